"""Section ``data``: which tokens are read and in which order."""

from __future__ import annotations

from typing import Literal

from bdtrain.config.schema.fields import NO_UNIT, Int, Section, setting


class DataConfig(Section):
    """Where the rows come from."""

    kind: Literal["corpus", "synthetic"] = setting(
        "corpus",
        unit=NO_UNIT,
        description="corpus reads shards made by tools/preprocess.py; synthetic makes rows from the seed "
        "and needs no files.",
    )
    path: str | None = setting(
        None,
        unit="path",
        description="Corpus folder (it holds index.json), relative to the working directory. Needed with "
        "kind corpus.",
        min_length=1,
    )
    seq_len: Int = setting(1024, unit="tokens", description="Tokens of a row (L).", ge=1, le=2**20)
    documents: Literal["isolate", "ignore"] = setting(
        "isolate",
        unit=NO_UNIT,
        description="isolate: blocks restart at each document and nothing is seen across documents. ignore: "
        "a row is one document, as in the paper.",
    )
    window_shards: Int = setting(
        16, unit="shards", description="Shards shuffled together; the range of the shuffle.", ge=1
    )
    lanes: Int = setting(
        64,
        unit="lanes",
        description="Lanes that the rows of a window are dealt to. A data-parallel size that divides it "
        "lets each rank read only its own members. Part of the order: changing it changes the run.",
        ge=1,
    )
    epoch_tokens: Int | None = setting(
        None,
        unit="tokens",
        description="Tokens of an epoch. null means one pass over the training split.",
        ge=1,
    )
    prefetch_batches: Int = setting(
        2, unit="batches", description="Batches prepared ahead by the loader's thread; 0 reads in line.", ge=0
    )
    synthetic_vocab_size: Int = setting(
        256, unit="tokens", description="Vocabulary of the synthetic rows.", ge=16
    )
    synthetic_tokens: Int = setting(2**20, unit="tokens", description="Tokens of one synthetic epoch.", ge=1)
