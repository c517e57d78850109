"""Reading a corpus folder: ``index.json``, and token shards as indexed, memory-mapped archives.

Any row of any member is reached without reading what lies before it. Damage never passes for data: the size
of an archive is compared with the index when it is opened, the side file has a checksum, and so has every
member, checked when it is first touched.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import tarfile
import zlib
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bdtrain.data.tokenizer import Tokenizer
from bdtrain.data.writer import INDEX_DTYPE, MEMBER_SUFFIX, ShardRecord, index_path, write_index
from bdtrain.errors import DataError, TokenizerError
from bdtrain.files import write_atomic

FORMAT = "bdtrain-tokens/1"
INDEX_NAME = "index.json"
TOKENIZER_NAME = "tokenizer.model"
MANIFEST_FOLDER = "manifest"

_MAX_OPEN_SHARDS = 128
_HASH_CHUNK = 1 << 22


@dataclass(frozen=True)
class Split:
    """Totals and shards of one split."""

    shards: tuple[ShardRecord, ...]
    rows: int
    tokens: int
    documents: int
    text_bytes: int

    @classmethod
    def of(cls, shards: tuple[ShardRecord, ...]) -> Split:
        """The split made of these shards."""
        return cls(
            shards=shards,
            rows=sum(shard.rows for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(shard.documents for shard in shards),
            text_bytes=sum(shard.text_bytes for shard in shards),
        )


@dataclass(frozen=True)
class CorpusIndex:
    """Content of ``index.json``.

    Attributes:
        packing: how documents became rows.
        dtype: array type of the tokens, ``<u2`` or ``<u4``.
        row_length: tokens per stored row.
        member_rows: rows per member.
        vocab_size: ids of the tokenizer.
        tokenizer_sha256: of ``tokenizer.model``.
        pad_id: fills the last row of a shard.
        bos_id: the BOS id.
        eos_id: ends every document.
        bos: whether documents begin with BOS.
        splits: by name, ``train`` and usually ``valid``.
    """

    packing: str
    dtype: str
    row_length: int
    member_rows: int
    vocab_size: int
    tokenizer_sha256: str
    pad_id: int
    bos_id: int
    eos_id: int
    bos: bool
    splits: dict[str, Split]

    @property
    def fingerprint(self) -> str:
        """Hash of everything above: two corpora that share it hold the same rows."""
        return hashlib.sha256(_canonical(self._content())).hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``index.json``, which declares the corpus complete."""
        content = {**self._content(), "fingerprint": self.fingerprint}
        write_atomic(folder / INDEX_NAME, json.dumps(content, indent=1).encode() + b"\n")

    def _content(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def load(cls, folder: Path) -> CorpusIndex:
        """Read ``index.json`` of a corpus.

        Raises:
            DataError: if the folder or the file is missing, unfinished, damaged, or of another format.
        """
        path = folder / INDEX_NAME
        if not folder.is_dir():
            raise DataError(
                f"data path {folder} does not exist; make a corpus with "
                f"tools/preprocess.py --input ... --tokenizer ... --out {folder}, or mend data.path"
            )
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            if (folder / MANIFEST_FOLDER).is_dir():
                raise DataError(
                    f"the corpus {folder} is unfinished; run the same tools/preprocess.py command again, "
                    f"it resumes"
                ) from error
            raise DataError(
                f"{folder} is not a corpus: it has no {INDEX_NAME}; data.path must be a folder that "
                f"tools/preprocess.py wrote"
            ) from error
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}); {_RESTORE}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise DataError(
                f"{path} has format {found!r}, this version reads {FORMAT!r}; run tools/preprocess.py again"
            )
        stored = content.pop("fingerprint", None)
        if stored != hashlib.sha256(_canonical(content)).hexdigest():
            raise DataError(
                f"{path} does not match its own fingerprint: it was changed or damaged; {_RESTORE}"
            )
        splits = {
            name: Split.of(tuple(ShardRecord(**shard) for shard in split["shards"]))
            for name, split in content.pop("splits").items()
        }
        del content["format"]
        return cls(**content, splits=splits)

    def split(self, name: str, folder: Path) -> Split:
        """A split by name.

        Raises:
            DataError: if the corpus has no such split.
        """
        if name not in self.splits:
            raise DataError(
                f"the corpus {folder} has no split {name!r}, only {', '.join(self.splits)}; "
                f"preprocess with --valid-fraction above 0 for a held-out split"
            )
        return self.splits[name]


