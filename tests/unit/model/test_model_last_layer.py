"""The last layer computes only keys and values of the clean stream: exact against computing everything."""

import pytest
import torch

from bdtrain.model.transformer import assemble_streams


@pytest.mark.parametrize("shape", ["qwen3", "bd3lm"])
def test_dropping_clean_rows_changes_neither_values_nor_gradients(
    build, make_case, ragged, monkeypatch, shape
):
    from bdtrain.model.attention import StreamContext

    case = make_case(copies=2, documents=ragged)
    tokens = assemble_streams(case.xt, case.x0)

    def run():
        model = build(shape)
        hidden = model.run_layers(tokens, model._stream_context(case.layout, 2, True))
        rows = hidden.shape[0]
        noisy = hidden[: 2 * case.seq]
        weight = torch.linspace(-1, 1, noisy.numel(), dtype=torch.float64).view_as(noisy)
        (noisy * weight).sum().backward()
        return rows, noisy, dict(model.named_parameters())

    short, ours, parameters = run()
    monkeypatch.setattr(StreamContext, "output_rows", lambda self, total: total)
    whole, wanted, reference = run()
    assert (short, whole) == (32, 48)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    for name, parameter in parameters.items():
        if parameter.grad is not None or reference[name].grad is not None:
            torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=1e-10, atol=1e-11, msg=name)


def test_only_the_last_layer_drops_rows(build, make_case):
    case = make_case()
    model = build(num_layers=3)
    seen = []
    for layer in model.decoder.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    model(assemble_streams(case.xt, case.x0), case.layout, noisy_copies=1, clean=True)
    assert seen == [32, 32, 16]
