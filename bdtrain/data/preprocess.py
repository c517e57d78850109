"""Text to a corpus folder: parallel, resumable, the same bytes for any number of processes.

Every task of the plan (:mod:`bdtrain.data.text`) writes its own shards and, last of all, its manifest. A task
whose manifest is there is done; everything else is done again, so a process may be killed at any moment. When
all manifests are there, ``index.json`` is made of them in the order of the plan, and declares the corpus
complete.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bdtrain.data.packing import PACKING, StreamPacker, token_dtype
from bdtrain.data.progress import ProgressLine
from bdtrain.data.shards import (
    FORMAT,
    INDEX_NAME,
    MANIFEST_FOLDER,
    TOKENIZER_NAME,
    CorpusIndex,
    Split,
)
from bdtrain.data.text import (
    FAULTS,
    Piece,
    TextOptions,
    describe_inputs,
    find_inputs,
    plan_tasks,
    read_documents,
)
from bdtrain.data.tokenizer import Tokenizer
from bdtrain.data.workers import run_in_processes
from bdtrain.data.writer import ShardRecord, index_path
from bdtrain.errors import DataError, TokenizerError
from bdtrain.files import TEMPORARY_PREFIX, write_atomic

SPLITS = ("train", "valid")
_CONFIG_NAME = "config.json"
_LOCK_NAME = ".lock"
_HASH_RANGE = float(1 << 64)


@dataclass(frozen=True)
class PreprocessOptions:
    """Everything that decides the content of a corpus, besides the inputs and the tokenizer.

    Attributes:
        text: how documents are found.
        valid_fraction: share of documents held out, chosen by a hash of their text: equal documents fall on
            the same side, in any order and any corpus. 0 holds out none; with inputs of its own the held-out
            split needs 0.
        bos: whether documents begin with BOS.
        dtype: ``uint16``, ``uint32`` or ``None`` for the smallest that fits.
        row_length: tokens per stored row.
        member_rows: rows per member of a shard.
        task_bytes: bytes of input per task, hence per shard; ``None`` chooses by the size of the input.
        max_bad_fraction: share of faulty documents that is tolerated (they are counted and left out).
    """

    text: TextOptions = field(default_factory=TextOptions)
    valid_fraction: float = 0.005
    bos: bool = False
    dtype: str | None = None
    row_length: int = 1024
    member_rows: int = 256
    task_bytes: int | None = None
    max_bad_fraction: float = 0.0

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            DataError: naming the option.
        """
        limits = (
            (
                0 <= self.valid_fraction < 1,
                f"--valid-fraction {self.valid_fraction}: allowed are 0 to below 1",
            ),
            (
                0 <= self.max_bad_fraction <= 1,
                f"--max-bad-fraction {self.max_bad_fraction}: allowed are 0 to 1",
            ),
            (self.row_length >= 1, f"--row-length {self.row_length}: it must be at least 1"),
            (self.member_rows >= 1, f"--member-rows {self.member_rows}: it must be at least 1"),
            (
                self.task_bytes is None or self.task_bytes >= 1,
                f"--task-mib: {self.task_bytes} bytes is too small",
            ),
            (self.text.document_separator != "", "--document-separator is empty; leave it out instead"),
        )
        for fits, message in limits:
            if not fits:
                raise DataError(message)


@dataclass(frozen=True)
class Manifest:
    """What one finished task wrote and met.

    Attributes:
        shards: record by split.
        documents: good, non-empty documents.
        bad: faulty documents by kind.
        first_bad: place and kind of the first faulty one.
        lowest_hash: smallest document hash as a fraction: the least ``valid_fraction`` that holds a document
            out.
        highest_hash: the largest.
    """

    shards: dict[str, ShardRecord]
    documents: int
    bad: dict[str, int]
    first_bad: str | None
    lowest_hash: float
    highest_hash: float


@dataclass(frozen=True)
class Summary:
    """Outcome of a run of :func:`preprocess`."""

    index: CorpusIndex
    bad: dict[str, int]
    tasks: int
    tasks_done_before: int

    def describe(self) -> str:
        """One line for a person."""
        parts = [
            f"{name} {split.documents} documents, {split.text_bytes / 1e6:.1f} MB of text, {split.tokens} "
            f"tokens, {split.rows} rows in {len(split.shards)} shards"
            for name, split in self.index.splits.items()
        ]
        kinds = [f"{count} {kind}" for kind, count in self.bad.items() if count]
        left_out = f"; left out: {', '.join(kinds)}" if kinds else ""
        resumed = (
            f"; {self.tasks_done_before} of {self.tasks} tasks were done before"
            if self.tasks_done_before
            else ""
        )
        return f"{'; '.join(parts)}{left_out}{resumed}; fingerprint {self.index.fingerprint[:12]}"