_RESTORE = "restore the file or run tools/preprocess.py into a new folder"


def load_tokenizer(folder: Path, index: CorpusIndex) -> Tokenizer:
    """The tokenizer that made a corpus.

    Raises:
        TokenizerError: if it is missing, damaged, or another one than the index names.
    """
    tokenizer = Tokenizer.load(folder / TOKENIZER_NAME)
    if tokenizer.sha256 != index.tokenizer_sha256:
        raise TokenizerError(
            f"{folder / TOKENIZER_NAME} (sha256 {tokenizer.sha256[:12]}) is not the tokenizer that made this "
            f"corpus ({index.tokenizer_sha256[:12]}); put the right file back, or preprocess again with this "
            f"one"
        )
    return tokenizer


class TarShard:
    """One archive, mapped into memory."""

    def __init__(self, folder: Path, record: ShardRecord, *, dtype: npt.DTypeLike, row_length: int) -> None:
        """Open an archive and its side file.

        Args:
            folder: of the corpus.
            record: what ``index.json`` says of the shard.
            dtype: array type of the corpus.
            row_length: tokens per row.

        Raises:
            DataError: if a file is missing, or disagrees with the index.
        """
        self._path = folder / record.name
        self._dtype, self._row_length = np.dtype(dtype), row_length
        self.records = read_index(folder, record)
        check_size(self._path, record)
        last = self.records[-1]
        if int(last["offset"]) + int(last["rows"]) * row_length * self._dtype.itemsize > record.bytes:
            raise DataError(f"{index_path(self._path)} points past the end of its archive; {_REBUILD}")
        try:
            with open(self._path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"cannot open shard {self._path} ({error.strerror})") from error
        self._views: dict[int, npt.NDArray[np.unsignedinteger]] = {}

    def member(self, number: int) -> npt.NDArray[np.unsignedinteger]:
        """All tokens of a member, [rows * row_length], read-only; its checksum is checked on first touch.

        Raises:
            DataError: if the checksum differs.
        """
        view = self._views.get(number)
        if view is None:
            offset, rows, crc32 = (int(value) for value in self.records[number])
            count = rows * self._row_length
            view = np.frombuffer(self._map, dtype=self._dtype, count=count, offset=offset)
            with memoryview(self._map) as whole:
                found = zlib.crc32(whole[offset : offset + view.nbytes])
            if found != crc32:
                raise DataError(
                    f"shard {self._path}, member {number}: checksum mismatch, the data is damaged; {_RESHARD}"
                )
            self._views[number] = view
        return view


_REBUILD = "rebuild it with tools/index_shards.py"
_RESHARD = "restore this file, or delete it and run the same tools/preprocess.py command again"


def check_size(path: Path, record: ShardRecord) -> None:
    """Compare an archive's size with the index.

    Raises:
        DataError: if it is missing, or has another size.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"shard {path} is missing ({error.strerror}); {_RESHARD}") from error
    if size != record.bytes:
        raise DataError(
            f"shard {path} has {size} bytes, the index says {record.bytes}: it is truncated or not this "
            f"shard; {_RESHARD}"
        )


def read_index(folder: Path, record: ShardRecord) -> npt.NDArray[np.void]:
    """The side file of a shard, :data:`~bdtrain.data.writer.INDEX_DTYPE` [members].

    Raises:
        DataError: if it is missing, damaged or of another shard.
    """
    path = index_path(folder / record.name)
    try:
        records = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; {_REBUILD}") from error
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); {_REBUILD}") from error
    if (
        not isinstance(records, np.ndarray)
        or records.dtype != INDEX_DTYPE
        or records.shape != (record.members,)
        or zlib.crc32(records.tobytes()) != record.index_crc32
    ):
        raise DataError(f"{path} does not match {INDEX_NAME}; {_REBUILD}")
    return records


class ShardCache:
    """Opens the shards of a split when they are needed and keeps the latest of them open."""

    def __init__(self, folder: Path, index: CorpusIndex, split: Split) -> None:
        """Describe the shards; opens none.

        Args:
            folder: of the corpus.
            index: of the corpus.
            split: whose shards to open.
        """
        self._folder, self._index, self._split = folder, index, split
        self._open: OrderedDict[int, TarShard] = OrderedDict()

    def check(self, record: ShardRecord) -> None:
        """Compare a shard's size with the index, without opening it."""
        check_size(self._folder / record.name, record)

    def __getitem__(self, number: int) -> TarShard:
        """Shard ``number`` of the split, open."""
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = TarShard(
                self._folder,
                self._split.shards[number],
                dtype=self._index.dtype,
                row_length=self._index.row_length,
            )
            if len(self._open) > _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(number)
        return shard


