"""The bench of scaling: what a point changes, and what becomes of points that do not fit."""

import pytest
import torch

from bench import scaling, test_scaling
from bench.data import loading
from bench.step import processes
from fastjepa.config import flat
from fastjepa.memory import STATE

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Fixture:
    """Stands for pytest-benchmark's, which serves once."""

    used = False

    def pedantic(self, target, args, setup, rounds, iterations):
        assert not self.used, "a fixture can be used once"
        self.used = True
        for _ in range(rounds):
            setup()
            target(*args)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize(
    ("axis", "keys"),
    [
        ("batch", {"optim.global_batch", "data.batch_size"}),
        ("tokens", {"mask.ratio"}),
        ("truncation", {"mask.truncation"}),
        ("frames", {"data.frames"}),
        ("crop", {"data.crop"}),
    ],
)
def test_an_axis_changes_one_thing(axis, keys, device):
    found = [flat(scaling.settings_of(axis, value, device)) for value in scaling.AXES[axis][device.type]]
    changed = {key for key in found[0] if any(one[key] != found[0][key] for one in found)}
    assert changed == keys
    assert found[0]["model.name"] == {"cuda": "vit_large", "cpu": "vit_nano"}[device.type]
    assert found[-1]["mask.group"] == 24, "the published one, or the batch where it is smaller"


def test_tokens_are_those_that_are_seen():
    points = scaling.points_of("tokens", CPU)
    assert [point.parameters["ratio"] for point in points] == [0.5, 0.75, 0.9]
    # Tubes through 8 planes of 4 x 4 patches; a tenth of 16 is rounded down.
    assert [point.parameters["tokens"] for point in points] == [64, 32, 8]


def test_the_points_of_an_axis_are_measured(monkeypatch):
    monkeypatch.setattr(test_scaling, "ROUNDS", {"cpu": 2})
    rows = []
    test_scaling.test_step(Fixture(), rows.extend, CPU, "batch")
    rows, over = rows[:3], rows[3:]
    assert [row["parameters"] for row in rows] == [{"model": "vit_nano", "batch": batch} for batch in (2, 4, 8)]
    assert [(row["name"], row["parameters"]["batch"], row["unit"]) for row in over] == [
        ("step against batch, over the first point", batch, "x") for batch in (4, 8)
    ]  # fmt: skip
    for row in rows:
        assert row["name"] == "step against batch"
        assert row["value"] == pytest.approx(1e3 * row["parameters"]["batch"] / row["ms"])
        assert row["n"] == 2
        assert row["order"] == "in turns"


class Runner:
    """Stands for a model: `turns_to` says what its steps raise, `building` what its construction does."""

    building, stepping = {}, {}
    alive, most, order = set(), 0, []

    def __init__(self, s, device):
        self.size, self.losses = s.optim.global_batch, []
        Runner.alive.add(self.size)
        Runner.most = max(Runner.most, len(Runner.alive))
        if error := self.failure(Runner.building):
            raise error

    def failure(self, which):
        error, needed = which.get(self.size, (None, 0))
        return error if len(Runner.alive) > needed else None

    def step(self, batches):
        Runner.order.append(self.size)
        if len(self.losses) >= scaling.WARM_UP["cpu"] and (error := self.failure(Runner.stepping)):
            raise error
        self.losses.append(torch.zeros(()))

    @property
    def taken(self):
        return len(self.losses)

    def __del__(self):
        Runner.alive.discard(self.size)


@pytest.fixture(scope="module")
def plans():
    return {point.settings.optim.global_batch: point.plan for point in scaling.points_of("batch", CPU)}


@pytest.fixture
def faked(monkeypatch, plans):
    monkeypatch.setattr(scaling, "plan_of", lambda s, device: plans[s.optim.global_batch])
    monkeypatch.setattr(scaling, "Runner", Runner)
    monkeypatch.setattr(scaling, "prepare", lambda s, draws, device: None)
    for name, value in (("building", {}), ("stepping", {}), ("alive", set()), ("most", 0), ("order", [])):
        monkeypatch.setattr(Runner, name, value)
    return scaling.points_of("batch", CPU)


def orders(points):
    return [point.order for point in points]


