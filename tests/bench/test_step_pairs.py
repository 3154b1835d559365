"""Two contenders in turns: their order, their rows, what cannot run, and that their losses agree."""

from types import SimpleNamespace

import pytest
import torch

from bench import failures
from bench.step import contenders, pairs, profile
from bench.test_step import pair_of
from tests.pedantic import Pedantic

CPU = torch.device("cpu")


class Fake:
    """A contender whose steps take `ms` and whose losses are `values`; notes what happens to it in `log`."""

    def __init__(self, name, ms, log, values=(0.5,)):
        self.name, self.ms, self.log, self.values = name, ms, log, values
        log.append(f"build {name}")

    def turn(self, count):
        self.log.append(f"turn {self.name}")
        return [self.ms] * count

    def losses(self):
        return contenders.finite(list(self.values) * 30)

    def facts(self):
        self.log.append(f"facts {self.name}")
        return {"peak_memory_gb": None, "how": [self.name]}

    def close(self):
        self.log.append(f"close {self.name}")


def pair(log, *, together=True, same=True, ours=(10.0,), other=(20.0,), builds=None):
    plan = SimpleNamespace(batch_size=4, tokens=8, context=[2.0], target=[3.0], flop_per_clip=1e11)
    build = {
        "ours": lambda: Fake("ours", ours[0], log, ours[1:] or (0.5,)),
        "other": lambda: Fake("other", other[0], log, other[1:] or (0.5,)),
    } | (builds or {})
    sides = [pairs.Side(name, build[name], plan) for name in ("ours", "other")]
    return pairs.Pair("m", *sides, CPU, together=together, same=same)


def raising(error):
    def build():
        raise error

    return build


def test_sides_take_turns_and_leave():
    log = []
    mine, theirs, ratio = pair(log).measure(Pedantic(), steps=15)
    assert log == [
        "build ours", "build other", "turn other", "turn ours", "turn other", "turn ours", "facts ours", "facts other",
        "close other", "close ours",
    ]  # fmt: skip
    assert (mine["name"], mine["value"], mine["n"]) == ("step ours", pytest.approx(400.0), 20)
    assert (mine["parameters"], mine["how"]) == ({"model": "m", "way": "ours", "beside": "other"}, ["ours"])
    assert (theirs["name"], theirs["value"]) == ("step other", pytest.approx(200.0))
    assert (ratio["name"], ratio["value"], ratio["unit"]) == ("step ours over other", 2.0, "x")
    assert ratio["in_turns"]
    assert ratio["parity"] == {"steps": 20, "largest": 0.0, "bound": pairs.PARITY_BOUND, "within": True}
    assert not pairs.disagreement([mine, theirs, ratio])


def test_what_does_not_fit_together_follows():
    log = []
    *_, ratio = pair(log, together=False).measure(Pedantic(), steps=10)
    assert log == [
        "build ours", "turn ours", "facts ours", "close ours",
        "build other", "turn other", "facts other", "close other",
    ]  # fmt: skip
    assert not ratio["in_turns"]


def test_losses_that_differ_are_no_figure():
    rows = pair([], ours=(10.0, 0.52)).measure(Pedantic(), steps=10)
    assert pairs.disagreement(rows) == ("step ours over other: losses differ by 4.0e-02, more than rounding explains")
    # Unlike work has unlike losses.
    rows = pair([], ours=(10.0, 0.52), same=False).measure(Pedantic(), steps=10)
    assert rows[2]["parity"] is None
    assert not pairs.disagreement(rows)


def test_a_loss_that_is_not_finite_is_no_figure():
    log = []
    with pytest.raises(ValueError, match="the loss of step 0 is not finite"):
        pair(log, ours=(10.0, float("nan"))).measure(Pedantic(), steps=10)
    assert log[-2:] == ["close other", "close ours"], "their memory is what the next case needs"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), ValueError("no such setting"), failures.TritonError("out of resource")]
)
def test_another_that_cannot_run_here_is_the_reason_of_the_case(error):
    log = []
    with pytest.raises(failures.CannotRun, match=f"other: {type(error).__name__}: "):
        pair(log, builds={"other": raising(error)}).measure(Pedantic(), steps=10)
    assert log == ["build ours", "close ours"]


