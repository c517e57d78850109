"""A lossless sentencepiece BPE tokenizer: training, loading, encoding, decoding.

Any text that is valid Unicode comes back exactly: nothing is normalised, unknown characters fall back to
bytes, and U+2581, which sentencepiece uses as its space symbol, is always written as its three bytes. The six
special ids are fixed; ``[MASK]`` and ``[SEP]`` are control symbols, which text that spells them out can never
produce.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from bdtrain.errors import TokenizerError
from bdtrain.files import write_atomic

SPACE_SYMBOL = "\u2581"
"""What sentencepiece writes for a space; the same character in text is encoded as bytes instead."""

CONTROL_SYMBOLS = ("[MASK]", "[SEP]")
MAX_CHUNK_CHARS = 2000
"""Longest training chunk; a longer line is cut here."""

_CUT_CHARS = 1024
"""Encoding handles about this many characters at a time: the time per character grows with the length of the
string."""

_SPECIAL_PIECES = ("<pad>", "<s>", "</s>", "<unk>", *CONTROL_SYMBOLS)
_PROBE = "def f():\n    x  =  1\t# \ufb01 \u2460 \U0001f600\r\n [MASK] <0x0A>  "
_MIN_ORDINARY_PIECES = 1


@dataclass(frozen=True)
class TokenizerInfo:
    """What the rest of the system needs to know of a tokenizer.

    Attributes:
        vocab_size: number of ids, special ones included.
        sha256: of the model file; two corpora with the same value share their ids.
        pad_id: padding; never counted.
        bos_id: first token of a document where the corpus was made with ``--bos``.
        eos_id: last token of every document.
        unk_id: never produced, since every byte has a piece.
        mask_id: the [MASK] of the diffusion; never in data.
        sep_id: reserved separator; never in data.
    """

    vocab_size: int
    sha256: str
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    unk_id: int = 3
    mask_id: int = 4
    sep_id: int = 5

    def to_dict(self) -> dict[str, int | str]:
        """The fields as plain values, for JSON."""
        return asdict(self)


class Tokenizer:
    """A loaded tokenizer model. Use :meth:`load`.

    Attributes:
        info: size, special ids and sha256.
        byte_lengths: UTF-8 bytes that each id decodes to, int64 [vocab]; 0 for the special ids. Summed over
            the tokens of a document it is the exact size of its text, however the document was cut into rows.
    """

    pad_id, bos_id, eos_id, unk_id, mask_id, sep_id = range(6)

    def __init__(self, model: bytes, *, name: str = "tokenizer model") -> None:
        """Check and open a serialised model.

        Args:
            model: content of the model file.
            name: what to call it in messages.

        Raises:
            TokenizerError: if the model is damaged or lacks what lossless diffusion training needs.
        """
        if not model:
            raise TokenizerError(f"{name} is empty; make one with tools/train_tokenizer.py")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise TokenizerError(
                f"{name} is not a readable sentencepiece model (damaged, or another kind of file); "
                f"make one with tools/train_tokenizer.py"
            ) from error
        self._model = model
        self.info = TokenizerInfo(
            vocab_size=int(self._processor.get_piece_size()), sha256=hashlib.sha256(model).hexdigest()
        )
        problem = self._find_problem()
        if problem is not None:
            raise TokenizerError(
                f"{name} cannot be used: {problem}; make one with tools/train_tokenizer.py, which sets "
                f"every option"
            )
        self._bytes = [self._bytes_of(index) for index in range(self.vocab_size)]
        self.byte_lengths: npt.NDArray[np.int64] = np.array([len(b) for b in self._bytes], dtype=np.int64)
        self._space_symbol_ids = np.array(
            [self._processor.piece_to_id(f"<0x{b:02X}>") for b in SPACE_SYMBOL.encode()], dtype=np.int32
        )
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise TokenizerError(
                f"{name} cannot be used: it changes text (it normalises, or drops or adds spaces); "
                f"make one with tools/train_tokenizer.py, which sets every option"
            )

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Open a model file.

        Raises:
            TokenizerError: if the file is missing, damaged or not a tokenizer that this project can use.
        """
        path = Path(path)
        try:
            model = path.read_bytes()
        except OSError as error:
            raise TokenizerError(
                f"cannot read the tokenizer {path} ({error.strerror}); "
                f"make one with tools/train_tokenizer.py --input ... --out FOLDER"
            ) from error
        return cls(model, name=str(path))

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return self.info.vocab_size

    @property
    def sha256(self) -> str:
        """Of the model file."""
        return self.info.sha256

    def save(self, path: str | Path) -> None:
        """Write the model file, whole or not at all."""
        write_atomic(Path(path), self._model)

    def piece(self, index: int) -> str:
        """The piece of an id as sentencepiece spells it, for inspection."""
        return str(self._processor.id_to_piece(int(index)))

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Ids of ``text``, int32 [tokens]; no BOS or EOS is added.

        Raises:
            TokenizerError: if the text holds a lone surrogate, which UTF-8 cannot express.
        """
        parts: list[npt.NDArray[np.int32]] = []
        for number, run in enumerate(text.split(SPACE_SYMBOL)):
            if number:
                parts.append(self._space_symbol_ids)
            chunks = list(_cut_before_spaces(run, _CUT_CHARS))
            try:
                parts.extend(self._processor.encode_as_numpy(chunk) for chunk in chunks)
            except (RuntimeError, UnicodeError) as error:
                raise TokenizerError("the text holds a lone surrogate: it is not valid Unicode") from error
        if not parts:
            return np.zeros(0, dtype=np.int32)
        return np.concatenate(parts).astype(np.int32, copy=False)

    def decode_bytes(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> bytes:
        """Exact bytes of a run of tokens; special ids give none.

        Raises:
            TokenizerError: if an id is outside the vocabulary.
        """
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            raise TokenizerError(
                f"token ids run from {array.min()} to {array.max()}; this tokenizer has 0 to "
                f"{self.vocab_size - 1}"
            )
        return b"".join(self._bytes[index] for index in array.tolist())

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """Text of a run of tokens; a character cut at an end of the run shows as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def _bytes_of(self, index: int) -> bytes:
        """What one id stands for."""
        if self._processor.is_control(index) or self._processor.is_unknown(index):
            return b""
        piece = self._processor.id_to_piece(index)
        if self._processor.is_byte(index):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace(SPACE_SYMBOL, " ").encode()

    def _find_problem(self) -> str | None:
        """The first property that a usable model has and this one lacks."""
        processor = self._processor
        for index, piece in enumerate(_SPECIAL_PIECES):
            if index >= self.vocab_size or processor.id_to_piece(index) != piece:
                return f"id {index} is not {piece}"
            if piece != "<unk>" and not processor.is_control(index):
                return f"{piece} is not a control symbol, so text that contains it would produce its id"
        if any(not processor.is_byte(processor.piece_to_id(f"<0x{value:02X}>")) for value in range(256)):
            return "it has no byte fallback, so it would lose characters"
        ordinary = [
            index
            for index in range(len(_SPECIAL_PIECES), self.vocab_size)
            if not (processor.is_byte(index) or processor.is_control(index) or processor.is_unused(index))
        ]
        if len(ordinary) < _MIN_ORDINARY_PIECES:
            return "it has no pieces besides bytes"
        # A BPE model's scores are minus the merge's rank; another kind of model is not invariant to being
        # fed in parts.
        if any(not float(processor.get_score(index)).is_integer() for index in ordinary):
            return "it is not a BPE model"
        if any(_has_inner_space(str(processor.id_to_piece(index))) for index in ordinary):
            return "it has pieces that run across spaces"
        return None


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, name: str = "the input") -> Tokenizer:
    """Train a BPE tokenizer; the same texts give the same bytes.

    Args:
        texts: documents.
        vocab_size: number of ids, the 6 special ids and 256 bytes included.
        name: what to call the texts in messages.

    Raises:
        TokenizerError: if there is no text, or too little for this vocabulary.
    """
    smallest = len(_SPECIAL_PIECES) + 256 + _MIN_ORDINARY_PIECES
    if vocab_size < smallest:
        raise TokenizerError(
            f"vocab_size={vocab_size}; at least {smallest} are needed (special ids, 256 bytes, pieces)"
        )
    model = io.BytesIO()
    chunks = _Counted(chunk for text in texts for chunk in training_chunks(text))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chunks,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentencepiece_length=16,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            control_symbols=list(CONTROL_SYMBOLS),
            # The default of 4192 bytes would silently leave out chunks of 3- and 4-byte characters.
            max_sentence_length=4 * MAX_CHUNK_CHARS + 1,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        if chunks.count == 0:
            raise TokenizerError(
                f"no text in {name}: a tokenizer cannot be trained on an empty corpus"
            ) from error
        largest = _number_after(str(error), "<= ")
        least = _number_after(str(error), f"{vocab_size} vs ")
        if largest is not None:
            raise TokenizerError(
                f"vocab_size={vocab_size} is too large for {name}: its text supports at most {largest}; "
                f"choose --vocab-size {largest} or less, or give more text"
            ) from error
        if least is not None:
            raise TokenizerError(
                f"vocab_size={vocab_size} is too small for the different characters of {name}; "
                f"choose at least {least}"
            ) from error
        raise TokenizerError(f"sentencepiece could not train on {name}: {error}") from error
    return Tokenizer(model.getvalue(), name="the trained tokenizer")