def test_a_point_over_the_first_counts_clips_and_not_steps(faked):
    first, second, _ = faked
    first.order = second.order = scaling.IN_TURNS
    first.ms, second.ms = [10.0, 10.0], [15.0, 15.0]  # of 2 and 4 clips
    (row,) = second.over(first, "step against batch")
    assert row["value"] == pytest.approx(2 * 10 / 15)
    assert first.over(first, "step against batch") == []


def test_points_take_turns_and_the_fixture_times_the_first(faked):
    scaling.measure(Fixture(), faked, 2)
    assert orders(faked) == ["in turns"] * 3
    assert Runner.order[3 * scaling.WARM_UP["cpu"] :] == [4, 8, 2, 4, 8, 2]
    assert [len(point.ms) for point in faked] == [2, 2, 2]
    assert not Runner.alive


def test_points_that_do_not_fit_together_follow_one_another(faked, monkeypatch):
    monkeypatch.setattr(scaling, "usable_memory", lambda device: 0.0)
    scaling.measure(Fixture(), faked, 2)
    assert orders(faked) == ["by itself"] * 3
    assert faked[1].over(faked[0], "x") == []
    assert Runner.most == 1
    assert [len(point.ms) for point in faked] == [2, 2, 2]


def test_states_of_all_and_activations_of_one_must_fit(faked, monkeypatch):
    held = [point.plan.held for point in faked]
    states = sum(one[name] for one in held for name in STATE)
    largest = max(sum(size for name, size in one.items() if name not in STATE) for one in held)
    monkeypatch.setattr(scaling, "usable_memory", lambda device: states + largest)
    scaling.measure(Fixture(), faked, 1)
    assert orders(faked) == ["in turns"] * 3


def test_a_point_that_cannot_be_is_a_row_and_the_rest_goes_on(faked):
    Runner.building = {4: (torch.OutOfMemoryError("no room\nfor it"), 0)}
    scaling.measure(Fixture(), faked, 2)
    rows = [point.row("x") for point in faked]
    assert ["skipped" in row for row in rows] == [False, True, False]
    assert rows[1]["skipped"] == "OutOfMemoryError: no room for it"
    assert rows[1]["parameters"] == {"model": "vit_nano", "batch": 4}
    assert [len(point.ms) for point in faked] == [2, 0, 2]


@pytest.mark.parametrize("where", ["building", "stepping"])
def test_a_point_that_lacks_memory_beside_the_others_has_another_try(faked, where):
    setattr(Runner, where, {8: (torch.OutOfMemoryError("no room"), 1)})
    scaling.measure(Fixture(), faked, 3)
    assert orders(faked) == ["in turns", "in turns", "by itself"]
    assert faked[2].over(faked[0], "x") == []
    assert [len(point.ms) for point in faked] == [3, 3, 3]
    assert not any(point.skipped for point in faked)


def test_the_first_point_may_be_the_one_that_fails(faked):
    Runner.building = {2: (ValueError("not on this machine"), 0)}
    scaling.measure(Fixture(), faked, 2)
    assert faked[0].row("x")["skipped"] == "ValueError: not on this machine"
    assert [len(point.ms) for point in faked] == [0, 2, 2]


def test_a_case_without_any_figure_fails(faked, monkeypatch):
    Runner.building = {size: (ValueError("nowhere"), 0) for size in (2, 4, 8)}
    monkeypatch.setattr(test_scaling, "points_of", lambda axis, device: faked)
    with pytest.raises(AssertionError, match="ValueError: nowhere"):
        test_scaling.test_step(Fixture(), [].extend, CPU, "batch")


def test_a_device_that_failed_ends_the_case(faked):
    Runner.stepping = {4: (torch.AcceleratorError("illegal address"), 0)}
    with pytest.raises(torch.AcceleratorError):
        scaling.measure(Fixture(), faked, 2)


def test_a_loss_that_is_not_finite_is_no_figure(faked, monkeypatch):
    monkeypatch.setattr(Runner, "step", lambda self, batches: self.losses.append(torch.tensor(float("nan"))))
    scaling.measure(Fixture(), faked, 2)
    assert faked[0].skipped == "ValueError: the loss of step 6 is not finite"


