"""What a process learns of the others from the environment, and that no gap in it ends in runs side by side."""

import pytest

from fastjepa.exits import Exit
from fastjepa.parallel.launch import BY_HAND, OTHERS, SRUN, TORCHRUN, Launch, first_host, launch

BY_TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
    "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
BY_SRUN = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[003-007,9],x",
    "SLURM_JOB_ID": "1234567", "SLURM_NTASKS": "8",
}  # fmt: skip


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


def test_a_process_that_a_person_started_is_alone():
    assert launch({}) == BY_HAND == Launch(0, 1, 0, "", 0, "")
    assert launch({"HOME": "/root", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}) == BY_HAND


def test_torchrun_is_understood():
    assert launch(BY_TORCHRUN) == Launch(rank=3, size=4, local_rank=1, address="node1", port=29500, by="torchrun")


def test_one_process_of_torchrun_is_alone():
    """Whatever else is set: it meets nobody."""
    assert launch(BY_TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}) == BY_HAND
    assert launch({"WORLD_SIZE": "1"}) == BY_HAND
    with pytest.raises(ValueError, match=r"^RANK: expected 0 to 0 with WORLD_SIZE 1, given 1$"):
        launch(BY_TORCHRUN | {"WORLD_SIZE": "1", "RANK": "1"})


@pytest.mark.parametrize("name", TORCHRUN)
@pytest.mark.parametrize("gap", ["missing", "empty"])
def test_a_missing_variable_of_torchrun_is_named(name, gap):
    environment = without(BY_TORCHRUN, name) | ({} if gap == "missing" else {name: ""})
    with pytest.raises(ValueError) as caught:
        launch(environment)
    others = ", ".join(f"{one}={BY_TORCHRUN[one]}" for one in TORCHRUN if one != name)
    assert str(caught.value) == (
        f"{name} is not set beside {others}: start with torchrun --nproc-per-node N -m fastjepa.train ..., or with srun"
    )


@pytest.mark.parametrize("alone", TORCHRUN[:3])
def test_one_variable_of_torchrun_by_itself_is_refused(alone):
    others = ", ".join(name for name in TORCHRUN if name != alone)
    with pytest.raises(ValueError, match=rf"^{others} are not set beside {alone}=2: start with torchrun"):
        launch({alone: "2"})


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["two", "-1", "1.5", "0x2", " 1", "1e3", "٣", "1" * 20])
def test_what_is_no_number_is_quoted(name, value):
    with pytest.raises(ValueError) as caught:
        launch(BY_TORCHRUN | {name: value})
    assert str(caught.value).startswith(f"{name}: expected a number, given {value!r}: start with torchrun")


