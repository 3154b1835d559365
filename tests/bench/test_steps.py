"""The bench of whole steps: its files, its rows of what failed, its order, its profile, and what it measures."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def steps(*arguments):
    command = [sys.executable, "-m", "bench.steps", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run of two models: (its process, {model: content of its file})."""
    folder = tmp_path_factory.mktemp("steps") / "results"
    ways = "packed,packed-triton,reference"
    done = steps(
        "--quick", "--device", "cpu", "--models", "vitl,vith_384", "--ways", ways, "--steps", 12, "--out", folder
    )
    assert done.returncode == 0, done.stderr
    files = {path.name.split("-")[1]: json.loads(path.read_text()) for path in folder.iterdir()}
    assert sorted(path.name[-11:] for path in folder.iterdir()) == ["-quick.json"] * 2
    return done, files


@pytest.fixture
def bench():
    """Imports a module of the bench folder."""
    return lambda name: importlib.import_module(f"bench.{name}")


def test_a_file_says_what_was_measured_and_that_it_is_quick(quick):
    for model, content in quick[1].items():
        assert content["complete"]
        assert content["quick"]
        assert content["model"] == f"vit_nano in place of {model}"
        assert content["command"] == (
            "python -m bench.steps --models vitl,vith_384 --ways packed,packed-triton,reference --steps 12 --quick "
            "--device cpu"
        )
        assert content["order"] == "in turns"
        assert content["draws"] >= 12
        assert content["flop_per_clip"] > 1e6
        assert str(ROOT) not in json.dumps(content)
    assert set(quick[1]) == {"vitl", "vith_384"}


def test_rows_have_figures_parity_and_what_ran(quick):
    for content in quick[1].values():
        packed, _, reference = content["rows"]
        for row in (packed, reference):
            assert row["value"] == pytest.approx(1e3 * content["batch"] / row["ms"])
            assert row["min"] <= row["value"] <= row["max"]
            assert row["p20"] <= row["value"] <= row["p80"]
            assert row["n"] == 12
            assert row["loss_first"] != row["loss_last"]
            assert row["mfu"] is row["peak_memory_gb"] is None  # of a GPU alone
            assert row["graphs_while_timed"] == 0
        assert packed["times_reference"] == pytest.approx(packed["value"] / reference["value"])
        assert packed["parity"]["with"] == "reference"
        assert packed["parity"]["steps"] == 19  # 5 of warm-up, 12 timed, the first of two turns
        assert 0 < packed["parity"]["largest"] < 1e-3
        assert packed["parity"]["within"]
        assert any(line.startswith("attention  sdpa") for line in packed["how"])
        assert any("the reference execution takes no others" in line for line in reference["how"])


def test_a_way_that_cannot_run_is_a_row_with_its_reason_and_the_others_go_on(quick):
    for content in quick[1].values():
        names = [row["name"] for row in content["rows"]]
        assert names == ["step packed", "step packed-triton", "step reference"]
        failed = content["rows"][1]
        assert "Triton needs a CUDA device" in failed["skipped"]
        assert "value" not in failed


