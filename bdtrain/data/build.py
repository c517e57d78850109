"""From the ``data`` section of a config to loaders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from bdtrain.data.loader import Batch, Loader, ValidationSet
from bdtrain.data.source import Source, TokenSource
from bdtrain.data.synthetic import SyntheticSource
from bdtrain.errors import ConfigError


class DataSettings(Protocol):
    """What this room reads of ``bdtrain.config``'s DataConfig; see there for meanings and defaults."""

    @property
    def kind(self) -> str:
        """``corpus`` or ``synthetic``."""

    @property
    def path(self) -> str | None:
        """Folder of the corpus."""

    @property
    def seq_len(self) -> int:
        """Tokens per row."""

    @property
    def window_shards(self) -> int:
        """Shards that are shuffled together."""

    @property
    def lanes(self) -> int:
        """Lanes of the order."""

    @property
    def epoch_tokens(self) -> int | None:
        """Tokens of an epoch."""

    @property
    def prefetch_batches(self) -> int:
        """Batches made ahead."""

    @property
    def synthetic_vocab_size(self) -> int:
        """Ids of the synthetic source."""

    @property
    def synthetic_tokens(self) -> int:
        """Size of the synthetic source."""


def build_source(cfg: DataSettings, *, split: str, seed: int) -> Source:
    """The source that ``data.kind`` names.

    Args:
        cfg: the ``data`` section.
        split: ``train`` or ``valid``.
        seed: the run's seed.

    Raises:
        ConfigError: if the section does not fit together.
        DataError: if the corpus cannot be used.
    """
    if cfg.kind == "synthetic":
        return SyntheticSource(
            split=split,
            seq_len=cfg.seq_len,
            seed=seed,
            vocab_size=cfg.synthetic_vocab_size,
            tokens=cfg.synthetic_tokens,
        )
    if cfg.kind != "corpus":
        raise ConfigError(f"data.kind={cfg.kind!r}; allowed: corpus, synthetic")
    if not cfg.path:
        raise ConfigError(
            "data.path is not set; give the folder that tools/preprocess.py wrote, or data.kind=synthetic"
        )
    return TokenSource(
        cfg.path,
        split=split,
        seq_len=cfg.seq_len,
        seed=seed,
        window_shards=cfg.window_shards,
        lanes=cfg.lanes,
    )


def build_loader(
    cfg: DataSettings,
    *,
    split: str = "train",
    seed: int,
    global_batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Loader:
    """The training loader of one data-parallel rank.

    Args:
        cfg: the ``data`` section.
        split: which split to shuffle.
        seed: the run's seed.
        global_batch_size: samples of a step over all ranks.
        dp_rank: this rank.
        dp_size: data-parallel ranks.
    """
    return Loader(
        build_source(cfg, split=split, seed=seed),
        global_batch_size=global_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        prefetch_batches=cfg.prefetch_batches,
        epoch_tokens=cfg.epoch_tokens,
    )


def build_validation(
    cfg: DataSettings, *, seed: int, split: str = "valid", max_sequences: int | None = None
) -> ValidationSet:
    """The held-out rows, with the count of their bytes.

    Args:
        cfg: the ``data`` section.
        seed: the run's seed; it matters to the synthetic source only.
        split: which split to read in order.
        max_sequences: only so many rows, spread evenly.
    """
    return ValidationSet(build_source(cfg, split=split, seed=seed), max_sequences=max_sequences)


def iter_validation(
    cfg: DataSettings,
    split: str = "valid",
    max_sequences: int | None = None,
    *,
    batch_size: int = 8,
    seed: int = 0,
) -> Iterator[Batch]:
    """Batches of the held-out rows in order, each row once.

    Args:
        cfg: the ``data`` section.
        split: which split to read in order.
        max_sequences: only so many rows, spread evenly.
        batch_size: rows per batch; the last one may have fewer.
        seed: the run's seed; it matters to the synthetic source only.
    """
    return build_validation(cfg, seed=seed, split=split, max_sequences=max_sequences).batches(batch_size)
