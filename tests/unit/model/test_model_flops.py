"""The count of operations against what torch counts as it runs, and against the whole mask."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bdtrain.diffusion.visibility import build_layout
from bdtrain.errors import ShapeError
from bdtrain.model.flops import count_step_flops, useful_pairs
from bdtrain.model.transformer import assemble_streams

STREAMS = [(1, True), (2, True), (2, False), (0, True)]


@pytest.mark.parametrize(("copies", "clean"), STREAMS)
@pytest.mark.parametrize("shape", ["qwen3", "bd3lm"])
def test_linear_operations_are_those_that_torch_runs(build, make_case, monkeypatch, shape, copies, clean):
    from bdtrain.model.attention import StreamContext

    # Attention without a product, through which gradients reach queries, keys and values.
    monkeypatch.setattr(
        StreamContext, "attend", lambda self, q, k, v, *, layer, scale: q + k.mean() + v.mean()
    )
    case = make_case(copies=max(copies, 1))
    model = build(shape, dtype=torch.float32, num_layers=3)
    tokens = assemble_streams(case.xt if copies else None, case.x0 if clean else None)
    with FlopCounterMode(display=False) as counter:
        hidden = model(tokens, case.layout, noisy_copies=copies, clean=clean)
        hidden.square().sum().backward()
    counted = count_step_flops(
        model.config,
        rows=case.batch,
        seq=case.seq,
        noisy_copies=copies,
        clean=clean,
        selected=0,
        pairs=0,
        last_layer_pairs=0,
    )
    assert counted.total == counted.linear == counter.get_total_flops()


def test_the_head_is_counted_on_the_selected_rows_and_the_real_vocabulary(build):
    model = build(dtype=torch.float32)
    hidden = torch.randn(11, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.output_layer(hidden, torch.full((11,), 7))
    counted = count(model.config, selected=11)
    assert counted.head == 3 * counter.get_total_flops() == 3 * 2 * 11 * 32 * 29


def test_a_pair_costs_two_products_per_head_forward_and_four_backward(build):
    config = build(num_layers=3).config  # 4 heads of 8 channels
    counted = count(config, pairs=10, last_layer_pairs=7)
    assert counted.attention == 3 * (2 + 2) * 8 * 4 * (2 * 10 + 7)


def count(config, *, selected=0, pairs=0, last_layer_pairs=0):
    return count_step_flops(
        config,
        rows=1,
        seq=16,
        noisy_copies=1,
        clean=True,
        selected=selected,
        pairs=pairs,
        last_layer_pairs=last_layer_pairs,
    )


@pytest.mark.parametrize(("copies", "clean"), STREAMS)
@pytest.mark.parametrize("isolate", [True, False])
def test_useful_pairs_are_the_entries_of_the_whole_mask(ragged, oracle, copies, clean, isolate):
    layout = build_layout(ragged, 4, isolate=isolate)
    documents = ragged if isolate else torch.zeros_like(ragged)
    mask = oracle.mask(documents, 4, noisy_copies=copies, clean=clean)
    found = useful_pairs(layout, noisy_copies=copies, clean=clean)
    assert found == int(mask.sum())
    if copies:
        noisy = useful_pairs(layout, noisy_copies=copies, clean=clean, queries="noisy")
        assert noisy == int(mask[:, : copies * 16].sum())


def test_useful_pairs_follow_the_closed_form_of_one_document():
    """(C + 1) L (L + L') / 2 for C copies and the clean stream (L a multiple of L')."""
    layout = build_layout(torch.zeros(3, 64, dtype=torch.int32), 8, isolate=True)
    assert useful_pairs(layout, noisy_copies=2, clean=True) == 3 * (3 * 64 * (64 + 8) // 2)


def test_a_count_without_streams_is_refused(build):
    layout = build_layout(torch.zeros(1, 8, dtype=torch.int32), 4, isolate=True)
    with pytest.raises(ShapeError, match="no stream"):
        useful_pairs(layout, noisy_copies=0, clean=False)
    with pytest.raises(ShapeError, match="choose 'all'"):
        useful_pairs(layout, noisy_copies=0, clean=True, queries="noisy")
