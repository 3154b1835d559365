"""Health in runs of several clip lengths: figures of one length all along, and its own loss against its trivial one."""

import json
import math

import pytest
import torch

from fastjepa import health
from fastjepa.config import Settings
from fastjepa.data.batches import Batch, MixedBatch
from fastjepa.jepa import JEPAOutput
from fastjepa.log import read_metrics
from fastjepa.looking import Looking
from fastjepa.masks import TargetUnion
from fastjepa.pictures import Wanted, draw
from fastjepa.reporting import console_line

FILMS = "synthetic://moving-shapes?videos=48&size=48&frames=8"
MORE = "synthetic://moving-shapes?videos=48&size=48&frames=8&seed=1"
MIXED = {FILMS: {"weight": 3, "frames": 4}, MORE: {"frames": 2}}
SMALL = (f"data.path={json.dumps(MIXED)}", "optim.global_batch=8", "optim.steps=6", "mask.group=4")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("weights", "usual"), [({2: 3, 4: 1, 8: 2}, 2), ({2: 1, 4: 1, 8: 1}, 8), ({1: 3, 4: 2, 8: 1}, 2)]
)
def test_the_usual_length_is_that_of_most_clips(weights, usual):
    path = {f"{frames}": {"weight": weight, "frames": frames} for frames, weight in weights.items()}
    assert Settings.model_validate({"data": {"path": path, "frames": 8}}).data.usual_length == usual


def test_the_weights_of_data_sets_of_one_length_add_up():
    path = {"a": {"frames": 4}, "b": {"frames": 4}, "c": {"weight": 1.5}}
    assert Settings.model_validate({"data": {"path": path, "frames": 8}}).data.usual_length == 4


def batch(clips):
    """What a step gets, and gives, of `clips` {frames: number}: errors and features tell which they are."""
    empty = torch.empty(0, dtype=torch.int64)
    groups = [
        Batch(torch.empty(n, 3, frames, 1, 1), [], [], TargetUnion(empty, []), tuple(range(n)), [], [])
        for frames, n in clips.items()
    ]
    seeds = [torch.Generator().manual_seed(frames) for frames in clips]
    features = [torch.randn(n, 4 * frames, 6, generator=g) for (frames, n), g in zip(clips.items(), seeds)]
    errors = [torch.tensor(float(100 * frames + n)) for frames, n in clips.items()]
    out = JEPAOutput(torch.tensor(0.0), torch.tensor(0.0), predictions=[[2 * one] for one in features])
    out.every_target, out.losses_jepa = features, errors
    return MixedBatch(groups, (1.0,) * len(groups)), out


def looking(frames=8, **path):
    path = path or {"a": {"weight": 3}, "b": {"frames": 2}}
    return Looking(Settings.model_validate({"data": {"path": path, "frames": frames}}), 1, CPU)


def test_of_several_lengths_the_usual_one_counts_in_the_batch_with_most_of_it():
    look, batches = looking(), [batch({2: 9, 8: 3}), batch({2: 1, 8: 4}), batch({8: 2}), batch({2: 5})]
    assert all(look.at(last) for last in (False, True))
    for one in batches:
        look.take(*one)
    found, compared = look.measured()
    assert compared.item() == 804
    expected = health.measure(batches[1][1].every_target[1], batches[1][1].predictions[1], 1.0)
    assert vars(found) == vars(expected)


def test_a_step_without_a_clip_of_the_usual_length_has_no_figures():
    look = looking()
    look.take(*batch({2: 5}))
    found, compared = look.measured()
    assert compared is None
    assert found.trivial_loss == 0
    assert all(math.isnan(value) for key, value in vars(found).items() if key != "trivial_loss")


def test_of_one_length_the_last_batch_counts_and_the_loss_of_the_step():
    look = looking(a=1.0)
    assert [look.at(last) for last in (False, True)] == [False, True]


def test_the_health_of_a_run_is_that_of_its_usual_length(run, monkeypatch):
    seen, measure = [], health.measure

    def spied(targets, predictions, *more):
        found = measure(targets, predictions, *more)
        seen.append((len(targets), targets.shape[1], found.trivial_loss.item(), [len(p) for p in predictions]))
        return found

    monkeypatch.setattr(health, "measure", spied)
    _, folder = run(*SMALL, "data.batch_size=2")
    rows = read_metrics(folder)
    assert len(seen) == len(rows) == 6
    # Of four batches of two clips of a step one has two of four frames, nearly always.
    assert {tokens for _, tokens, *_ in seen} == {32}
    assert sum(clips == 2 for clips, *_ in seen) >= 5
    ratios = [row["loss_ratio"] for row in rows if row["loss_ratio"] is not None]
    assert len(ratios) >= 5
    assert all(0.3 < ratio < 3 for ratio in ratios)


def test_the_ratio_is_that_of_the_loss_of_these_clips_alone(run, monkeypatch):
    """Losses of the other length are made ten times as large: they must not show."""
    taken = []
    original = Looking.take

    def marked(self, one, out):
        out.losses_jepa = [
            loss * (1 if group.clips.shape[2] == 4 else 10) for group, loss in zip(one.groups, out.losses_jepa)
        ]
        taken.append({group.clips.shape[2]: loss.item() for group, loss in zip(one.groups, out.losses_jepa)})
        original(self, one, out)

    monkeypatch.setattr(Looking, "take", marked)
    trivial, measure = [], health.measure

    def spied(*given):
        trivial.append(measure(*given))
        return trivial[-1]

    monkeypatch.setattr(health, "measure", spied)
    _, folder = run(*SMALL, "data.batch_size=8")
    rows = read_metrics(folder)
    for row, losses, found in zip(rows, taken, trivial, strict=True):
        assert row["loss_ratio"] == pytest.approx(losses[4] / found.trivial_loss.item())


def test_a_row_without_figures_is_written_and_told_without_them(run, monkeypatch):
    monkeypatch.setattr(Looking, "take", lambda self, one, out: None)
    _, folder = run(*SMALL)
    rows = read_metrics(folder)
    assert [(row["rank"], row["loss_ratio"], row["content"]) for row in rows] == [(None, None, None)] * 6
    nan = dict.fromkeys(("rank", "content"), math.nan)
    line = console_line({**rows[-1], **nan}, 6, None)
    assert "rank" not in line
    assert "nan" not in line


def test_pictures_of_a_mixed_run_are_drawn_of_its_own_videos_and_of_others(run, tmp_path):
    _, folder = run(*SMALL)
    for number, data in enumerate((None, MORE)):
        drawn = draw(folder, out=tmp_path / str(number), data=data, wanted=Wanted(clips=4))
        assert not [note for note in drawn.notes if "no pictures" in note]
        assert {"masks.png", "clips.png"} <= {path.name for path in drawn.files}