def test_ours_may_lack_what_the_settings_ask_for_but_must_not_fail():
    with pytest.raises(failures.CannotRun, match=r"ours: ValueError: runtime\.compile"):
        pair([], builds={"ours": raising(ValueError("runtime.compile: no compiler"))}).measure(Pedantic())
    with pytest.raises(RuntimeError, match="broken"):
        pair([], builds={"ours": raising(RuntimeError("broken"))}).measure(Pedantic())


@pytest.mark.parametrize("error", [torch.AcceleratorError("illegal memory access"), KeyError("typing error")])
def test_a_device_that_failed_or_a_mistake_of_our_own_is_no_skip(error):
    with pytest.raises(type(error)):
        pair([], builds={"other": raising(error)}).measure(Pedantic())


def test_the_reason_of_a_compiler_is_more_than_its_first_line():
    error = RuntimeError("backend='inductor' raised:\n\nCompilationError: no such type\nat line 3\nmore")
    assert failures.reason(error) == "RuntimeError: backend='inductor' raised: CompilationError: no such type at line 3"


def test_figures_of_a_gpu(monkeypatch):
    monkeypatch.setattr(pairs, "peak_flops", lambda device: 4e12)
    mine, *_ = pair([], ours=(200.0,)).measure(Pedantic(), steps=10)
    assert (mine["value"], mine["mfu"]) == (20.0, 0.5)  # 4 clips in 0.2 s


@pytest.mark.parametrize("other", ["reference", "packed-eager"])
def test_real_ways_agree_and_their_steps_have_components(other):
    mine, theirs, ratio = pair_of("vith_384", "packed", other, CPU, quick=True).measure(Pedantic(), steps=12)
    assert mine["n"] == theirs["n"] == 20
    assert 0 <= ratio["parity"]["largest"] < 1e-3
    assert (ratio["parity"]["largest"] > 0) == (other == "reference")
    for row in (mine, theirs):
        assert row["p20"] <= row["value"] <= row["p80"]
        assert set(row["components"]) == {*profile.COMPONENTS, "step"}
        assert row["mfu"] is row["peak_memory_gb"] is None  # of a GPU alone
        assert row["graphs_while_timed"] == 0
        assert row["loss_first"] != row["loss_last"]
    assert any(line.startswith("attention  sdpa") for line in mine["how"])


def test_real_noised_ways_agree():
    pair = pair_of("vitl", "packed-noised", "reference-noised", CPU, quick=True)
    assert 0 < pair.measure(Pedantic(), steps=1)[2]["parity"]["largest"] < 1e-2


def test_a_tampered_execution_is_found(monkeypatch):
    class Tampered(contenders.Runner):
        def forward(self, batches):
            loss = super().forward(batches)
            return loss * 1.05 if self.jepa.execution == "packed" else loss

    monkeypatch.setattr(contenders, "Runner", Tampered)
    rows = pair_of("vitl", "packed", "reference", CPU, quick=True).measure(Pedantic(), steps=1)
    assert "more than rounding explains" in pairs.disagreement(rows)


def test_steps_on_a_gpu_are_timed_by_its_clock_without_a_wait_between(monkeypatch):
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
    assert contenders.time_steps(runner, None, 4) == ([7] * 4, 250)
    assert (runner.taken, len(waits)) == (5, 1)
    waits.clear()
    marks, more = profile.Marks(runner.device), []
    for milliseconds in (3, 5):
        with marks.part("step"):
            for _ in range(2):
                with marks.part("context"):
                    now[0] += milliseconds
            more.append(len(waits))
    assert marks.steps() == [{"context": 6, "step": 6}, {"context": 10, "step": 10}]
    assert more == [0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("other", ["reference", "reference-compiled", "packed-triton", "packed-fused"])
def test_real_ways_on_cuda(other):
    device = torch.device("cuda", torch.cuda.current_device())
    mine, theirs, _ = pair_of("vitl", "packed", other, device, quick=True).measure(Pedantic(), steps=20)
    for row in (mine, theirs):
        assert row["peak_memory_gb"] > 0
        assert row["graphs_while_timed"] == 0, row
