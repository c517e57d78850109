"""NELBO, perplexity and bits per byte on held-out rows, each with the two parts of its standard error.

The reported value is the sum over counted tokens divided by all counted tokens, masked or not. Two things
make it uncertain: the masks that were drawn (noise) and the documents that happened to be in the text (text).
Every row is measured with at least two independent draws of the noise, so that both parts can be told apart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bdtrain.data.loader import Batch, split_rows
from bdtrain.data.tokenizer import TokenizerInfo
from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.micro_batch import MicroBatch, corrupt_rows
from bdtrain.diffusion.objectives.base import Objective
from bdtrain.errors import ConfigError, DataError
from bdtrain.model.forward import forward_stage, stream_rows
from bdtrain.model.transformer import TwoStreamTransformer
from bdtrain.parallel.engine import run_schedule

MIN_DOCUMENTS = 10
"""Below this many documents the rows stand for them."""


class HeldOutRows(Protocol):
    """Rows of held-out text in order, as ``bdtrain.data.loader.ValidationSet`` has them."""

    @property
    def tokenizer_info(self) -> TokenizerInfo:
        """Special ids."""

    def batches(self, batch_size: int, *, dp_rank: int = 0, dp_size: int = 1) -> Iterable[Batch]:
        """One rank's share: row i of a batch of all ranks goes to rank i % dp_size."""


@dataclass(frozen=True)
class Likelihood:
    """A likelihood with its errors.

    Attributes:
        nelbo: nats per counted token; a bound, or exact where ``exact``.
        nelbo_noise_error: standard error of ``nelbo`` from the draw of the masks, nats per token.
        nelbo_text_error: standard error from the choice of the text's parts, nats per token; None for one.
        ppl: exp of ``nelbo``.
        ppl_error: both parts together, by the delta method.
        bpb: bits per UTF-8 byte of the text; None without a tokenizer.
        bpb_error: both parts together.
        tokens: counted tokens.
        text_bytes: UTF-8 bytes they decode to; None without a tokenizer.
        sequences: rows measured.
        text_units: independent parts of the text.
        text_unit: "document"; "part" of a document where rows between them were left out; "row" when there
            are fewer than ten of either. Parts and rows of one document are taken as independent, which
            makes the text error too small where documents are long.
        replicates: draws of the noise per row.
        exact: whether ``nelbo`` is the negative log-likelihood itself.
        seconds: wall time.
    """

    nelbo: float
    nelbo_noise_error: float
    nelbo_text_error: float | None
    ppl: float
    ppl_error: float | None
    bpb: float | None
    bpb_error: float | None
    tokens: int
    text_bytes: int | None
    sequences: int
    text_units: int
    text_unit: str
    replicates: int
    exact: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """One line for the console."""
        sign = "=" if self.exact else "<="

        def error(value: float | None, digits: int) -> str:
            return "unknown" if value is None else f"{value:.{digits}f}"

        least = "" if self.text_unit == "document" else "at least "
        bytes_part = (
            "" if self.bpb is None else f"  bits/byte {sign} {self.bpb:.4f} +- {error(self.bpb_error, 4)}"
        )
        return (
            f"{'NLL' if self.exact else 'NELBO'} {self.nelbo:.4f} nats/token "
            f"(+- {self.nelbo_noise_error:.4f} noise, +- {least}{error(self.nelbo_text_error, 4)} text)  "
            f"PPL {sign} {self.ppl:.2f} +- {error(self.ppl_error, 2)}{bytes_part}  "
            f"[{self.tokens} tokens, {self.text_units} {self.text_unit}s]"
        )


