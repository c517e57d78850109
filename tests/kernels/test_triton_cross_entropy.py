"""The Triton backend of masked_cross_entropy against float64: under the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bdtrain_kernels import BackendUnavailableError, masked_cross_entropy
from bdtrain_kernels.masked_cross_entropy import reference_cross_entropy, reference_statistics, row_statistics
from bdtrain_kernels.masked_cross_entropy.plan import Plan
from bdtrain_kernels.masked_cross_entropy.triton_backend import TritonChunks
from tests.kernels.kernel_cases import DEVICE, DTYPES, relative_error

ROUNDING = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Relative L2 error that each type's own rounding of logits and of their gradients explains."""

SHAPES = {
    # vocabulary, padded, hidden, rows, chunk: below one tile; ragged tiles; several tiles of either kernel
    "small": (37, 48, 12, 23, 8),
    "ragged": (2050, 2176, 16, 5, 2),
    "several tiles": (8300, 8320, 8, 3, 3),
}


def tensors(shape: str, dtype: torch.dtype, *, bias: bool) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """([hidden, weight, bias], targets, row weights); sharp enough that some rows are nearly certain."""
    vocab, padded, hidden, rows, _ = SHAPES[shape]
    generator = torch.Generator().manual_seed(vocab)
    made = [
        torch.randn(rows, hidden, generator=generator),
        torch.randn(padded, hidden, generator=generator),
        torch.randn(padded, generator=generator) if bias else None,
    ]
    given = [None if x is None else x.to(DEVICE, dtype).requires_grad_() for x in made]
    targets = torch.randint(5, vocab, (rows,), generator=generator).to(DEVICE)
    row_weights = (0.1 + torch.rand(rows, generator=generator)).to(DEVICE)
    return given, targets, row_weights


def exact(given: list[Tensor | None]) -> list[Tensor | None]:
    """The same numbers in float64."""
    return [None if x is None else x.detach().double().requires_grad_() for x in given]


