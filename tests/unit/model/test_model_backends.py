"""The model over every attention backend, and the ones that cannot run refused when it is built."""

import pytest
import torch

from bdtrain.diffusion.visibility import build_layout
from bdtrain.errors import ConfigError
from bdtrain.model.transformer import assemble_streams


def device_of(backend):
    """Where a backend is tested: Triton's kernels are compiled where there is a GPU, else interpreted."""
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


def loss_and_gradients(build, case, backend, device):
    """Summed nll of the masked rows and every gradient, float32."""
    weights = build(dtype=torch.float32, head_dim=16).state_dict()
    overrides = {"attention_backend": backend, "device": device}
    model = build(dtype=torch.float32, head_dim=16, jitter=False, overrides=overrides)
    model.load_state_dict(weights)
    tokens, rows = assemble_streams(case.xt, case.x0).to(device), case.masked.to(device)
    layout = build_layout(case.documents.to(device), case.block_size, isolate=True)
    view = model(tokens, layout, noisy_copies=case.copies, clean=True, rows=rows)
    loss = view.nll(case.targets.to(device)[rows]).sum()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", ["tree", "flash", "triton"])
def test_every_backend_gives_the_dense_losses_and_gradients(build, make_case, backend, triton_interpreter):
    documents = torch.tensor([[0] * 5 + [1] * 11], dtype=torch.int32)
    case, device = make_case(batch=1, copies=2, documents=documents), device_of(backend)
    loss, gradients = loss_and_gradients(build, case, "dense", device)
    other, others = loss_and_gradients(build, case, backend, device)
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=0.0)
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


def test_a_backend_that_cannot_run_is_refused_when_the_model_is_built(build, monkeypatch):
    with pytest.raises(ConfigError, match=r"model.attention_backend: .*no backward on a CPU"):
        build(overrides={"attention_backend": "flex"})
    overrides = {"attention_backend": "triton", "device": device_of("triton")}
    with pytest.raises(ConfigError, match=r"head_dim=12; its kernels take multiples of 8"):
        build(dtype=torch.float32, head_dim=12, overrides=overrides)
    # The model below is for a CPU, on a machine with a GPU too.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"needs a CUDA device"):
        build(dtype=torch.float32, head_dim=16, overrides={"attention_backend": "triton"})