def index_archive(path: Path, *, dtype: npt.DTypeLike, row_length: int) -> npt.NDArray[np.void]:
    """Build the records of an archive by reading it through; any tar flavour that Python reads will do.

    Args:
        path: an archive whose members are token arrays, not compressed.
        dtype: array type that every member must have.
        row_length: length of a row that every member must have.

    Raises:
        DataError: if the archive is damaged, compressed, or holds anything else.
    """
    records: list[tuple[int, int, int]] = []
    end = 0
    try:
        with tarfile.open(path, "r:") as archive, open(path, "rb") as file:
            for entry in archive:
                if not entry.isreg() or not entry.name.endswith(MEMBER_SUFFIX):
                    raise DataError(f"{path}: member {entry.name} is not a token array (*{MEMBER_SUFFIX})")
                file.seek(entry.offset_data)
                rows = _read_header(file, f"{path}: member {entry.name}", np.dtype(dtype), row_length)
                offset = file.tell()
                data = file.read(rows * row_length * np.dtype(dtype).itemsize)
                if offset + len(data) != entry.offset_data + entry.size:
                    raise DataError(f"{path}: member {entry.name} is cut short; {_RESHARD}")
                records.append((offset, rows, zlib.crc32(data)))
                end = entry.offset_data + -(-entry.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            # tarfile takes a damaged header, or a cut at a member's bound, for the end; only a block of
            # zeros is one.
            file.seek(end)
            ends_well = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        raise DataError(f"{path} is not an intact, uncompressed tar ({error}); {_RESHARD}") from error
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror})") from error
    if not ends_well or not records:
        raise DataError(
            f"{path} is cut short or has a damaged header after member {len(records) - 1}; {_RESHARD}"
        )
    return np.array(records, dtype=INDEX_DTYPE)


def _read_header(file: Any, name: str, dtype: np.dtype[Any], row_length: int) -> int:
    """Read an npy header and give the number of rows."""
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"npy version {version}")
        shape, fortran, found = np.lib.format.read_array_header_1_0(file)
    except ValueError as error:
        raise DataError(f"{name} is not a plain npy array ({error}); {_RESHARD}") from error
    if fortran or found != dtype or len(shape) != 2 or shape[1] != row_length or shape[0] < 1:
        raise DataError(f"{name} holds {found} {shape}; this corpus has {dtype} [rows, {row_length}]")
    return int(shape[0])


def verify_shard(folder: Path, index: CorpusIndex, record: ShardRecord, *, deep: bool) -> None:
    """Check one shard against the index.

    Args:
        folder: of the corpus.
        index: of the corpus.
        record: of the shard.
        deep: also read the whole archive: its sha256, every header and every checksum.

    Raises:
        DataError: at the first disagreement.
    """
    path = folder / record.name
    check_size(path, record)
    records = read_index(folder, record)
    if int(records["rows"].sum()) != record.rows:
        raise DataError(
            f"{index_path(path)} has {records['rows'].sum()} rows, {INDEX_NAME} says {record.rows}"
        )
    if not deep:
        return
    if _sha256_of(path) != record.sha256:
        raise DataError(f"shard {path} has another sha256 than the index: the data is damaged; {_RESHARD}")
    if not np.array_equal(index_archive(path, dtype=index.dtype, row_length=index.row_length), records):
        raise DataError(f"{index_path(path)} does not describe its archive; {_REBUILD}")


def rebuild_index(folder: Path, index: CorpusIndex, record: ShardRecord) -> None:
    """Write the side file of a shard again, from its archive.

    Raises:
        DataError: if the archive is not the one that ``index.json`` names; nothing is written then.
    """
    path = folder / record.name
    check_size(path, record)
    records = index_archive(path, dtype=index.dtype, row_length=index.row_length)
    if zlib.crc32(records.tobytes()) != record.index_crc32:
        raise DataError(
            f"shard {path} is not the one that {INDEX_NAME} describes: its data is damaged; {_RESHARD}"
        )
    write_index(path, records)


def _sha256_of(path: Path) -> str:
    """Hash of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _canonical(content: dict[str, Any]) -> bytes:
    """One byte string per value, whatever the order of its keys."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
