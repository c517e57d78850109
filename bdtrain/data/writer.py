"""Writing of token shards and small files: whole or not at all, and the same bytes every time.

A shard is a plain USTAR archive in the WebDataset convention. Its members ``<key>.tokens.npy`` are
little-endian arrays [rows, row_length]; every one but the last of a shard has ``member_rows`` rows. The side
file ``.idx.npy`` holds one record per member (:data:`INDEX_DTYPE`) and can be rebuilt from the archive.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from bdtrain.files import sync_folder, temporary_path, write_atomic

INDEX_DTYPE = np.dtype([("offset", "<u8"), ("rows", "<u4"), ("crc32", "<u4")])
"""Per member: byte offset of the array's data in the archive, its rows, and the CRC-32 of the data."""

MEMBER_SUFFIX = ".tokens.npy"


@dataclass(frozen=True)
class ShardRecord:
    """What the index says of one shard.

    Attributes:
        name: file name of the archive.
        bytes: size of the archive.
        sha256: of the archive.
        index_crc32: CRC-32 of the records in the side file.
        members: number of members.
        rows: rows of all members.
        tokens: tokens, padding not included.
        documents: documents that begin in this shard (a document never crosses shards).
        text_bytes: UTF-8 bytes of their text.
    """

    name: str
    bytes: int
    sha256: str
    index_crc32: int
    members: int
    rows: int
    tokens: int
    documents: int
    text_bytes: int


def index_path(archive: Path) -> Path:
    """The side file of an archive."""
    return archive.with_name(archive.name.removesuffix(".tar") + ".idx.npy")


def write_index(archive: Path, records: npt.NDArray[np.void]) -> None:
    """Write the side file of an archive."""
    buffer = io.BytesIO()
    np.save(buffer, records, allow_pickle=False)
    write_atomic(index_path(archive), buffer.getvalue())


class ShardWriter:
    """Writes one archive and its side file; both appear when :meth:`close` succeeds.

    As a context manager it closes on success and leaves nothing behind on an exception.
    """

    def __init__(self, path: Path, *, dtype: npt.DTypeLike, row_length: int, member_rows: int) -> None:
        """Open a temporary file beside ``path``.

        Args:
            path: the archive, ending in ``.tar``.
            dtype: ``<u2`` or ``<u4``.
            row_length: tokens per row.
            member_rows: rows per member; only the last member may have fewer.
        """
        self._path = path
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._row_length = row_length
        self._member_rows = member_rows
        self._key = path.name.removesuffix(".tar")
        self._records: list[tuple[int, int, int]] = []
        self._temporary = temporary_path(path)
        self._file: BinaryIO = open(self._temporary, "wb")
        self._sha256 = hashlib.sha256()
        self._offset = 0
        self._closed = False

    @property
    def rows(self) -> int:
        """Rows written so far."""
        return sum(record[1] for record in self._records)

    def write(self, rows: npt.NDArray[np.integer]) -> None:
        """Append one member.

        Args:
            rows: tokens, [rows, row_length]; after a member of fewer than ``member_rows`` rows no other may
                follow.
        """
        count = rows.shape[0]
        assert rows.shape == (count, self._row_length) and 0 < count <= self._member_rows
        assert not self._records or self._records[-1][1] == self._member_rows, (
            "a short member must be the last"
        )
        header = io.BytesIO()
        array = np.ascontiguousarray(rows, dtype=self._dtype)
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
        data = array.tobytes()
        entry = tarfile.TarInfo(f"{self._key}-{len(self._records):06d}{MEMBER_SUFFIX}")
        entry.size = len(header.getvalue()) + len(data)
        entry.mode, entry.mtime = 0o644, 0
        self._put(entry.tobuf(tarfile.USTAR_FORMAT))
        self._put(header.getvalue())
        self._records.append((self._offset, count, zlib.crc32(data)))
        self._put(data)
        self._put(b"\0" * (-entry.size % tarfile.BLOCKSIZE))

    def close(self, *, tokens: int, documents: int, text_bytes: int) -> ShardRecord:
        """Finish both files and give their record; the counts are the caller's."""
        self._put(b"\0" * (2 * tarfile.BLOCKSIZE))
        self._put(b"\0" * (-self._offset % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        records = np.array(self._records, dtype=INDEX_DTYPE)
        write_index(self._path, records)
        os.replace(self._temporary, self._path)
        sync_folder(self._path.parent)
        self._closed = True
        return ShardRecord(
            name=self._path.name,
            bytes=self._offset,
            sha256=self._sha256.hexdigest(),
            index_crc32=zlib.crc32(records.tobytes()),
            members=len(records),
            rows=self.rows,
            tokens=tokens,
            documents=documents,
            text_bytes=text_bytes,
        )

    def abort(self) -> None:
        """Drop what was written; harmless after :meth:`close`."""
        if not self._closed:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
            self._closed = True

    def __enter__(self) -> ShardWriter:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave nothing behind unless :meth:`close` was reached."""
        self.abort()

    def _put(self, content: bytes) -> None:
        self._file.write(content)
        self._sha256.update(content)
        self._offset += len(content)
