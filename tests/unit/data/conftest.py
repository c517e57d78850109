from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from bdtrain.data.preprocess import PreprocessOptions, preprocess
from bdtrain.data.tokenizer import Tokenizer, train_tokenizer

WORDS = (
    "the cat sat on a mat while 12 dogs ran  home ; def f(x):\n    return x\n\ttab É ﬁ ① 😀 ▁ end.\n".split(
        " "
    )
)


def make_texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"{n} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for n in range(count)]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(150)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(make_texts(300, seed=9), vocab_size=380)


@pytest.fixture(scope="session")
def tokenizer_path(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    tokenizer.save(path)
    return path


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, list[str]], Path]:
    def write(path: Path, texts: list[str]) -> Path:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def make_corpus(
    tokenizer_path: Path, texts: list[str], write_jsonl: Callable[[Path, list[str]], Path]
) -> Callable[..., Path]:
    """A small corpus of many shards: rows of 32 tokens, members of 4 rows."""

    def make(folder: Path, **changes: object) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        source = write_jsonl(folder / "in.jsonl", texts)
        settings = {"valid_fraction": 0.15, "row_length": 32, "member_rows": 4, "task_bytes": 4000, **changes}
        preprocess([str(source)], tokenizer_path, folder / "corpus", options=PreprocessOptions(**settings))
        return folder / "corpus"

    return make


@pytest.fixture(scope="session")
def corpus(make_corpus: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: tests that change files make their own."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))
