"""Steps of several processes that train together, each on a GPU of its own, or on a processor.

A process has as many clips as one by itself: with twice the processes a step has twice the clips.
"""

import json
import os
import socket
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing

from bench.measure import synchronize
from bench.pairing import wall_clock
from bench.step.ways import Runner, prepare
from fastjepa import parallel
from fastjepa.config import Settings
from fastjepa.data.processes import processors
from fastjepa.exits import Exit

PROCESSES = (1, 2, 4, 8)
DRAWS = 50
WARM_UP = 5
TURNS, TURN = 6, 5  # so many times are taken, each of so many steps
MINUTES_OF_AN_EXCHANGE = 5.0


def too_many(processes: int, device: torch.device) -> str:
    """Why so many processes are not measured here; empty where they are."""
    gpus = device.type == "cuda"
    there = torch.cuda.device_count() if gpus else processors()
    kind = "GPU" if gpus else "processor"
    told = f"{processes} processes are more than this machine's {there} {kind}{'' if there == 1 else 's'}"
    return told * (processes > there)


def step_times(s: Settings, processes: int, device: torch.device) -> list[float]:
    """Milliseconds of a step by the clock on the wall, several times, of the slowest process each time.

    The processes are started and ended here. Errors: torch's ProcessException with the traceback of the first one that
    fails.
    """
    with tempfile.TemporaryDirectory(prefix="step-") as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        given = (s, processes, device.type, port, folder)
        torch.multiprocessing.start_processes(_steps, given, processes, start_method="spawn")
        return json.loads((Path(folder) / "ms.json").read_text())


def _steps(rank: int, s: Settings, processes: int, device_type: str, port: int, folder: str) -> None:
    """One of the processes; the first one leaves the times."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    found = parallel.launch(os.environ)
    device, _ = parallel.set_up(s.runtime.model_copy(update={"device": device_type}), found)
    world = parallel.join(found, device, MINUTES_OF_AN_EXCHANGE)
    runner = Runner(s, device, "alone" if processes == 1 else "ddp")
    batches = prepare(s, DRAWS, device)

    def turn() -> None:
        for _ in range(TURN):
            runner.step(batches)
        synchronize(device)

    for _ in range(WARM_UP):
        runner.step(batches)
    ms = []
    for _ in range(TURNS):
        synchronize(device)
        world.any(False)  # all begin together
        ms.append(max(world.gather(wall_clock(turn) / TURN)))
    if not all(loss.isfinite() for loss in runner.losses):
        raise ValueError(f"a loss of the {runner.taken} steps is not finite")
    if world.first:
        (Path(folder) / "ms.json").write_text(json.dumps(ms))
    world.leave(Exit.DONE)
