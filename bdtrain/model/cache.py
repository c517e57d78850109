"""Generation: keys and values of finished blocks, and the ``denoise`` object that samplers call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from bdtrain.errors import ShapeError
from bdtrain.model.rope import RopeTable
from bdtrain.model.transformer import TwoStreamTransformer
from bdtrain_kernels import cache_attention


@dataclass
class KeyValueCache:
    """Clean keys (rotated) and values of each row's finished tokens.

    Attributes:
        keys: one tensor per layer, [rows, local kv heads, max_len + 1, head_dim]; the last slot is a bin for
            tokens that are not there.
        values: the same.
        lengths: tokens stored per row, int64 [rows].
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor

    @property
    def max_len(self) -> int:
        """Tokens a row can hold, those of the running call included."""
        return self.keys[0].shape[2] - 1


@dataclass(frozen=True)
class CacheContext:
    """Attention of some new tokens to each other and to what their row has stored.

    Attributes:
        cache: where keys and values lie; new ones are written behind the row's length, so that they count as
            stored as soon as the length is raised.
        rope: angles of the new tokens.
        slots: where each new token goes, int64 [rows, n].
        key_mask: bool [rows, keys], or None when every row sees all of the first ``keys`` slots.
        keys: slots that anyone may see.
        rows: row numbers, int64 [rows, 1], to index beside ``slots``.
    """

    cache: KeyValueCache
    rope: RopeTable
    slots: Tensor
    key_mask: Tensor | None
    keys: int
    rows: Tensor

    def output_rows(self, total: int) -> int:
        """All of them."""
        return total

    def to_streams(self, x: Tensor) -> Tensor:
        """As they are: nobody splits the new tokens."""
        return x

    def to_chunks(self, x: Tensor) -> Tensor:
        """As they are."""
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float) -> Tensor:
        """Store the new keys and values, then attend to all."""
        stored_k, stored_v = self.cache.keys[layer - 1], self.cache.values[layer - 1]
        # [rows, heads, n, d] into [rows, heads, slots, d] at a slot per (row, token).
        stored_k.transpose(1, 2)[self.rows, self.slots] = k.transpose(1, 2).to(stored_k.dtype)
        stored_v.transpose(1, 2)[self.rows, self.slots] = v.transpose(1, 2).to(stored_v.dtype)
        return cache_attention(
            q, stored_k[:, :, : self.keys], stored_v[:, :, : self.keys], self.key_mask, scale=scale
        )


class Denoiser:
    """A model as ``bdtrain.diffusion.sampler`` wants it: logits of some tokens given the stored ones.

    Works for every objective: a block of L' tokens for block diffusion, the whole sequence with nothing
    stored for MDLM, one token at a time for autoregression.

    Args:
        model: the model; one pipeline stage, no sequence parallelism.

    Raises:
        ShapeError: for a model of another layout.
    """

    def __init__(self, model: TwoStreamTransformer) -> None:
        """See the class."""
        if not (model.pre_process and model.post_process):
            raise ShapeError("the model is split over pipeline stages; generation needs it whole (pp=1)")
        if model.chunks > 1:
            raise ShapeError(
                "the model splits sequences over ranks, and a block of new tokens is too short for that; "
                "build it with sequence_parallel=False to generate"
            )
        self._model = model

    def start(self, rows: int, max_len: int) -> KeyValueCache:
        """An empty cache.

        Args:
            rows: sequences generated side by side.
            max_len: most tokens of a row, prompt included.
        """
        config = self._model.config
        device = self._model.output_layer.weight.device
        heads = config.num_query_groups // self._model.pg_collection.tp.size()
        shape = (rows, heads, max_len + 1, config.kv_channels)

        def empty() -> list[Tensor]:
            return [
                torch.zeros(shape, dtype=config.params_dtype, device=device) for _ in range(config.num_layers)
            ]

        return KeyValueCache(empty(), empty(), torch.zeros(rows, dtype=torch.int64, device=device))

    @torch.no_grad()
    def logits(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: KeyValueCache,
        store: bool,
        active: Tensor | None = None,
    ) -> Tensor:
        """Run some tokens.

        Args:
            tokens: ids, int64 [rows, n]; they see each other and the row's stored tokens.
            positions: their places in the row, int64 [rows, n].
            cache: from ``start``; with ``store`` the tokens are appended to it.
            store: keep the keys and values (the tokens are final).
            active: which tokens are there, bool [rows, n]; None for all. Logits of the others mean nothing.

        Returns:
            float32 [rows, n, vocab_size], -inf at [MASK].

        Raises:
            ShapeError: if shapes differ or a row would grow past the cache.
        """
        rows, count = tokens.shape
        if positions.shape != tokens.shape or (active is not None and active.shape != tokens.shape):
            raise ShapeError(f"tokens {tuple(tokens.shape)}, positions and active must have one shape")
        if rows != cache.lengths.shape[0]:
            raise ShapeError(
                f"{rows} rows for a cache of {cache.lengths.shape[0]}; start a cache of the same rows"
            )
        context, lengths = self._context(positions, cache, active)
        model = self._model
        # Nothing in the model differs between training and evaluation mode (no dropout), so the mode stays.
        hidden = model.run_layers(tokens, context)
        everything = torch.ones(rows, count, dtype=torch.bool, device=tokens.device)
        local = model.view_rows(hidden, everything).logits()
        if store:
            cache.lengths = lengths
        full = gather_from_tensor_model_parallel_region(local, group=model.pg_collection.tp)
        return full[:, : model.config.vocab_size].unflatten(0, (rows, count)).float()

    def _context(
        self, positions: Tensor, cache: KeyValueCache, active: Tensor | None
    ) -> tuple[CacheContext, Tensor]:
        """Slots, mask and angles of a call, and the lengths after it."""
        rows, count = positions.shape
        device = positions.device
        if active is None:
            slots = cache.lengths.unsqueeze(1) + torch.arange(count, device=device)
            lengths = cache.lengths + count
        else:
            slots = cache.lengths.unsqueeze(1) + active.long().cumsum(1) - 1
            slots = torch.where(active, slots, torch.full_like(slots, cache.max_len))
            lengths = cache.lengths + active.sum(1)
        longest, shortest = int(lengths.max()), int(lengths.min())
        if longest > cache.max_len:
            raise ShapeError(
                f"a row would hold {longest} tokens, the cache holds {cache.max_len}; use max_len={longest}"
            )
        mask = None
        if shortest != longest:
            # A row with no token at all sees slot 0, so that its softmax is defined; nobody reads the result.
            mask = torch.arange(longest, device=device) < lengths.clamp(min=1).unsqueeze(1)
        context = CacheContext(
            cache=cache,
            rope=self._model.rope_table(positions.t()),
            slots=slots,
            key_mask=mask,
            keys=longest,
            rows=torch.arange(rows, device=device).unsqueeze(1),
        )
        return context, lengths


def as_denoiser(model: TwoStreamTransformer) -> Denoiser:
    """The model as the ``denoise`` object of the samplers."""
    return Denoiser(model)
