"""Whole runs of a tiny model on tiny videos: what comes out, how they end, and that nothing is lost on the way."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastjepa import checkpoint, configfile
from fastjepa.exits import Exit
from fastjepa.start import start

ROOT = Path(__file__).parents[1]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[str]:
    """Exact losses, as hexadecimal floats; every step must be there once."""
    found = rows(folder)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [row["loss"].hex() for row in found]


def launch(recipe, folder, *overrides):
    command = [sys.executable, "-m", "fastjepa.train", str(recipe), f"log.folder={folder}", *overrides]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[1]
    )


def wait_for_rows(process, folder, count):
    """Wait until a run has logged this many steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        files = list(folder.glob("tiny-*/metrics.jsonl"))
        if files and files[0].read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    raise AssertionError("the run did not log in time")


def test_a_run_leaves_what_the_documentation_draws(run):
    code, folder = run("log.images=true", "eval.probe=auto")
    assert code == Exit.DONE
    assert re.fullmatch(r"tiny-[0-9a-f]{6}", folder.name)
    names = {p.name for p in folder.iterdir()}
    assert {"config.yaml", "command.txt", "env.json", "metrics.jsonl", "train.log", "status.json"} <= names
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"step-0000009", "step-0000010", "latest"}
    viz = {p.name for p in (folder / "viz").iterdir()}
    assert viz == {
        "clips.png",
        "curves.png",
        "index.html",
        "loss.png",
        "masks.png",
        "pca.png",
        "pca.webp",
        "similarity.png",
    }
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    found = rows(folder)
    wanted = {"step", "loss", "loss_ratio", "lr", "momentum", "grad_norm", "clips_per_s", "data_wait", "rank"}
    assert all(wanted <= set(row) for row in found)
    probe = json.loads((folder / "probe" / "step-0000010.json").read_text())
    assert {r["task"] for r in probe["results"]} == {"motion", "shape"}


def test_a_finished_run_says_so_and_does_nothing(run, capsys):
    _, folder = run()
    before = (folder / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    code, again = run()
    assert (code, again) == (Exit.DONE, folder)
    assert "has its 10 steps" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_killed_run_continues_bitwise(run, recipe, tmp_path, workers):
    _, whole = run(folder="whole")
    folder = tmp_path / f"killed{workers}"
    for rows_seen in (2, 5):
        process = launch(recipe, folder, f"data.workers={workers}")
        wait_for_rows(process, folder, rows_seen)
        process.send_signal(signal.SIGKILL)
        process.wait()
    code, killed = run(f"data.workers={workers}", folder=folder.name)
    assert code == Exit.DONE
    assert losses(killed) == losses(whole)


@pytest.mark.parametrize("overrides", [("model.targets=noised", "model.noise=linear"), ("data.batch_size=2",)])
def test_stopping_early_and_going_on_equals_one_run(run, overrides):
    _, whole = run(*overrides, folder="whole")
    for stop_at in (1, 4, 7):
        code, parts = run(*overrides, f"runtime.stop_at={stop_at}", folder="parts")
        assert code == Exit.DONE
        assert rows(parts)[-1]["step"] == stop_at
    _, parts = run(*overrides, folder="parts")
    assert losses(parts) == losses(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_leaves(run, recipe, tmp_path, number):
    _, whole = run(folder="whole")
    folder = tmp_path / "stopped"
    process = launch(recipe, folder, "data.workers=1", "checkpoint.every=1000")
    wait_for_rows(process, folder, 3)
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == Exit.SAVED_AFTER_SIGNAL, output
    assert signal.Signals(number).name in output
    stopped = next(folder.glob("tiny-*"))
    step = checkpoint.newest(stopped / "checkpoints", print).step
    assert json.loads((stopped / "status.json").read_text())["state"] == "stopped"
    assert rows(stopped)[-1]["step"] == step
    run(folder="stopped")
    assert losses(stopped) == losses(whole)


def test_a_signal_inside_a_step_drops_only_that_step(run, monkeypatch):
    """With 128 batches a step nobody wants to wait for the end of one."""
    from fastjepa.jepa import JEPA

    _, whole = run("data.batch_size=1", folder="whole")
    forward, calls = JEPA.forward, []

    def forward_and_interrupt(self, *arguments, **more):
        calls.append(1)
        if len(calls) == 4 * 5 + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *arguments, **more)

    monkeypatch.setattr(JEPA, "forward", forward_and_interrupt)
    code, parts = run("data.batch_size=1", folder="parts")
    assert code == Exit.SAVED_AFTER_SIGNAL
    assert checkpoint.newest(parts / "checkpoints", print).step == 5
    assert len(calls) == 4 * 5 + 2
    code, parts = run("data.batch_size=1", folder="parts")
    assert code == Exit.DONE
    assert losses(parts) == losses(whole)


def test_the_console_says_which_decoder_and_why(run, capsys):
    run("runtime.stop_at=1")
    assert "decoder    pyav (not dali_gpu: there is no GPU to decode on)" in capsys.readouterr().out
    run("runtime.stop_at=1", "data.decoder=pyav", folder="asked")
    assert "decoder    pyav (asked for)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings", [(), ("model.targets=noised", "model.noise=linear")], ids=["mask_tokens", "noised"]
)
def test_accumulation_changes_nothing_but_rounding(run, settings):
    _, whole = run(*settings, folder="whole")
    _, halves = run(*settings, "data.batch_size=2", folder="halves")
    _, singles = run(*settings, "data.batch_size=1", folder="singles")
    for one, two, three in zip(rows(whole), rows(halves), rows(singles)):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-5)
        assert one["loss"] == pytest.approx(three["loss"], rel=2e-5)


