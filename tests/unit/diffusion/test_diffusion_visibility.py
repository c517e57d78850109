"""Layouts against the golden masks and against a token-by-token walk over the row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdtrain.diffusion.visibility import BlockLayout, build_layout
from bdtrain.errors import ShapeError


def two_stream_mask(layout: BlockLayout, row: int) -> np.ndarray:
    """The rule of the layout, [2 seq, 2 seq], noisy then clean."""
    seq = layout.shape[1]
    mask = np.zeros((2 * seq, 2 * seq), dtype=bool)
    for q in range(seq):
        block_start, block_end = int(layout.block_start[row, q]), int(layout.block_end[row, q])
        doc_start = int(layout.doc_start[row, q])
        mask[q, block_start:block_end] = True
        mask[q, seq + doc_start : seq + block_start] = True
        mask[seq + q, seq + doc_start : seq + block_end] = True
    return mask


@pytest.mark.parametrize(("seq", "block_size"), [(16, 1), (16, 2), (16, 4), (16, 16), (24, 8), (15, 5)])
@pytest.mark.parametrize("isolate", [True, False])
def test_one_document_gives_the_golden_masks(seq, block_size, isolate, golden):
    expected = np.load(golden / "masks.npz")[f"n{seq}_b{block_size}"]
    layout = build_layout(torch.zeros(2, seq, dtype=torch.int32), block_size, isolate=isolate)
    assert np.array_equal(two_stream_mask(layout, 1), expected)


@settings(max_examples=60, deadline=None)
@given(
    row=st.lists(st.sampled_from([-1, 0, 1, 2]), min_size=1, max_size=20),
    block_size=st.integers(1, 7),
    isolate=st.booleans(),
)
def test_layouts_agree_with_a_walk_over_the_row(row, block_size, isolate):
    layout = build_layout(torch.tensor([row], dtype=torch.int32), block_size, isolate=isolate)
    seq = len(row)
    for q in range(seq):
        low, high = q, q
        while low > 0 and (not isolate or row[low - 1] == row[q]):
            low -= 1
        while high < seq and (not isolate or row[high] == row[q]):
            high += 1
        start = low + (q - low) // block_size * block_size
        assert layout.doc_start[0, q] == low
        assert layout.doc_end[0, q] == high
        assert layout.block_start[0, q] == start
        assert layout.block_end[0, q] == min(start + block_size, high)
    for name in ("block_start", "block_end", "doc_start", "doc_end"):
        assert getattr(layout, name).dtype == torch.int32
        assert getattr(layout, name).is_contiguous()
    assert layout.single_document == (not isolate)


def test_rows_of_a_layout_are_the_layout_of_the_rows():
    documents = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, -1]], dtype=torch.int32)
    whole = build_layout(documents, 2, isolate=True)
    index = torch.tensor([2, 0])
    part, direct = whole.rows(index), build_layout(documents[index], 2, isolate=True)
    for name in ("block_start", "block_end", "doc_start", "doc_end"):
        assert torch.equal(getattr(part, name), getattr(direct, name))
    assert whole.to("cpu").shape == (3, 4)


def test_wrong_shapes_and_block_sizes_are_refused():
    with pytest.raises(ShapeError):
        build_layout(torch.zeros(4, dtype=torch.int32), 2, isolate=True)
    with pytest.raises(ShapeError):
        build_layout(torch.zeros(1, 4, dtype=torch.int32), 0, isolate=True)
