from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from bdtrain.data.tokenizer import MAX_CHUNK_CHARS, Tokenizer, train_tokenizer, training_chunks
from bdtrain.errors import TokenizerError

PIECES = [
    "\u2581",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "[MASK]",
    "</s>",
    "<0x0A>",
    "the",
    "12",
    "é",
    "😀",
    "\0",
    "\ufeff",
]
ANY_TEXT = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=30).map("".join))


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_any_unicode_text_comes_back_and_never_makes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not np.isin(ids, range(6)).any()
    assert int(tokenizer.byte_lengths[ids].sum()) == len(text.encode())


def test_the_space_symbol_is_written_as_its_three_bytes(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.piece(index) for index in tokenizer.encode("\u2581")]
    assert pieces == ["<0xE2>", "<0x96>", "<0x81>"]
    assert tokenizer.decode(tokenizer.encode("a\u2581 \u2581\u2581b")) == "a\u2581 \u2581\u2581b"


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from([p for p in PIECES if p != "\u2581"] + ["x" * 40]), min_size=50, max_size=150
    )
)
def test_encoding_in_parts_equals_encoding_whole(tokenizer: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts) * 20
    whole = sentencepiece.SentencePieceProcessor(model_proto=tokenizer._model).encode(text)
    assert tokenizer.encode(text).tolist() == whole


def test_decoding_agrees_with_sentencepiece(tokenizer: Tokenizer, texts: list[str]) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer._model)
    for text in texts[:40]:
        ids = tokenizer.encode(text.replace("\u2581", ""))
        assert tokenizer.decode(ids) == processor.decode(ids.tolist())


def test_special_ids_and_empty_text(tokenizer: Tokenizer) -> None:
    names = ["<pad>", "<s>", "</s>", "<unk>", "[MASK]", "[SEP]"]
    assert [tokenizer.piece(index) for index in range(6)] == names
    assert tokenizer.encode("").tolist() == [] and tokenizer.decode([]) == ""
    assert tokenizer.decode(range(6)) == ""
    assert tokenizer.info.mask_id == tokenizer.mask_id == 4 and tokenizer.info.sep_id == 5


def test_lone_surrogates_and_foreign_ids_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="lone surrogate"):
        tokenizer.encode("a\ud800b")
    with pytest.raises(TokenizerError, match="0 to 379"):
        tokenizer.decode([380])


def test_training_twice_gives_the_same_bytes_and_a_file_round_trip(texts: list[str], tmp_path: Path) -> None:
    first, second = (train_tokenizer(texts, vocab_size=330) for _ in range(2))
    assert first.sha256 == second.sha256
    first.save(tmp_path / "t.model")
    assert Tokenizer.load(tmp_path / "t.model").sha256 == first.sha256
    assert [path.name for path in tmp_path.iterdir()] == ["t.model"]


def test_training_chunks_lose_nothing_and_end_after_newlines() -> None:
    text = ("line of text\n" * 400) + "y" * 5000 + "\nlast"
    chunks = list(training_chunks(text))
    assert "".join(chunks) == text
    assert max(map(len, chunks)) <= MAX_CHUNK_CHARS
    assert all(chunk.endswith("\n") for chunk in chunks[:2])
    assert list(training_chunks("")) == []


def test_pieces_may_hold_newlines_and_runs_of_spaces() -> None:
    trained = train_tokenizer(["if x:\n        y()\n" * 50], vocab_size=280)
    pieces = [trained.piece(index) for index in range(trained.vocab_size)]
    assert any("\n" in piece for piece in pieces)
    assert any(piece.startswith("\u2581\u2581") for piece in pieces)


def test_a_model_with_pieces_across_spaces_is_refused() -> None:
    model = _train(["on the mat of the cat\n" * 50], vocab_size=290, split_by_whitespace=False)
    with pytest.raises(TokenizerError, match="across spaces"):
        Tokenizer(model)


def test_a_vocabulary_below_the_number_of_characters_is_clear() -> None:
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 100)))
    with pytest.raises(TokenizerError, match=r"vocab_size=300 is too small .*choose at least 362"):
        train_tokenizer([text], vocab_size=300)


def test_too_little_text_and_a_tiny_vocabulary_are_clear() -> None:
    with pytest.raises(TokenizerError, match=r"at most \d+.*--vocab-size"):
        train_tokenizer(["a b c"], vocab_size=5000)
    with pytest.raises(TokenizerError, match="at least 263"):
        train_tokenizer(["a b c"], vocab_size=100)
    with pytest.raises(TokenizerError, match="empty corpus"):
        train_tokenizer([], vocab_size=300)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x00" * 50, bytes(range(256))])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer.model .*tools/train_tokenizer.py"):
        Tokenizer.load(path)


def test_a_missing_and_a_cut_model_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path / "no.model")
    for size in (10, 1000, len(tokenizer._model) // 2):
        with pytest.raises(TokenizerError):
            Tokenizer(tokenizer._model[:size])


def _train(texts: list[str], **changes: object) -> bytes:
    model = io.BytesIO()
    options: dict[str, object] = {
        "model_type": "bpe",
        "vocab_size": 340,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
        "control_symbols": ["[MASK]", "[SEP]"],
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **{**options, **changes}
    )
    return model.getvalue()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"control_symbols": [], "user_defined_symbols": ["[MASK]", "[SEP]"]}, "not a control symbol"),
        ({"control_symbols": ["[SEP]", "[MASK]"]}, r"id 4 is not \[MASK\]"),
        ({"byte_fallback": False, "vocab_size": 120}, "no byte fallback"),
        ({"model_type": "unigram", "vocab_size": 320}, "not a BPE model"),
        ({"add_dummy_prefix": True}, "changes text"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes text"),
        ({"remove_extra_whitespaces": True}, "changes text"),
    ],
)
def test_a_model_with_other_settings_is_refused_with_the_reason(
    texts: list[str], changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(TokenizerError, match=reason):
        Tokenizer(_train(texts, **changes))
