"""masked_cross_entropy against F.cross_entropy on all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bdtrain_kernels import KernelShapeError, masked_cross_entropy
from bdtrain_kernels.masked_cross_entropy import reference_cross_entropy

VOCAB, PADDED, HIDDEN, MASK = 37, 48, 12, 4


def tensors(rows: int, dtype=torch.float64, *, bias: bool = True):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64)
    offset = torch.randn(PADDED, generator=generator, dtype=torch.float64) if bias else None
    targets = torch.randint(MASK + 1, VOCAB, (rows,), generator=generator)
    row_weights = torch.rand(rows, generator=generator, dtype=torch.float64)
    made = [None if x is None else x.to(dtype).requires_grad_() for x in (hidden, weight, offset)]
    return *made, targets, row_weights.to(dtype)


def plain(hidden, weight, bias, targets):
    """All logits; the classes left out are removed, not set to a value."""
    kept = torch.tensor([i for i in range(VOCAB) if i != MASK])
    logits = F.linear(hidden, weight, bias)[:, kept]
    return F.cross_entropy(logits, targets - 1, reduction="none")  # every target lies above the mask id


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("announced", (None, "proportional", "other"))
@pytest.mark.parametrize("rows,chunk_rows", ((1, 4), (23, 4), (23, 23), (23, 100)))
def test_values_and_gradients_equal_the_plain_form(bias, announced, rows, chunk_rows):
    hidden, weight, offset, targets, row_weights = tensors(rows, bias=bias)
    given = {"proportional": row_weights * 7.0, "other": row_weights.flip(0) + 0.1, None: None}[announced]
    nll = masked_cross_entropy(
        hidden,
        weight,
        offset,
        targets,
        excluded=[MASK],
        vocab_size=VOCAB,
        row_weights=given,
        chunk_rows=chunk_rows,
    )
    expected = plain(hidden, weight, offset, targets)
    torch.testing.assert_close(nll, expected, rtol=1e-12, atol=1e-12)
    reference = reference_cross_entropy(
        hidden, weight, offset, targets, excluded=torch.tensor([MASK]), vocab_size=VOCAB
    )
    torch.testing.assert_close(reference, expected, rtol=1e-12, atol=1e-12)
    leaves = [x for x in (hidden, weight, offset) if x is not None]
    found = torch.autograd.grad((nll * row_weights).sum() / 3, leaves)
    for a, b in zip(found, torch.autograd.grad((expected * row_weights).sum() / 3, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    assert not found[1][VOCAB:].any()
    assert not found[1][MASK].any()


def test_gradcheck_with_and_without_announced_weights():
    hidden, weight, bias, targets, row_weights = tensors(5)
    for given in (None, row_weights):
        assert torch.autograd.gradcheck(
            lambda h, w, b, given=given: masked_cross_entropy(
                h, w, b, targets, excluded=[MASK], vocab_size=VOCAB, row_weights=given, chunk_rows=2
            ),
            (hidden, weight, bias),
        )


def test_float32_error_is_that_of_float32():
    exact, single = tensors(64), tensors(64, torch.float32)
    results = []
    for hidden, weight, bias, targets, row_weights in (exact, single):
        nll = masked_cross_entropy(
            hidden,
            weight,
            bias,
            targets,
            excluded=[MASK],
            vocab_size=VOCAB,
            row_weights=row_weights,
            chunk_rows=16,
        )
        results.append((nll, *torch.autograd.grad((nll * row_weights).sum(), (hidden, weight, bias))))
    for a, b in zip(*results, strict=True):
        assert b.dtype == torch.float32
        assert (a - b.double()).norm() <= 2e-6 * a.norm()


def test_no_rows_give_no_loss_and_zero_gradients():
    hidden, weight, bias, targets, row_weights = tensors(0)
    for given in (None, row_weights):
        nll = masked_cross_entropy(
            hidden, weight, bias, targets, excluded=[MASK], vocab_size=VOCAB, row_weights=given
        )
        assert nll.shape == (0,)
        for gradient, leaf in zip(
            torch.autograd.grad(nll.sum(), (hidden, weight, bias)), (hidden, weight, bias), strict=True
        ):
            assert gradient.shape == leaf.shape
            assert not gradient.any()


def test_rows_of_weight_zero_give_zero_gradients():
    hidden, weight, bias, targets, _ = tensors(6)
    zeros = torch.zeros(6, dtype=torch.float64)
    nll = masked_cross_entropy(
        hidden, weight, bias, targets, excluded=[MASK], vocab_size=VOCAB, row_weights=zeros
    )
    assert not any(g.any() for g in torch.autograd.grad((nll * zeros).sum(), (hidden, weight, bias)))


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return result


@pytest.mark.parametrize("announced", (True, False))
def test_memory_is_bounded_by_the_chunk_not_by_the_rows(announced):
    chunk_rows = 32
    for rows in (64, 1024):
        hidden, weight, bias, targets, row_weights = tensors(rows)
        kept: list[int] = []

        def pack(x: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(x.numel())
            return x

        with LargestTensor() as seen, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            nll = masked_cross_entropy(
                hidden,
                weight,
                bias,
                targets,
                excluded=torch.tensor([MASK]),
                vocab_size=VOCAB,
                row_weights=row_weights if announced else None,
                chunk_rows=chunk_rows,
            )
            (nll * row_weights).sum().backward()
        largest = max(chunk_rows * PADDED, rows * HIDDEN, PADDED * HIDDEN)
        assert seen.numbers <= largest
        assert max(kept) <= max(rows * HIDDEN, PADDED * HIDDEN)
    assert rows * VOCAB > largest  # the logits of all rows would have been noticed


def test_arguments_that_do_not_fit_are_refused():
    hidden, weight, bias, targets, _ = tensors(4)
    with pytest.raises(KernelShapeError, match="give one each"):
        masked_cross_entropy(hidden, weight, bias, targets[:3], excluded=None, vocab_size=VOCAB)
    with pytest.raises(KernelShapeError, match="vocab_size=49"):
        masked_cross_entropy(hidden, weight, bias, targets, excluded=None, vocab_size=49)
    with pytest.raises(KernelShapeError, match=r"\[rows, hidden\]"):
        masked_cross_entropy(hidden[:, :3], weight, bias, targets, excluded=None, vocab_size=VOCAB)