def test_the_run_ends_with_a_table_a_model(quick):
    out = quick[0].stdout
    assert out.count("in turns; losses within 2% of each other over 20 steps") == 2
    assert out.count("\nreference   ") == 2
    assert "ValueError: runtime.kernels" in out
    assert "packed: compile    off: on a CPU it does not pay" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--models", "vitx"), "--models: expected some of vitl,vith,vith_384, given 'vitx'."),
        (("--ways", "packed,fast"), "--ways: expected some of packed,reference,"),
        (("--steps", 0), "--steps: expected at least 1, given 0."),
        (("--profile", "--ways", "packed,reference"), "--ways: expected one way beside --profile, given packed,"),
        (("--trace",), "--trace: expected beside --profile, given without it."),
    ],
)
def test_a_wrong_argument_is_one_sentence(arguments, sentence, tmp_path):
    done = steps("--device", "cpu", *arguments, "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(sentence)
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_what_is_measured_are_the_published_settings_with_the_batch_of_one_gpu(bench):
    ways = bench("steps.ways")
    for model, clips, crop in (("vitl", 24, 224), ("vith", 24, 224), ("vith_384", 10, 384)):
        found = {way: ways.settings_of(model, way, quick=False) for way in ways.WAYS}
        for s in found.values():
            assert (s.group, s.optim.global_batch, s.data.batch_size, s.data.crop) == (clips, clips, clips, crop)
            assert (s.model.predictor_depth, s.data.frames, s.optim.dtype) == (12, 16, "bfloat16")
            assert (s.optim.clip_grad, s.compat.clip_after_warmup) == (10.0, 0)
        assert found["packed"].runtime == type(found["packed"].runtime)()  # what a run has by default
        assert found["packed-triton"].runtime.kernels == "triton"
        fused = found["packed-fused"].runtime.kernels
        assert {fused["mlp"], fused["embed"]} == {"fused"}
        assert {name for piece, name in fused.items() if piece not in ("mlp", "embed")} == {"triton"}
        assert set(fused) == set(ways.PIECES)
        assert [found[way].runtime.execution for way in ("reference", "reference-compiled")] == ["reference"] * 2
        assert [found[way].runtime.compile for way in ("reference", "reference-compiled", "packed-eager")] == [
            False, True, False,
        ]  # fmt: skip


def test_draws_differ_and_are_the_same_for_every_way(bench):
    ways = bench("steps.ways")
    batches = ways.prepare(ways.settings_of("vitl", "packed", quick=True), 50, CPU)
    seen = {tuple(draw.context[0].flatten().tolist()) for draw in batches.draws}
    assert len(seen) > 45
    clips, draw = batches.at(51)
    assert clips is batches.clips[1]
    assert draw is batches.draws[1]
    assert clips.dtype == torch.uint8


def test_a_way_that_cannot_compile_here_is_planned_all_the_same(bench, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    ways = bench("steps.ways")
    settings = ways.settings_of("vitl", "reference-compiled", quick=True)
    assert ways.plan_of(settings, CPU).shape.compiled
    with pytest.raises(ValueError, match=r"runtime\.compile: expected auto or false on this machine"):
        ways.Runner(settings, CPU)


def test_whether_ways_fit_together_counts_every_state_and_the_largest_activations(bench):
    ways = bench("steps.ways")
    held = [dict.fromkeys(ways.STATE, 2.0) | {"activations": a, "input clips": 1.0} for a in (5.0, 7.0)]
    plans = [SimpleNamespace(held=one, state_bytes=2.0 * len(ways.STATE)) for one in held]
    needed = 2 * 2.0 * len(ways.STATE) + 8.0
    assert ways.fit_together(plans, needed)
    assert not ways.fit_together(plans, needed - 1)
    plan = ways.plan_of(ways.settings_of("vith", "packed", quick=False), CPU)
    assert 4.5e12 < plan.flop_per_clip < 4.8e12  # 4.644 TFLOP by hand


class Fake:
    """Stands for a way that is built; `faults` says at which of its steps it raises, by way."""

    faults: ClassVar = {}
    built: ClassVar = []

    def __init__(self, s, device):
        self.way = "reference" if s.runtime.execution == "reference" else "packed"
        Fake.built.append(self.way)
        self.device, self.how, self.losses = device, [f"how {self.way}"], []

    def step(self, batches):
        fault = Fake.faults.get((self.way, len(self.losses), Fake.built.count(self.way)))
        if isinstance(fault, Exception):
            raise fault
        self.losses.append(torch.tensor(0.5 if fault is None else fault))


@pytest.fixture
def measured(bench, monkeypatch, tmp_path):
    """Measures packed and reference with stand-ins: (rows, the bench)."""
    rounds, rows, ways = bench("steps.rounds"), bench("steps.rows"), bench("steps.ways")
    monkeypatch.setattr(rounds, "Runner", Fake)
    settings = {way: ways.settings_of("vitl", way, quick=True) for way in ("packed", "reference")}
    plans = {
        way: SimpleNamespace(held=dict.fromkeys(ways.STATE, 1.0), state_bytes=5.0, batch_size=4, flop_per_clip=1e11)
        for way in settings
    }

    def go(faults=None, usable=1e9, seconds=float("inf")):
        monkeypatch.setattr(Fake, "faults", faults or {})
        monkeypatch.setattr(Fake, "built", [])
        monkeypatch.setattr(rounds, "usable_memory", lambda device: usable)
        header = {"model": "m", "batch": 4, "device": "d", "peak_flops": None}
        one = rows.Bench(tmp_path / "r.json", header, settings, plans, None, CPU, 25, seconds)
        rounds.measure_model(one)
        content = json.loads((tmp_path / "r.json").read_text())
        assert content["complete"]
        return content, one

    return go


def test_ways_that_do_not_fit_together_follow_one_another_and_the_first_comes_again(measured):
    content, _ = measured(usable=1.0)
    assert content["order"].startswith("one after another")
    assert Fake.built == ["packed", "reference", "packed"]
    assert [row["name"] for row in content["rows"]] == ["step packed", "step reference", "step packed, again"]
    assert content["rows"][2]["times_first"] > 0
    assert content["rows"][2]["n"] == 25


def test_a_way_that_lacks_memory_beside_the_others_tries_by_itself(measured):
    content, _ = measured({("packed", 2, 1): torch.OutOfMemoryError("no room")})
    assert Fake.built == ["packed", "reference", "packed"]
    assert content["order"] == "in turns; by itself: packed"
    assert {row["name"]: row["n"] for row in content["rows"]} == {"step reference": 25, "step packed": 25}


def test_one_that_lacks_memory_even_so_is_a_row_with_the_reason(measured):
    error = torch.OutOfMemoryError("no room")
    content, _ = measured({("packed", 2, 1): error, ("packed", 2, 2): error})
    rows = {row["name"]: row for row in content["rows"]}
    assert rows["step packed"]["skipped"] == "OutOfMemoryError: no room"
    assert rows["step reference"]["n"] == 25


@pytest.mark.parametrize("step", [0, 9])
def test_a_kernel_that_does_not_compile_is_a_row_with_the_reason(measured, bench, step):
    error = bench("steps.rounds").TritonError("out of resource: shared memory")
    content, one = measured({("packed", step, 1): error})
    rows = {row["name"]: row for row in content["rows"]}
    assert "out of resource" in rows["step packed"]["skipped"]
    assert rows["step reference"]["n"] == 25
    assert "out of resource" in one.table()


def test_a_loss_that_is_not_finite_is_no_figure(measured):
    content, _ = measured({("packed", 7, 1): float("nan")})
    assert content["rows"][0]["skipped"] == "ValueError: the loss of step 7 is not finite"


def test_losses_that_differ_are_told_and_count(measured):
    content, one = measured({("packed", 19, 1): 0.52})
    assert not content["rows"][0]["parity"]["within"]
    assert content["rows"][0]["parity"]["largest"] == pytest.approx(0.04)
    assert not one.agree()
    assert "TOO FAR" in one.table()
    _, later = measured({("packed", 20, 1): 0.52})
    assert later.agree()  # beyond the steps that are compared, rounding has grown


def test_a_device_that_failed_ends_the_run_with_its_reason_in_the_file(measured, tmp_path):
    with pytest.raises(torch.AcceleratorError):
        measured({("reference", 3, 1): torch.AcceleratorError("illegal memory access")})
    content = json.loads((tmp_path / "r.json").read_text())
    assert not content["complete"]
    assert content["rows"][0]["skipped"] == "AcceleratorError: illegal memory access"


def test_a_mistake_of_our_own_is_no_row(measured):
    with pytest.raises(KeyError):
        measured({("packed", 3, 1): KeyError("typing error")})


def test_the_reason_of_a_compiler_is_more_than_its_first_line(measured):
    error = RuntimeError("backend='inductor' raised:\n\nCompilationError: no such type\nat line 3\nmore")
    content, _ = measured({("packed", 0, 1): error})
    reason = content["rows"][0]["skipped"]
    assert reason == "RuntimeError: backend='inductor' raised: CompilationError: no such type at line 3"


def test_steps_on_a_gpu_are_timed_by_its_clock_without_a_wait_between(bench, monkeypatch):
    """Stand-ins for CUDA: a clock that steps move, and numbers of the allocator."""
    now, waits = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, other):
            return other.at - self.at

    class Runner:
        device, taken = SimpleNamespace(type="cuda"), 0

        def step(self, batches):
            self.taken += 1
            now[0] += 100 if self.taken == 1 else 7
            assert not waits

    for name, value in {"memory_allocated": 100, "max_memory_allocated": 350, "reset_peak_memory_stats": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    runner = Runner()
    assert bench("steps.rounds").time_steps(runner, None, 4) == ([7] * 4, 250)
    assert (runner.taken, len(waits)) == (5, 1)
    waits.clear()
    marks, more = bench("steps.profile").Marks(runner.device), []
    for milliseconds in (3, 5):
        with marks.part("step"):
            for _ in range(2):
                with marks.part("context"):
                    now[0] += milliseconds
            more.append(len(waits))
    assert marks.steps() == [{"context": 6, "step": 6}, {"context": 10, "step": 10}]
    assert more == [0, 0]


def test_figures_of_a_gpu(measured, bench):
    """MFU by the work of the plan, and memory."""
    _, one = measured()
    figures = bench("steps.rows").Figures(ms=[200.0, 200.0], losses=[0.5, 0.5], peak_bytes=3e9)
    one.header["peak_flops"], one.device = 4e12, SimpleNamespace(type="cuda")
    one.found["packed"] = figures
    row = one.row("packed", figures)
    assert (row["value"], row["mfu"], row["peak_memory_gb"]) == (20.0, 0.5, 3.0)  # 4 clips in 0.2 s
    assert "50.0%" in one.table()


def test_what_the_time_does_not_allow_is_said(measured):
    content, _ = measured(seconds=0.0)
    assert {row["skipped"] for row in content["rows"]} == {"no time was left of --budget"}
    assert Fake.built == []


def test_losses_that_differ_end_the_command_with_1(bench, monkeypatch, tmp_path, capsys):
    main, rounds = bench("steps.__main__").main, bench("steps.rounds")

    class Tampered(rounds.Runner):
        def forward(self, batches):
            loss = super().forward(batches)
            return loss * 1.05 if self.jepa.execution == "packed" else loss

    monkeypatch.setattr(rounds, "Runner", Tampered)
    arguments = ["--quick", "--device", "cpu", "--models", "vitl", "--ways", "packed,reference", "--steps", "2"]
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    assert "differ by more than rounding explains" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["packed", "reference"])
def test_a_profile_names_components_and_the_most_expensive_operators(tmp_path, way):
    done = steps(
        "--quick", "--device", "cpu", "--models", "vith", "--ways", way, "--profile", "--trace", "--out", tmp_path
    )
    assert done.returncode == 0, done.stderr
    text, trace = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert text.name.startswith(f"profile-vith-{way}-cpu-")
    lines = text.read_text().splitlines()
    assert lines[0] == f"vith, {way} (vit_nano in place of it)"
    start = next(number for number, line in enumerate(lines) if line.startswith("component"))
    parts = {line.split()[0]: float(line.split()[1]) for line in lines[start + 1 : start + 8]}
    assert list(parts) == ["target", "context", "predictor", "loss", "backward", "optimizer", "step"]
    assert min(parts.values()) > 0
    assert sum(parts.values()) - parts["step"] == pytest.approx(parts["step"], rel=0.35)  # medians, a busy machine
    costs = [float(line.split()[0]) for line in lines[start + 11 :]]
    assert len(costs) == 30
    assert costs == sorted(costs, reverse=True)
    events = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"target", "context", "predictor", "backward", "optimizer", "step"} <= events


def test_the_gpu_script_times_and_profiles(tmp_path):
    more = {"PYTHON": sys.executable, "OUT": str(tmp_path), "STEP_ARGS": "--quick --device cpu --ways packed --steps 2"}
    command = ["bash", "bench/gpu.sh", "step", "profile"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **more}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[-3:]]
    assert [(row[0], row[2]) for row in rows if len(row) == 4] == [("step", "ok"), ("profile", "ok")]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.partition("-cpu-")[0] for name in names] == ["profile-vith-packed", "steps-vith", "steps-vitl"]
    assert all(name in done.stdout for name in names)


@pytest.mark.gpu
def test_a_quick_run_on_cuda_has_figures_for_every_way(tmp_path):
    done = steps("--quick", "--models", "vitl", "--steps", 12, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 6
    for row in rows:
        assert "skipped" not in row, row
        assert row["peak_memory_gb"] > 0
        assert row["graphs_while_timed"] == 0, row


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["packed", "packed-triton"])
def test_a_profile_on_cuda_names_kernels(tmp_path, way):
    done = steps("--quick", "--models", "vitl", "--ways", way, "--profile", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    assert "kernels: " in text
    assert "aten::" not in text.partition("most expensive")[2]
