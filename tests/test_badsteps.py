"""Steps that are not finite: nothing changes, their videos are named, and after some in a row it is enough."""

import json
import math

import numpy as np
import pytest
import torch

from fastjepa import badsteps
from fastjepa.badsteps import BadSteps, file_names
from fastjepa.data.order import Collection, VideoOrder
from fastjepa.optim import OptimizerPass, StepNorms
from fastjepa.schedules import Schedule
from tests.small_jepa import clips, make, masks

SCHEDULE = Schedule(1000, 100, 1e-3, 1e-3, 1e-6, 0.04, 0.4, 0.9, 1.0)
GOOD, LOSS, GRADIENT, ELSEWHERE = "good", "loss", "gradient", "elsewhere"


def names(slots):
    return [f"{slot}.mp4" for slot in slots]


@pytest.fixture
def said():
    return []


@pytest.fixture
def open_steps(tmp_path, said):
    def go(most=3, **options):
        return BadSteps(tmp_path / "bad_steps.jsonl", most, names, said.append, **options)

    return go


def listed(tmp_path):
    path = tmp_path / "bad_steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def note(steps, step, kind):
    """A step of two micro-batches of two clips."""
    losses = [torch.tensor(0.5), torch.tensor(math.nan if kind == LOSS else 0.25)]
    loss = torch.tensor({LOSS: math.nan, ELSEWHERE: math.inf}.get(kind, 0.375))
    bad = torch.tensor(float(kind != GOOD))
    norm = torch.tensor(math.inf if kind == GRADIENT else 2.0)
    first = 4 * (step - 1)
    slots = [(first, first + 1), (first + 2, first + 3)]
    steps.note(step, slots, losses, loss, StepNorms(norm, torch.tensor(1.0), norm, bad))


def follow(steps, kinds, first=1):
    """Numbers of the steps after which the run is to be ended."""
    ends = []
    for step, kind in enumerate(kinds, start=first):
        note(steps, step, kind)
        if steps.check():
            ends.append(step)
    return ends


# Real steps of a small JEPA


@pytest.mark.parametrize("where", ["loss", "gradient", "clip"])
def test_a_bad_step_changes_nothing_and_names_its_videos(open_steps, tmp_path, said, where):
    jepa = make().float()
    update = OptimizerPass(jepa, SCHEDULE, clip_grad=1.0, accumulation=2)
    steps = open_steps()
    video, sets = clips(4).float(), masks(4)
    for step in range(1, 6):
        before = {name: value.clone() for name, value in update.tensors().items()}
        losses = []
        for part in range(2):
            given = video.clone()
            if step == 3 and part == 1 and where == "clip":
                given[2, 0, 1, 5, 5] = math.nan
            loss = jepa(given, *sets).loss
            if step == 3 and part == 1 and where == "loss":
                loss = loss * math.inf
            update.backward(loss / 2)
            losses.append(loss.detach())
        if step == 3 and where == "gradient":
            jepa.predictor.predictor_embed.weight.grad.view(-1)[0] = -math.inf
        norms = update.step(step - 1, sum(losses) / 2)
        slots = [tuple(range(8 * step + 4 * part, 8 * step + 4 * part + 4)) for part in range(2)]
        steps.note(step, slots, losses, sum(losses) / 2, norms)
        assert not steps.check()
        same = [torch.equal(value, before[name]) for name, value in update.tensors().items() if "skipped" not in name]
        assert all(same) == (step == 3)
    (entry,) = listed(tmp_path)
    assert entry["step"] == 3
    assert entry["not_finite"] == ("gradient" if where == "gradient" else "loss")
    assert entry["samples"] == names(range(24 if where == "gradient" else 28, 32))
    assert math.isfinite(entry["losses"][0])
    assert math.isfinite(float(entry["losses"][1])) == (where == "gradient")
    (line,) = said
    assert line.startswith("bad step   3 changed nothing, as its ")
    assert f"it saw {', '.join(entry['samples'][:3])} and {len(entry['samples']) - 3} more" in line
    assert str(tmp_path / "bad_steps.jsonl") in line
    steps.diagnose(tmp_path / "non_finite.json", update.norms_of_bad_step(), {"lr": 0.5})
    found = json.loads((tmp_path / "non_finite.json").read_text())
    assert found["bad_steps"] == [entry]
    assert found["lr"] == 0.5
    some = set(found["parameters_not_finite"])
    assert some == {name for name, norm in found["gradient_norms"].items() if not math.isfinite(float(norm))}
    assert some == {"predictor.predictor_embed.weight"} if where == "gradient" else "encoder.norm.weight" in some


