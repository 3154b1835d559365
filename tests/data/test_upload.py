"""Batches one ahead: their order, what the copy waits for, and how a source ends. Streams are stand-ins on a CPU."""

import json
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass

import pytest
import torch

from fastjepa import loop
from fastjepa.data.loader import Batch
from fastjepa.data.replaced import TooManyBadFiles
from fastjepa.data.upload import uploaded
from fastjepa.exits import Exit
from fastjepa.masks import Ragged, TargetUnion

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def batch(number):
    dense, ragged = torch.full((2, 3), number), Ragged(torch.full((3,), number), (1, 2))
    clips, union = torch.full((2, 3), number), TargetUnion(torch.full((2, 3), number), [ragged])
    return Batch(clips, [dense, ragged], [ragged], union, (number,), [(f"{number}.mp4", "why")], [])


@dataclass
class Stream:
    """A stream that writes down what it is asked for."""

    name: str
    log: list

    def record_event(self):
        self.log.append(("copied", self.name))
        return ("event", self.log.count(("copied", self.name)) - 1)

    def wait_event(self, event):
        self.log.append((self.name, "waits for", event))


@pytest.fixture
def log(monkeypatch):
    """What happens, in order: fetches of the source, copies, waits, and which memory is kept for which stream."""
    log, active = [], ["computing"]

    @contextmanager
    def within(stream):
        active.append(stream.name)
        yield
        active.pop()

    def to(self, device):
        log.append(("copy", self.slots[0], device, active[-1]))
        return self

    computing = Stream("computing", log)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(Batch, "to", to)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: log.append(("keep", self.flatten()[0].item(), stream.name))
    )
    return log


def source(log, count, error=None):
    for number in range(count):
        log.append(("fetch", number))
        yield batch(number)
    log.append("end")
    if error is not None:
        raise error


def entries(log, *kinds):
    return [entry for entry in log if entry[0] in kinds]


def test_one_batch_is_fetched_and_copied_ahead_and_no_more(log):
    batches = uploaded(source(log, 5), CUDA)
    for number in range(5):
        found = next(batches)
        assert (found.slots, found.bad) == ((number,), [(f"{number}.mp4", "why")])
        ahead = min(number + 2, 5)
        assert entries(log, "fetch") == [("fetch", n) for n in range(ahead)]
        assert entries(log, "copy") == [("copy", n, CUDA, "side") for n in range(ahead)]
    assert next(batches, None) is None
    assert next(batches, None) is None


def test_nothing_is_fetched_before_the_first_batch_is_asked_for(log):
    uploaded(source(log, 2), CUDA)
    assert log == []


def test_a_batch_is_handed_out_after_its_own_copy_and_kept_for_the_computing_stream(log):
    """Every tensor of it: clips, two context sets, one target set, the union and the places in it."""
    list(uploaded(source(log, 3), CUDA))
    waits = [entry for entry in log if "waits for" in entry]
    assert waits == [("computing", "waits for", ("event", n)) for n in range(3)]
    for number in range(3):
        assert log.count(("keep", number, "computing")) == 6
        copied = log.index(("copy", number, CUDA, "side"))
        wait = log.index(waits[number])
        assert log[copied + 1] == ("copied", "side")
        assert copied < wait < log.index(("keep", number, "computing"))
        if number < 2:  # the next copy is under way when this one is waited for
            assert log.index(("copy", number + 1, CUDA, "side")) < wait


@pytest.mark.parametrize("error", [OSError, TooManyBadFiles])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_error_of_the_source_comes_out_as_soon_as_it_is_met(log, count, error):
    batches = uploaded(source(log, count, error("a broken disk")), CUDA)
    handed_out = max(0, count - 1)
    assert [next(batches).slots for _ in range(handed_out)] == [(n,) for n in range(handed_out)]
    with pytest.raises(error, match="a broken disk"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_an_empty_source_ends_at_once(log):
    assert list(uploaded(iter([]), CUDA)) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_does_not_wait_for_a_step(log, error):
    batches = uploaded(source(log, 1, error()), CUDA)
    with pytest.raises(error):
        next(batches)


@pytest.mark.parametrize("device", [CUDA, CPU])
def test_closed_early_it_asks_the_source_for_nothing_more(log, device):
    with closing(uploaded(source(log, 5), device)) as batches:
        next(batches)
    fetched = entries(log, "fetch")
    assert len(fetched) == (2 if device is CUDA else 1)
    assert next(batches, None) is None
    assert entries(log, "fetch") == fetched


def test_a_cpu_gets_the_batches_as_they_are_and_none_ahead(log):
    made = [batch(n) for n in range(3)]
    taken = []

    def watched():
        for one in made:
            taken.append(one)
            yield one

    for number, found in enumerate(uploaded(watched(), CPU)):
        assert found is made[number]
        assert len(taken) == number + 1
    assert log == []


def test_on_a_cpu_errors_pass_through():
    batches = uploaded(source([], 1, OSError("a broken disk")), CPU)
    assert next(batches).slots == (0,)
    with pytest.raises(OSError, match="a broken disk"):
        next(batches)


# In a run


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_looks_ahead_is_the_same_run_also_when_it_is_continued(run, log, monkeypatch):
    _, plain = run(folder="plain")
    monkeypatch.setattr(loop, "uploaded", lambda batches, device: uploaded(batches, CUDA))
    code, _ = run("runtime.stop_at=4", folder="ahead")
    assert code == Exit.DONE
    assert len(entries(log, "copy")) == 4  # the source has no more for this part
    code, ahead = run(folder="ahead")
    assert code == Exit.DONE
    assert len(entries(log, "copy")) == 10
    assert losses(ahead) == losses(plain)


def test_the_time_blocked_in_the_loader_counts_as_waited(run, monkeypatch):
    waits = []

    def slowly(batches, device):
        for one in batches:
            time.sleep(0.05)
            yield one

    report = loop.Trainer._report
    monkeypatch.setattr(loop, "uploaded", slowly)
    monkeypatch.setattr(
        loop.Trainer, "_report", lambda self, *rest: waits.append(self.clock.waited) or report(self, *rest)
    )
    run("runtime.stop_at=3")
    assert len(waits) == 3
    assert all(0.05 <= seconds < 5 for seconds in waits)