def gradients(result: Tensor, given: list[Tensor | None]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(result, [x for x in given if x is not None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("announced", (True, False))
def test_nll_and_gradients_equal_float64(shape, dtype, announced):
    vocab, _, _, _, chunk_rows = SHAPES[shape]
    given, targets, row_weights = tensors(shape, dtype, bias=announced)
    nll = masked_cross_entropy(
        *given,
        targets,
        excluded=[4, 0],
        vocab_size=vocab,
        row_weights=row_weights if announced else None,
        backend="triton",
        chunk_rows=chunk_rows,
    )
    wide = exact(given)
    excluded = torch.tensor([4, 0], device=DEVICE)
    expected = reference_cross_entropy(*wide, targets, excluded=excluded, vocab_size=vocab)
    assert nll.dtype == torch.float32
    assert relative_error(nll, expected) < ROUNDING[dtype]
    found = gradients((nll * row_weights).sum() / 3, given)
    wanted = gradients((expected * row_weights).sum() / 3, wide)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) < ROUNDING[dtype]
    for x in found[1:]:
        assert not x[vocab:].any()
        assert not x[[4, 0]].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_and_gradients_equal_float64(shape, dtype):
    vocab, _, _, _, chunk_rows = SHAPES[shape]
    given, targets, row_weights = tensors(shape, dtype, bias=True)
    ids = torch.stack((targets, torch.full_like(targets, vocab - 1), targets), dim=1)  # one is named twice
    wide = exact(given)
    excluded = torch.tensor([4], device=DEVICE)
    answers = (
        row_statistics(*given, ids, excluded=[4], vocab_size=vocab, backend="triton", chunk_rows=chunk_rows),
        reference_statistics(*wide, ids, excluded=excluded, vocab_size=vocab),
    )
    for found, expected in zip(*answers, strict=True):
        assert relative_error(found, expected) < ROUNDING[dtype]
    outer = torch.Generator().manual_seed(0)
    grad_values = torch.randn(ids.shape, generator=outer).to(DEVICE)
    found, wanted = (
        gradients((lse * row_weights).sum() + (values * grad_values).sum(), leaves)
        for (lse, values), leaves in zip(answers, (given, wide), strict=True)
    )
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) < ROUNDING[dtype]


def test_a_nearly_certain_row_keeps_its_gradient_in_sixteen_bits():
    """p - 1 is made in float32 and then rounded: p in float16 would be 1, and the gradient 0."""
    hidden = torch.tensor([[1.0]], dtype=torch.float16, device=DEVICE).requires_grad_()
    weight = torch.tensor([[9.5], [0.0], [0.0]], dtype=torch.float16, device=DEVICE).requires_grad_()
    targets = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    nll = masked_cross_entropy(hidden, weight, None, targets, excluded=None, vocab_size=3, backend="triton")
    (grad,) = torch.autograd.grad(nll.sum(), weight)
    expected = torch.tensor([9.5, 0.0, 0.0], dtype=torch.float64, device=DEVICE).softmax(0)
    expected[0] = -expected[1:].sum()
    assert 0 < expected[1] < 1e-4
    assert relative_error(grad.squeeze(1), expected) < 1e-3


def test_no_rows_and_no_ids_are_fine():
    given, targets, _ = tensors("small", torch.float32, bias=True)
    settings = {"vocab_size": 37, "backend": "triton"}
    lse, values = row_statistics(*given, targets[:, None][:, :0], excluded=None, **settings)
    assert values.shape == (23, 0)
    wide = exact(given)
    expected = F.linear(*wide)[:, :37].logsumexp(1)
    assert relative_error(lse, expected) < ROUNDING[torch.float32]
    for a, b in zip(gradients(lse.sum(), given), gradients(expected.sum(), wide), strict=True):
        assert relative_error(a, b) < ROUNDING[torch.float32]
    none = masked_cross_entropy(given[0][:0], *given[1:], targets[:0], excluded=[4], **settings)
    assert none.shape == (0,)
    assert not any(x.any() for x in gradients(none.sum(), given))


def test_an_excluded_target_costs_infinitely_much():
    given, targets, _ = tensors("small", torch.float32, bias=False)
    targets[3] = 4
    nll = masked_cross_entropy(*given, targets, excluded=[4], vocab_size=37, backend="triton")
    assert nll[3] == torch.inf
    assert nll[:3].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_this_ranks_part_of_the_vocabulary_is_summed_and_written(dtype):
    """Ranks of 16 ids of which 37 are real: the third holds 5, the fourth none. Logits lie in wider rows."""
    logits = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    ids = torch.tensor([[0, 15], [16, 36], [31, 32], [4, 20], [20, 20], [36, 0]], device=DEVICE)
    excluded = torch.tensor([4, 20], device=DEVICE)
    whole = logits.double().index_fill(1, excluded, -torch.inf)[:, :37]
    factor, added = torch.rand(6, device=DEVICE), torch.randn(6, 2, device=DEVICE)
    total, gradient = torch.zeros(6, dtype=torch.float64, device=DEVICE), []
    values = torch.zeros(6, 2, dtype=torch.float64, device=DEVICE)
    shift = torch.full((6,), 1.5, device=DEVICE)
    for rank in range(4):
        plan = Plan(16 * rank, min(max(37 - 16 * rank, 0), 16), excluded, None, 6, "triton")
        weight = torch.eye(64, dtype=dtype, device=DEVICE)[16 * rank : 16 * rank + 16]
        chunks = TritonChunks(plan, 6, weight, None)
        wide = torch.full((6, 40), 7.0, dtype=dtype, device=DEVICE)
        chunks._room = wide[:, 3:19]
        state, part = chunks.summarise(logits, ids)
        assert part.peak.isfinite().all()
        total += part.total.double() * part.peak.double().exp()
        values += part.values
        gradient.append(chunks.score_gradients(state, shift, factor, ids, added).double())
        assert (wide[:, :3] == 7).all() and (wide[:, 19:] == 7).all()
    torch.testing.assert_close(total, whole.exp().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(values, whole.gather(1, ids))
    expected = (whole - 1.5).exp() * factor.double().unsqueeze(1)
    expected = expected.scatter_add(1, ids, added.double()).index_fill(1, excluded, 0.0)
    found = torch.cat(gradient, dim=1)
    assert relative_error(found[:, :37], expected) < ROUNDING[dtype]
    assert not found[:, 37:].any()


def test_double_precision_is_left_to_the_chunked_backend():
    given, targets, _ = tensors("small", torch.float64, bias=False)
    with pytest.raises(BackendUnavailableError, match="float64"):
        masked_cross_entropy(*given, targets, excluded=[4], vocab_size=37, backend="triton")
    nll = masked_cross_entropy(*given, targets, excluded=None, vocab_size=37)
    expected = F.cross_entropy((given[0] @ given[1].t())[:, :37], targets, reduction="none")
    torch.testing.assert_close(nll, expected)