def test_on_a_gpu_steps_are_timed_in_a_row_by_its_clock(monkeypatch, faked):
    allocated = iter([100, 700])
    monkeypatch.setattr(scaling, "_allocated", lambda device: next(allocated))
    monkeypatch.setattr(scaling, "plan_of", lambda s, device: faked[0].plan)
    asked = []
    monkeypatch.setattr(scaling, "time_steps", lambda runner, batches, count: asked.append(count) or ([5.0, 6.0], 1000))
    point = scaling.Point(scaling.settings_of("batch", 48, CUDA), {"batch": 48}, CUDA)
    assert point.build()
    assert len(Runner.order) == scaling.WARM_UP["cuda"]
    assert (point.turn(), point.turn()) == (6.0, 6.0)
    row = point.row("x")
    assert asked == [scaling.TURN] * 2
    assert row["n"] == 4
    assert row["value"] == pytest.approx(48 / 5.5e-3)
    assert row["peak_memory_gb"] == (700 - 100 + 1000) / 1e9, "its state and what its steps add"


def test_processes_are_timed_as_far_as_there_are_processors(monkeypatch):
    asked = []

    def step_times(s, count, device):
        asked.append((count, s.optim.global_batch))
        return [10.0 * (1 + count)] * 3

    monkeypatch.setattr(test_scaling, "step_times", step_times)
    monkeypatch.setattr(processes, "processors", lambda: 5)
    rows = []
    test_scaling.test_processes(Fixture(), rows.extend, CPU)
    clips = asked[0][1]
    assert asked == [(2, clips), (4, clips), (1, clips)] * test_scaling.PROCESS_ROUNDS, "in turns, each with the same"
    points, over = rows[:4], rows[4:]
    assert [row["parameters"]["processes"] for row in points] == [1, 2, 4, 8]
    assert [row["value"] for row in points[:3]] == [
        pytest.approx(1e3 * count * clips / (10 * (1 + count))) for count in (1, 2, 4)
    ]  # fmt: skip
    assert points[3]["skipped"] == "8 processes are more than this machine's 5 processors"
    assert {row["clock"] for row in (*points[:3], *over)} == {"wall"}
    assert [row["name"] for row in over] == ["step against processes, over the first point"] * 2
    assert [row["value"] for row in over] == [pytest.approx(2 * 20 / 30), pytest.approx(4 * 20 / 50)]


def test_on_a_machine_with_gpus_a_process_has_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert processes.too_many(1, CUDA) == ""
    assert processes.too_many(2, CUDA) == "2 processes are more than this machine's 1 GPU"


def test_processes_train_together_and_the_slowest_counts():
    s = scaling.settings_of("processes", 1, CPU)
    ms = processes.step_times(s, 2, CPU)
    assert len(ms) == processes.TURNS
    assert min(ms) > 0


@pytest.mark.parametrize(("processors", "block"), [(2, 12), (8, 16), (64, 32)])
def test_workers_have_a_row_each_and_their_own_time_for_the_same_clips(monkeypatch, tmp_path, processors, block):
    monkeypatch.setattr(loading, "processors", lambda: processors)
    monkeypatch.setattr(test_scaling, "settings_of", lambda video, clips: scaling.settings_of("batch", clips, CPU))
    asked = []

    def fresh(s, workers, device, block):
        asked.append((s.optim.global_batch, block))
        return loading.Stretch(1000.0 / (1 + workers), 0.5)

    monkeypatch.setattr(test_scaling, "fresh", fresh)
    rows, shelf = [], type("Shelf", (), {"path": lambda self, size, gop: tmp_path})()
    test_scaling.test_workers(Fixture(), rows.extend, CPU, shelf)
    assert set(asked) == {(4, block)}, "the same clips for all of them"
    for row, workers in zip(rows, test_scaling.WORKERS, strict=True):
        assert row["parameters"]["workers"] == workers
        if workers > processors:
            assert row["skipped"] == f"{workers} workers are more than this machine's {processors} processors"
        else:
            assert row["value"] == pytest.approx(4 * block * (1 + workers))
            assert row["clock"] == "wall"
