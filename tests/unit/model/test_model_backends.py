"""The model over every attention backend, and the ones that cannot run refused when it is built."""

import pytest
import torch

from bdtrain.errors import ConfigError
from bdtrain.model.transformer import assemble_streams


def loss_and_gradients(build, case, backend):
    """Summed nll of the masked rows and every gradient, float32."""
    model = build(dtype=torch.float32, head_dim=16, overrides={"attention_backend": backend})
    tokens = assemble_streams(case.xt, case.x0)
    view = model(tokens, case.layout, noisy_copies=case.copies, clean=True, rows=case.masked)
    loss = view.nll(case.targets[case.masked]).sum()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", ["tree", "flash", "triton"])
def test_every_backend_gives_the_dense_losses_and_gradients(build, make_case, backend):
    documents = torch.tensor([[0] * 5 + [1] * 11], dtype=torch.int32)
    case = make_case(batch=1, copies=2, documents=documents)
    loss, gradients = loss_and_gradients(build, case, "dense")
    other, others = loss_and_gradients(build, case, backend)
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=0.0)
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


def test_a_backend_that_cannot_run_is_refused_when_the_model_is_built(build, monkeypatch):
    with pytest.raises(ConfigError, match=r"model.attention_backend: .*no backward on a CPU"):
        build(overrides={"attention_backend": "flex"})
    with pytest.raises(ConfigError, match=r"head_dim=12; its kernels take multiples of 8"):
        build(dtype=torch.float32, head_dim=12, overrides={"attention_backend": "triton"})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"needs a CUDA device"):
        build(dtype=torch.float32, head_dim=16, overrides={"attention_backend": "triton"})
