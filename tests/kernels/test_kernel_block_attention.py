"""block_attention against explicit softmax in float64 under a mask made independently."""

from __future__ import annotations

import itertools
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from kernel_cases import (
    DOCUMENTS,
    HandLayout,
    hand_layout,
    inputs,
    mask_by_loops,
    relative_error,
    row_layout,
)

from bdtrain_kernels import (
    BackendUnavailableError,
    KernelShapeError,
    block_attention,
    dense_mask,
    prepare,
)
from bdtrain_kernels.block_attention import pieces
from bdtrain_kernels.block_attention.reference import reference_attention
from bdtrain_kernels.dispatch import announce

BACKENDS = ("dense", "tree", "flash")  # flash: over torch's flash operator for CPUs
STREAMS = (  # copies, clean, queries
    (1, True, "all"),
    (1, True, "noisy"),
    (2, True, "all"),
    (3, True, "noisy"),
    (0, True, "all"),
    (1, False, "all"),
    (2, False, "noisy"),
)
HEADS = ((1, 1), (4, 2), (8, 1))
TOLERANCE = 2e-6


def check(
    layout: HandLayout, backend: str, copies: int, clean: bool, queries: str, tile=None, **case
) -> None:
    """Output and gradients within the tolerance of float64."""
    q, k, v, grad = inputs(layout, copies=copies, clean=clean, queries=queries, **case)
    prepared = prepare(layout, noisy_copies=copies, clean=clean, backend=backend, tile=tile)
    out = block_attention(q, k, v, prepared, noisy_copies=copies, clean=clean, queries=queries)
    found = (out, *torch.autograd.grad(out, (q, k, v), grad))
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    mask = dense_mask(layout, noisy_copies=copies, clean=clean, queries=queries)
    expected = reference_attention(*doubles, mask)
    expected = (expected, *torch.autograd.grad(expected, doubles, grad.double()))
    assert out.shape == q.shape
    least = 0.1 * grad.norm().item()
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        error = relative_error(a, b, least)
        assert error <= TOLERANCE, f"{name}: {error:.1e}"  # NaN fails too


@pytest.mark.parametrize("copies,clean,queries", STREAMS)
def test_dense_mask_is_the_rule_applied_pair_by_pair(copies, clean, queries):
    for documents, block_size in itertools.product(([[12]], [[5, 1, 6], [3, 9]]), (1, 3, 4, 12, 20)):
        layout = hand_layout(documents, block_size)
        found = dense_mask(layout, noisy_copies=copies, clean=clean, queries=queries)
        assert torch.equal(found[:, 0], mask_by_loops(layout, copies=copies, clean=clean, queries=queries))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seq", (16, 50, 64, 77, 128, 256))
def test_output_and_gradients_equal_float64_at_every_length_and_block_size(backend, seq):
    cases = itertools.cycle(itertools.product(HEADS, STREAMS))
    for block_size in (1, 3, 4, 7, 16, 64, seq, seq + 5):
        heads, streams = next(cases)
        check(row_layout(1, seq, block_size), backend, *streams, heads=heads)
        check(row_layout(2, seq, block_size), backend, 1, True, "all")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_output_and_gradients_equal_float64_with_documents(backend, documents):
    for seq, block_size in itertools.product((16, 77), (1, 3, 16, 90)):
        check(hand_layout(DOCUMENTS[documents](seq), block_size), backend, 1, True, "all")
    layout = hand_layout(DOCUMENTS[documents](77), 4)
    for streams in STREAMS:
        check(layout, backend, *streams)
    for heads in HEADS:
        check(layout, backend, 2, True, "all", heads=heads)


@pytest.mark.parametrize("tile", (4, 8, 12, 60))
def test_tree_is_right_for_any_tile(tile):
    for documents in ([[77]], [[30, 47], [9, 68]]):
        check(hand_layout(documents, 4), "tree", 2, True, "all", tile=tile)
    check(row_layout(3, 77, 4), "tree", 1, True, "noisy", tile=tile)