def evaluate_likelihood(
    model: TwoStreamTransformer,
    objective: Objective,
    rows: HeldOutRows,
    *,
    batch_size: int,
    seed: int,
    replicates: int,
    device: torch.device,
    token_bytes: Tensor | None,
    exact: bool,
) -> Likelihood:
    """Measure a model on rows of held-out text, in order. Every rank must call it; all get the result.

    Args:
        model: this rank's part of the two-stream transformer; in evaluation mode for the time of the call.
        objective: the objective in its reported form, which integrates over the full range of noise.
        rows: the held-out rows; data-parallel ranks share them.
        batch_size: rows per forward pass and rank.
        seed: keys the noise, together with the row's position.
        replicates: independent draws per row, at least 2 unless ``exact``.
        device: where the model is.
        token_bytes: UTF-8 bytes each token decodes to, int64 [vocab]; None leaves bits per byte out.
        exact: the objective has no noise (AR) or hides everything (block size 1).

    Raises:
        ConfigError: for fewer than 2 replicates of an objective with noise.
        DataError: if no token counts.
    """
    if replicates < 2 and not exact:
        raise ConfigError(
            f"replicates={replicates}; noise and text are told apart by 2 draws per row or more: choose 2"
        )
    started = time.monotonic()
    draws = 1 if exact else replicates
    sums = _Sums(draws, rows.tokenizer_info.eos_id)
    groups = model.pg_collection
    share = rows.batches(batch_size, dp_rank=groups.dp.rank(), dp_size=groups.dp.size())
    whole = rows.batches(batch_size * groups.dp.size())
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for mine, everyones in zip(share, whole, strict=True):
                # Copies are the replicates: each has strata of its own, and they share one clean stream.
                key = NoiseKey(seed=seed, purpose=Purpose.EVALUATE)
                micro_batches = [
                    corrupt_rows(
                        objective, part, key=key, global_batch_size=batch_size, copies=draws, device=device
                    )
                    for part in split_evenly(mine, groups.pp.size())
                ]
                losses = token_losses(model, objective, micro_batches)
                counted = torch.cat([part.corrupted.counted for part in micro_batches])
                # One more channel carries which tokens count, so that one gather brings everything.
                table = torch.cat((losses, counted.double().unsqueeze(1)), dim=1)
                table = gather_rows(table, groups)[: len(everyones.tokens)]
                sums.add(everyones, table[:, -1].bool(), table[:, :-1], token_bytes)
    finally:
        model.train(was_training)
    return sums.result(exact=exact, has_bytes=token_bytes is not None, seconds=time.monotonic() - started)


