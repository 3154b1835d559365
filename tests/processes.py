"""Functions run in several processes at once, as torchrun starts them."""

import faulthandler
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A server that has imported torch already forks the processes: a test of them takes tenths of a second, and nothing
# that a test has left behind in this process is in them.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo", "safetensors.torch", "fsspec"]
)


def run_processes(function: Callable[..., Any], world: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(*args)` in `world` processes with the environment of torchrun; what they return, by rank.

    `function` is one of a module's top level; it and its arguments and results are pickled. It makes the process group
    if it wants one; the helper ends it. AssertionError with the traceback of the first process that failed, or with
    where each of them was when `timeout` seconds had passed; all are dead then.
    """
    with tempfile.TemporaryDirectory(prefix="processes-") as name:
        folder, port = Path(name), free_port()
        environments = [
            os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": "lo",
            }
            for rank in range(world)
        ]
        processes = [
            _CONTEXT.Process(target=_process, args=(function, args, folder, environment, os.getcwd(), timeout))
            for environment in environments
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, folder, timeout)
            return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world)]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()


def free_port() -> int:
    """A TCP port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(processes: list, folder: Path, timeout: float) -> None:
    end, running = time.monotonic() + timeout + 2, dict(enumerate(processes))
    while running:
        if not connection.wait([p.sentinel for p in running.values()], max(0, end - time.monotonic())):
            where = "\n".join(f"rank {rank}:\n{_text(folder / f'stack-{rank}')}" for rank in running)
            raise AssertionError(
                f"{len(running)} of {len(processes)} processes had not ended after {timeout} s\n{where}"
            )
        for rank, process in list(running.items()):
            if process.is_alive():
                continue
            process.join()
            del running[rank]
            if process.exitcode != 0:
                time.sleep(0.2)  # one that fails takes others with it: the first to say why is the cause
                said = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
                why = _text(said[0]) if said else f"rank {rank} ended with exit code {process.exitcode}"
                raise AssertionError(why)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else "nothing is known"


def _process(
    function: Callable[..., Any], args: tuple, folder: Path, environment: dict, place: str, timeout: float
) -> None:
    rank, code = environment["RANK"], 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(place)
        torch.set_num_threads(1)
        with (folder / f"stack-{rank}").open("w") as stack:
            faulthandler.dump_traceback_later(timeout, file=stack)
            (folder / f"result-{rank}").write_bytes(pickle.dumps(function(*args)))
            if dist.is_initialized():
                dist.barrier()
                dist.destroy_process_group()
            faulthandler.cancel_dump_traceback_later()
        code = 0
    except BaseException:  # noqa: BLE001
        scratch = folder / f"scratch-{rank}"
        scratch.write_text(f"rank {rank}:\n{traceback.format_exc()}")
        scratch.rename(folder / f"error-{rank}")
    finally:
        # The ordinary end of an interpreter that had a process group aborts now and then, in threads of the group.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
