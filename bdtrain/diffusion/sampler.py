"""Generation block by block over any ``denoise`` object; a row's sample knows nothing of its batch.

A block starts as masks (or as the tail of the prompt and masks), is unmasked over some network calls, enters
the cache by one clean forward, and the next begins. Blocks align at position 0 of the request, as in
training. How masks are lifted:

* ``ancestral``: ``steps`` equal steps of t from 1 to 0. A token that is masked at t stays so until s with
  p(s)/p(t), so the step that lifts it can be drawn beforehand, from one uniform per token; steps that lift
  nothing cost no call.
* ``first_hitting``: the limit of infinitely many steps (arXiv 2409.02908): one token per call. The network
  takes no time, so the hitting times matter by their order only, which is that of the same uniforms.
* ``confidence``: every token whose candidate has probability above ``threshold``, and the best one in any
  case.
* ``static``: the same number of tokens each call, those of the most probable candidates.

Autoregressive models go through the same protocol, one token per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bdtrain.diffusion.keyed import NoiseKey, Purpose, uniforms
from bdtrain.diffusion.schedule import get_schedule
from bdtrain.diffusion.token_draws import draw_tokens, unigram_entropy
from bdtrain.errors import ConfigError

METHODS = ("ancestral", "first_hitting", "confidence", "static")
ENTROPY_WINDOW = 256

# Draw numbers of a position's key.
_TOKEN_DRAW = 0
_ORDER_DRAW = 1
# A row's draws are keyed by sample id and the call inside the block, packed into the key's 63 bits of sample.
_CALL_BITS = 24


class Cache(Protocol):
    """What a ``Denoise`` keeps of each row; the sampler reads only this."""

    @property
    def lengths(self) -> Tensor:
        """Tokens stored per row, int64 [rows]; its device is where the sampler works."""
        ...


class Denoise(Protocol):
    """A network with a cache of clean tokens."""

    def start(self, rows: int, max_len: int) -> Any:
        """An empty ``Cache`` for so many rows of at most ``max_len`` tokens."""
        ...

    def logits(
        self, tokens: Tensor, positions: Tensor, cache: Any, store: bool, active: Tensor | None = None
    ) -> Tensor:
        """Logits of some tokens, float32 [rows, n, vocab]; those of inactive tokens mean nothing.

        Args:
            tokens: ids, int64 [rows, n]; the active ones of a row see each other and the row's stored tokens.
            positions: int64 [rows, n].
            cache: from ``start``.
            store: append the active tokens, which are final, to their row's cache.
            active: bool [rows, n]; None for all.
        """
        ...


@dataclass(frozen=True)
class Sample:
    """One generated continuation.

    Attributes:
        tokens: generated ids, without the prompt, an EOS that ended them included.
        network_calls: forward passes that this row took part in, those that fill the cache included.
        denoise_calls: forward passes whose prediction was used.
        stopped_by: ``eos``, ``length`` or ``entropy``.
    """

    tokens: list[int]
    network_calls: int
    denoise_calls: int
    stopped_by: str


@dataclass(frozen=True)
class _Settings:
    """The arguments of ``generate`` that do not differ by row."""

    block_size: int
    max_tokens: int
    mask_id: int
    eos_id: int | None
    method: str
    steps: int
    schedule: str
    temperature: float
    top_p: float
    threshold: float
    entropy_nats: float | None
    key: NoiseKey


@dataclass
class _Row:
    """What the host knows of one row."""

    prompt: list[int]
    tokens: list[int]
    network_calls: int = 0
    denoise_calls: int = 0
    stopped_by: str = ""

    @property
    def length(self) -> int:
        """Tokens of the request and of all finished blocks, prompt included."""
        return len(self.prompt) + len(self.tokens)

    def accept(self, new: list[int], settings: _Settings) -> None:
        """Take final tokens and apply the stop rules."""
        for token in new:
            self.tokens.append(token)
            if token == settings.eos_id:
                self.stopped_by = "eos"
            elif len(self.tokens) >= settings.max_tokens:
                self.stopped_by = "length"
            if self.stopped_by:
                return
        limit = settings.entropy_nats
        if limit is not None and len(self.tokens) >= ENTROPY_WINDOW:
            if unigram_entropy(self.tokens[-ENTROPY_WINDOW:]) < limit:
                self.stopped_by = "entropy"

    def result(self) -> Sample:
        """The finished sample."""
        return Sample(self.tokens, self.network_calls, self.denoise_calls, self.stopped_by)


def generate(
    denoise: Denoise,
    prompts: Sequence[Sequence[int]],
    *,
    block_size: int,
    max_tokens: int,
    mask_id: int,
    eos_id: int | None,
    key: NoiseKey,
    method: str = "ancestral",
    steps: int | None = None,
    schedule: str = "linear",
    temperature: float = 1.0,
    top_p: float = 1.0,
    threshold: float = 0.9,
    entropy_nats: float | None = None,
    sample_ids: Sequence[int] | None = None,
    autoregressive: bool = False,
) -> list[Sample]:
    """Continue prompts, all in one batch.

    Args:
        denoise: the network.
        prompts: token ids of each row, BOS included where the model knows one; may be empty, save for
            autoregression.
        block_size: L' of the model. For MDLM the window in which everything is unmasked, prompt included.
        max_tokens: generated tokens per row, at most. Blocks are always full, as in training; what passes
            ``max_tokens`` or EOS is cut.
        mask_id: id of [MASK].
        eos_id: ends a row; None for never.
        key: of purpose SAMPLE; seed and step are part of every draw.
        method: how masks are lifted, see the module.
        steps: steps per block for ``ancestral``; calls per block for ``static``. None: ``block_size``.
        schedule: noise schedule whose move_chance spaces the ``ancestral`` steps.
        temperature: logits are divided by it; 0 takes the most probable token.
        top_p: keeps the most probable tokens up to this mass, the one that crosses it included.
        threshold: probability above which ``confidence`` accepts a candidate.
        entropy_nats: stop a row when the unigram entropy of its last 256 generated tokens is below this (4 in
            the reference); None for never.
        sample_ids: identity of each row's draws, in [0, 2**39); None: its number in ``prompts``. Rows of the
            same prompt, id and key are the same sample, whatever else is in the batch.
        autoregressive: the network predicts the next token; ``method``, ``steps`` and ``block_size`` have no
            meaning.

    Returns:
        One sample per prompt, in order.

    Raises:
        ConfigError: if an argument is out of range.
    """
    settings = _Settings(
        block_size=1 if autoregressive else block_size,
        max_tokens=max_tokens,
        mask_id=mask_id,
        eos_id=eos_id,
        method=method,
        steps=block_size if steps is None else steps,
        schedule=schedule,
        temperature=temperature,
        top_p=top_p,
        threshold=threshold,
        entropy_nats=entropy_nats,
        key=key,
    )
    ids = list(range(len(prompts))) if sample_ids is None else list(sample_ids)
    _check(settings, prompts, ids, autoregressive)
    rows = [_Row(list(prompt), []) for prompt in prompts]
    if not rows:
        return []
    longest = max(len(row.prompt) for row in rows) + max_tokens
    cache = denoise.start(len(rows), -(-longest // settings.block_size) * settings.block_size)
    if autoregressive:
        _continue_token_by_token(denoise, cache, rows, ids, settings)
    else:
        _BlockRun(denoise, cache, rows, ids, settings).run()
    return [row.result() for row in rows]


def _check(
    settings: _Settings, prompts: Sequence[Sequence[int]], ids: list[int], autoregressive: bool
) -> None:
    """Refuse arguments that cannot work, all at once."""
    problems = []
    for name, low in (("block_size", 1), ("max_tokens", 1), ("steps", 1)):
        if getattr(settings, name) < low:
            problems.append(f"{name}={getattr(settings, name)}; it must be at least {low}")
    if settings.method not in METHODS:
        problems.append(f"method={settings.method!r} is unknown; choose one of {', '.join(METHODS)}")
    if settings.temperature < 0.0:
        problems.append(f"temperature={settings.temperature}; it must be 0 (greedy) or more")
    if not 0.0 < settings.top_p <= 1.0:
        problems.append(f"top_p={settings.top_p}; allowed is 0 < top_p <= 1")
    if settings.key.purpose is not Purpose.SAMPLE:
        problems.append(f"key.purpose={settings.key.purpose.name}; sampling draws need Purpose.SAMPLE")
    if len(ids) != len(prompts) or any(not 0 <= number < 1 << 39 for number in ids):
        problems.append("sample_ids must hold one number in [0, 2**39) per prompt")
    if autoregressive and any(len(prompt) == 0 for prompt in prompts):
        problems.append("an empty prompt has no next token for an autoregressive model; begin it with BOS")
    if any(settings.mask_id in prompt for prompt in prompts):
        problems.append(f"a prompt holds mask_id={settings.mask_id}; prompts are clean text")
    if problems:
        raise ConfigError("\n".join(problems))
    get_schedule(settings.schedule)


class _BlockRun:
    """Block-by-block generation of one batch.

    Tensors are [rows, block_size]; a row is active while it still generates, and each row is at a block and a
    call of its own.
    """

    def __init__(
        self, denoise: Denoise, cache: Cache, rows: list[_Row], ids: list[int], settings: _Settings
    ) -> None:
        self.denoise, self.cache, self.rows, self.settings = denoise, cache, rows, settings
        self.device = cache.lengths.device
        size = settings.block_size
        shape = (len(rows), size)
        self.offset = torch.arange(size, device=self.device)
        self.ids = torch.tensor(ids, dtype=torch.int64, device=self.device)
        lengths = [len(row.prompt) for row in rows]
        self.prompt_lengths = torch.tensor(lengths, dtype=torch.int64, device=self.device)
        self.start = torch.zeros(len(rows), dtype=torch.int64, device=self.device)
        self.block = torch.full(shape, settings.mask_id, dtype=torch.int64, device=self.device)
        self.events = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.call = torch.zeros(len(rows), dtype=torch.int64, device=self.device)
        self.active = torch.ones(len(rows), dtype=torch.bool, device=self.device)

    def run(self) -> None:
        """Until every row has stopped."""
        self._store_prompts()
        self._open_blocks(list(range(len(self.rows))))
        while bool(self.active.any()):
            masked = (self.block == self.settings.mask_id) & self.active[:, None]
            self._lift(masked)
            self._close_blocks()

    def _store_prompts(self) -> None:
        """Store each prompt's full blocks, one forward each: a block sees itself and earlier ones only."""
        size = self.settings.block_size
        for number in range(max(len(row.prompt) // size for row in self.rows)):
            here = [index for index, row in enumerate(self.rows) if len(row.prompt) // size > number]
            window = slice(number * size, (number + 1) * size)
            self.block[here] = torch.tensor(
                [self.rows[index].prompt[window] for index in here], device=self.device
            )
            self.start[here] = number * size
            self._store(here)

    def _store(self, here: list[int]) -> None:
        """Append the blocks of some rows to the cache."""
        chosen = torch.zeros_like(self.active)
        chosen[here] = True
        self._call_network(chosen, store=True)

    def _call_network(self, chosen: Tensor, *, store: bool) -> Tensor:
        """One forward of the current blocks; only ``chosen`` rows [rows] take part."""
        for index in chosen.nonzero().flatten().tolist():
            self.rows[index].network_calls += 1
            self.rows[index].denoise_calls += not store
        everyone = chosen[:, None].expand_as(self.block)
        positions = self.start[:, None] + self.offset
        # A row that is not there may hold anything; its positions stay legal because blocks never pass the
        # cache.
        active = None if len(self.rows) == 1 else everyone.contiguous()
        return self.denoise.logits(self.block, positions, self.cache, store, active)

    def _open_blocks(self, here: list[int]) -> None:
        """Begin the block of the next position of some rows: the prompt's tail, if any, then masks."""
        settings = self.settings
        size, starts, blocks = settings.block_size, [], []
        for index in here:
            row = self.rows[index]
            first = row.length // size * size
            tail = row.prompt[first:]
            starts.append(first)
            blocks.append(tail + [settings.mask_id] * (size - len(tail)))
        self.start[here] = torch.tensor(starts, device=self.device)
        self.block[here] = torch.tensor(blocks, device=self.device)
        self.call[here] = 0
        if settings.method in ("ancestral", "first_hitting"):
            chosen = torch.tensor(here, dtype=torch.int64, device=self.device)
            self.events[chosen] = self._draw_events(chosen)

    def _draw_events(self, chosen: Tensor) -> Tensor:
        """In which step each token of some rows' blocks is lifted, int64 [chosen, block_size]."""
        settings = self.settings
        v = self._uniforms(chosen, _ORDER_DRAW)
        if settings.method == "first_hitting":
            prompt = self.block[chosen] != settings.mask_id
            # From t = 1 down, a token is masked while v < p(t): the largest v is hit first.
            order = torch.where(prompt, -1.0, v).argsort(dim=1, descending=True, stable=True)
            return torch.empty_like(order).scatter_(1, order, self.offset.expand_as(order))
        s = torch.arange(settings.steps - 1, -1, -1, device=self.device, dtype=torch.float64) / settings.steps
        still_masked = get_schedule(settings.schedule).move_chance(s)
        # The grid ends at s = 0, where nothing may stay masked, whatever a clamped schedule says there.
        still_masked[-1] = 0.0
        return settings.steps - torch.bucketize(v, still_masked.flip(0).contiguous(), right=True)

    def _uniforms(self, chosen: Tensor, draw: int) -> Tensor:
        """Keyed draws for the blocks of some rows at their current call, float64 [chosen, block_size]."""
        sample = self.ids[chosen] << _CALL_BITS | self.call[chosen]
        positions = self.start[chosen][:, None] + self.offset
        return uniforms(self.settings.key, sample[:, None], 0, positions, draw)

    def _lift(self, masked: Tensor) -> None:
        """One network call, and the masks that it lifts; ``masked`` bool [rows, block_size]."""
        settings = self.settings
        logits = self._call_network(self.active, store=False)
        everyone = torch.arange(len(self.rows), device=self.device)
        u = self._uniforms(everyone, _TOKEN_DRAW)
        if settings.method in ("ancestral", "first_hitting"):
            never = torch.iinfo(torch.int64).max
            events = torch.where(masked, self.events, never)
            lifted = masked & (events == events.amin(dim=1, keepdim=True))
            tokens, _ = self._draw(logits, u, lifted)
            self.block[lifted] = tokens
        else:
            tokens, confidence = self._draw(logits, u, masked)
            candidates = self.block.masked_scatter(masked, tokens)
            scores = torch.full_like(u, -1.0).masked_scatter(masked, confidence)
            lifted = masked & self._accepted(scores)
            self.block = torch.where(lifted, candidates, self.block)
        self.call += 1

    def _draw(self, logits: Tensor, u: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and their probabilities at the places ``where``, bool [rows, block_size]."""
        settings = self.settings
        return draw_tokens(
            logits[where],
            u[where],
            mask_id=settings.mask_id,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )

    def _accepted(self, scores: Tensor) -> Tensor:
        """Which candidates are kept; scores [rows, block_size], -1 where there is none."""
        settings = self.settings
        order = scores.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(1, order, self.offset.expand_as(order))
        if settings.method == "confidence":
            return (scores > settings.threshold) | (rank == 0)
        return rank < -(-settings.block_size // settings.steps)

    def _close_blocks(self) -> None:
        """Take the final tokens of settled blocks, store those that go on, open their next block."""
        settings = self.settings
        indexes = (self.active & self._settled()).nonzero().flatten().tolist()
        if not indexes:
            return
        going_on = []
        for index, block in zip(indexes, self.block[indexes].tolist(), strict=True):
            row = self.rows[index]
            row.accept(block[row.length % settings.block_size :], settings)
            if row.stopped_by:
                self.active[index] = False
            else:
                going_on.append(index)
        if going_on:
            self._store(going_on)
            self._open_blocks(going_on)

    def _settled(self) -> Tensor:
        """Whether no mask is left that the result could hold (not behind EOS or the limit), bool [rows]."""
        settings = self.settings
        generated = self.start[:, None] + self.offset - self.prompt_lengths[:, None]
        wanted = generated < settings.max_tokens
        if settings.eos_id is not None:
            ends = (self.block == settings.eos_id) & (generated >= 0)
            wanted = wanted & (ends.cumsum(dim=1) == 0)
        return ~((self.block == settings.mask_id) & wanted).any(dim=1)


def _continue_token_by_token(
    denoise: Denoise, cache: Cache, rows: list[_Row], ids: list[int], settings: _Settings
) -> None:
    """Next-token generation: each call stores one token per row and predicts the one after it.

    The prompt goes in token by token as well, because the tokens of one call see each other; rows with short
    prompts generate while others still read theirs.
    """
    device = cache.lengths.device
    sample = torch.tensor(ids, dtype=torch.int64, device=device) << _CALL_BITS
    step = 0
    while any(not row.stopped_by for row in rows):
        here = [index for index, row in enumerate(rows) if not row.stopped_by]
        fed = [(row.prompt + row.tokens)[step] if not row.stopped_by else 0 for row in rows]
        tokens = torch.tensor(fed, dtype=torch.int64, device=device)[:, None]
        active = torch.zeros(len(rows), 1, dtype=torch.bool, device=device)
        active[here] = True
        positions = torch.full_like(tokens, step)
        logits = denoise.logits(tokens, positions, cache, True, None if len(rows) == 1 else active)[:, 0]
        step += 1
        u = uniforms(settings.key, sample, 0, step, _TOKEN_DRAW)
        drawn = draw_tokens(
            logits, u, mask_id=settings.mask_id, temperature=settings.temperature, top_p=settings.top_p
        )[0].tolist()
        for index in here:
            rows[index].network_calls += 1
            if step >= len(rows[index].prompt):
                rows[index].denoise_calls += 1
                rows[index].accept([drawn[index]], settings)
