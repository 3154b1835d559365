"""A process that has imported the program once, and forks a child for every run that it is asked for.

A start of the real program then costs a fork instead of the seconds of importing torch. Requests are lines of JSON on
the standard input, answers lines of JSON on the standard output:

    {"start": [ARGUMENT, ...], "output": PATH, "sabotage": [[NAME, {...}], ...]}   ->  {"pid": N}
    {"wait": PID, "seconds": N}                                                   ->  {"code": N or null}

A child runs `fastjepa.train.main`, with what it prints in PATH.out and PATH.err, in a session of its own. `sabotage`
names functions of `sabotage.py`, called before the program.
"""

import atexit
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback

import torch

from fastjepa import train
from tests.reliability import sabotage

# What a run imports late, so that no child has to.
EARLY = (
    "fastjepa.start",
    "safetensors.torch",
    "torch.nn.attention.varlen",
    "einops._torch_specific",
    "av.subtitles.stream",
)


def main() -> int | str | None:
    """Serve until the input ends; in a child, run the program. Returns the exit code of this process."""
    torch.set_num_threads(1)
    for name in EARLY:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    gc.freeze()  # what lives now is never looked at again, in no child
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            child = os.fork()
            if child == 0:
                answers.close()
                return program(request)
            answer = {"pid": child}
        else:
            answer = {"code": wait(request["wait"], request["seconds"])}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def wait(child: int, seconds: float) -> int | None:
    """The exit code of a child, minus the number of the signal that killed it; None where it still runs by then."""
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def program(request: dict) -> int | str | None:
    """Run the program as `python -m fastjepa.train` does; returns what it hands to sys.exit."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((0, os.devnull), (1, f"{request['output']}.out"), (2, f"{request['output']}.err")):
        handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout.reconfigure(line_buffering=True)
    sys.argv = ["fastjepa.train", *request["start"]]
    for name, arguments in request["sabotage"]:
        getattr(sabotage, name)(**arguments)
    return train.main(request["start"])


def leave(ending: int | str | None) -> None:
    """What the interpreter does at its end, but for taking torch apart, which takes longer than a whole short run."""
    if isinstance(ending, str):
        print(ending, file=sys.stderr)
        ending = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ending or 0)


if __name__ == "__main__":
    try:
        ending = main()
    except SystemExit as end:
        ending = end.code
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        ending = 1
    leave(ending)
