"""What processes tell each other on the host, in processes that gloo connects."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fastjepa import parallel
from fastjepa.config import Runtime
from fastjepa.exits import Exit
from fastjepa.parallel import ALONE, Launch, World, join, launch
from tests.processes import run_processes

CPU = torch.device("cpu")
APART = "ValueError: the processes do not come together:"


def met(minutes=1.0):
    return join(launch(os.environ), CPU, minutes)


def said(work):
    """The sentence of a ValueError, or the result."""
    try:
        return work()
    except ValueError as error:
        return f"ValueError: {error}"


# -- words ------------------------------------------------------------------------------------------------------------


def words() -> dict:
    world = met()
    rank = world.rank
    return {
        "who": (world.rank, world.size, world.local_rank, world.by, world.first),
        "sharing": world.sharing,
        "gather": world.gather({"rank": rank}),
        "most": world.most([3, -7, 5][rank]),
        "least": world.most([-3, -7, -5][rank]),
        "any": world.any(rank == 2),
        "none": world.any(False),
        "groups": len({id(world.control), id(world.saving), id(dist.group.WORLD)}),
    }


def test_what_each_says_all_hear():
    found = run_processes(words, 3)
    assert [one.pop("who") for one in found] == [
        (0, 3, 0, "torchrun", True), (1, 3, 1, "torchrun", False), (2, 3, 2, "torchrun", False),
    ]  # fmt: skip
    wanted = {
        "sharing": 3, "gather": [{"rank": 0}, {"rank": 1}, {"rank": 2}], "most": 5, "least": -3, "any": True,
        "none": False, "groups": 3,
    }  # fmt: skip
    assert found == [wanted] * 3


def shares_of_processors() -> int:
    # Two processes that are bound to the same processor share it; the third has another place.
    places = {"0": ("host", (0,)), "1": ("host", (0,)), "2": ("host", (1,))}
    parallel.world._place = lambda: places[os.environ["RANK"]]
    return met().sharing


def test_processors_are_shared_with_those_of_the_same_place():
    assert run_processes(shares_of_processors, 3) == [2, 2, 1]


def test_the_place_of_a_process_is_its_machine_and_its_processors(monkeypatch):
    from fastjepa.parallel import world

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 2}, raising=False)
    monkeypatch.setattr(world.socket, "gethostname", lambda: "node7")
    assert world._place() == ("node7", (2, 5))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert world._place() == ("node7", ())


# -- work -------------------------------------------------------------------------------------------------------------


def works() -> dict:
    world = met()
    rank = world.rank

    def fails_in(*ranks, kind=ValueError):
        def work():
            if rank in ranks:
                raise kind(f"no clip in {rank}")
            return rank

        return work

    calls = []

    def first_only():
        calls.append(rank)
        return f"written by {rank}"

    return {
        "fine": said(lambda: world.together(fails_in())),
        "one": said(lambda: world.together(fails_in(1))),
        "later ones": said(lambda: world.together(fails_in(1, 2, kind=OSError))),
        "all": said(lambda: world.together(lambda: (_ for _ in ()).throw(OSError("the folder is gone")))),
        "first": said(lambda: world.first_does(first_only)),
        "calls": calls,
        "first fails": said(lambda: world.first_does(fails_in(0, kind=OSError))),
        "others do not count": said(lambda: world.first_does(fails_in(1, 2))),
        "after it all": world.gather(rank),
    }


def test_what_fails_in_one_fails_in_all_with_its_sentence():
    found = run_processes(works, 3)
    assert [one.pop("fine") for one in found] == [0, 1, 2]
    assert [one.pop("calls") for one in found] == [[0], [], []]
    assert found == [found[0]] * 3
    assert found[0] == {
        "one": "ValueError: process 1 of 3: no clip in 1",
        "later ones": "ValueError: process 1 of 3: no clip in 1",
        "all": "ValueError: the folder is gone",
        "first": "written by 0",
        "first fails": "ValueError: no clip in 0",
        "others do not count": 0,
        "after it all": [0, 1, 2],
    }


def errs_otherwise() -> None:
    world = met()
    world.together(lambda: {}["key"] if world.rank == 1 else None)


def test_what_nobody_foresaw_is_no_sentence():
    with pytest.raises(AssertionError, match=r"(?s)rank 1:.*KeyError: 'key'"):
        run_processes(errs_otherwise, 2)


def in_turn(folder: str, fails: bool) -> object:
    world = met()
    made = os.path.join(folder, "cache")

    def work():
        if fails:
            raise ValueError("the disk is full")
        found = os.path.exists(made)
        if world.local_rank == 0:
            time.sleep(0.3)
            with open(made, "w"):
                pass
        return found

    return said(lambda: world.one_by_one(work)), world.gather(world.rank)


def test_what_the_first_of_a_machine_leaves_is_there_for_the_others(tmp_path):
    found = run_processes(in_turn, 3, str(tmp_path), False)
    assert [result for result, _ in found] == [False, True, True]


def test_where_the_first_of_a_machine_fails_the_others_do_not_try(tmp_path):
    found = run_processes(in_turn, 3, str(tmp_path), True)
    assert found == [("ValueError: process 0 of 3: the disk is full", [0, 1, 2])] * 3


# -- waiting ----------------------------------------------------------------------------------------------------------


def waits(seconds: float) -> tuple[int, list[int]]:
    world = met(minutes=0.5 / 60)
    beats = []
    for _ in range(2):  # another wait is another place
        if world.rank == 0:
            time.sleep(seconds)
        world.wait(lambda: beats.append(1))
    return len(beats), world.gather(world.rank)


def test_waiting_takes_as_long_as_it_takes_and_shows_life():
    """Three times as long as an exchange may take."""
    first, second = run_processes(waits, 2, 1.5)
    assert first[0] <= 4, "the last one to come waits for nobody"
    assert second[0] >= 15, "a beat each tenth of a second, of both waits"
    assert second[1] == [0, 1]


def keeps_waiting_exchange() -> str:
    world = met(minutes=0.5 / 60)
    if world.rank == 0:
        time.sleep(2)
    try:
        world.gather(1)
    except RuntimeError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return "all came"


def test_an_exchange_has_a_limit():
    assert "imed out" in run_processes(keeps_waiting_exchange, 2)[1]


# -- coming together and leaving --------------------------------------------------------------------------------------


def comes_alone() -> tuple[str, float]:
    began = time.monotonic()
    if os.environ["RANK"] == "1":
        return "never came", 0.0
    return said(lambda: join(launch(os.environ), CPU, 1.0, seconds_to_meet=1.0)), time.monotonic() - began


def test_a_process_that_the_others_do_not_join_says_so():
    (sentence, seconds), _ = run_processes(comes_alone, 2, timeout=60)
    assert sentence.startswith(f"{APART} process 0 of 2 (started by torchrun) at 127.")
    assert "\n" not in sentence
    assert seconds < 30


def finds_nobody() -> str:
    return said(lambda: join(Launch(1, 2, 1, "127.0.0.1", int(os.environ["MASTER_PORT"]), "srun"), CPU, 1.0, 1.0))


def test_a_process_that_finds_no_meeting_place_says_where_it_looked():
    (sentence,) = run_processes(finds_nobody, 1, timeout=60)
    assert sentence.startswith(f"{APART} process 1 of 2 (started by srun) at 127.")


def test_one_process_needs_nobody(monkeypatch):
    monkeypatch.setattr(dist, "init_process_group", None)
    world = join(Launch(), CPU, 1.0)
    assert world is ALONE
    assert (world.rank, world.size, world.sharing, world.first) == (0, 1, 1, True)
    assert world.gather("x") == ["x"]
    assert world.most(-3) == -3
    assert world.any(True) is True
    assert world.any(False) is False
    assert world.one_by_one(lambda: 5) == 5
    world.wait(lambda: pytest.fail("there is nobody to wait for"))
    for error in (OSError("gone"), ValueError("wrong")):
        for does in (world.together, world.first_does, world.one_by_one):
            with pytest.raises(type(error), match=str(error)):
                does(lambda error=error: (_ for _ in ()).throw(error))
    assert world.leave(Exit.WRONG_INPUT) is Exit.WRONG_INPUT


def leaves(code: Exit) -> None:
    world = met(minutes=5 / 60)
    if world.rank == 1:
        time.sleep(0.5)
        world.store.add("still here", 1)  # the first process keeps the store
    world.leave(code)
    raise AssertionError("a process among several ends here")


@pytest.mark.parametrize("code", [Exit.WRONG_INPUT, Exit.SAVED_AFTER_SIGNAL])
def test_leaving_ends_all_with_the_code(code):
    with pytest.raises(AssertionError, match=f"^rank [01] ended with exit code {int(code)}$"):
        run_processes(leaves, 2, code)


def test_leaving_a_finished_run_is_an_exit_code_of_0():
    # No process has failed, and none has returned from its function.
    with pytest.raises(FileNotFoundError, match="result-0"):
        run_processes(leaves, 2, Exit.DONE)


def leaves_by_itself() -> int:
    world = met(minutes=5 / 60)
    if world.rank == 1:
        ended, os._exit = os._exit, lambda code: None
        world.leave(Exit.FAILED)
        os._exit = ended
    return world.store.add("left", 1) if world.rank == 1 else world.store.wait(["left"], timedelta(seconds=20)) or 0


def test_a_process_that_has_failed_waits_for_nobody():
    """Those it leaves find out: what they wait for fails."""
    assert run_processes(leaves_by_itself, 2) == [0, 1]


def loses_another(dies: int, way: str, said: str) -> None:
    world = met()
    world.gather(1)
    if world.rank == dies:
        os._exit(0)
    ways = {"gather": lambda: world.gather(1), "reduce": lambda: dist.all_reduce(torch.ones(1)), "wait": world.wait}

    def until_it_fails():
        while True:
            ways[way]()

    with pytest.raises(RuntimeError) as caught:
        until_it_fails()
    with open(said, "w") as file:
        file.write(str(parallel.lost_another(caught.value)))
    os._exit(0)


@pytest.mark.parametrize(("dies", "way"), [(1, "gather"), (0, "reduce"), (0, "wait")])
def test_the_end_of_another_process_is_told_from_other_failures(tmp_path, dies, way):
    said = tmp_path / "said"
    with pytest.raises(FileNotFoundError, match="result-0"):  # none of them has returned, and none has failed
        run_processes(loses_another, 2, dies, way, str(said))
    assert said.read_text() == "True"


def test_failures_of_this_process_are_not_the_end_of_another():
    told = "NCCL error: ncclRemoteError: A call failed possibly due to a network error or a remote process exiting"
    assert parallel.lost_another(dist.DistBackendError(told))
    assert not parallel.lost_another(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed"))
    assert not parallel.lost_another(RuntimeError("Timed out waiting 500ms for recv operation to complete"))
    assert not parallel.lost_another(ConnectionResetError("Connection reset by peer"))


# -- devices ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two GPUs, as far as choosing one is concerned."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Pretend")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(("rank", "local_rank"), [(0, 0), (1, 1), (6, 0), (7, 1)])
def test_each_process_of_a_machine_takes_the_gpu_of_its_number(two_gpus, name, rank, local_rank):
    found = Launch(rank, 8, local_rank, "node1", 29500, "torchrun")
    device, reason = parallel.set_up(Runtime(device=name), found)
    assert (device, reason) == (torch.device("cuda", local_rank), "one for each process: NVIDIA Pretend")
    assert two_gpus == [device]


def test_more_processes_than_gpus_are_refused(two_gpus):
    with pytest.raises(ValueError, match=r"^this machine has 2 GPUs, too few for process 2 on it: start 2 a machine$"):
        parallel.set_up(Runtime(), Launch(2, 4, 2, "node1", 29500, "torchrun"))
    assert two_gpus == []


def test_the_one_gpu_that_srun_shows_to_a_process_is_its_own(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    device, _ = parallel.set_up(Runtime(), Launch(3, 4, 3, "node1", 29500, "srun"))
    assert device == torch.device("cuda:0")
    with pytest.raises(ValueError, match=r"^this machine has 1 GPUs, too few for process 3"):
        parallel.set_up(Runtime(), Launch(3, 4, 3, "node1", 29500, "torchrun"))


def test_a_gpu_by_number_is_refused_for_several_processes(two_gpus):
    with pytest.raises(
        ValueError, match=r"^runtime\.device: expected auto, cuda or cpu with 2 processes, given cuda:1$"
    ):
        parallel.set_up(Runtime(device="cuda:1"), Launch(1, 2, 1, "node1", 29500, "torchrun"))


def test_several_processes_may_train_on_the_cpu_beside_gpus(two_gpus):
    device, reason = parallel.set_up(Runtime(device="cpu", threads=1), Launch(1, 2, 1, "node1", 29500, "torchrun"))
    assert (device, reason) == (CPU, "asked for: 1 threads")
    assert two_gpus == []


def made(monkeypatch, device):
    """What `join` asks torch for."""
    asked = {}
    store = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda url, rank, size, timeout: iter([(store, rank, size)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: asked.update(backend=backend, **more))
    monkeypatch.setattr(dist, "new_group", lambda **more: asked.setdefault("groups", []).append(more) or "group")
    monkeypatch.setattr(World, "gather", lambda self, value: [value])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    join(Launch(1, 2, 1, "node1", 29500, "srun"), device, 30.0)
    return asked


def test_gradients_go_through_nccl_on_gpus_and_decisions_through_gloo(monkeypatch):
    half_an_hour = timedelta(minutes=30)
    asked = made(monkeypatch, torch.device("cuda:1"))
    assert (asked["backend"], asked["device_id"]) == ("cpu:gloo,cuda:nccl", torch.device("cuda:1"))
    assert asked["groups"] == [{"backend": "gloo", "timeout": half_an_hour}] * 2
    assert asked["timeout"] == half_an_hour


def test_everything_goes_through_gloo_on_a_cpu(monkeypatch):
    asked = made(monkeypatch, CPU)
    assert (asked["backend"], asked["device_id"]) == ("gloo", None)
