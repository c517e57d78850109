"""Five ways to start a run are the same run; a mistake is one message, whoever starts it."""

import contextlib
import json
import random
import socket
from pathlib import Path

import pytest

from bdtrain.testing.ranks import rank_environment
from bdtrain.tracking.jsonl import read_lines
from tests.reliability.launched import Launched, free_port, wait_until

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "run" / "tiny_synthetic.yaml"
STEPS = 6
QUICK = (
    f"train.steps={STEPS}",
    "train.log_every_steps=1",
    "validation.sequences=4",
    "validation.sample_tokens=4",
    "tracking.mlflow=false",
)
LIMIT_S = 600.0


def pretrain(folder, *overrides):
    return ["launchers/pretrain.py", "--config", TINY, f"run.folder={folder}", *QUICK, *overrides]


def losses(folder):
    """Step and loss of every report, the loss with all its bits."""
    lines = [line for _, line in read_lines(folder / "metrics.jsonl")]
    return [(line["step"], line["train/loss"].hex()) for line in lines if "train/loss" in line]


def slurm_job():
    """A job number for which the port that the ranks choose is free."""
    while True:
        port = random.randrange(20000, 30000)
        with contextlib.suppress(OSError), socket.socket() as found:
            found.bind(("127.0.0.1", port))
            # The port is 20000 + 31 * job modulo 10000, for step 0.
            return (port - 20000) * pow(31, -1, 10000) % 10000


def torchrun(folder, scratch):
    front = ["torchrun", "--nproc_per_node", 2, "--master_addr", "127.0.0.1", "--master_port", free_port()]
    return [Launched([*front, *pretrain(folder)], scratch / "log")]


def srun(folder, scratch):
    job = slurm_job()
    return [
        Launched(
            ["python", *pretrain(folder)],
            scratch / f"log-{rank}",
            {
                "SLURM_JOB_ID": str(job),
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_TASKS_PER_NODE": "2",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "SLURM_NODEID": "0",
            },
        )
        for rank in range(2)
    ]


def deepspeed(folder, scratch):
    front = ["deepspeed", "--num_gpus", 2, "--master_port", free_port()]
    return [Launched([*front, *pretrain(folder)], scratch / "log")]


def two_nodes(folder, scratch):
    """One rank on each of two machines that are both this one; the command is given once on each."""
    scratch.mkdir()
    (scratch / "hostfile").write_text("first-node slots=1\nsecond-node slots=1\n")
    port = free_port()
    front = ["deepspeed", "-H", scratch / "hostfile", "--no_ssh", "--master_addr", "127.0.0.1"]
    return [
        Launched(
            [*front, "--master_port", port, "--node_rank", node, *pretrain(folder)], scratch / f"log-{node}"
        )
        for node in range(2)
    ]


def finish(runs):
    """Exit codes and output of commands that belong together; none of their processes is left."""
    with contextlib.ExitStack() as stack:
        for run in runs:
            stack.enter_context(run)
        codes = [run.wait(LIMIT_S) for run in runs]
        for run in runs:
            assert wait_until(lambda run=run: not run.processes(), 10), run.processes()
        return codes, [run.text() for run in runs]


@pytest.fixture(scope="module")
def by_torchrun(tmp_path_factory):
    """Folder of the run that torchrun started with two ranks."""
    root = tmp_path_factory.mktemp("torchrun")
    codes, texts = finish(torchrun(root / "run", root / "scratch"))
    assert codes == [0], texts[0][-3000:]
    assert [step for step, _ in losses(root / "run")] == list(range(1, STEPS + 1))
    return root / "run"


@pytest.mark.parametrize("launcher", [srun, deepspeed, two_nodes])
def test_every_launcher_starts_the_same_run(tmp_path, by_torchrun, launcher):
    folder = tmp_path / "run"
    runs = launcher(folder, tmp_path / "scratch")
    codes, texts = finish(runs)
    assert codes == [0] * len(runs), texts
    assert losses(folder) == losses(by_torchrun)
    start = next(line for _, line in read_lines(folder / "metrics.jsonl"))
    assert (start["event"], start["world_size"]) == ("start", 2)
    assert json.loads((folder / "EXIT.json").read_text())["reason"] == "finished"
    # One rank tells the story.
    assert sum(text.count("parameters on 2 ranks") for text in texts) == 1


def test_one_process_computes_the_same_run(tmp_path, by_torchrun):
    folder = tmp_path / "run"
    codes, texts = finish([Launched(["python", *pretrain(folder)], tmp_path / "log")])
    assert codes == [0], texts
    ours, theirs = ([float.fromhex(loss) for _, loss in losses(run)] for run in (folder, by_torchrun))
    assert ours == pytest.approx(theirs, rel=1e-5)


# --- mistakes


def started_wrongly(folder, scratch, world_size, *overrides):
    """Exit codes and output of ranks that were started without a launcher."""
    scratch.mkdir()
    return finish(
        [
            Launched(
                ["python", *pretrain(folder, *overrides)],
                scratch / f"log-{rank}",
                rank_environment(rank, world_size, scratch / "meeting"),
            )
            for rank in range(world_size)
        ]
    )


@pytest.mark.parametrize(
    ("world_size", "overrides", "words"),
    [
        (3, ["parallel.tp=3"], ["tp=3", "num_heads=4"]),
        (3, ["parallel.tp=2"], ["tp=2", "3"]),
        (2, ["parallel.pp=2", "parallel.zero_stage=3"], ["zero_stage=3", "pp"]),
        (2, ["parallel.zero_stage=0"], ["zero_stage", "1, 2 or 3"]),
        (2, ["parallel.tpp=2"], ["parallel.tpp", "parallel.tp"]),
    ],
    ids=["heads", "world size", "ZeRO 3 with stages", "ZeRO 0", "misspelt"],
)
def test_mistake_is_one_message_of_one_rank_before_any_work(tmp_path, world_size, overrides, words):
    folder = tmp_path / "run"
    codes, texts = started_wrongly(folder, tmp_path / "scratch", world_size, *overrides)
    assert codes == [3] * world_size, texts
    assert texts[0].startswith("error: "), texts
    assert texts[0].count("error:") == 1, texts[0]
    assert texts[1:] == [""] * (world_size - 1)
    for word in words:
        assert word in texts[0], texts[0]
    assert "Traceback" not in texts[0]
    assert not folder.exists()
    print(texts[0])


def test_rule_that_matches_no_parameter_is_one_message_and_leaves_no_folder(tmp_path):
    folder = tmp_path / "run"
    rule = "optim.groups=[{match: no_such_weight, lr_scale: 0.5}]"
    codes, texts = started_wrongly(folder, tmp_path / "scratch", 2, rule)
    assert codes == [3, 3], texts
    assert "".join(texts).count("error:") == 1, texts
    assert "error: optim.groups: no parameter matches 'no_such_weight'; names look like " in texts[0]
    assert "Traceback" not in "".join(texts)
    assert not folder.exists()
    print(texts)


@pytest.mark.soak
def test_mistake_under_the_deepspeed_command_is_told_once(tmp_path):
    folder = tmp_path / "run"
    front = ["deepspeed", "--num_gpus", 2, "--master_port", free_port()]
    command = [*front, *pretrain(folder, "parallel.tp=2", "model.num_kv_heads=1")]
    codes, [text] = finish([Launched(command, tmp_path / "log")])
    assert codes == [3], text
    assert text.count("tp=2 does not divide num_kv_heads=1") == 1, text
    assert text.count("error: ") == 1, text
    assert "Traceback" not in text
    assert not folder.exists()
    print(text)