def document_hash(text: bytes) -> float:
    """A hash of a document as a fraction in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / _HASH_RANGE


def preprocess(
    inputs: list[str],
    tokenizer_path: str | Path,
    out: str | Path,
    *,
    valid_inputs: Sequence[str] = (),
    options: PreprocessOptions | None = None,
    workers: int = 1,
    show: ProgressLine | None = None,
) -> Summary:
    """Make a corpus folder, or finish one that was begun.

    Args:
        inputs: files, folders, patterns.
        tokenizer_path: model file.
        out: folder of the corpus.
        valid_inputs: the same for the held-out split; empty holds out a share of ``inputs``.
        options: what the corpus shall be.
        workers: processes; the result does not depend on it.
        show: progress line.

    Raises:
        DataError: if an input, an option or what stands in the folder does not allow it.
        TokenizerError: if the tokenizer cannot be used.
    """
    options, out = options or PreprocessOptions(), Path(out)
    options.check()
    if workers < 1:
        raise DataError(f"--workers {workers}: it must be at least 1")
    tokenizer = Tokenizer.load(tokenizer_path)
    dtype = token_dtype(tokenizer.vocab_size, options.dtype)
    described = describe_inputs(find_inputs(inputs, options.text))
    held_out = _describe_held_out(valid_inputs, described, options)
    tasks = plan_tasks(described, options.task_bytes)
    if not tasks:
        raise DataError(f"the corpus is empty: every file of --input {' '.join(inputs)} has 0 bytes")
    first_held_out = len(tasks)
    tasks += plan_tasks(held_out, options.task_bytes)
    config = {
        "format": FORMAT,
        "packing": PACKING,
        "tokenizer": tokenizer.sha256,
        "inputs": [list(entry) for entry in described],
        **({"valid_inputs": [list(entry) for entry in held_out]} if held_out else {}),
        # Tolerance decides whether there is a corpus, not what is in it.
        "options": {key: value for key, value in asdict(options).items() if key != "max_bad_fraction"},
    }
    try:
        (out / MANIFEST_FOLDER).mkdir(parents=True, exist_ok=True)
        with _locked(out):
            _take_folder(out, config)
            if not (out / TOKENIZER_NAME).exists():
                tokenizer.save(out / TOKENIZER_NAME)
            job = _Job(out, tokenizer.sha256, options, str(dtype.str), first_held_out)
            done = [number for number in range(len(tasks)) if _read_manifest(out, number) is not None]
            _run_tasks(job, tasks, set(done), workers, show or ProgressLine(quiet=True))
            return _finalize(job, tokenizer, len(tasks), len(done))
    except OSError as error:
        raise DataError(
            f"cannot write to {error.filename or out} ({error.strerror}); what is finished is kept: mend "
            f"this and run the same command again"
        ) from error


def _describe_held_out(
    patterns: Sequence[str], train: Sequence[tuple[str, int, str]], options: PreprocessOptions
) -> list[tuple[str, int, str]]:
    """The files of the held-out split, none where a share of the others is held out.

    Raises:
        DataError: if both ways are asked for, or a file would be on both sides.
    """
    if not patterns:
        return []
    if options.valid_fraction:
        raise DataError(
            f"--valid-fraction {options.valid_fraction:g} and --valid-input both say what is held out; "
            f"give one of them"
        )
    described = describe_inputs(find_inputs(patterns, options.text, option="--valid-input"))
    # By content: the same file may have two names.
    known = {(size, digest): name for name, size, digest in train if size}
    for name, size, digest in described:
        if (size, digest) in known:
            raise DataError(
                f"{name} of --valid-input is {known[size, digest]} of --input; leave it out of one of them"
            )
    if not any(size for _, size, _ in described):
        raise DataError(f"every file of --valid-input {' '.join(patterns)} has 0 bytes")
    return described


@dataclass(frozen=True)
class _Job:
    """What a worker needs to know; tasks from ``first_held_out`` on are the held-out split."""

    out: Path
    tokenizer_sha256: str
    options: PreprocessOptions
    dtype: str
    first_held_out: int


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder; the kernel lets go when the process ends, however it ends."""
    with open(out / _LOCK_NAME, "w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"another preprocess run is writing to {out}; wait for it, or choose another --out"
            ) from error
        yield


