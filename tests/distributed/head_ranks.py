"""What two ranks compute for test_head_ranks.py: a shared vocabulary beside the dense form in one piece."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HIDDEN, LOCAL = 12, 24
MASKS = {"first": [4], "second": [30], "both": [4, 30], "none": []}


def compare_heads(rank: int, world: int) -> dict[str, Any]:
    """Everything, on this rank."""
    from bdtrain.parallel.cpu import install_cpu_shim
    from bdtrain.parallel.libraries import prepare_libraries
    from bdtrain.testing.interpreter import quicken_interpreter

    prepare_libraries()
    quicken_interpreter()
    torch.set_num_threads(1)
    install_cpu_shim()
    dist.init_process_group("gloo", init_method=os.environ["BDTRAIN_RENDEZVOUS"], rank=rank, world_size=world)
    group = dist.group.WORLD
    return {
        "cases": [
            compare(group, dtype, excluded, bias=bias, rows=rows, way=way, vocab=vocab)
            for dtype in ("float64", "float32")
            for excluded in MASKS.values()
            for bias in (False, True)
            for rows in (23, 1, 0)
            for way in ("announced", "computed again", "statistics")
            for vocab in (37,)
        ]
        # All of the second rank's columns are padding; none of any rank's are.
        + [
            compare(group, "float64", [4], bias=True, rows=7, way=way, vocab=vocab)
            for way in ("announced", "computed again", "statistics")
            for vocab in (20, 48)
        ],
        "triton": {
            way: max(
                compare(group, "float32", [4, 30], bias=True, rows=7, way=way, vocab=37, backend="triton")[
                    "errors"
                ].values()
            )
            for way in ("announced", "computed again", "statistics")
        },
        "bfloat16": {way: compare_bfloat16(group, way) for way in ("announced", "computed again")},
        "traffic": {way: count_traffic(group, way) for way in ("announced", "computed again")},
        "largest": largest_tensor(group),
    }


def inputs(rows: int, excluded: list[int], vocab: int) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Float64 numbers of the whole vocabulary, targets on both ranks, row weights, ids of the statistics."""
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    whole = {
        "hidden": normal(rows, HIDDEN),
        "weight": normal(2 * LOCAL, HIDDEN),
        "bias": normal(2 * LOCAL),
    }
    allowed = torch.tensor([i for i in range(vocab) if i not in excluded])
    targets = allowed[torch.randint(len(allowed), (rows,), generator=generator)]
    others = allowed[torch.randint(len(allowed), (rows,), generator=generator)]
    row_weights = 0.1 + torch.rand(rows, generator=generator, dtype=torch.float64)
    return whole, targets, row_weights, torch.stack((targets, others, targets), dim=1)


def answer(
    given: dict[str, Tensor],
    targets: Tensor,
    row_weights: Tensor,
    ids: Tensor,
    *,
    way: str,
    **settings: Any,
) -> tuple[dict[str, Tensor], Tensor]:
    """Named answers of the kernel and a scalar made of them."""
    from bdtrain_kernels.masked_cross_entropy import masked_cross_entropy, row_statistics

    head = (given["hidden"], given["weight"], given.get("bias"))
    if way == "statistics":
        lse, values = row_statistics(*head, ids, chunk_rows=4, **settings)
        return {"logsumexp": lse, "values": values}, combine(lse, values, row_weights)
    announced = 3 * row_weights if way == "announced" else None
    nll = masked_cross_entropy(*head, targets, row_weights=announced, chunk_rows=4, **settings)
    return {"nll": nll}, (nll * row_weights).sum() / 5


def combine(lse: Tensor, values: Tensor, row_weights: Tensor) -> Tensor:
    """A function of both statistics whose gradient differs from row to row and from id to id."""
    return (lse * row_weights).sum() + (values * values.new_tensor([1.0, -2.0, 0.5])).sum()


