"""Text inputs: which files, cut into tasks, and the documents of a task.

The plan of tasks depends on the inputs and the options only, never on how many processes work on it. A task
is a list of pieces; a piece is a whole file or, for uncompressed ``.jsonl``, a range of bytes. A range owns
the lines that begin in it, so that ranges of any size cover every line once and none has to be looked for in
advance.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from bdtrain.errors import DataError

JSON_SUFFIXES = (".jsonl", ".jsonl.gz")
MIN_TASK_BYTES = 4 << 20
MAX_TASK_BYTES = 64 << 20
TASKS_AIMED_AT = 16

_SAMPLE_BYTES = 1 << 16
_READ_BYTES = 1 << 20
_SAMPLE_CHARS = 1 << 16
_EXPANSION = 3

FAULTS = {
    "not_utf8": "is not UTF-8",
    "broken_json": "is not a line of JSON",
    "missing_field": "has no text in the field that --text-field names",
    "lone_surrogate": "holds a lone surrogate, which is not valid Unicode",
}
"""Kinds of faulty documents, as messages put them."""


@dataclass(frozen=True)
class Piece:
    """A range of a file, in bytes of the file; ``end`` is the file's size for a whole file."""

    path: str
    start: int
    end: int


@dataclass(frozen=True)
class TextOptions:
    """How documents are found in the inputs.

    Attributes:
        text_field: key of the text in a line of JSON.
        document_separator: text between two documents of a plain file; ``None`` makes the file one document.
        text_suffixes: names of plain files that are taken from a folder.
    """

    text_field: str = "text"
    document_separator: str | None = None
    text_suffixes: tuple[str, ...] = (".txt",)


@dataclass(frozen=True)
class Document:
    """One document, or what was wrong with it.

    Attributes:
        text: the text; ``None`` where it could not be read.
        fault: kind of the fault: ``not_utf8``, ``broken_json``, ``missing_field``, ``lone_surrogate``.
        place: file and byte or line, for messages.
    """

    text: str | None
    fault: str | None
    place: str


def find_inputs(patterns: Sequence[str], options: TextOptions, *, option: str = "--input") -> list[Path]:
    """Files named by paths, folders and glob patterns, in a fixed order, each once.

    A folder gives all files under it with a known ending; a file that is named directly may have any ending
    and is plain text unless it ends in ``.jsonl`` or ``.jsonl.gz``. ``option`` names the patterns in errors.

    Raises:
        DataError: if a pattern matches nothing, or a file is of a kind that cannot be read.
    """
    endings = (*options.text_suffixes, *JSON_SUFFIXES)
    found: dict[str, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        matches = [path] if path.exists() else [Path(match) for match in glob.glob(pattern, recursive=True)]
        files: list[Path] = []
        for match in matches:
            if match.is_dir():
                files.extend(
                    file for file in match.rglob("*") if file.name.endswith(endings) and file.is_file()
                )
            else:
                files.append(match)
        if not files:
            raise DataError(
                f"{option} {pattern}: no such file, or a folder without files ending in "
                f"{', '.join(endings)}; give files, folders or quoted patterns"
            )
        found.update((str(file), None) for file in sorted(files))
    paths = [Path(name) for name in found]
    for path in paths:
        if path.name.endswith((".gz", ".zst", ".parquet", ".tar", ".zip")) and not path.name.endswith(
            ".jsonl.gz"
        ):
            raise DataError(f"{path} cannot be read; allowed are plain text, .jsonl and .jsonl.gz")
    return paths


def describe_inputs(paths: Sequence[Path]) -> list[tuple[str, int, str]]:
    """Name, size and a hash of both ends of every file: a cheap way to notice another input on resume."""
    described = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                head = file.read(_SAMPLE_BYTES)
                size = file.seek(0, 2)
                file.seek(max(0, size - _SAMPLE_BYTES))
                digest = hashlib.blake2b(head + file.read(), digest_size=16).hexdigest()
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror})") from error
        described.append((str(path), size, digest))
    return described


