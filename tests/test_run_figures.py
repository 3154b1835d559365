"""What a run says of itself: the loss ratio, the plan, and a probe that could not be made."""

import json

import pytest

from fastjepa.exits import Exit


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_ratio_is_that_of_the_prediction_alone(run):
    """The regulariser is no part of what the trivial prediction is compared with."""
    plain, regular = (rows(run(f"loss.reg_coeff={weight}", "runtime.stop_at=1")[1])[0] for weight in (0.0, 0.5))
    assert regular["loss"] > plain["loss"] + 0.1
    assert regular["loss_ratio"] == pytest.approx(plain["loss_ratio"], rel=1e-6)


def test_clips_of_a_single_video_say_nothing_about_the_trivial_loss(run):
    _, folder = run("data.clips_per_video=4", "mask.group=1", "runtime.stop_at=2")
    assert [row["loss_ratio"] for row in rows(folder)] == [None, None]
    _, folder = run("data.clips_per_video=2", "mask.group=1", "runtime.stop_at=2")
    assert all(row["loss_ratio"] > 0 for row in rows(folder))


def test_a_probe_that_has_no_disk_left_does_not_end_the_training(run, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastjepa.loop.run_probe", full)
    code, folder = run("eval.every=2", "eval.probe=linear")
    assert code == Exit.DONE
    assert len(rows(folder)) == 10
    assert capsys.readouterr().out.count("no probe: [Errno 28] No space left on device") == 5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model={name: vit_nano, predictor_depth: 1, predictor_dim: 16, targets: noised, noise: linear}",
         "targets: noised, noise: linear"),
        ("data.motion_shift=true", "at stride 1; the crop moves"),
        ("data.auto_augment=true", "at stride 1; RandAugment"),
        ("data.erase=0.25", "at stride 1; a box is erased in 25% of the clips"),
    ],
)  # fmt: skip
def test_the_plan_names_what_changes_the_task(run, capsys, override, words):
    run(override, "runtime.stop_at=1")
    assert words in capsys.readouterr().out
