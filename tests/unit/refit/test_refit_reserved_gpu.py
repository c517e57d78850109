"""The GPU that is left to re-fits: which it is under each launcher, and that it is not training's."""

import json
from types import SimpleNamespace

import pytest
import torch

from bdtrain.config import RunConfig
from bdtrain.errors import ConfigError
from bdtrain.parallel.launch_environment import Launch, read_launch
from bdtrain.refit.reserved_gpu import check_reserved, visible_gpu
from bdtrain.testing import tiny_model_config
from bdtrain.train import launch as launching
from bdtrain.train.launch import train_from_config

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "6", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "6", "MASTER_ADDR": "h"}
TORCHRUN["TORCHELASTIC_RUN_ID"] = "1"
DEEPSPEED = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_SIZE": "3", "MASTER_ADDR": "h"}
DEEPSPEED |= {"CROSS_RANK": "0", "CROSS_SIZE": "1", "CUDA_VISIBLE_DEVICES": "0,2,3"}


def run_config(gpu, **refit):
    return RunConfig.model_validate(
        {
            "model": tiny_model_config(),
            "data": {"kind": "synthetic", "seq_len": 32},
            "train": {"steps": 1, "global_batch_size": 8},
            "refit": {"mode": "clip", "placement": "process", "gpu": gpu, **refit},
        }
    )


def check(tmp_path, gpu, environment=None, *, count=8, driver=8, launch=None, **refit):
    folder = tmp_path / "gpus"
    if driver:
        folder.mkdir(exist_ok=True)
        for number in range(driver):
            (folder / f"0000:{number:02x}:00.0").mkdir(exist_ok=True)
    environment = environment or {}
    launch = launch or read_launch(environment)
    check_reserved(run_config(gpu, **refit), launch, environment, count=count, driver=folder)


def refusal(*given, **more):
    with pytest.raises(ConfigError) as found:
        check(*given, **more)
    return str(found.value)


@pytest.mark.parametrize(
    ("gpu", "environment", "more"),
    [
        (6, TORCHRUN, {}),
        (7, TORCHRUN, {"placement": "auto"}),
        (1, {}, {"count": 2}),
        # Of the visible ones, whatever they are called.
        (2, {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b,GPU-c"}, {"count": 3}),
    ],
)
def test_a_gpu_behind_those_of_the_ranks_is_free(tmp_path, gpu, environment, more):
    check(tmp_path, gpu, environment, **more)


def test_it_is_shown_by_the_name_that_the_launcher_gave_it():
    assert visible_gpu(2, {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b,GPU-c"}) == "GPU-c"
    assert visible_gpu(7, TORCHRUN) == "7"
    # One that is not among them: the process sees none, and says so.
    assert visible_gpu(3, {"CUDA_VISIBLE_DEVICES": "4,5"}) == ""


def test_a_gpu_of_the_ranks_is_refused(tmp_path):
    said = refusal(tmp_path, 5, TORCHRUN)
    assert said.startswith("refit.gpu=5: training uses GPU 5, with 6 ranks") and "fewer ranks" in said
    assert "training uses GPU 0, with 1 rank on" in refusal(tmp_path, 0)
    # A scheduler that shows each task its own: it trains there.
    assert "training uses GPU 0" in refusal(tmp_path, 0, TORCHRUN, count=1)


def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    said = refusal(tmp_path, 8, TORCHRUN)
    assert "has 8 GPUs for this run" in said and "GPU 8 is none of them" in said
    shown = {"CUDA_VISIBLE_DEVICES": "4,5"}
    assert "(CUDA_VISIBLE_DEVICES=4,5)" in refusal(tmp_path, 2, shown, count=2)
    assert "has 0 GPUs" in refusal(tmp_path, 1, count=0)


def test_the_deepspeed_launcher_hides_the_free_ones_and_they_have_the_machines_numbers(tmp_path):
    for gpu in (1, 7):
        check(tmp_path, gpu, DEEPSPEED, count=3)
        assert visible_gpu(gpu, DEEPSPEED) == str(gpu)
    said = refusal(tmp_path, 3, DEEPSPEED, count=3)
    assert "training uses GPU 3, with 3 ranks" in said and "--include" in said
    assert "GPU 8 is none of them" in refusal(tmp_path, 8, DEEPSPEED, count=3)


def test_where_the_driver_says_nothing_the_process_will(tmp_path):
    check(tmp_path, 9, DEEPSPEED, count=3, driver=0)


def test_only_ranks_of_the_first_machine_judge(tmp_path):
    check(tmp_path, 0, launch=Launch(rank=6, local_rank=0, world_size=12, local_world_size=6))
    refusal(tmp_path, 0, launch=Launch(rank=5, local_rank=5, world_size=12, local_world_size=6))


def test_the_gpu_of_a_run_without_re_fits_does_not_matter(tmp_path):
    for gpu in (0, 99):
        check(tmp_path, gpu, mode="off")
    check(tmp_path, None)


@pytest.fixture
def told(monkeypatch):
    """What rank 0 tells the ranks of all machines, who have met; no group is made."""
    found = []

    class Communicator:
        rank = 0

        def broadcast_object(self, value):
            if self.rank == 0:
                found.append(json.dumps(value))
            return json.loads(found[0])

    communicator = Communicator()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("prepare_machine", "init_groups", "host_group", "destroy_groups"):
        monkeypatch.setattr(launching, name, lambda *_, **__: None)
    monkeypatch.setattr(launching, "TorchCommunicator", lambda group: communicator)
    return communicator, found


def start(folder, rank):
    config = run_config(0)
    config = config.model_copy(update={"run": config.run.model_copy(update={"folder": str(folder)})})
    launch = Launch(rank=rank, local_rank=0, world_size=2, local_world_size=1)
    console = SimpleNamespace(line=print)
    layout = SimpleNamespace(world_size=2, tp=1, pp=1)
    train_from_config(config, launch, layout, {}, console=console, stop=None)


def test_a_run_is_refused_before_it_starts_and_on_every_machine(tmp_path, told):
    """A rank of another machine, which cannot judge, would wait for the first in vain."""
    communicator, found = told
    said = []
    for rank in range(2):
        communicator.rank = rank
        with pytest.raises(ConfigError, match="training uses GPU 0") as refused:
            start(tmp_path / "run", rank)
        said.append(str(refused.value))
    assert said[0] == said[1] and len(found) == 1
    assert not (tmp_path / "run").exists()
