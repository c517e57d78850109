"""Who a process is, and what the libraries are told."""

import subprocess
import sys

import pytest
import torch

from bdtrain.errors import ConfigError
from bdtrain.parallel import cpu
from bdtrain.parallel.groups import Launch, read_launch


def test_process_started_by_hand_is_a_world_of_one():
    assert read_launch({}) == Launch(rank=0, local_rank=0, world_size=1)


def test_launcher_is_believed():
    assert read_launch({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}) == Launch(5, 1, 8)


@pytest.mark.parametrize(
    "found", [{"RANK": "1"}, {"LOCAL_RANK": "0"}, {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}]
)
def test_half_an_environment_is_refused(found):
    with pytest.raises(ConfigError, match=r"torchrun.*or unset"):
        read_launch(found)


def test_environment_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="whole numbers"):
        read_launch({"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})


def test_shim_is_not_installed_where_cuda_is(monkeypatch):
    before = torch.cuda.current_device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cpu.install_cpu_shim() is False
    assert torch.cuda.current_device is before


def test_schedule_context_rewrites_the_literal_device_only():
    with cpu.schedule_device_context():
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.zeros(1, device="meta").device.type == "meta"


def test_configuration_is_checked_without_torch():
    code = (
        "import sys\nfrom bdtrain.config import load_config\n"
        "load_config(['configs/run/tiny_synthetic.yaml'], [])\n"
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