def test_tree_is_right_where_its_pieces_go_to_the_flash_operator():
    check(row_layout(1, 600, 16), "tree", 1, True, "all", heads=(2, 1))
    check(row_layout(1, 520, 260), "tree", 1, True, "all", heads=(1, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_are_taken(backend):
    for layout in (row_layout(2, 50, 4), hand_layout([[20, 30], [41, 9]], 4)):
        for streams in STREAMS[:3]:
            check(layout, backend, *streams, sequence_first=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_far_apart_stay_finite_and_right(backend):
    layout = hand_layout([[20, 30], [41, 9]], 4)
    q, k, v, _ = (40.0 * x.detach() for x in inputs(layout, copies=1, clean=True, queries="all"))
    out = block_attention(q, k, v, layout, noisy_copies=1, backend=backend)
    mask = dense_mask(layout, noisy_copies=1, clean=True)
    # Scores of thousands: float32 rounding of a score moves a probability by 1e-4.
    assert relative_error(out, reference_attention(q.double(), k.double(), v.double(), mask)) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("documents", ([[48]], [[9, 22, 17]]))
def test_no_position_sees_its_answer_not_even_in_one_bit(backend, documents):
    block_size, seq, changed = 4, 48, 14
    layout = hand_layout(documents, block_size, single_document=len(documents[0]) == 1)
    q, k, v, grad = inputs(layout, copies=2, clean=True, queries="all")
    start, doc = int(layout.block_start[0, changed]), int(layout.doc_start[0, changed])
    positions = torch.arange(seq)
    # Rows that may not depend on the clean token: noisy ones up to its block, clean ones before it, other
    # documents.
    other = (layout.doc_start[0] != doc).repeat(3)
    before = torch.cat([positions < layout.block_end[0, changed]] * 2 + [positions < start])
    blind = other | before
    prepared = prepare(layout, noisy_copies=2, backend=backend, tile=16 if backend == "tree" else None)

    def run(scale: float):
        with torch.no_grad():
            moved = [x.clone() for x in (q, k, v)]
            for x in moved:
                x[:, :, 2 * seq + changed] *= scale
        for x in moved:
            x.requires_grad_()
        out = block_attention(*moved, prepared, noisy_copies=2)
        # Only blind rows are asked for: no gradient may reach the clean token's key and value.
        gradients = torch.autograd.grad(out, moved, grad * blind.view(1, 1, -1, 1), retain_graph=True)
        return out.detach(), gradients

    (out, gradients), (out_moved, gradients_moved) = run(1.0), run(-30.0)
    blind_rows = blind.clone()
    blind_rows[2 * seq + changed] = False  # its own query was changed too
    assert torch.equal(out[:, :, blind_rows], out_moved[:, :, blind_rows])
    assert not torch.equal(out, out_moved)
    for name, a, b in zip("qkv", gradients, gradients_moved, strict=True):
        untouched = torch.ones(3 * seq, dtype=torch.bool)
        untouched[2 * seq + changed] = False
        assert torch.equal(a[:, :, untouched], b[:, :, untouched]), f"gradient of {name}"
    for gradient in gradients[1:]:
        assert not gradient[:, :, 2 * seq + changed].any()


def test_block_size_1_makes_the_clean_stream_ordinary_causal_attention():
    layout = row_layout(2, 40, 1)
    q, k, v, _ = inputs(layout, copies=0, clean=True, queries="all", heads=(2, 2))
    causal = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True
    )
    for backend in BACKENDS:
        out = block_attention(q, k, v, layout, noisy_copies=0, backend=backend)
        assert relative_error(out, causal) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_together_equal_copies_one_by_one(backend):
    layout = hand_layout([[30, 20], [7, 43]], 4)
    q, k, v, _ = inputs(layout, copies=2, clean=True, queries="all")
    both = block_attention(q, k, v, layout, noisy_copies=2, backend=backend)
    for copy in range(2):
        take = torch.cat((torch.arange(copy * 50, copy * 50 + 50), torch.arange(100, 150)))
        one = block_attention(
            q[:, :, take], k[:, :, take], v[:, :, take], layout, noisy_copies=1, backend=backend
        )
        torch.testing.assert_close(one, both[:, :, take], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal_bit_for_bit(backend):
    layout = hand_layout([[30, 47], [70, 7]], 4)
    q, k, v, grad = inputs(layout, copies=1, clean=True, queries="all")
    runs = []
    for _ in range(2):
        out = block_attention(q, k, v, layout, noisy_copies=1, backend=backend)
        runs.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("documents", ([[11]], [[5, 6], [8, 3]]))
@pytest.mark.parametrize("copies,clean,queries", STREAMS)
def test_tree_gradients_pass_gradcheck(documents, copies, clean, queries):
    layout = hand_layout(documents, 2)
    tensors = inputs(layout, copies=copies, clean=clean, queries=queries, heads=(2, 1), head_dim=2)[:3]
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    prepared = prepare(layout, noisy_copies=copies, clean=clean, backend="tree", tile=4)
    assert torch.autograd.gradcheck(
        lambda q, k, v: block_attention(q, k, v, prepared, noisy_copies=copies, clean=clean, queries=queries),
        doubles,
        fast_mode=True,
    )


def test_tree_gradcheck_through_the_flash_operator(monkeypatch):
    monkeypatch.setattr(pieces, "FLASH_KEYS", 2)
    layout = row_layout(1, 12, 4)
    tensors = inputs(layout, copies=1, clean=True, queries="all", heads=(2, 1), head_dim=2)[:3]
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    prepared = prepare(layout, noisy_copies=1, backend="tree", tile=4)
    assert torch.autograd.gradcheck(
        lambda q, k, v: block_attention(q, k, v, prepared, noisy_copies=1), doubles, fast_mode=True
    )


def test_tree_keeps_memory_in_proportion_to_the_sequence():
    kept = []
    for seq in (512, 1024):
        layout = row_layout(1, seq, 16)
        q, k, v, _ = inputs(layout, copies=1, clean=True, queries="all", heads=(1, 1), head_dim=8)
        sizes: list[int] = []

        def pack(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            block_attention(q, k, v, layout, noisy_copies=1, backend="tree")
        kept.append(sum(sizes))
    # 2 streams * (own tile of 32 twice + levels of 32, 64, 128) and the packed tensors; a square would be 4
    # times.
    assert kept[1] < 2.1 * kept[0]
    assert kept[1] < 1024 * 2 * 300


def test_half_precision_is_computed_in_float32_by_the_tree():
    layout = row_layout(1, 64, 4)
    q, k, v, _ = (x.detach().bfloat16() for x in inputs(layout, copies=1, clean=True, queries="all"))
    out = block_attention(q, k, v, layout, noisy_copies=1, backend="tree")
    exact = reference_attention(
        q.double(), k.double(), v.double(), dense_mask(layout, noisy_copies=1, clean=True)
    )
    assert out.dtype == torch.bfloat16
    assert relative_error(out, exact) < 3e-3  # one rounding to 8 bits


def test_an_unknown_or_impossible_backend_is_refused_by_name():
    layout = row_layout(1, 8, 4)
    q, k, v, _ = inputs(layout, copies=1, clean=True, queries="all")
    with pytest.raises(BackendUnavailableError, match=r"'cudnn'.*auto, dense, flash, flex, tree"):
        block_attention(q, k, v, layout, noisy_copies=1, backend="cudnn")
    uneven = replace(layout, single_document=False, block_end=layout.block_end.clone().fill_(8))
    with pytest.raises(KernelShapeError, match="backend='dense'"):
        block_attention(q, k, v, uneven, noisy_copies=1, backend="tree")


def test_triton_is_refused_on_a_cpu_without_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    layout = row_layout(1, 8, 4)
    q, k, v, _ = inputs(layout, copies=1, clean=True, queries="all")
    with pytest.raises(BackendUnavailableError, match=r"'triton'.*needs a CUDA device.*auto, dense"):
        block_attention(q, k, v, layout, noisy_copies=1, backend="triton")


@pytest.mark.parametrize("copies,clean,queries", STREAMS)
def test_flex_sees_what_the_mask_shows_and_refuses_gradients_on_a_cpu(copies, clean, queries):
    for layout in (row_layout(2, 50, 7), hand_layout([[5, 20, 25], [47, 3]], 4)):
        tensors = inputs(layout, copies=copies, clean=clean, queries=queries)
        q, k, v = (x.detach() for x in tensors[:3])
        how = {"noisy_copies": copies, "clean": clean, "queries": queries, "backend": "flex"}
        out = block_attention(q, k, v, layout, **how)
        mask = dense_mask(layout, noisy_copies=copies, clean=clean, queries=queries)
        exact = reference_attention(q.double(), k.double(), v.double(), mask)
        assert relative_error(out, exact) <= TOLERANCE
    with pytest.raises(BackendUnavailableError, match="no backward on a CPU"):
        block_attention(*tensors[:3], layout, **how)


def test_flash_takes_one_call_where_no_mask_is_needed():
    plans = [
        prepare(row_layout(1, 16, size), noisy_copies=copies, clean=clean, backend="flash").state
        for size, copies, clean in ((1, 0, True), (16, 1, False), (4, 1, True), (4, 0, True))
    ]
    assert [plan.causal for plan in plans] == [True, False, None, None]


def test_flash_gradcheck():
    layout = hand_layout([[5, 6], [8, 3]], 2)
    tensors = inputs(layout, copies=2, clean=True, queries="noisy", heads=(2, 1), head_dim=2)[:3]
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    prepared = prepare(layout, noisy_copies=2, backend="flash", tile=4)
    assert torch.autograd.gradcheck(
        lambda q, k, v: block_attention(q, k, v, prepared, noisy_copies=2, queries="noisy"),
        doubles,
        fast_mode=True,
    )


def test_shapes_that_do_not_fit_the_streams_are_refused_with_both_sizes():
    layout = row_layout(1, 8, 4)
    q, k, v, _ = inputs(layout, copies=1, clean=True, queries="all")
    with pytest.raises(KernelShapeError, match="needs 24 query rows and 24 keys"):
        block_attention(q, k, v, layout, noisy_copies=2)
    with pytest.raises(KernelShapeError, match="prepared for"):
        block_attention(q, k, v, prepare(layout, noisy_copies=1), noisy_copies=2)
    with pytest.raises(KernelShapeError, match="no stream"):
        block_attention(q, k, v, layout, noisy_copies=0, clean=False)
    with pytest.raises(KernelShapeError, match="queries='some'"):
        block_attention(q, k, v, layout, noisy_copies=1, queries="some")


def test_the_backend_taken_is_logged_once(caplog):
    announce.cache_clear()
    short, long = row_layout(1, 16, 4), row_layout(2, 512, 16)
    with caplog.at_level(logging.INFO, logger="bdtrain_kernels"):
        for _ in range(3):
            assert prepare(short, noisy_copies=1).backend == "dense"
            assert prepare(long, noisy_copies=1).backend == "tree"
            prepare(short, noisy_copies=1, backend="tree")
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        "block_attention: backend dense",
        "block_attention: backend tree",
        "block_attention: backend tree",
    ]