def test_a_process_of_srun_that_does_not_know_how_many_there_are_is_refused():
    with pytest.raises(ValueError, match=r"^SLURM_STEP_NUM_TASKS is not set beside SLURM_PROCID=3: start with"):
        launch({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"})
    assert launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).size == 1  # a batch script


@pytest.mark.parametrize(("rank", "size", "last"), [("4", "4", 3), ("9", "2", 1)])
def test_a_number_beyond_the_last_process_is_refused(rank, size, last):
    with pytest.raises(ValueError, match=f"^RANK: expected 0 to {last} with WORLD_SIZE {size}, given {rank}$"):
        launch(BY_TORCHRUN | {"RANK": rank, "WORLD_SIZE": size})


@pytest.mark.parametrize("port", ["0", "65536"])
def test_a_port_that_none_can_be_is_refused(port):
    with pytest.raises(ValueError, match=f"^MASTER_PORT: expected 1 to 65535, given {port}$"):
        launch(BY_TORCHRUN | {"MASTER_PORT": port})
    with pytest.raises(ValueError, match=f"^MASTER_PORT: expected 1 to 65535, given {port}$"):
        launch(BY_SRUN | {"MASTER_PORT": port})


def test_srun_is_understood():
    found = launch(BY_SRUN)
    assert found == Launch(rank=5, size=8, local_rank=1, address="gpu003", port=found.port, by="srun")


def test_all_processes_of_srun_meet_at_one_place_that_follows_from_the_job():
    places = {
        (launch(BY_SRUN | {"SLURM_PROCID": str(rank)}).address, launch(BY_SRUN | {"SLURM_PROCID": str(rank)}).port)
        for rank in range(8)
    }
    assert len(places) == 1
    ports = [launch(BY_SRUN | {"SLURM_JOB_ID": str(job)}).port for job in (1, 2, 19_999, 20_000, 999_999_998)]
    assert len(set(ports)) == 5
    assert all(1024 < port < 32768 for port in ports), "what the system gives to outgoing connections begins at 32768"


def test_a_place_that_the_user_named_is_taken_by_srun_too():
    found = launch(BY_SRUN | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1111"})
    assert (found.address, found.port) == ("10.0.0.7", 1111)


@pytest.mark.parametrize("name", SRUN)
def test_a_missing_variable_of_srun_is_named(name):
    with pytest.raises(ValueError, match=rf"^{name} is not set beside SLURM_.*: start with torchrun .*, or with srun$"):
        launch(without(BY_SRUN, name))


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID"])
def test_what_is_no_number_of_srun_is_quoted(name):
    with pytest.raises(ValueError, match=f"^{name}: expected a number, given 'many': start with"):
        launch(BY_SRUN | {name: "many"})


def test_a_number_beyond_the_last_process_of_srun_is_refused():
    with pytest.raises(ValueError, match=r"^SLURM_PROCID: expected 0 to 7 with SLURM_STEP_NUM_TASKS 8, given 8$"):
        launch(BY_SRUN | {"SLURM_PROCID": "8"})


def test_a_job_of_slurm_without_a_step_of_several_is_one_process():
    """In the batch script SLURM_NTASKS says how many srun may start; this process is one."""
    assert launch({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) == BY_HAND
    assert launch(BY_SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == BY_HAND


def test_torchrun_within_srun_is_torchrun():
    """One srun task a machine, each a torchrun: its variables are those of the processes."""
    found = launch(BY_SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"} | BY_TORCHRUN)
    assert found == launch(BY_TORCHRUN)


@pytest.mark.parametrize("name", OTHERS)
def test_mpirun_is_refused_for_several_processes(name):
    with pytest.raises(ValueError, match=rf"^{name} says that 4 processes were started by mpirun: start with torchrun"):
        launch({name: "4"})
    assert launch({name: "1"}) == BY_HAND


def test_variables_of_mpi_beside_those_of_srun_are_its_own():
    """With --mpi=pmi2 srun sets them too."""
    assert launch(BY_SRUN | {"PMI_SIZE": "8"}).by == "srun"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[003-007,9],x", "node003"),
        ("node[5,7-9]", "node5"),
        ("rack2-gpu[08-12]-ib", "rack2-gpu08-ib"),
        ("a-[1-2].cluster.org,b", "a-1.cluster.org"),
        ("x,node[1-2]", "x"),
        ("rack[1-2]node[05-06]", "rack1node05"),
    ],
)
def test_the_first_machine_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", "[1-2]", ",a", "node[1-2", "node1,"])
def test_a_node_list_without_a_name_is_refused(nodes):
    with pytest.raises(ValueError, match=r"^SLURM_STEP_NODELIST: expected names of machines, given "):
        first_host(nodes)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set beside WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE says that 2 processes were started by mpirun"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NODELIST, SLURM_JOB_ID are not set"),
        (BY_TORCHRUN | {"RANK": "4"}, "RANK: expected 0 to 3 with WORLD_SIZE 4, given 4"),
    ],
)
def test_a_program_that_does_not_know_its_place_ends_before_it_makes_a_run(run, monkeypatch, capsys, environment, says):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, folder = run()
    assert (code, folder) == (Exit.WRONG_INPUT, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