def test_settings_without_effect_on_results_share_the_run(run):
    _, first = run("runtime.stop_at=2")
    _, second = run("runtime.stop_at=4", "checkpoint.keep=3", "runtime.execution=reference", "log.every=2")
    assert first == second


def test_a_changed_result_setting_is_a_new_run_and_is_refused_on_an_explicit_resume(run, capsys):
    _, first = run("runtime.stop_at=2")
    _, second = run("runtime.stop_at=2", "optim.lr=2e-3")
    assert first != second
    assert f"resume={first} continues it" in capsys.readouterr().out
    code, _ = run("optim.lr=2e-3", f"resume={first}")
    assert code == Exit.WRONG_INPUT
    assert "optim.lr: 0.001 -> 0.002" in capsys.readouterr().err
    code, _ = run(f"resume={first}", "runtime.stop_at=3")
    assert code == Exit.DONE
    assert rows(first)[-1]["step"] == 3


def test_never_starts_a_run_of_its_own(run):
    _, first = run("runtime.stop_at=2")
    _, second = run("runtime.stop_at=2", "resume=never")
    assert second.name == f"{first.name}-2"
    assert losses(second) == losses(first)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_float32(run, dtype):
    _, full = run("runtime.stop_at=4", folder="full")
    code, half = run("runtime.stop_at=4", f"optim.dtype={dtype}", folder="half")
    assert code == Exit.DONE
    assert rows(half)[-1]["skipped"] == 0
    for exact, rounded in zip(rows(full), rows(half)):
        assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.02)


def test_float16_continues_with_its_loss_scale(run):
    _, whole = run("optim.dtype=float16", folder="whole")
    run("optim.dtype=float16", "runtime.stop_at=4", folder="parts")
    _, parts = run("optim.dtype=float16", folder="parts")
    assert losses(parts) == losses(whole)


@pytest.mark.parametrize("truncation", ["group", "none"])
def test_every_truncation_trains(run, truncation):
    code, folder = run(f"mask.truncation={truncation}", "mask.group=2", "runtime.stop_at=3")
    assert code == Exit.DONE
    assert len(losses(folder)) == 3


def test_a_run_that_is_not_finite_stops_and_keeps_its_weights(run, capsys):
    code, folder = run("optim.lr=1e30", "optim.start_lr=1e30", "optim.warmup_steps=0", "optim.clip_grad=null")
    assert code == Exit.NON_FINITE
    assert "not finite" in capsys.readouterr().out
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    assert rows(folder)[-1]["skipped"] >= 3
    assert rows(folder)[-1]["loss"] is None


