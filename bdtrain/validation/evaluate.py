"""Evaluation as a run and a launcher use it: the reported objective, held-out rows, samples, saved models."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bdtrain.checkpoint.weights import SavedModel, open_model
from bdtrain.config import RunConfig
from bdtrain.config.schema.validation import MAIN_SET
from bdtrain.data.loader import ValidationSet
from bdtrain.data.source import Row, Source
from bdtrain.data.tokenizer import Tokenizer
from bdtrain.diffusion.build import build_objective, reported_plan
from bdtrain.errors import DataError
from bdtrain.model.build import build_model
from bdtrain.model.transformer import TwoStreamTransformer
from bdtrain.model.weights import load_full_state
from bdtrain.parallel.groups import init_groups, prepare_deepspeed
from bdtrain.validation.baselines import Baselines, measure_baselines
from bdtrain.validation.held_out import (
    HeldOut,
    Trained,
    check_tokenizer,
    open_held_out,
    open_split,
    open_text,
)
from bdtrain.validation.likelihood import Likelihood, evaluate_likelihood
from bdtrain.validation.record import evaluation_manifest

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

MICRO_BATCHES = 4
"""Micro-batches of training that an evaluation takes at a time."""

BASELINE_TOKENS = 50_000_000
"""Training tokens that the unigram and bigram models are fitted on at most."""


class Evaluator:
    """Measures the model of a run on held-out rows.

    Args:
        config: the run; ``model.vocab_size`` is set.
        held_out: the rows.
        device: where the model is.
        micro_batch_size: rows of a forward pass in training; evaluation takes four times as many.
        batch_size: rows per forward pass and rank, in place of that.

    Attributes:
        config: as given.
        held_out: as given.
    """

    def __init__(
        self,
        config: RunConfig,
        held_out: HeldOut,
        *,
        device: torch.device,
        micro_batch_size: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.config, self.held_out, self._device = config, held_out, device
        source = held_out.source
        # Without a backward pass there is room for more rows.
        micro = micro_batch_size or config.train.micro_batch_size or config.train.global_batch_size
        self._batch_size = batch_size or MICRO_BATCHES * micro
        self._rows = ValidationSet(source, max_sequences=held_out.sequences)
        self._token_bytes = torch.from_numpy(source.byte_lengths) if config.data.kind == "corpus" else None
        self._objective = build_objective(
            config.diffusion, config.data, source.tokenizer_info, reported_plan(config.diffusion)
        )

    @property
    def row_numbers(self) -> tuple[int, ...]:
        """Which rows of the source are measured."""
        return self._rows.numbers

    @cached_property
    def rows_sha256(self) -> str:
        """Digest of the tokens of the measured rows, in order, as little-endian int64; reads all of them."""
        digest = hashlib.sha256()
        for number in self.row_numbers:
            digest.update(np.ascontiguousarray(self.held_out.source.row(number), dtype="<i8").tobytes())
        return digest.hexdigest()

    def likelihood(self, model: TwoStreamTransformer) -> Likelihood:
        """NELBO, perplexity and bits per byte with their errors."""
        config = self.config
        return evaluate_likelihood(
            model,
            self._objective,
            self._rows,
            batch_size=self._batch_size,
            seed=config.run.seed,
            replicates=config.validation.replicates,
            device=self._device,
            token_bytes=self._token_bytes,
            exact=config.diffusion.algo == "ar" or config.diffusion.block_size == 1,
        )


def build_evaluators(
    config: RunConfig, *, device: torch.device, micro_batch_size: int | None
) -> tuple[Evaluator, ...]:
    """What a run measures at each validation: its own held-out rows first, then its sets in their order.

    Args:
        config: the run; ``model.vocab_size`` is set.
        device: where the model is.
        micro_batch_size: rows of a forward pass in training.

    Raises:
        DataError: if a text cannot be read.
        TokenizerError: if a set was made with another tokenizer.
    """
    return tuple(
        Evaluator(config, held_out, device=device, micro_batch_size=micro_batch_size)
        for held_out in open_held_out(config)
    )


@dataclass(frozen=True)
class SavedEvaluation:
    """Evaluation of a saved model, with what it takes to repeat it.

    Attributes:
        likelihood: the numbers.
        baselines: on the same text, None if not asked for.
        manifest: of ``evaluation_manifest``.
    """

    likelihood: Likelihood
    baselines: Baselines | None
    manifest: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        result = {**self.likelihood.to_dict(), "manifest": self.manifest}
        if self.baselines is not None:
            result["baselines"] = {
                "unigram_bpb": self.baselines.unigram_bpb,
                "bigram_bpb": self.baselines.bigram_bpb,
                "gzip_bpb": self.baselines.gzip_bpb,
            }
        return result

    def lines(self) -> list[str]:
        """What the command prints."""
        where, here = Path(self.manifest["checkpoint"]), Path.cwd()
        checkpoint = where.relative_to(here) if where.is_relative_to(here) else where
        lines = [f"{checkpoint} on {self.manifest['text']}", self.likelihood.describe()]
        if self.baselines is not None:
            lines.append(
                f"bits/byte of the same text: unigram {self.baselines.unigram_bpb:.4f}, bigram "
                f"{self.baselines.bigram_bpb:.4f} (fitted on the training split), gzip -9 "
                f"{self.baselines.gzip_bpb:.4f}"
            )
        return lines


def load_saved(
    folder: Path,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    groups: ProcessGroupCollection | None = None,
) -> tuple[SavedModel, TwoStreamTransformer]:
    """Verify a model folder and build its model in this process.

    Args:
        folder: a model folder or a training checkpoint.
        device: where the model is to be; a GPU if there is one, if None.
        dtype: type of its parameters.
        groups: process groups that share the model, of which this process builds its part; all of it is
            here if None.

    Raises:
        CheckpointError: if the folder is damaged or its weights do not fit.
    """
    saved = open_model(folder)
    prepare_deepspeed()
    groups = groups or init_groups()
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(
        saved.config.model,
        pg_collection=groups,
        mask_id=int(saved.facts["tokenizer"]["mask_id"]),
        device=device,
        dtype=dtype,
    )
    load_full_state(model, saved.state())
    model.eval()
    return saved, model


def evaluate_saved(
    checkpoint: Path,
    *,
    data: Path | None = None,
    text: Path | None = None,
    split: str = "valid",
    sequences: int | None = None,
    replicates: int = 2,
    seed: int | None = None,
    batch_size: int | None = None,
    baselines: bool = False,
) -> SavedEvaluation:
    """Evaluate a saved model on a corpus or a text file.

    Args:
        checkpoint: model folder.
        data: corpus folder; the run's own if None.
        text: a UTF-8 file instead of a corpus' split.
        split: of the corpus.
        sequences: rows to use, all if None.
        replicates: draws of the noise per row.
        seed: of the noise; the run's if None.
        batch_size: rows per forward pass; four micro-batches of the run if None.
        baselines: also gzip, and unigram and bigram fitted on the training split of the corpus.

    Raises:
        BdtrainError: for a damaged checkpoint or corpus, or a corpus of another tokenizer.
    """
    if text is not None and data is not None and not baselines:
        raise DataError(
            "--text stands instead of a corpus; leave out --data, or add --baselines, which are fitted on it"
        )
    saved, model = load_saved(checkpoint)
    config = saved.config
    section = (
        config.data if data is None else config.data.model_copy(update={"path": str(data), "kind": "corpus"})
    )
    if baselines and section.kind == "synthetic":
        raise DataError("--baselines are in bits per byte, and synthetic data have no bytes; leave it out")
    trained = Trained(str(saved.folder), str(saved.facts["tokenizer"]["sha256"]), saved.tokenizer)
    if text is not None:
        held_out = open_text(text, trained, seq_len=section.seq_len, name=MAIN_SET, sequences=sequences)
    else:
        held_out = open_split(section, split=split, seed=config.run.seed, sequences=sequences)
        check_tokenizer(held_out, trained)
    settings = config.validation.model_copy(update={"replicates": replicates})
    run = config.run.model_copy(update={"seed": config.run.seed if seed is None else seed})
    config = config.model_copy(update={"validation": settings, "run": run})
    evaluator = Evaluator(config, held_out, device=next(model.parameters()).device, batch_size=batch_size)
    likelihood = evaluator.likelihood(model)
    compared = None
    if baselines:
        fitted = open_split(section, split="train", seed=saved.config.run.seed)
        check_tokenizer(fitted, trained)
        tokenizer = Tokenizer.load(Path(str(section.path)) / "tokenizer.model")
        compared = compare_baselines(held_out.source, fitted.source, tokenizer, rows=evaluator.row_numbers)
    return SavedEvaluation(
        likelihood=likelihood,
        baselines=compared,
        manifest=evaluation_manifest(
            evaluator,
            likelihood,
            step=saved.facts.get("step"),
            averaged=bool(saved.facts.get("averaged")),
            checkpoint=str(checkpoint.resolve()),
        ),
    )


def compare_baselines(
    held_out: Source, train: Source, tokenizer: Tokenizer, *, rows: Sequence[int]
) -> Baselines:
    """Baselines on the rows that were evaluated, fitted on training rows.

    Args:
        held_out: the rows, in order.
        train: what the models are fitted on, up to ``BASELINE_TOKENS`` tokens of it.
        tokenizer: of both.
        rows: numbers of the rows of ``held_out`` that were evaluated.
    """
    tokens = np.concatenate([_real(held_out.row(number), tokenizer) for number in rows])
    fitted = min(train.num_samples, -(-BASELINE_TOKENS // train.seq_len))
    return measure_baselines(
        (_real(train.row(number), tokenizer) for number in range(fitted)),
        tokens,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        text=tokenizer.decode_bytes(tokens),
    )


def _real(row: Row, tokenizer: Tokenizer) -> Row:
    """A row without padding and BOS, which a model is not scored on either."""
    kept: Row = row[(row != tokenizer.pad_id) & (row != tokenizer.bos_id)]
    return kept
