"""Ways to compute one and the same training loss and its gradients, for the efficiency ablation.

All use the modules of one ``TwoStreamTransformer``, the same noise and the same head and loss on the masked
rows; they differ in how many passes they make and in how attention is computed:

* a loop over blocks with a cache: clean keys and values of the blocks before, then the noisy block;
* two passes: the clean text gives keys and values, all noisy blocks attend to them at once;
* one pass over the noisy and the clean stream laid end to end.

Source: arXiv 2503.09573, the section on efficient training: keys and values of all blocks first, then the
noisy blocks; and the vectorised form of both in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdtrain.diffusion.micro_batch import MicroBatch
from bdtrain.diffusion.objectives.base import Objective
from bdtrain.errors import ShapeError
from bdtrain.model.forward import forward_losses
from bdtrain.model.rope import RopeTable
from bdtrain.model.transformer import TwoStreamTransformer, assemble_streams
from bdtrain_kernels import block_attention, dense_mask, prepare

OURS = "one pass, our attention"

TrainingPass = Callable[[TwoStreamTransformer, Objective, MicroBatch], Tensor]
"""Adds the gradients to ``.grad`` and gives the loss, weighted nats per counted token."""


def all_passes() -> dict[str, TrainingPass]:
    """Name -> how, from the naive one to ours."""
    return {
        "loop over blocks, one backward": loop_over_blocks,
        "loop over blocks, backward in each": loop_with_backward,
        "two passes, dense masks": two_passes("dense"),
        "two passes, our attention": two_passes("auto"),
        "one pass, one masked call": one_masked_call,
        "one pass, dense masks": one_pass("dense"),
        "one pass, FlexAttention": one_pass("flex"),
        OURS: one_pass("auto"),
    }


def one_pass(backend: str) -> TrainingPass:
    """Both streams in one pass, as the model does it.

    Args:
        backend: attention backend.
    """

    def run(model: TwoStreamTransformer, objective: Objective, micro_batch: MicroBatch) -> Tensor:
        with attention_backend(model, backend):
            loss = forward_losses(model, objective, micro_batch).sum() / _tokens(micro_batch)
            loss.backward()
        return loss.detach()

    return run


def one_masked_call(model: TwoStreamTransformer, objective: Objective, micro_batch: MicroBatch) -> Tensor:
    """Both streams in one pass as published: one attention call over all rows, with a boolean mask.

    The last layer computes the clean rows to the end, too, and drops them.
    """
    corrupted = _single_copy(micro_batch)
    seq = micro_batch.layout.shape[1]
    mask = dense_mask(micro_batch.layout, noisy_copies=1, clean=True)
    mask = mask[:1] if micro_batch.layout.single_document else mask
    positions = torch.arange(seq, device=mask.device).repeat(2)
    context = _Context(rope=model.rope_table(positions), mask=mask)
    hidden = model.run_layers(assemble_streams(corrupted.noisy, corrupted.clean), context)
    loss = _loss(model, objective, micro_batch, hidden[:seq], slice(0, seq))
    loss.backward()
    return loss.detach()


def two_passes(backend: str) -> TrainingPass:
    """The clean stream alone, then the noisy one against its keys and values.

    Args:
        backend: attention backend of both passes.
    """

    def run(model: TwoStreamTransformer, objective: Objective, micro_batch: MicroBatch) -> Tensor:
        corrupted = _single_copy(micro_batch)
        seq = micro_batch.layout.shape[1]
        stored = clean_keys_values(model, micro_batch, backend)
        context = _Context(
            rope=stored.rope,
            layout=prepare(micro_batch.layout, noisy_copies=1, clean=True, backend=backend),
            prefix=(stored.keys, stored.values),
            own_first=True,
        )
        hidden = model.run_layers(corrupted.noisy.flatten(1), context)
        loss = _loss(model, objective, micro_batch, hidden, slice(0, seq))
        loss.backward()
        return loss.detach()

    return run


def loop_over_blocks(model: TwoStreamTransformer, objective: Objective, micro_batch: MicroBatch) -> Tensor:
    """Block after block: the noisy block against the cache, then the clean block into it; one backward."""
    corrupted = _single_copy(micro_batch)
    seq = micro_batch.layout.shape[1]
    keys: list[Tensor] = []
    values: list[Tensor] = []
    states = []
    for block in _blocks(micro_batch):
        rope = model.rope_table(torch.arange(block.start, block.stop, device=corrupted.clean.device))
        noisy = _Context(rope=rope, prefix=(keys, values))
        states.append(model.run_layers(corrupted.noisy[:, 0, block], noisy))
        if block.stop < seq:
            clean = _Context(rope=rope, prefix=(keys, values), read_rows=0)
            model.run_layers(corrupted.clean[:, block], clean)
            keys, values = clean.keys, clean.values
    # The head once: a call per block would keep a gradient of the whole head for each.
    loss = _loss(model, objective, micro_batch, torch.cat(states), slice(0, seq))
    loss.backward()
    return loss.detach()


def loop_with_backward(model: TwoStreamTransformer, objective: Objective, micro_batch: MicroBatch) -> Tensor:
    """One clean pass for keys and values, then block after block forward and backward: least memory."""
    corrupted = _single_copy(micro_batch)
    stored = clean_keys_values(model, micro_batch, "dense")
    keys, values = ([x.detach().requires_grad_() for x in side] for side in (stored.keys, stored.values))
    total = torch.zeros((), device=corrupted.clean.device)
    for block in _blocks(micro_batch):
        rope = model.rope_table(torch.arange(block.start, block.stop, device=corrupted.clean.device))
        prefix = ([x[:, :, : block.start] for x in keys], [x[:, :, : block.start] for x in values])
        hidden = model.run_layers(corrupted.noisy[:, 0, block], _Context(rope=rope, prefix=prefix))
        loss = _loss(model, objective, micro_batch, hidden, block)
        loss.backward()
        total = total + loss.detach()
    pairs = [
        (made, leaf.grad)
        for made, leaf in zip(stored.keys + stored.values, keys + values, strict=True)
        if leaf.grad is not None  # a single block reads no clean key
    ]
    if pairs:
        torch.autograd.backward([made for made, _ in pairs], [grad for _, grad in pairs])
    return total


def clean_keys_values(model: TwoStreamTransformer, micro_batch: MicroBatch, backend: str) -> _Context:
    """One pass over the clean stream; its last layer computes keys and values alone.

    Args:
        model: the model.
        micro_batch: with a clean stream.
        backend: attention backend.

    Returns:
        The context with ``keys`` and ``values`` of each layer, [batch, kv heads, seq, head_dim].

    Raises:
        ShapeError: without a clean stream.
    """
    layout, clean = micro_batch.layout, micro_batch.corrupted.clean
    if clean is None:
        raise ShapeError("the micro-batch has no clean stream; take it from block diffusion")
    positions = torch.arange(layout.shape[1], device=layout.block_start.device)
    context = _Context(
        rope=model.rope_table(positions),
        layout=prepare(layout, noisy_copies=0, clean=True, backend=backend),
        read_rows=0,
    )
    model.run_layers(clean, context)
    return context


@dataclass
class _Context:
    """What attention does in one pass (``bdtrain.model.attention.AttentionContext``).

    Attributes:
        rope: angles of the rows.
        layout: prepared layout; without it every row sees every key, but for ``mask``.
        mask: of a single call, bool [batch or 1, 1, rows, keys], or None.
        prefix: keys and values per layer that stand before the rows' own; none at first.
        own_first: the rows' own keys come first, as ``block_attention`` wants its streams.
        read_rows: rows that anyone reads after the last layer; None for all.
        keys: what each layer attended to, filled by the pass.
        values: the same.
    """

    rope: RopeTable
    layout: Any = None
    mask: Tensor | None = None
    prefix: tuple[list[Tensor], list[Tensor]] | None = None
    own_first: bool = False
    read_rows: int | None = None
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def output_rows(self, total: int) -> int:
        """All of them, or as said."""
        return total if self.read_rows is None else self.read_rows

    def to_streams(self, x: Tensor) -> Tensor:
        """As they are: one rank has all rows."""
        return x

    def to_chunks(self, x: Tensor) -> Tensor:
        """As they are."""
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float) -> Tensor:
        """Attention of [batch, heads, rows, head_dim]."""
        if self.prefix is not None and self.prefix[0]:
            stored = (self.prefix[0][layer - 1], self.prefix[1][layer - 1])
            pairs = ((k, stored[0]), (v, stored[1])) if self.own_first else ((stored[0], k), (stored[1], v))
            k, v = (torch.cat(pair, dim=2) for pair in pairs)
        self.keys.append(k)
        self.values.append(v)
        if q.shape[2] == 0:
            return q
        if self.layout is not None:
            noisy = self.layout.noisy_copies > 0
            return block_attention(
                q,
                k,
                v,
                self.layout,
                noisy_copies=self.layout.noisy_copies,
                queries="noisy" if noisy else "all",
                scale=scale,
            )
        group = q.shape[1] // k.shape[1]
        if group > 1:
            # Repeated by hand: with a mask, enable_gqa leaves only the unfused path on CUDA.
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=scale)


@contextmanager
def attention_backend(model: TwoStreamTransformer, backend: str) -> Iterator[None]:
    """The model with another attention backend."""
    before = model.config.block_attention_backend
    model.config.block_attention_backend = backend
    try:
        yield
    finally:
        model.config.block_attention_backend = before


def _loss(
    model: TwoStreamTransformer, objective: Objective, micro_batch: MicroBatch, hidden: Tensor, at: slice
) -> Tensor:
    """Loss of the masked rows among some positions of the noisy stream; ``hidden`` is [positions, ...]."""
    corrupted = micro_batch.corrupted
    rows = corrupted.rows[:, 0, at]
    view = model.view_rows(hidden, rows)
    targets, weight = corrupted.targets[:, 0, at][rows], corrupted.weight[:, 0, at][rows]
    return objective.loss(view, targets, weight).sum() / _tokens(micro_batch)


def _tokens(micro_batch: MicroBatch) -> Tensor:
    return micro_batch.corrupted.rows.shape[1] * micro_batch.corrupted.counted.sum()


def _single_copy(micro_batch: MicroBatch) -> Any:
    corrupted = micro_batch.corrupted
    if corrupted.noisy is None or corrupted.clean is None or corrupted.noisy.shape[1] != 1:
        found = None if corrupted.noisy is None else corrupted.noisy.shape[1]
        raise ShapeError(f"{found} noisy copies; these passes are written for 1 beside a clean stream")
    return corrupted


def _blocks(micro_batch: MicroBatch) -> list[slice]:
    """Blocks of a row, the same in every row."""
    layout = micro_batch.layout
    if not layout.single_document:
        raise ShapeError(
            "rows of several documents have blocks at different places; a loop over blocks needs "
            "isolate_documents=False"
        )
    seq, size = layout.shape[1], layout.block_size
    return [slice(start, min(start + size, seq)) for start in range(0, seq, size)]