def test_unreadable_files_are_named_once_and_counted(run, tmp_path, capsys):
    videos = tmp_path / "videos"
    _copy_videos(videos, good=3, bad=4)
    code, folder = run(f"data.path={videos}", "data.workers=1")
    out = capsys.readouterr().out
    assert code == Exit.DONE
    listed = [json.loads(line) for line in (folder / "bad_files.jsonl").read_text().splitlines()]
    assert sorted(Path(entry["path"]).name for entry in listed) == [f"bad{i}.mp4" for i in range(4)]
    assert all(entry["reason"] for entry in listed)
    for i in range(4):
        assert len(re.findall(rf"bad file .*bad{i}\.mp4", out)) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_files_end_the_run(run, tmp_path, capsys, workers):
    videos = tmp_path / "videos"
    _copy_videos(videos, good=2, bad=12)
    code, _ = run(f"data.path={videos}", f"data.workers={workers}", "optim.global_batch=8", "mask.group=8")
    assert code == Exit.TOO_MANY_BAD_FILES
    assert "data.max_bad_fraction" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_file_ends_the_run(run, tmp_path, capsys, workers):
    videos = tmp_path / "videos"
    _copy_videos(videos, good=0, bad=3)
    code, _ = run(f"data.path={videos}", f"data.workers={workers}", "data.max_bad_fraction=1.0")
    assert code == Exit.TOO_MANY_BAD_FILES
    assert "none of the 3 files can be read" in capsys.readouterr().out


def test_a_wrong_path_is_one_sentence(run, capsys):
    code, folder = run("data.path=/nowhere/at/all")
    assert (code, folder) == (Exit.WRONG_INPUT, None)
    error = capsys.readouterr().err
    assert "data.path" in error
    assert error.count("\n") == 1


def test_impossible_masks_are_refused_before_any_work(run, capsys):
    code, folder = run("mask.sets.0.spatial_scale=[1.0, 1.0]", "mask.sets.0.temporal_scale=[1.0, 1.0]")
    assert (code, folder) == (Exit.WRONG_INPUT, None)
    assert "leave no context" in capsys.readouterr().err