def split_evenly(batch: Batch, parts: int) -> list[Batch]:
    """Cut into ``parts`` micro-batches of one size, which keep a pipeline busy; one if they do not divide."""
    rows = len(batch.tokens)
    return split_rows(batch, rows // parts if rows % parts == 0 else rows)


def gather_rows(table: Tensor, groups: Any) -> Tensor:
    """The last pipeline stage's values of all data-parallel ranks, in the order of the global batch.

    Args:
        table: of this rank's rows, float64 [rows, channels, seq].
        groups: Megatron's process groups.

    Returns:
        [rows * dp, channels, seq], on the CPU; the same on every rank.
    """
    parts = [torch.empty_like(table) for _ in range(groups.dp.size())]
    dist.all_gather(parts, table.contiguous(), group=groups.dp)
    # Rank r has the rows i of the global batch with i % dp = r.
    everyones = torch.stack(parts, dim=1).flatten(0, 1)
    last = dist.get_global_rank(groups.pp, groups.pp.size() - 1)
    dist.broadcast(everyones, src=last, group=groups.pp)
    return everyones.cpu()


def token_losses(model: nn.Module, objective: Objective, micro_batches: list[MicroBatch]) -> Tensor:
    """Weighted loss at each position, through the training schedule.

    Returns:
        float64 [batch, draws, seq]; zeros on all but the last pipeline stage.
    """

    def forward_step(batches: Iterator[MicroBatch], module: nn.Module) -> Any:
        output = forward_stage(module, objective, next(batches))
        tokens = torch.zeros((), dtype=torch.int, device=output.device)
        return output, lambda output: (output, tokens, output)

    outputs = run_schedule(
        model,
        forward_step,
        micro_batches,
        rows=stream_rows(micro_batches[0]),
        micro_batch_size=micro_batches[0].layout.shape[0],
        forward_only=True,
    )
    tables = []
    for number, micro_batch in enumerate(micro_batches):
        rows = micro_batch.corrupted.rows
        table = torch.zeros(rows.shape, dtype=torch.float64, device=rows.device)
        if outputs:
            table[rows] = outputs[number].double()
        tables.append(table)
    full = torch.cat(tables)
    # AR's output at a position predicts the next token: its loss belongs there.
    return full if objective.noisy else torch.nn.functional.pad(full[..., :-1], (1, 0))


class _Sums:
    """Sums per row and per document, for every draw of the noise."""

    def __init__(self, draws: int, eos_id: int) -> None:
        self._draws, self._eos_id = draws, eos_id
        self._row_losses: list[Tensor] = []  # [draws, batch] each
        self._row_tokens: list[Tensor] = []
        self._documents: dict[int, list[float]] = {}  # number -> [loss of the mean draw, counted tokens]
        self._next_document = 0
        self._next_row: int | None = None
        self._gaps = False
        self._bytes = 0

    def add(self, batch: Batch, counted: Tensor, losses: Tensor, token_bytes: Tensor | None) -> None:
        """Take a batch.

        Args:
            batch: the rows, in the order of the text.
            counted: tokens in the denominator, bool [batch, seq].
            losses: of each token, [batch, draws, seq].
            token_bytes: UTF-8 bytes of each token id, int64 [vocab].
        """
        self._row_losses.append(losses.sum(dim=2).t())
        self._row_tokens.append(counted.sum(dim=1))
        if token_bytes is not None:
            self._bytes += int(token_bytes[batch.tokens[counted]].sum())
        # A row's loss at position l may belong to token l + 1 (AR); inside a document that makes no
        # difference.
        numbers = self._number_documents(batch)
        real = numbers >= 0
        found, index = numbers[real].unique(return_inverse=True)
        sums = torch.zeros(len(found), 2, dtype=torch.float64)
        sums[:, 0].index_add_(0, index, losses.mean(dim=1)[real])
        sums[:, 1].index_add_(0, index, counted[real].double())
        for number, (loss, tokens) in zip(found.tolist(), sums.tolist(), strict=True):
            entry = self._documents.setdefault(number, [0.0, 0.0])
            entry[0] += loss
            entry[1] += tokens

    def _number_documents(self, batch: Batch) -> Tensor:
        """Number of each token's document in the whole text, int64 [batch, seq]; -1 for padding.

        What follows a row that was left out counts as another document.
        """
        numbers = batch.documents.long()
        for row, tokens, place in zip(numbers, batch.tokens, batch.sample_index.tolist(), strict=True):
            real = row >= 0
            if place >= 0:  # else it only fills up a batch
                if self._next_row is not None and place != self._next_row:
                    self._gaps = True
                    self._next_document += 1
                self._next_row = place + 1
            if not real.any():
                continue
            row[real] += self._next_document
            # The row's last document goes on in the next row, unless EOS or padding ended it.
            ended = not bool(real[-1]) or int(tokens[-1]) == self._eos_id
            self._next_document = int(row[real][-1]) + int(ended)
        return numbers

    def result(self, *, exact: bool, has_bytes: bool, seconds: float) -> Likelihood:
        """The estimate with its errors."""
        if not self._row_tokens or int(torch.cat(self._row_tokens).sum()) == 0:
            raise DataError(
                "the held-out text has no token to score; give a longer text or a larger validation share"
            )
        rows = torch.cat(self._row_losses, dim=1)  # draws, rows
        row_tokens = torch.cat(self._row_tokens).double()
        tokens = row_tokens.sum()
        nelbo = float(rows.mean(dim=0).sum() / tokens)

        # Rows are taken as independent draws of noise. Strata make their sum less variable than that: an
        # upper estimate.
        noise_variance = 0.0 if self._draws == 1 else float(rows.var(dim=0).sum() / self._draws / tokens**2)
        if len(self._documents) >= MIN_DOCUMENTS:
            unit = "part" if self._gaps else "document"
            sums, sizes = torch.tensor(list(self._documents.values()), dtype=torch.float64).unbind(dim=1)
        else:
            unit, sums, sizes = "row", rows.mean(dim=0), row_tokens
        noise_error = math.sqrt(noise_variance)
        text_error = None
        if len(sizes) > 1:
            text_error = math.sqrt(max(_ratio_variance(sums, sizes, nelbo) - noise_variance, 0.0))
        error = None if text_error is None else math.hypot(noise_error, text_error)
        per_byte = float(tokens) / self._bytes / math.log(2) if has_bytes and self._bytes else None
        ppl = math.exp(min(nelbo, 700.0))
        return Likelihood(
            nelbo=nelbo,
            nelbo_noise_error=noise_error,
            nelbo_text_error=text_error,
            ppl=ppl,
            ppl_error=None if error is None else ppl * error,
            bpb=None if per_byte is None else nelbo * per_byte,
            bpb_error=None if per_byte is None or error is None else error * per_byte,
            tokens=int(tokens),
            text_bytes=self._bytes if has_bytes else None,
            sequences=rows.shape[1],
            text_units=len(sizes),
            text_unit=unit,
            replicates=self._draws,
            exact=exact,
            seconds=seconds,
        )


def _ratio_variance(sums: Tensor, sizes: Tensor, ratio: float) -> float:
    """Variance of sum(sums) / sum(sizes) over independent units, by linearisation."""
    units = len(sizes)
    residual = sums - ratio * sizes
    return float((residual**2).sum() * units / (units - 1) / sizes.sum() ** 2)
