"""Who a process is under python, torchrun, deepspeed, srun and mpirun."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bdtrain.errors import ConfigError
from bdtrain.parallel.launch_environment import (
    FIRST_SLURM_PORT,
    SLURM_PORTS,
    Launch,
    first_host,
    read_launch,
    torch_environment,
)

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "worker-0",
    "MASTER_PORT": "29500",
    "CUDA_VISIBLE_DEVICES": "0,1",
}
# What sbatch puts into the environment of its script, and every step inherits.
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "4321",
    "SLURM_JOB_NODELIST": "gpu[07-09,12]",
    "SLURM_NNODES": "4",
    "SLURM_NTASKS": "32",
    "SLURM_TASKS_PER_NODE": "8(x4)",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
SRUN = {
    **BATCH_SCRIPT,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_NTASKS": "7",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "MASTER_ADDR": "node1",
}


def problem(environment: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        read_launch(environment)
    assert caught.value.exit_code == 3
    return str(caught.value)


@pytest.mark.parametrize("environment", [{}, {"PATH": "/bin"}, {"RANK": "", "WORLD_SIZE": " "}])
def test_process_started_by_hand_is_a_world_of_one(environment):
    assert read_launch(environment) == Launch(0, 0, 1, 1, None, None, "python")


def test_torchrun_is_believed():
    assert read_launch(TORCHRUN) == Launch(5, 1, 8, 4, "10.0.0.7", 29400, "torchrun")


def test_deepspeed_is_believed():
    assert read_launch(DEEPSPEED) == Launch(3, 1, 4, 2, "worker-0", 29500, "deepspeed")


def test_variables_set_by_hand_are_taken_for_one_machine():
    found = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    assert read_launch(found) == Launch(1, 1, 2, 2, "localhost", 29500, "environment")
    assert read_launch({"RANK": "0", "WORLD_SIZE": "1"}) == Launch(0, 0, 1, 1, None, None, "environment")


def test_ranks_that_meet_through_a_file_need_no_address():
    found = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "BDTRAIN_RENDEZVOUS": "file:///tmp/meeting"}
    assert read_launch(found) == Launch(1, 1, 2, 2, None, None, "environment")


@pytest.mark.parametrize(
    "found", [{"RANK": "1"}, {"LOCAL_RANK": "0"}, {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, {"WORLD_SIZE": "2"}]
)
def test_half_an_environment_is_refused(found):
    text = problem(found)
    for name in {"RANK", "WORLD_SIZE"} - set(found):
        assert name in text.split("but not")[1]
    assert "torchrun" in text and "unset" in text


def test_srun_task_is_read_from_its_step_not_from_the_job():
    launch = read_launch(SRUN)
    assert (launch.rank, launch.local_rank, launch.world_size, launch.local_world_size) == (5, 1, 7, 3)
    assert (launch.master_addr, launch.launcher) == ("gpu08", "srun")
    first = read_launch({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    assert first.local_world_size == 4
    assert (first.master_addr, first.master_port) == (launch.master_addr, launch.master_port)


def test_srun_without_the_names_of_the_step_reads_those_of_the_job():
    step = {key: value for key, value in SRUN.items() if not key.startswith("SLURM_STEP_")}
    launch = read_launch({**step, "SLURM_STEP_ID": "0", "SLURM_NNODES": "2"})
    # Seven tasks on two nodes: four on the fuller one.
    assert (launch.rank, launch.world_size, launch.local_world_size) == (5, 7, 4)
    assert launch.master_addr == "gpu07"


def test_srun_port_differs_between_jobs_and_steps_and_is_safe():
    def port(job, step):
        return read_launch({**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).master_port

    neighbours = {port(job, step) for job in range(4321, 4331) for step in range(3)}
    assert len(neighbours) == 30
    assert all(FIRST_SLURM_PORT <= port(job, 0) < FIRST_SLURM_PORT + SLURM_PORTS for job in (1, 10**9))
    assert FIRST_SLURM_PORT > 1024
    assert FIRST_SLURM_PORT + SLURM_PORTS <= 32768


def test_explicit_address_and_port_win_under_srun():
    launch = read_launch({**SRUN, "MASTER_ADDR": "ib0.gpu08", "MASTER_PORT": "12345"})
    assert (launch.master_addr, launch.master_port) == ("ib0.gpu08", 12345)
    assert read_launch({**SRUN, "MASTER_PORT": "12345"}).master_addr == "gpu08"


@pytest.mark.parametrize(
    "environment",
    [
        BATCH_SCRIPT,
        {**BATCH_SCRIPT, "SLURM_NTASKS": "1"},
        # Slurm's numbers for the shell that salloc opens on a node, and for the batch script.
        {**BATCH_SCRIPT, "SLURM_STEP_ID": "4294967290"},
        {**BATCH_SCRIPT, "SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "1"},
        # salloc's shell on the login node has no rank at all.
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "gpu[1-2]"},
    ],
)
def test_python_in_a_shell_of_an_allocation_is_a_world_of_one(environment):
    assert read_launch(environment) == Launch(0, 0, 1)


def test_interactive_srun_of_one_task_is_a_world_of_one():
    shell = {
        **BATCH_SCRIPT,
        "SLURM_STEP_ID": "3",
        "SLURM_NTASKS": "1",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_TASKS_PER_NODE": "1",
    }
    assert read_launch(shell) == Launch(0, 0, 1, 1, None, None, "srun")


@pytest.mark.parametrize("inner", [TORCHRUN, DEEPSPEED])
def test_launcher_that_srun_started_counts_rather_than_srun(inner):
    # One torchrun or deepspeed per node, each with several ranks, and the other way round.
    for tasks in ("2", "64"):
        outer = {**SRUN, "SLURM_NTASKS": tasks, "SLURM_STEP_NUM_TASKS": tasks}
        assert read_launch({**outer, **inner}) == read_launch(inner)


def test_mpirun_is_believed_also_inside_an_allocation():
    expected = Launch(2, 0, 4, 2, "node1", 29500, "openmpi")
    assert read_launch(MPIRUN) == expected
    assert read_launch({**SRUN, **MPIRUN}) == expected


def test_mpirun_of_one_process_needs_no_address():
    alone = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    assert read_launch(alone) == Launch(0, 0, 1, 1, None, None, "openmpi")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({**TORCHRUN, "RANK": "x"}, "RANK='x'; it must be a whole number"),
        ({**TORCHRUN, "WORLD_SIZE": "8.0"}, "WORLD_SIZE='8.0'; it must be a whole number"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT='http'; it must be a whole number"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT=70000; choose a port from 1 to 65535"),
        ({**TORCHRUN, "RANK": "8"}, "RANK=8 is not in 0 to WORLD_SIZE-1=7"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK=-1 is not in 0 to WORLD_SIZE-1=7"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE=0; it must be at least 1"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_RANK=4 is not in 0 to LOCAL_WORLD_SIZE-1=3"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 is not in 1 to WORLD_SIZE=8"),
        ({**DEEPSPEED, "LOCAL_SIZE": "0"}, "LOCAL_SIZE=0 is not in 1 to WORLD_SIZE=4"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "WORLD_SIZE=8 without MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 without MASTER_ADDR"),
        ({**MPIRUN, "MASTER_ADDR": ""}, "OMPI_COMM_WORLD_SIZE=4 without MASTER_ADDR"),
        ({**MPIRUN, "OMPI_COMM_WORLD_SIZE": ""}, "but not OMPI_COMM_WORLD_SIZE"),
        ({**MPIRUN, "OMPI_COMM_WORLD_RANK": "4"}, "OMPI_COMM_WORLD_RANK=4 is not in 0 to"),
        ({**SRUN, "SLURM_PROCID": "7"}, "SLURM_PROCID=7 is not in 0 to SLURM_STEP_NUM_TASKS-1=6"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "", "SLURM_NTASKS": ""}, "but not SLURM_NTASKS"),
        ({**SRUN, "SLURM_JOB_ID": "a"}, "SLURM_JOB_ID='a'; it must be a whole number"),
        ({**SRUN, "SLURM_STEP_NODELIST": "gpu[08"}, "'gpu[08' of Slurm cannot be read; set MASTER_ADDR"),
        ({**SRUN, "SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, "without MASTER_ADDR"),
        ({**SRUN, "RANK": "0"}, "sets RANK but not WORLD_SIZE"),
        # Left over in the shell that called srun or mpirun: each task would be rank 0 of a world of one.
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE=1 but SLURM_STEP_NUM_TASKS=7 processes"),
        ({**MPIRUN, "RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE=1 but OMPI_COMM_WORLD_SIZE=4 processes"),
    ],
)
def test_contradiction_is_refused_with_its_numbers(environment, expected):
    assert expected in problem(environment)


def test_all_problems_are_reported_together():
    text = problem({**TORCHRUN, "RANK": "9", "LOCAL_RANK": "9", "MASTER_ADDR": ""})
    for expected in ("RANK=9", "LOCAL_RANK=9", "without MASTER_ADDR"):
        assert expected in text


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[07-09,12]", "gpu07"),
        ("gpu[12,07-09]", "gpu12"),
        ("gpu[3]", "gpu3"),
        ("login,gpu[1-2]", "login"),
        ("gpu[1-2],login", "gpu1"),
        ("rack[2-3]node[05-06]", "rack2node05"),
        ("a-b[001-128].cluster.example,x", "a-b001.cluster.example"),
    ],
)
def test_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", "gpu[", "gpu[]", "gpu[1-2", "[1-2]]", ",gpu1", "gpu 1"])
def test_what_is_no_node_list_is_refused(nodelist):
    with pytest.raises(ConfigError, match="set MASTER_ADDR"):
        first_host(nodelist)


@pytest.mark.parametrize("environment", [{}, TORCHRUN, DEEPSPEED, SRUN, MPIRUN])
def test_what_is_told_to_torch_reads_back_as_the_same_ranks(environment):
    launch = read_launch(environment)
    again = read_launch(torch_environment(launch))
    numbers = ("rank", "local_rank", "world_size", "local_world_size", "master_addr", "master_port")
    assert all(getattr(again, name) == getattr(launch, name) for name in numbers)


def test_reading_the_environment_imports_nothing_heavy():
    code = (
        "import sys\nfrom bdtrain.parallel.launch_environment import read_launch\nread_launch({})\n"
        "sys.exit(bool({'torch', 'numpy', 'deepspeed', 'megatron', 'pydantic'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