def training_chunks(text: str) -> Iterator[str]:
    """Cut a document into pieces of at most ``MAX_CHUNK_CHARS``, after newlines where there are any.

    The newline stays with its line: fed line by line, the trainer would never see one and no piece could hold
    it.
    """
    held: list[str] = []
    size = 0
    for line in _lines(text.replace(SPACE_SYMBOL, "\n")):
        if size + len(line) > MAX_CHUNK_CHARS and held:
            yield "".join(held)
            held, size = [], 0
        held.append(line)
        size += len(line)
    if held:
        yield "".join(held)


def _lines(text: str) -> Iterator[str]:
    """Lines with their newline; one longer than a chunk comes in parts."""
    # Not splitlines(), which also cuts at other characters.
    *whole, last = text.split("\n")
    for line in (*(line + "\n" for line in whole), last):
        for start in range(0, len(line), MAX_CHUNK_CHARS):
            yield line[start : start + MAX_CHUNK_CHARS]


def _cut_before_spaces(text: str, target: int) -> Iterator[str]:
    """Cut ``text`` into parts of at least ``target`` characters where no piece can cross.

    A cut lies before a space that follows something else. Every piece of the vocabulary is free of spaces,
    all spaces, or has them in front, so no BPE merge spans the cut and the ids are those of the whole text.
    """
    start = 0
    while start < len(text):
        end = text.find(" ", start + target)
        while end != -1 and text[end - 1] == " ":
            # Inside a run of spaces: the next cut is at the next run.
            end = _next_run(text, end)
        if end == -1:
            end = len(text)
        yield text[start:end]
        start = end


def _next_run(text: str, position: int) -> int:
    """Start of the next run of spaces after the one that holds ``position``, or -1."""
    while position < len(text) and text[position] == " ":
        position += 1
    return text.find(" ", position)


def _has_inner_space(piece: str) -> bool:
    """Whether a space follows something else inside the piece."""
    return SPACE_SYMBOL in piece.lstrip(SPACE_SYMBOL)


def _number_after(message: str, mark: str) -> int | None:
    """The number that follows ``mark`` in a message of sentencepiece, where its limits stand."""
    _, found, rest = message.partition(mark)
    digits = rest.split(".")[0].strip()
    return int(digits) if found and digits.isdigit() else None


class _Counted:
    """An iterator that counts what it has given, to tell an empty corpus from other failures."""

    def __init__(self, items: Iterator[str]) -> None:
        self.count = 0
        self._items = items

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        item = next(self._items)
        self.count += 1
        return item
