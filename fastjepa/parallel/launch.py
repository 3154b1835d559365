"""What a launcher says to each process that it starts: torchrun, or srun of SLURM."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
# Of launchers that are not understood: how many processes they have started.
OTHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_WORLD_SIZE")
USE = "start with torchrun --nproc-per-node N -m fastjepa.train ..., or with srun"


@dataclass(frozen=True)
class Launch:
    """One of `size` processes that train together: its number among all, and among those of its machine.

    They meet at `address`:`port`. `by` names the launcher; empty for a process that was started by hand.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0
    by: str = ""


BY_HAND = Launch()


def launch(environment: Mapping[str, str]) -> Launch:
    """What the environment variables say. Errors: ValueError where some are missing or contradict each other.

    A process never trains alone because a variable is missing: N such runs would write into one folder.
    """
    if any(name in environment for name in TORCHRUN[:3]):
        if environment.get("WORLD_SIZE") == "1" and environment.get("RANK", "0") == "0":
            return BY_HAND
        return _by_torchrun(environment)
    if _number(environment, "SLURM_STEP_NUM_TASKS", "1") > 1:
        return _by_srun(environment)
    if _number(environment, "SLURM_PROCID", "0") > 0 and "SLURM_STEP_NUM_TASKS" not in environment:
        # The first of such processes cannot be told from a batch script; this one would train beside it.
        raise ValueError(f"SLURM_STEP_NUM_TASKS is not set beside SLURM_PROCID={environment['SLURM_PROCID']}: {USE}")
    for name in OTHERS:
        if _number(environment, name, "1") > 1:
            raise ValueError(f"{name} says that {environment[name]} processes were started by mpirun: {USE}")
    return BY_HAND


def _by_torchrun(environment: Mapping[str, str]) -> Launch:
    _all_there(environment, TORCHRUN)
    rank, size, local_rank, port = (
        _number(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    )
    return _checked(Launch(rank, size, local_rank, environment["MASTER_ADDR"], port, "torchrun"), "RANK", "WORLD_SIZE")


def _by_srun(environment: Mapping[str, str]) -> Launch:
    """SLURM names no place to meet: the first machine of the step, and a port that follows from the job's number."""
    _all_there(environment, SRUN)
    rank, size, local_rank, job = (
        _number(environment, name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID")
    )
    address = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
    # Below the range that systems give to outgoing connections, which begins at 32768.
    port = _number(environment, "MASTER_PORT", str(12_000 + job % 20_000))
    found = Launch(rank, size, local_rank, address, port, "srun")
    return _checked(found, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: node[003-007,9],other -> node003."""
    name = r"[^,\[\]](?:[^,\[\]]|\[[^\[\]]+\])*"
    found = re.fullmatch(rf"({name})(?:,{name})*", nodes)
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST: expected names of machines, given {nodes!r}")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", found[1])


def _all_there(environment: Mapping[str, str], names: tuple[str, ...]) -> None:
    missing = [name for name in names if not environment.get(name)]
    if missing:
        given = ", ".join(f"{name}={environment[name]}" for name in names if environment.get(name))
        are = "is" if len(missing) == 1 else "are"
        raise ValueError(f"{', '.join(missing)} {are} not set beside {given or 'the other variables'}: {USE}")


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name) or default
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise ValueError(f"{name}: expected a number, given {text!r}: {USE}")
    return int(text)


def _checked(found: Launch, rank: str, size: str) -> Launch:
    if not 0 <= found.rank < found.size:
        raise ValueError(f"{rank}: expected 0 to {found.size - 1} with {size} {found.size}, given {found.rank}")
    if not 0 < found.port < 65536:
        raise ValueError(f"MASTER_PORT: expected 1 to 65535, given {found.port}")
    return found