def _take_folder(out: Path, config: dict[str, Any]) -> None:
    """Begin a folder or recognise our own; remove what a killed run left half-written."""
    path = out / MANIFEST_FOLDER / _CONFIG_NAME
    content = json.dumps(config, indent=1, sort_keys=True).encode() + b"\n"
    if path.exists():
        try:
            stored = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path} is damaged; delete the folder {out} and run again") from error
        wanted = json.loads(content)
        different = sorted(key for key in {*stored, *wanted} if stored.get(key) != wanted.get(key))
        if different:
            raise DataError(
                f"{out} was begun with other {', '.join(different)}; choose another --out, delete the "
                f"folder, or repeat the command that began it"
            )
    else:
        strangers = [entry.name for entry in out.iterdir() if entry.name.endswith((".tar", INDEX_NAME))]
        if strangers:
            raise DataError(f"{out} holds {strangers[0]} of something else; choose an empty --out")
        write_atomic(path, content)
    for folder in (out, out / MANIFEST_FOLDER):
        for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
            leftover.unlink(missing_ok=True)


def _manifest_path(out: Path, number: int) -> Path:
    return out / MANIFEST_FOLDER / f"{number:06d}.json"


def _read_manifest(out: Path, number: int) -> Manifest | None:
    """The manifest of a task, if it is finished and its shards are there."""
    try:
        content = json.loads(_manifest_path(out, number).read_bytes())
        shards = {name: ShardRecord(**record) for name, record in content.pop("shards").items()}
        manifest = Manifest(shards=shards, **content)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for record in manifest.shards.values():
        archive = out / record.name
        if not archive.exists() or archive.stat().st_size != record.bytes or not index_path(archive).exists():
            return None
    return manifest


def run_task(
    job: _Job, tokenizer: Tokenizer, number: int, pieces: list[Piece], report: Callable[[int], None]
) -> None:
    """Do one task: its shards, then its manifest.

    Args:
        job: folder and options.
        tokenizer: whose sha256 the job names.
        number: of the task.
        pieces: its input.
        report: called now and then with bytes read since the last call.
    """
    options = job.options
    packers = {
        split: StreamPacker(
            job.out / f"{split}-{number:06d}.tar",
            dtype=job.dtype,
            row_length=options.row_length,
            member_rows=options.member_rows,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            bos_id=tokenizer.bos_id if options.bos else None,
        )
        for split in SPLITS
    }
    bad = dict.fromkeys(FAULTS, 0)
    first_bad: str | None = None
    documents, lowest, highest = 0, 1.0, 0.0
    try:
        for document in (doc for piece in pieces for doc in read_documents(piece, options.text, report)):
            if document.text is None:
                fault = document.fault or ""
                bad[fault] += 1
                first_bad = first_bad or f"{document.place}: {FAULTS[fault]}"
                if options.max_bad_fraction == 0:
                    raise DataError(
                        f"{first_bad}; mend or remove it, or tolerate a share of faulty documents with "
                        f"--max-bad-fraction"
                    )
                continue
            content = document.text.encode()
            share = document_hash(content)
            lowest, highest = min(lowest, share), max(highest, share)
            held_out = number >= job.first_held_out or share < options.valid_fraction
            split = "valid" if held_out else "train"
            packers[split].add(tokenizer.encode(document.text), len(content))
            documents += 1
        closed = {split: packer.close() for split, packer in packers.items()}
    finally:
        for packer in packers.values():
            packer.abort()
    shards = {split: record for split, record in closed.items() if record is not None}
    manifest = Manifest(shards, documents, bad, first_bad, lowest, highest)
    write_atomic(_manifest_path(job.out, number), json.dumps(asdict(manifest)).encode())


def _work(job: _Job) -> Callable[[tuple[int, list[Piece]], Callable[[int], None]], None]:
    """Open what a worker keeps between tasks and give the function that does one."""
    tokenizer = _open_tokenizer(job)
    return lambda task, report: run_task(job, tokenizer, task[0], task[1], report)


