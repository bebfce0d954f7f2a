"""Read how many bytes the parts of parquet and Arrow files decompress to, before decompressing any of them.

pyarrow decompresses a page of a parquet column, or a batch of an Arrow stream, as a whole, and does not say before how
large it is.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_HEADER = 1 << 12, 1 << 20  # bytes that hold the header of a page, nearly always and always


def is_signed(path: Path, metadata_size: int) -> bool:
    """Whether a parquet file's metadata is signed, as it is where columns are encrypted; pyarrow aborts at those.

    ``metadata_size`` is what of the footer is metadata: a signature of 28 bytes (a nonce and a tag) stands behind it.
    """
    with path.open("rb") as file:
        file.seek(-8, 2)
        (footer_size,) = struct.unpack("<I", file.read(4))
    return bool(footer_size - metadata_size == 28)


def page_sizes(file: BinaryIO, column: Any) -> Iterator[int]:
    """Yield the bytes that each page of a parquet column chunk decompresses to; OSError for a damaged header."""
    at = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)), default=0)
    end = at + column.total_compressed_size
    while at < end:
        for size in _HEADER:
            file.seek(at)
            header = _Thrift(file.read(size))
            try:
                fields = header.struct()
                break
            except IndexError:
                continue
        else:
            raise OSError("the header of a page is damaged")
        uncompressed, compressed = fields.get(2, -1), fields.get(3, -1)
        if min(uncompressed, compressed) < 0:
            raise OSError("the header of a page is damaged")
        yield uncompressed
        at += header.at + compressed


class _Thrift:
    """Integers of a structure in Thrift's compact protocol, from its first byte on; IndexError where it is cut."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.at = 0  # how much of it was read

    def struct(self) -> dict[int, int]:
        """Read a structure; returns its integers by the number of their field."""
        found: dict[int, int] = {}
        number = 0
        while byte := self._byte():
            number = number + (byte >> 4) if byte >> 4 else self._integer()
            kind = byte & 15
            if kind in (4, 5, 6):
                found[number] = self._integer()
            else:
                self._skip(kind)
        return found

    def _skip(self, kind: int) -> None:
        if kind == 3:
            self._byte()
        elif kind in (4, 5, 6):
            self._varint()
        elif kind == 7:
            self.at += 8
        elif kind == 8:
            size = self._varint()
            self.at += size
        elif kind in (9, 10):
            byte = self._byte()
            for _ in range(self._varint() if byte >> 4 == 15 else byte >> 4):
                self._skip(3 if byte & 15 in (1, 2) else byte & 15)
        elif kind == 12:
            self.struct()
        elif kind not in (1, 2):
            raise OSError("the header of a page is damaged")

    def _byte(self) -> int:
        self.at += 1
        return self._content[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)


def batch_size(message: Any) -> int:
    """Return the bytes that a message of an Arrow stream decompresses to; 0 if it is not compressed."""
    table = _Flatbuffer(message.metadata)
    kind = table.field(1)
    if kind is None or table.content[kind] not in (2, 3):  # a batch of a dictionary, or of records
        return 0
    batch = table.table(2) if table.content[kind] == 3 else table.table(2).table(1)
    if batch.field(3) is None:
        return 0
    start = batch.follow(2)
    body, total = memoryview(message.body), 0
    for number in range(*struct.unpack_from("<I", batch.content, start)):
        offset, length = struct.unpack_from("<qq", batch.content, start + 4 + 16 * number)
        if length >= 8:
            (size,) = struct.unpack_from("<q", body, offset)
            total += length if size < 0 else size
    return total


class _Flatbuffer:
    """A table of a flatbuffer."""

    def __init__(self, content: Any, at: int | None = None) -> None:
        self.content = memoryview(content)
        self._at = struct.unpack_from("<I", self.content)[0] if at is None else at

    def field(self, number: int) -> int | None:
        """Return where a field is; None if the table lacks it."""
        names = self._at - struct.unpack_from("<i", self.content, self._at)[0]
        (size,) = struct.unpack_from("<H", self.content, names)
        if 4 + 2 * number >= size:
            return None
        (offset,) = struct.unpack_from("<H", self.content, names + 4 + 2 * number)
        return self._at + offset if offset else None

    def follow(self, number: int) -> int:
        """Return what a field points to."""
        place = self.field(number)
        if place is None:
            raise OSError("a batch is damaged")
        return place + int(struct.unpack_from("<I", self.content, place)[0])

    def table(self, number: int) -> "_Flatbuffer":
        """Return the table that a field points to."""
        return _Flatbuffer(self.content, self.follow(number))
