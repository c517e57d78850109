"""The texts that a run measures: its own held-out rows, and the sets that ``validation.sets`` names."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from bdtrain.config import DataConfig, RunConfig
from bdtrain.config.schema.validation import MAIN_SET, HeldOutSet
from bdtrain.data.build import build_source
from bdtrain.data.shards import CorpusIndex
from bdtrain.data.source import Source
from bdtrain.data.text_source import TextSource
from bdtrain.data.tokenizer import Tokenizer
from bdtrain.errors import DataError, TokenizerError


@dataclass(frozen=True)
class HeldOut:
    """Rows to measure, and where they come from.

    Attributes:
        name: of the set.
        text: path of the corpus or of the text file; ``synthetic``.
        split: ``train`` or ``valid`` of a corpus; ``text`` for a file.
        split_sha256: of the file, or of what the corpus' index says of the split's shards, their digests
            included; None for synthetic rows, which are a function of the seed.
        source: the rows.
        sequences: rows to use, spread evenly; None for all.
    """

    name: str
    text: str
    split: str
    split_sha256: str | None
    source: Source
    sequences: int | None = None


@dataclass(frozen=True)
class Trained:
    """What a model read in training, for the refusal of texts that it cannot read.

    Attributes:
        by: who says so: ``data.path=FOLDER``, or the folder of a saved model.
        tokenizer_sha256: of the tokenizer.
        tokenizer: the file; None for synthetic data, which have none.
    """

    by: str
    tokenizer_sha256: str
    tokenizer: Path | None


def open_held_out(config: RunConfig) -> list[HeldOut]:
    """Everything that a run measures: its own held-out rows first, then its sets in their order.

    Raises:
        DataError: if a text cannot be read.
        TokenizerError: if a set was made with another tokenizer.
    """
    own = open_split(config.data, split="valid", seed=config.run.seed, sequences=config.validation.sequences)
    sets = config.validation.sets
    if not sets:
        return [own]
    trained = Trained(
        by=f"data.path={config.data.path}",
        tokenizer_sha256=str(own.source.tokenizer_info.sha256),
        tokenizer=Path(str(config.data.path)) / "tokenizer.model",
    )
    return [own, *(_open_set(config, entry, trained) for entry in sets)]


def _open_set(config: RunConfig, entry: HeldOutSet, trained: Trained) -> HeldOut:
    """One of ``validation.sets``."""
    path = Path(entry.path)
    if not path.is_dir():
        return open_text(
            path, trained, seq_len=config.data.seq_len, name=entry.name, sequences=entry.sequences
        )
    section = config.data.model_copy(update={"path": entry.path})
    split = entry.split or ("valid" if "valid" in CorpusIndex.load(path).splits else "train")
    found = open_split(section, split=split, seed=config.run.seed, name=entry.name, sequences=entry.sequences)
    check_tokenizer(found, trained)
    return found


def open_text(
    path: Path, trained: Trained, *, seq_len: int, name: str, sequences: int | None = None
) -> HeldOut:
    """A text file, read with a model's tokenizer.

    Raises:
        DataError: if the file is missing, empty or not UTF-8, or the model has no tokenizer.
    """
    if trained.tokenizer is None:
        raise DataError(
            f"{trained.by} was trained on synthetic data and has no tokenizer to read {path} with"
        )
    source = TextSource(path, Tokenizer.load(trained.tokenizer), seq_len=seq_len)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return HeldOut(name, str(path), "text", digest, source, sequences)


def open_split(
    section: DataConfig, *, split: str, seed: int, name: str = MAIN_SET, sequences: int | None = None
) -> HeldOut:
    """A split of the data that a ``data`` section names.

    Raises:
        DataError: if the corpus is missing or damaged, or has no such split.
    """
    source = build_source(section, split=split, seed=seed)
    if section.kind == "synthetic":
        return HeldOut(name, "synthetic", split, None, source, sequences)
    shards = CorpusIndex.load(Path(str(section.path))).splits[split].shards
    content = json.dumps([asdict(shard) for shard in shards], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return HeldOut(name, str(section.path), split, digest, source, sequences)


def check_tokenizer(held_out: HeldOut, trained: Trained) -> None:
    """Refuse rows of another tokenizer than the model's.

    Raises:
        TokenizerError: naming both.
    """
    ours, theirs = trained.tokenizer_sha256, str(held_out.source.tokenizer_info.sha256)
    if ours != theirs:
        raise TokenizerError(
            f"{held_out.text} was made with another tokenizer (sha256 {theirs[:12]}...) than that of "
            f"{trained.by} ({ours[:12]}...); make a corpus with tools/preprocess.py --tokenizer "
            f"{trained.tokenizer}"
        )
