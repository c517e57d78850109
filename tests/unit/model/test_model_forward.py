"""The model against a serial transformer in plain torch, float64."""

import pytest
import torch

from bdtrain.errors import ShapeError


def run_both(build, oracle, case, shape, *, noisy_copies, clean, **changes):
    from bdtrain.model.transformer import assemble_streams
    from bdtrain.model.weights import full_state

    model = build(shape, **changes)
    tokens = assemble_streams(case.xt if noisy_copies else None, case.x0 if clean else None)
    out = noisy_copies or 1
    rows = torch.ones(case.batch, out, case.seq, dtype=torch.bool)
    targets = case.x0[:, None].expand(-1, out, -1)
    view = model(tokens, case.layout, noisy_copies=noisy_copies, clean=clean, rows=rows)
    ours = view.nll(targets[rows]).view(targets.shape)

    from bdtrain.testing import tiny_model_config

    state = {name: value.requires_grad_() for name, value in full_state(model).items()}
    mask = oracle.mask(case.documents, case.block_size, noisy_copies=noisy_copies, clean=clean)
    streams = noisy_copies + int(clean)
    section = tiny_model_config(shape, **{k: v for k, v in changes.items() if k != "overrides"})
    logits = oracle.logits(state, section, tokens, case.positions(streams), mask)
    wanted = oracle.nll(logits.unflatten(1, (streams, case.seq))[:, :out], targets)
    return model, state, ours, wanted


@pytest.mark.parametrize("shape", ["qwen3", "bd3lm"])
@pytest.mark.parametrize(("copies", "clean"), [(1, True), (2, True), (1, False), (0, True)])
def test_nll_and_every_gradient_equal_the_serial_transformer(
    build, oracle, make_case, ragged, shape, copies, clean
):
    case = make_case(copies=max(copies, 1), documents=ragged)
    model, state, ours, wanted = run_both(build, oracle, case, shape, noisy_copies=copies, clean=clean)
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.rand(ours.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (ours * weight).sum().backward()
    (wanted * weight).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_any_number_of_query_groups_equals_the_serial_transformer(build, oracle, make_case, num_kv_heads):
    case = make_case()
    _, _, ours, wanted = run_both(
        build, oracle, case, "qwen3", noisy_copies=1, clean=True, num_kv_heads=num_kv_heads
    )
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute": "full"},
        {"recompute": "core_attn"},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    ],
)
def test_recomputed_activations_give_the_same_gradients(build, oracle, make_case, recompute):
    case = make_case()
    plain, _, ours, _ = run_both(build, oracle, case, "qwen3", noisy_copies=1, clean=True)
    saving, _, again, _ = run_both(
        build, oracle, case, "qwen3", noisy_copies=1, clean=True, overrides=recompute
    )
    ours.sum().backward()
    again.sum().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("recompute", "attention", "mlp"), [("none", 0, 0), ("core_attn", 3, 0), ("full", 3, 3)]
)
def test_backward_makes_again_what_was_asked_for(build, make_case, recompute, attention, mlp):
    from bdtrain.model.transformer import assemble_streams

    case = make_case()
    model = build(num_layers=3, overrides={"recompute": recompute})
    seen = []
    for layer in model.decoder.layers:
        layer.self_attention.core_attention.register_forward_hook(lambda *_: seen.append("attention"))
        layer.mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    tokens = assemble_streams(case.xt, case.x0)
    view = model(tokens, case.layout, noisy_copies=1, clean=True, rows=case.masked)
    loss = view.nll(case.targets[case.masked]).sum()
    assert (seen.count("attention"), seen.count("mlp")) == (3, 3)
    loss.backward()
    assert (seen.count("attention"), seen.count("mlp")) == (3 + attention, 3 + mlp)


def test_losses_are_asked_of_the_stage_that_has_a_head(build, make_case):
    from types import SimpleNamespace

    from bdtrain.diffusion.micro_batch import MicroBatch
    from bdtrain.model.forward import forward_losses, forward_stage

    case = make_case()
    weight = torch.rand(case.masked.shape, dtype=torch.float64)
    corrupted = SimpleNamespace(
        noisy=case.xt, clean=case.x0, rows=case.masked, targets=case.targets, weight=weight
    )
    batch = MicroBatch(layout=case.layout, corrupted=corrupted)
    objective = SimpleNamespace(loss=lambda view, targets, weight: view.nll(targets) * weight)
    model = build()
    assert forward_losses(model, objective, batch).equal(forward_stage(model, objective, batch))
    model.post_process = False
    assert forward_stage(model, objective, batch).shape == (case.seq, case.batch, 32)
    with pytest.raises(ShapeError, match="use forward_stage"):
        forward_losses(model, objective, batch)


def test_without_rows_the_normed_states_of_the_output_streams_come_back(build, make_case):
    from bdtrain.model.transformer import assemble_streams

    case = make_case(copies=2)
    model = build()
    tokens = assemble_streams(case.xt, case.x0)
    hidden = model(tokens, case.layout, noisy_copies=2, clean=True)
    assert hidden.shape == (2, 2, 16, 32)
    rows = case.masked
    view = model(tokens, case.layout, noisy_copies=2, clean=True, rows=rows)
    torch.testing.assert_close(model.output_layer(hidden[rows]), view.logits())


def test_wrong_shapes_are_refused_with_the_shape_they_need(build, make_case):
    case = make_case()
    model = build()
    with pytest.raises(ShapeError, match=r"need \[2, 32\]"):
        model(case.x0, case.layout, noisy_copies=1, clean=True)
    with pytest.raises(ShapeError, match="at least one stream"):
        model(case.x0[:, :0], case.layout, noisy_copies=0, clean=False)
    with pytest.raises(ShapeError, match=r"\[2, 1, 16\]"):
        model(case.x0, case.layout, noisy_copies=0, clean=True, rows=torch.ones(2, 16, dtype=torch.bool))