def dense_answer(
    given: dict[str, Tensor],
    targets: Tensor,
    row_weights: Tensor,
    ids: Tensor,
    *,
    way: str,
    excluded: list[int],
    vocab_size: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """The same from the logits of all rows, the classes left out removed."""
    kept = torch.tensor([i for i in range(vocab_size) if i not in excluded])
    place = torch.full((vocab_size,), -1)
    place[kept] = torch.arange(len(kept))
    logits = F.linear(given["hidden"], given["weight"], given.get("bias"))[:, kept]
    if way == "statistics":
        lse, values = logits.logsumexp(1), logits.gather(1, place[ids])
        return {"logsumexp": lse, "values": values}, combine(lse, values, row_weights)
    nll = F.cross_entropy(logits, place[targets], reduction="none")
    return {"nll": nll}, (nll * row_weights).sum() / 5


def leaves(whole: dict[str, Tensor], group: Any, dtype: torch.dtype, *, bias: bool) -> dict[str, Tensor]:
    """This rank's part; without a group everything."""
    given = {}
    for name, x in whole.items():
        if name == "bias" and not bias:
            continue
        part = x if group is None or name == "hidden" else x.chunk(group.size())[group.rank()]
        given[name] = part.to(dtype).clone().requires_grad_()
    return given


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest number; a difference in shape is infinite."""
    if found.shape != wanted.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    size = wanted.double().abs().max().item()
    return (found.double() - wanted.double()).abs().max().item() / (size or 1.0)


def compare(
    group: Any,
    dtype: str,
    excluded: list[int],
    *,
    bias: bool,
    rows: int,
    way: str,
    vocab: int,
    backend: str = "auto",
) -> dict[str, Any]:
    """Answers and gradients of two ranks against the dense ones of float64."""
    whole, targets, row_weights, ids = inputs(rows, excluded, vocab)
    kind = getattr(torch, dtype)
    # The reference gets the same rounded numbers, so that only the arithmetic differs.
    rounded = {name: x.to(kind).double() for name, x in whole.items()}
    weights = row_weights.to(kind)
    mine = leaves(rounded, group, kind, bias=bias)
    found, loss = answer(
        mine,
        targets,
        weights,
        ids,
        way=way,
        excluded=excluded,
        vocab_size=vocab,
        group=group,
        backend=backend,
    )
    loss.backward()
    alone = leaves(rounded, None, torch.float64, bias=bias)
    wanted, expected = dense_answer(
        alone, targets, weights.double(), ids, way=way, excluded=excluded, vocab_size=vocab
    )
    expected.backward()
    errors = {name: difference(found[name], wanted[name]) for name in wanted}
    for name, leaf in mine.items():
        whole_grad = alone[name].grad
        assert whole_grad is not None and leaf.grad is not None
        part = whole_grad if name == "hidden" else whole_grad.chunk(group.size())[group.rank()]
        size = whole_grad.abs().max().item() if whole_grad.numel() else 1.0
        errors[f"{name} gradient"] = (
            (leaf.grad.double() - part).abs().max().item() / (size or 1.0) if part.numel() else 0.0
        )
    first = group.rank() * LOCAL
    silent = [i - first for i in (*excluded, *range(vocab, 2 * LOCAL)) if 0 <= i - first < LOCAL]
    return {
        "dtype": dtype,
        "case": f"{excluded} bias={bias} rows={rows} {way} vocab={vocab}",
        "errors": errors,
        "silent": not mine["weight"].grad[silent].any(),
    }


def compare_bfloat16(group: Any, way: str) -> float:
    """Largest relative L2 error of the gradients."""
    whole, targets, row_weights, ids = inputs(23, [4], 37)
    rounded = {name: x.bfloat16().double() for name, x in whole.items()}
    mine = leaves(rounded, group, torch.bfloat16, bias=True)
    settings = {"excluded": [4], "vocab_size": 37}
    answer(mine, targets, row_weights.float(), ids, way=way, group=group, **settings)[1].backward()
    alone = leaves(rounded, None, torch.float64, bias=True)
    dense_answer(alone, targets, row_weights, ids, way=way, **settings)[1].backward()
    errors = []
    for name, leaf in mine.items():
        wanted = alone[name].grad
        part = wanted if name == "hidden" else wanted.chunk(group.size())[group.rank()]
        errors.append(((leaf.grad.double() - part).norm() / part.norm()).item())
    return max(errors)


def count_traffic(group: Any, way: str) -> list[int]:
    """Numbers in each sum or maximum over the ranks, in order."""
    whole, targets, row_weights, ids = inputs(23, [4], 37)
    mine = leaves(whole, group, torch.float64, bias=True)
    sizes: list[int] = []
    real = dist.all_reduce

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(x.numel())
        return real(x, *args, **kwargs)

    dist.all_reduce = counted
    try:
        _, loss = answer(mine, targets, row_weights, ids, way=way, excluded=[4], vocab_size=37, group=group)
        loss.backward()
    finally:
        dist.all_reduce = real
    return sizes


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.numel())
        return result


def largest_tensor(group: Any) -> int:
    """Of 64 rows in chunks of 4, on this rank; its weight has 288 numbers, its hidden states 768."""
    whole, targets, row_weights, ids = inputs(64, [4], 37)
    mine = leaves(whole, group, torch.float64, bias=True)
    with LargestTensor() as seen:
        for way in ("announced", "computed again", "statistics"):
            answer(mine, targets, row_weights, ids, way=way, excluded=[4], vocab_size=37, group=group)[
                1
            ].backward()
    return seen.numbers
