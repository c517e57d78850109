"""masked_cross_entropy against F.cross_entropy on all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bdtrain_kernels import BackendUnavailableError, KernelShapeError, masked_cross_entropy
from bdtrain_kernels.masked_cross_entropy import reference_cross_entropy, reference_statistics, row_statistics

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


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("rows,chunk_rows", ((1, 4), (23, 4), (23, 100)))
@pytest.mark.parametrize("count", (0, 1, 3))
def test_statistics_and_gradients_equal_the_plain_form(bias, rows, chunk_rows, count):
    hidden, weight, offset, targets, row_weights = tensors(rows, bias=bias)
    ids = torch.stack((targets, targets.flip(0), targets), dim=1)[:, :count]  # one is named twice
    lse, values = row_statistics(
        hidden, weight, offset, ids, excluded=[MASK], vocab_size=VOCAB, chunk_rows=chunk_rows
    )
    kept = torch.tensor([i for i in range(VOCAB) if i != MASK])
    logits = F.linear(hidden, weight, offset)[:, kept]
    expected = logits.exp().sum(1).log(), logits.gather(1, ids - 1)
    reference = reference_statistics(
        hidden, weight, offset, ids, excluded=torch.tensor([MASK]), vocab_size=VOCAB
    )
    outer = torch.randn(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [x for x in (hidden, weight, offset) if x is not None]
    gradients = []
    for one, several in ((lse, values), expected, reference):
        torch.testing.assert_close(one, expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(several, expected[1], rtol=1e-12, atol=1e-12)
        loss = (one * row_weights).sum() + (several * outer * row_weights.unsqueeze(1)).sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    for found in gradients[::2]:
        for a, b in zip(found, gradients[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_statistics_pass_gradcheck_and_the_mask_is_minus_infinity():
    hidden, weight, bias, targets, _ = tensors(5)
    ids = torch.stack((targets, targets.roll(1)), dim=1)
    assert torch.autograd.gradcheck(
        lambda h, w, b: row_statistics(h, w, b, ids, excluded=[MASK], vocab_size=VOCAB, chunk_rows=2),
        (hidden, weight, bias),
    )
    masked = torch.full((5, 1), MASK)
    _, values = row_statistics(hidden, weight, bias, masked, excluded=[MASK], vocab_size=VOCAB)
    assert (values == -torch.inf).all()
    _, values = row_statistics(hidden, weight, bias, masked, excluded=None, vocab_size=VOCAB)
    torch.testing.assert_close(values[:, 0], F.linear(hidden, weight, bias)[:, MASK])


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_a_second_backward_pass_gives_the_same_gradients(dtype):
    """The sums made in forward are scaled in place only where nobody can ask for them again."""
    hidden, weight, bias, targets, row_weights = tensors(9, dtype)
    nll = masked_cross_entropy(
        hidden, weight, bias, targets, excluded=[MASK], vocab_size=VOCAB, row_weights=row_weights
    )
    loss = (nll * row_weights).sum() / 7
    first = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    last = torch.autograd.grad(loss, (hidden, weight, bias))
    for a, b, c in zip(first, second, last, strict=True):
        assert a.equal(b) and a.equal(c)


def test_the_weights_gradient_of_bfloat16_adds_up_in_float32():
    """600 equal rows in chunks of one: a sum in bfloat16 would stop growing at 256 times one of them."""
    hidden = torch.ones(600, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    weight.grad_dtype = torch.float32
    nll = masked_cross_entropy(
        hidden,
        weight,
        None,
        torch.zeros(600, dtype=torch.int64),
        excluded=None,
        vocab_size=2,
        row_weights=torch.ones(600),
        chunk_rows=1,
    )
    nll.sum().backward()
    assert weight.grad.flatten().tolist() == [-300.0, 300.0]  # 600 times 1/2 - 1 and 1/2


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

        ids = targets.unsqueeze(1)
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
            lse, values = row_statistics(
                hidden, weight, bias, ids, excluded=[MASK], vocab_size=VOCAB, chunk_rows=chunk_rows
            )
            (lse * row_weights - values.squeeze(1)).sum().backward()
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
    with pytest.raises(KernelShapeError, match="one floating type"):
        masked_cross_entropy(hidden.float(), weight, bias, targets, excluded=None, vocab_size=VOCAB)
    with pytest.raises(KernelShapeError, match="targets from -1 to -1; choose from 0 to 36"):
        masked_cross_entropy(hidden, weight, bias, targets * 0 - 1, excluded=None, vocab_size=VOCAB)
    with pytest.raises(KernelShapeError, match=r"give \[4, ids\]"):
        row_statistics(hidden, weight, bias, targets, excluded=None, vocab_size=VOCAB)
    with pytest.raises(KernelShapeError, match=f"choose from 0 to {VOCAB - 1}"):
        row_statistics(hidden, weight, bias, targets[:, None] + VOCAB, excluded=None, vocab_size=VOCAB)


@pytest.mark.parametrize(
    "wrong,found", (([-1], "-1 to -1"), ([VOCAB, 2], f"2 to {VOCAB}"), ([40], "40 to 40"))
)
def test_excluded_ids_outside_the_vocabulary_are_refused_whichever_form_and_backend(wrong, found):
    hidden, weight, bias, targets, _ = tensors(4, torch.float32)
    message = f"excluded ids from {found}; choose from 0 to {VOCAB - 1}"
    for excluded in (wrong, tuple(wrong), torch.tensor(wrong)):
        for backend in ("chunked", "triton"):
            settings = {"excluded": excluded, "vocab_size": VOCAB, "backend": backend}
            with pytest.raises(KernelShapeError, match=message):
                masked_cross_entropy(hidden, weight, bias, targets, **settings)
            with pytest.raises(KernelShapeError, match=message):
                row_statistics(hidden, weight, bias, targets[:, None], **settings)


@pytest.mark.parametrize("dtype", (torch.int32, torch.uint8, torch.float32))
def test_ids_of_another_type_are_refused(dtype):
    hidden, weight, bias, targets, _ = tensors(4)
    wrong = targets.to(dtype)
    with pytest.raises(KernelShapeError, match=f"targets are {dtype}; they must be torch.int64"):
        masked_cross_entropy(hidden, weight, bias, wrong, excluded=None, vocab_size=VOCAB)
    with pytest.raises(KernelShapeError, match=f"^ids are {dtype}; they must be torch.int64"):
        row_statistics(hidden, weight, bias, wrong[:, None], excluded=None, vocab_size=VOCAB)
    with pytest.raises(KernelShapeError, match=f"excluded ids are {dtype}; they must be torch.int64"):
        masked_cross_entropy(hidden, weight, bias, targets, excluded=wrong[:1], vocab_size=VOCAB)


@pytest.mark.parametrize("announced", (True, False))
def test_equal_weights_that_sixteen_bits_cannot_hold_scale_the_gradients_all_the_same(announced):
    """1.25390625 lies between two numbers of bfloat16: rounded first, all gradients were 0.3% too small."""
    factor, found = 1.25 + 2.0**-8, []
    hidden, weight, bias, targets, _ = tensors(400, torch.bfloat16)
    for row_weights in (torch.ones(400), torch.full((400,), factor)):
        nll = masked_cross_entropy(
            hidden,
            weight,
            bias,
            targets,
            excluded=[MASK],
            vocab_size=VOCAB,
            row_weights=row_weights if announced else None,
            backend="chunked",
        )
        found.append(torch.autograd.grad((nll * row_weights).sum(), (weight, bias)))
    for plain, scaled in zip(*found, strict=True):
        plain, scaled = plain.double(), scaled.double()
        assert float((plain * scaled).sum() / plain.square().sum()) == pytest.approx(factor, rel=1e-3)


class HostReads(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", ("proportional", "other", "all zero", "zero announced"))
def test_backward_reads_one_number_on_the_host(case):
    hidden, weight, bias, targets, row_weights = tensors(9)
    zeros = torch.zeros_like(row_weights)
    given = {"proportional": 3 * row_weights, "other": row_weights.flip(0)}.get(case, zeros)
    arriving = zeros if case == "all zero" else row_weights
    nll = masked_cross_entropy(
        hidden, weight, bias, targets, excluded=[MASK], vocab_size=VOCAB, row_weights=given, chunk_rows=4
    )
    with HostReads() as reads:
        nll.backward(arriving)
    assert reads.count == 1
    expected = torch.autograd.grad(plain(hidden, weight, bias, targets), (hidden, weight, bias), arriving)
    for leaf, wanted in zip((hidden, weight, bias), expected, strict=True):
        torch.testing.assert_close(leaf.grad, wanted, rtol=1e-10, atol=1e-12)


def test_a_backend_that_is_not_there_is_refused_and_the_choice_is_said(caplog):
    from bdtrain_kernels.dispatch import announce

    announce.cache_clear()
    hidden, weight, bias, targets, _ = tensors(4)
    with pytest.raises(BackendUnavailableError, match="backend='fused' does not exist"):
        masked_cross_entropy(hidden, weight, bias, targets, excluded=None, vocab_size=VOCAB, backend="fused")
    with caplog.at_level("INFO", logger="bdtrain_kernels"):
        for backend in ("auto", "chunked", "auto"):
            masked_cross_entropy(
                hidden, weight, bias, targets, excluded=None, vocab_size=VOCAB, backend=backend
            )
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "masked_cross_entropy: backend chunked (auto: cpu)",
        "masked_cross_entropy: backend chunked (forced)",
    ]