def plan_tasks(inputs: Sequence[tuple[str, int, str]], task_bytes: int | None = None) -> list[list[Piece]]:
    """Cut the inputs into tasks.

    Args:
        inputs: name, size and hash of each file, as :func:`describe_inputs` gives them.
        task_bytes: bytes of input per task; ``None`` aims at 16 tasks of 4 to 64 MiB.

    Returns:
        Tasks in order. Small files share one; a long ``.jsonl`` is cut; a ``.gz`` file is one task.
    """
    if task_bytes is None:
        total = sum(size for _, size, _ in inputs)
        task_bytes = min(MAX_TASK_BYTES, max(MIN_TASK_BYTES, -(-total // TASKS_AIMED_AT)))
    tasks: list[list[Piece]] = []
    held: list[Piece] = []
    held_bytes = 0
    for path, size, _ in inputs:
        if path.endswith(".gz"):
            pieces = [Piece(path, 0, size)]
            full = True
        else:
            step = task_bytes if path.endswith(".jsonl") else max(size, 1)
            pieces = [Piece(path, start, min(start + step, size)) for start in range(0, size, step)]
            full = False
        for piece in pieces:
            if held and (full or held_bytes + piece.end - piece.start > task_bytes):
                tasks.append(held)
                held, held_bytes = [], 0
            held.append(piece)
            held_bytes += piece.end - piece.start
            if full:
                tasks.append(held)
                held, held_bytes = [], 0
    if held:
        tasks.append(held)
    return tasks


def sample_texts(patterns: Sequence[str], options: TextOptions, *, max_bytes: int) -> Iterator[str]:
    """Texts to train a tokenizer on: all of a small input, a share chosen by hash of a large one.

    Faulty documents are left out, since preprocessing reports them.

    Args:
        patterns: files, folders, patterns.
        options: how to find documents.
        max_bytes: about so many bytes of text at most; a compressed byte counts as three.

    Raises:
        DataError: if the input cannot be read, or is empty.
    """
    described = describe_inputs(find_inputs(patterns, options))
    total = sum(size * (_EXPANSION if path.endswith(".gz") else 1) for path, size, _ in described)
    share = max_bytes / max(total, 1)
    found = False
    for piece in (piece for task in plan_tasks(described) for piece in task):
        for document in read_documents(piece, options):
            if document.text is None:
                continue
            found = True
            if share >= 1:
                yield document.text
                continue
            # A long document gives a share of its chunks, or one book would be all or nothing.
            for start in range(0, len(document.text), _SAMPLE_CHARS):
                part = document.text[start : start + _SAMPLE_CHARS]
                digest = hashlib.blake2b(part.encode(), digest_size=4).digest()
                if int.from_bytes(digest, "big") < share * (1 << 32):
                    yield part
    if not found:
        raise DataError(f"the corpus is empty: --input {' '.join(patterns)} holds no document with any text")


def read_documents(
    piece: Piece, options: TextOptions, progress: Callable[[int], None] = lambda read: None
) -> Iterator[Document]:
    """Documents of a piece, in order; empty ones are left out, faulty ones come with their fault.

    Args:
        piece: what to read.
        options: how to find documents.
        progress: called with the bytes of the file that were read since the last call.

    Raises:
        DataError: if the file cannot be read, or a compressed one is damaged.
    """
    reader = _read_json if piece.path.endswith(JSON_SUFFIXES) else _read_plain
    try:
        with open(piece.path, "rb") as file:
            yield from reader(file, piece, options, progress)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{piece.path} is damaged ({error}); fetch it again, or leave it out of --input"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {piece.path} ({error.strerror})") from error


def _read_plain(
    file: BinaryIO, piece: Piece, options: TextOptions, progress: Callable[[int], None]
) -> Iterator[Document]:
    """The documents of a plain file."""
    separator = (options.document_separator or "").encode()
    start = 0
    for content in _split_stream(file, separator):
        if content:
            yield _decode(content, f"{piece.path}, document at byte {start}", start)
        start += len(content) + len(separator)
        progress(len(content) + len(separator))


def _split_stream(file: BinaryIO, separator: bytes) -> Iterator[bytes]:
    """Cut a file at a separator without holding all of it; an empty separator gives the whole file."""
    if not separator:
        yield file.read()
        return
    held = b""
    while block := file.read(_READ_BYTES):
        *whole, held = (held + block).split(separator)
        yield from whole
    yield held


def _decode(content: bytes, place: str, offset: int) -> Document:
    """Strict UTF-8; sentencepiece itself would replace bad bytes without a word."""
    try:
        return Document(content.decode("utf-8"), None, place)
    except UnicodeDecodeError as error:
        return Document(None, "not_utf8", f"{place.split(', document')[0]}, byte {offset + error.start}")


def _read_json(
    file: BinaryIO, piece: Piece, options: TextOptions, progress: Callable[[int], None]
) -> Iterator[Document]:
    """The lines that begin inside the piece; a line that runs past its end is read to its own."""
    if piece.path.endswith(".gz"):
        lines = cast(BinaryIO, gzip.GzipFile(fileobj=file, mode="rb"))
        end = None
    else:
        lines, end = file, piece.end
        if piece.start:
            # From the byte before, so that a line that begins exactly here is ours.
            file.seek(piece.start - 1)
            file.readline()
    offset = lines.tell()
    reported = file.tell()
    number = 0
    while end is None or offset < end:
        line = lines.readline()
        if not line:
            break
        number += 1
        # A range does not know how many lines lie before it; a byte offset can be used with any editor too.
        place = f"{piece.path}, line {number}" if piece.start == 0 else f"{piece.path}, line at byte {offset}"
        if line.strip():
            document = _parse(line, place, options.text_field)
            if document.text != "":
                yield document
        offset += len(line)
        position = file.tell() if end is None else offset
        progress(position - reported)
        reported = position


def _parse(line: bytes, place: str, field: str) -> Document:
    """The text of one line of JSON."""
    try:
        content = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Document(None, "not_utf8", f"{place}, byte {error.start} of the line")
    except (ValueError, RecursionError):
        return Document(None, "broken_json", place)
    text = content.get(field) if isinstance(content, dict) else None
    if not isinstance(text, str):
        return Document(None, "missing_field", place)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return Document(None, "lone_surrogate", place)
    return Document(text, None, place)