def test_checkpoints_that_cannot_be_written_end_the_run_loudly(run, monkeypatch, capsys):
    def full(*_, **more):
        raise checkpoint.SaveFailed("no space left on device")

    monkeypatch.setattr("fastjepa.checkpoint.saver.write", full)
    code, _ = run("checkpoint.every=1")
    assert code == Exit.FAILED
    assert capsys.readouterr().out.count("no space left on device") == 3


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(run, capsys):
    _, whole = run(folder="whole")
    _, parts = run("runtime.stop_at=7", folder="parts")
    shard = next((parts / "checkpoints" / "step-0000007").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    _, parts = run(folder="parts")
    assert "put aside as corrupt-step-0000007" in capsys.readouterr().out
    assert losses(parts) == losses(whole)


def test_online_probe_every_few_steps_changes_no_loss(run):
    _, plain = run(folder="plain")
    _, probed = run("eval.every=4", "eval.probe=linear", folder="probed")
    assert losses(probed) == losses(plain)
    assert [p.name for p in sorted((probed / "probe").glob("step-*"))] == [
        "step-0000004.json", "step-0000008.json", "step-0000010.json",
    ]  # fmt: skip


def test_several_processes_are_refused_instead_of_training_side_by_side(run, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, folder = run()
    assert (code, folder) == (Exit.WRONG_INPUT, None)
    assert "WORLD_SIZE" in capsys.readouterr().err


def test_deterministic_setting_reaches_torch(run):
    import torch

    try:
        code, _ = run("runtime.deterministic=true", "runtime.stop_at=2")
        assert code == Exit.DONE
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_real_clips_train_and_exactly_the_unreadable_ones_are_listed(shared, tmp_path):
    demo = Path(__file__).parents[1] / "configs" / "demo.yaml"
    overrides = ["data.max_bad_fraction=0.9", "runtime.stop_at=20", f"log.folder={tmp_path}"]
    settings = configfile.load(demo, [f"data.path={shared / 'clips'}", *overrides])
    assert start(settings, "demo") == Exit.DONE
    folder = next(tmp_path.glob("demo-*"))
    listed = [json.loads(line)["path"] for line in (folder / "bad_files.jsonl").read_text().splitlines()]
    assert sorted(os.path.relpath(path, shared / "clips") for path in listed) == [
        "bad/audio_only.mp4",
        "bad/random_bytes.mp4",
        "bad/single_frame.mp4",
        "bad/text_renamed.mp4",
        "bad/truncated_header.mp4",
        "bad/zero_bytes.mp4",
        "tfio_audio_only.mp4",
    ]


def _copy_videos(folder: Path, good: int, bad: int) -> None:
    from fastjepa.data.synthetic import MovingShapes, materialise, video_names

    spec = MovingShapes.from_url("synthetic://moving-shapes?videos=48&size=48&frames=8")
    source = materialise(spec)
    folder.mkdir()
    for i, name in zip(range(good), video_names(spec)):
        (folder / f"good{i}.mp4").write_bytes((source / name).read_bytes())
    for i in range(bad):
        (folder / f"bad{i}.mp4").write_bytes(b"not a video" * 100)


def test_float16_may_overflow_while_it_looks_for_its_loss_scale(run, monkeypatch):
    """Four skipped steps are how the scaler works, not a run that is not finite."""
    import torch

    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: scaler(device, init_scale=2.0**25))
    code, folder = run("optim.dtype=float16", "optim.clip_grad=null")
    assert code == Exit.DONE
    assert rows(folder)[-1]["skipped"] >= 3


def test_a_signal_to_the_whole_group_ends_no_worker_before_the_save(run, recipe, tmp_path, monkeypatch):
    """SLURM and systemd signal every process: a worker that died of it would end the save half-way."""
    _, whole = run(folder="whole")
    folder = tmp_path / "stopped"
    slow = "import time, fastjepa.checkpoint as c, fastjepa.data.loader as l; l.SECONDS_TO_SAVE = 1; save = c.save\n"
    slow += (
        "c.save = lambda *a: (time.sleep(3), save(*a))[1]\nfrom fastjepa.train import main; raise SystemExit(main())"
    )
    command = [
        sys.executable,
        "-c",
        slow,
        str(recipe),
        f"log.folder={folder}",
        "data.workers=2",
        "checkpoint.every=1000",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True
    )
    wait_for_rows(process, folder, 3)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == Exit.SAVED_AFTER_SIGNAL, output
    run(folder="stopped")
    assert losses(next(folder.glob("tiny-*"))) == losses(whole)


def test_stop_at_before_the_resumed_step_changes_nothing(run, capsys):
    _, folder = run("runtime.stop_at=7")
    before = (folder / "metrics.jsonl").read_bytes()
    (folder / "status.json").unlink()
    capsys.readouterr()
    code, _ = run("runtime.stop_at=4")
    assert code == Exit.DONE
    assert "at step 7 already" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert not (folder / "probe").exists()


def test_an_automatic_batch_size_is_kept_for_the_resume(run, monkeypatch):
    from fastjepa import start

    _, whole = run("data.batch_size=auto", folder="whole")
    run("data.batch_size=auto", "runtime.stop_at=4", folder="parts")
    monkeypatch.setattr(start, "usable_memory", lambda device: 0.0)  # a machine with less room would choose 1
    _, parts = run("data.batch_size=auto", folder="parts")
    assert losses(parts) == losses(whole)


def test_a_failure_that_nobody_expects_is_one_sentence_with_details_in_the_log(run, monkeypatch, capsys):
    from fastjepa.jepa import JEPA

    def fail(*_, **__):
        raise RuntimeError("CUDA out of memory\nand many lines")

    monkeypatch.setattr(JEPA, "forward", fail)
    code, folder = run()
    assert code == Exit.FAILED
    assert "failed     CUDA out of memory (details in" in capsys.readouterr().out
    assert "Traceback" in (folder / "train.log").read_text()
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("truncation", ["group", "random", "none"])
def test_both_executions_take_the_same_noise_and_give_the_same_losses(run, truncation):
    settings = ("model.targets=noised", "model.noise=linear", f"mask.truncation={truncation}", "mask.group=2")
    _, packed = run(*settings, "runtime.stop_at=4", folder="packed")
    _, reference = run(*settings, "runtime.stop_at=4", "runtime.execution=reference", folder="reference")
    for one, other in zip(rows(packed), rows(reference), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-5)
