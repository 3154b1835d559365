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


def test_every_row_has_all_figures_of_health_and_the_verdict(run):
    _, folder = run("optim.steps=4")
    for row in rows(folder):
        assert row["content"] == pytest.approx(row["loss"] / row["loss_ratio"], rel=1e-4), "of an L1 loss"
        assert row["grad_norm"] == pytest.approx(
            (row["grad_norm_encoder"] ** 2 + row["grad_norm_predictor"] ** 2) ** 0.5, rel=1e-4
        )
        assert 0 < row["feature_std"] < 1 < row["rank"] < 64
        assert 1 <= row["pooled_rank"] <= 3 + 1e-3
        assert 0 < row["pooled_cosine"] < 1
        assert 0 < row["norm_ratio"] < 1
        assert row["verdict"] == "early"
    distances = [row["ema_distance"] for row in rows(folder)]
    assert distances[0] == 0, "before the first step both are the same"
    assert 0 < distances[1] < distances[3] < 0.5
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["verdict"]) == ("done", "early")
    assert status["verdict_text"].startswith("too early to tell")


def test_steps_that_are_not_finite_have_diverged(run):
    """Though no row has been logged since."""
    code, folder = run("optim.lr=100", "optim.steps=40", "optim.clip_grad=null", "log.every=40")
    assert code == Exit.NON_FINITE
    assert json.loads((folder / "status.json").read_text())["verdict"] == "diverged"


def test_a_look_changes_nothing_that_is_learnt(run):
    """Whichever steps are logged."""
    often, rarely = (run(f"log.every={every}", folder=f"every-{every}")[1] for every in (1, 10))
    assert rows(often)[-1]["loss"] == rows(rarely)[-1]["loss"]
    assert rows(often)[-1]["grad_norm"] == rows(rarely)[-1]["grad_norm"]


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