# When it is enough


@pytest.mark.parametrize("bad", [LOSS, GRADIENT, ELSEWHERE])
@pytest.mark.parametrize("most", [1, 3])
def test_so_many_in_a_row_are_enough(open_steps, bad, most):
    steps = open_steps(most)
    assert follow(steps, [GOOD, *[bad] * (most - 1), GOOD, *[bad] * (most - 1), GOOD]) == []
    assert steps.reason is None
    assert follow(steps, [bad] * most + [GOOD], first=50) == [49 + most, 50 + most]
    assert f"in {most} steps in a row (optim.max_bad_steps)" in steps.reason
    assert steps.reason.startswith("loss or gradients" if bad == GRADIENT else "the loss")


def test_losses_and_gradients_count_together(open_steps):
    steps = open_steps(3)
    assert follow(steps, [GRADIENT, LOSS, GRADIENT]) == [3]
    assert steps.reason == "loss or gradients were not finite in 3 steps in a row (optim.max_bad_steps)"


@pytest.mark.parametrize("most", [3, 25])
def test_float16_may_look_for_its_loss_scale_but_a_loss_is_not_scaled(open_steps, said, most):
    limit = max(20, most)
    steps = open_steps(most, scaled=True)
    assert follow(steps, [GRADIENT] * (limit - 1) + [GOOD]) == []
    assert said == []
    assert follow(steps, [GRADIENT] * limit, first=100) == [99 + limit]
    assert f"in {limit} steps in a row" in steps.reason
    assert ("max_bad_steps" in steps.reason) == (most > 20)
    steps = open_steps(most, scaled=True)
    assert follow(steps, [GRADIENT, LOSS, LOSS, GRADIENT, LOSS, GOOD] + [LOSS] * most) == [6 + most]
    assert len(said) == 3 + most


def test_the_end_is_told_again_and_its_reason_stays(open_steps):
    steps = open_steps(2)
    assert follow(steps, [LOSS, LOSS, GOOD, GRADIENT, GRADIENT, GRADIENT]) == [2, 3, 4, 5, 6]
    assert steps.reason.startswith("the loss was not finite in 2")


# What is said and listed


def test_good_steps_leave_no_file(open_steps, tmp_path, said):
    assert follow(open_steps(), [GOOD] * 5) == []
    assert list(tmp_path.iterdir()) == []
    assert said == []


def test_what_another_process_has_spoilt_is_counted_and_names_nothing_here(open_steps, tmp_path, said):
    follow(open_steps(), [ELSEWHERE])
    (entry,) = listed(tmp_path)
    assert entry["samples"] == []
    assert (entry["loss"], entry["losses"]) == ("inf", [0.5, 0.25])
    assert said == []


def test_a_file_is_named_once_and_three_need_no_more(tmp_path, said):
    steps = BadSteps(tmp_path / "bad_steps.jsonl", 3, lambda slots: [f"{s // 2}.mp4" for s in slots], said.append)
    note(steps, 1, LOSS)
    assert steps.wait() is False
    assert "it saw 1.mp4 (listed" in said[0]
    assert listed(tmp_path)[0]["samples"] == ["1.mp4", "1.mp4"]


def test_a_full_disk_is_said_and_steps_are_counted_all_the_same(open_steps, tmp_path, said):
    (tmp_path / "bad_steps.jsonl").symlink_to("/dev/full")
    steps = open_steps()
    assert follow(steps, [LOSS] * 3) == [3]
    assert sum("cannot be written" in line for line in said) == 3
    assert sum(line.startswith("bad step") for line in said) == 3
    said.clear()
    steps.diagnose(tmp_path / "absent" / "non_finite.json", {}, {})
    assert "cannot be written" in said[0]


# A device that lags behind


class Later:
    """A copy that arrives when it is told to; until then its values are nonsense."""

    def __init__(self, values):
        self.true, self.values, self.there, self.waited = values, torch.full_like(values, -7.0), False, False

    def query(self):
        return self.there

    def arrive(self):
        self.values.copy_(self.true)
        self.there = True

    def synchronize(self):
        self.waited = True
        self.arrive()


@pytest.fixture
def lag(monkeypatch):
    every = []

    def to_host(values):
        every.append(Later(values))
        return every[-1].values, every[-1]

    monkeypatch.setattr(badsteps, "to_host", to_host)
    return every


