"""What the libraries are told."""

import subprocess
import sys

import torch

from bdtrain.parallel import cpu


def test_shim_is_not_installed_where_cuda_is(monkeypatch):
    before = torch.cuda.current_device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cpu.install_cpu_shim() is False
    assert torch.cuda.current_device is before


def test_schedule_context_rewrites_the_literal_device_only():
    from megatron.core.pipeline_parallel import schedules

    with cpu.schedule_device_context():
        assert schedules.torch.zeros(1, device="cuda").device.type == "cpu"
        assert schedules.torch.zeros(1, device="meta").device.type == "meta"
        assert schedules.torch.ones is torch.ones
    assert schedules.torch is torch


def test_configuration_is_checked_without_torch():
    code = (
        "import sys\nfrom bdtrain.config import load_config\n"
        "load_config(['configs/run/tiny_synthetic.yaml'], [])\n"
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