def _open_tokenizer(job: _Job) -> Tokenizer:
    """The corpus' own copy of the tokenizer; a copy that has changed is refused."""
    tokenizer = Tokenizer.load(job.out / TOKENIZER_NAME)
    if tokenizer.sha256 != job.tokenizer_sha256:
        raise TokenizerError(
            f"{job.out / TOKENIZER_NAME} is not the tokenizer given; delete it and run the same command again"
        )
    return tokenizer


def _run_tasks(job: _Job, tasks: list[list[Piece]], done: set[int], workers: int, show: ProgressLine) -> None:
    """Do the tasks that are not done, here or in processes."""
    sizes = [sum(piece.end - piece.start for piece in pieces) for pieces in tasks]
    show.start(sum(sizes), sum(sizes[number] for number in done))
    todo = [number for number in range(len(tasks)) if number not in done]
    if min(workers, len(todo)) <= 1:
        if todo:
            tokenizer = _open_tokenizer(job)
            for number in todo:
                run_task(job, tokenizer, number, tasks[number], show.advance)
    else:
        run_in_processes(
            functools.partial(_work, job),
            [(number, tasks[number]) for number in todo],
            min(workers, len(todo)),
            show,
        )
    show.finish()


def _finalize(job: _Job, tokenizer: Tokenizer, tasks: int, done_before: int) -> Summary:
    """Check the totals and write ``index.json`` from the manifests, in the order of the plan."""
    out, options = job.out, job.options
    manifests = [_read_manifest(out, number) for number in range(tasks)]
    finished = [manifest for manifest in manifests if manifest is not None]
    assert len(finished) == tasks, "a task ended without its manifest"
    bad = {kind: sum(manifest.bad[kind] for manifest in finished) for kind in FAULTS}
    _check_totals(finished, bad, options, held_out=job.first_held_out < tasks)
    splits = {
        split: Split.of(tuple(m.shards[split] for m in finished if split in m.shards)) for split in SPLITS
    }
    index = CorpusIndex(
        packing=PACKING,
        dtype=job.dtype,
        row_length=options.row_length,
        member_rows=options.member_rows,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        bos=options.bos,
        splits={name: split for name, split in splits.items() if split.shards},
    )
    index.save(out)
    return Summary(index=index, bad=bad, tasks=tasks, tasks_done_before=done_before)


def _check_totals(
    manifests: list[Manifest], bad: dict[str, int], options: PreprocessOptions, *, held_out: bool
) -> None:
    """Refuse a corpus that is empty, too faulty, or lacks a split (``held_out``: that has its own inputs)."""
    documents = sum(manifest.documents for manifest in manifests)
    faulty = sum(bad.values())
    first_bad = next((manifest.first_bad for manifest in manifests if manifest.first_bad), None)
    if faulty and faulty > options.max_bad_fraction * (faulty + documents):
        kinds = ", ".join(f"{count} {kind}" for kind, count in bad.items() if count)
        raise DataError(
            f"{faulty} of {faulty + documents} documents are faulty ({kinds}), --max-bad-fraction allows "
            f"{options.max_bad_fraction:g}; the first: {first_bad}"
        )
    if documents == 0:
        raise DataError("the corpus is empty: the input holds no document with any text; check --input")
    present = {split for manifest in manifests for split in manifest.shards}
    for split, option in (("train", "--input"), ("valid", "--valid-input")):
        if held_out and split not in present:
            raise DataError(f"{option} holds no document with any text; give another and another --out")
    if options.valid_fraction == 0:
        return
    if "valid" not in present:
        least = min(manifest.lowest_hash for manifest in manifests)
        raise DataError(
            f"--valid-fraction {options.valid_fraction:g} holds out none of {documents} documents; "
            + (
                "one document cannot be split: cut it with --document-separator, or use --valid-fraction 0"
                if documents == 1
                else f"choose at least {least + 1e-6:.6f}, or 0 for no held-out split"
            )
            + " (and another --out, or delete this one)"
        )
    if "train" not in present:
        most = max(manifest.highest_hash for manifest in manifests)
        raise DataError(
            f"--valid-fraction {options.valid_fraction:g} holds out all {documents} documents and leaves "
            f"none to train on; choose at most {max(most - 1e-6, 0):.6f} (and another --out, or delete this "
            f"one)"
        )