def test_steps_are_taken_in_order_when_they_have_arrived_and_nobody_waits(open_steps, tmp_path, lag):
    steps = open_steps(2)
    assert follow(steps, [LOSS, GOOD, LOSS, LOSS]) == []
    assert listed(tmp_path) == []
    lag[1].arrive()  # the first is not there yet
    assert not steps.check()
    assert listed(tmp_path) == []
    lag[0].arrive()
    assert not steps.check()
    assert [entry["step"] for entry in listed(tmp_path)] == [1]
    lag[3].arrive()
    lag[2].arrive()
    assert steps.check()
    assert [entry["step"] for entry in listed(tmp_path)] == [1, 3, 4]
    assert not any(event.waited for event in lag)


def test_before_a_save_everything_is_waited_for(open_steps, tmp_path, lag):
    steps = open_steps(2)
    follow(steps, [LOSS, LOSS])
    assert steps.wait()
    assert [entry["step"] for entry in listed(tmp_path)] == [1, 2]
    assert all(event.waited for event in lag)
    assert steps.wait()


def test_what_the_caller_does_with_its_tensors_later_does_not_matter(open_steps, tmp_path, lag):
    steps = open_steps()
    loss, bad = torch.tensor(math.nan), torch.tensor(1.0)
    one = torch.tensor(1.0)
    steps.note(1, [(0,)], [loss], loss, StepNorms(one, one, one, bad))
    loss.zero_()
    bad.zero_()
    steps.wait()
    assert listed(tmp_path)[0]["loss"] == "nan"


# A resume


ENDS_AT_ITS_LAST = {
    False: [LOSS, GOOD, GRADIENT, LOSS, GOOD, GOOD, LOSS, LOSS, LOSS],
    True: [GOOD, LOSS, LOSS, GRADIENT, LOSS, GRADIENT, LOSS, LOSS, LOSS],
}


@pytest.mark.parametrize("stop", range(9))
@pytest.mark.parametrize("scaled", [False, True])
def test_a_resumed_run_lists_and_ends_like_an_unbroken_one(open_steps, tmp_path, stop, scaled):
    kinds = ENDS_AT_ITS_LAST[scaled]
    whole = open_steps(3, scaled=scaled)
    assert follow(whole, kinds) == [len(kinds)]
    want = listed(tmp_path)
    assert [entry["step"] for entry in want] == [step for step, kind in enumerate(kinds, start=1) if kind != GOOD]
    with (tmp_path / "bad_steps.jsonl").open("a") as out:
        out.write('{"step": 9, "not_fi')
    again = open_steps(3, scaled=scaled)
    again.rewind(stop)
    assert listed(tmp_path) == [entry for entry in want if entry["step"] <= stop]
    assert not again.check()
    assert follow(again, kinds[stop:], first=stop + 1) == [len(kinds)]
    assert (listed(tmp_path), again.reason) == (want, whole.reason)


def test_a_rewind_forgets_what_was_on_its_way(open_steps, tmp_path, lag):
    steps = open_steps(1)
    follow(steps, [LOSS])
    steps.rewind(0)
    assert not steps.wait()
    assert listed(tmp_path) == []


# Names


@pytest.mark.parametrize("clips_per_video", [1, 2])
def test_slots_have_the_files_of_their_videos_and_bad_ones_those_that_replaced_them(clips_per_video):
    order = VideoOrder(0, [Collection(np.arange(9))])
    paths = [f"{number}.mp4" for number in range(9)]
    slots = range(9 * clips_per_video)
    asked = file_names(order, paths, clips_per_video, lambda path: False)(slots)
    assert asked == [paths[order.video(slot // clips_per_video)] for slot in slots]
    bad = {asked[4 * clips_per_video], paths[order.replacement(4, 0)]}
    got = file_names(order, paths, clips_per_video, bad.__contains__)(slots)
    first = next(v for v in (order.replacement(4, n) for n in range(16)) if paths[v] not in bad)
    assert got[4 * clips_per_video] == paths[first]
    assert not bad & set(got)
    assert [new for new, old in zip(got, asked) if old not in bad] == [old for old in asked if old not in bad]


@pytest.mark.gpu
def test_a_device_is_asked_for_nothing(open_steps, tmp_path):
    steps = open_steps()
    one, nan = torch.ones((), device="cuda"), torch.full((), math.nan, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 3):
            steps.note(step, [(0,)], [nan], nan, StepNorms(one, one, one, one))
            steps.check()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not steps.wait()
    assert [entry["step"] for entry in listed(tmp_path)] == [1, 2]
