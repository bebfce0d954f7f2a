"""Read how many bytes the parts of parquet and Arrow files decompress to, before decompressing any of them.

pyarrow decompresses a page of a parquet column, or a batch of an Arrow stream, as a whole, and does not say before how
large it is.

The formats: Thrift's compact protocol (github.com/apache/thrift, doc/specs/thrift-compact-protocol.md), PageHeader of
parquet.thrift (github.com/apache/parquet-format), and Message, RecordBatch and DictionaryBatch of Message.fbs
(github.com/apache/arrow, format/Message.fbs).
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_HEADER = 1 << 12, 1 << 20  # bytes that hold the header of a page, nearly always and always

_UNCOMPRESSED_SIZE, _COMPRESSED_SIZE = 2, 3  # fields of PageHeader
# types of Thrift's compact protocol, by number; a boolean in a structure has no other value than its type
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET = range(1, 11)
_STRUCT = 12
_HEADER_TYPE, _MESSAGE_HEADER = 1, 2  # fields of Message
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3  # what _HEADER_TYPE says
_DATA = 1  # field of DictionaryBatch: its RecordBatch
_BUFFERS, _COMPRESSION = 2, 3  # fields of RecordBatch


def is_signed(path: Path, metadata_size: int) -> bool:
    """Return whether a parquet file's metadata is signed, as with encrypted columns; pyarrow aborts at those.

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
        uncompressed, compressed = fields.get(_UNCOMPRESSED_SIZE, -1), fields.get(_COMPRESSED_SIZE, -1)
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
            if kind in (_I16, _I32, _I64):
                found[number] = self._integer()
            else:
                self._skip(kind)
        return found

    def _skip(self, kind: int) -> None:
        if kind == _BYTE:
            self._byte()
        elif kind in (_I16, _I32, _I64):
            self._varint()
        elif kind == _DOUBLE:
            self.at += 8
        elif kind == _BINARY:
            size = self._varint()
            self.at += size
        elif kind in (_LIST, _SET):
            byte = self._byte()  # how many elements, and their type
            for _ in range(self._varint() if byte >> 4 == 15 else byte >> 4):
                self._skip(_BYTE if byte & 15 in (_TRUE, _FALSE) else byte & 15)
        elif kind == _STRUCT:
            self.struct()
        elif kind not in (_TRUE, _FALSE):
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
    place = table.field(_HEADER_TYPE)
    kind = None if place is None else table.content[place]
    if kind not in (_DICTIONARY_BATCH, _RECORD_BATCH):
        return 0
    header = table.table(_MESSAGE_HEADER)
    batch = header if kind == _RECORD_BATCH else header.table(_DATA)
    if batch.field(_COMPRESSION) is None:
        return 0
    start = batch.follow(_BUFFERS)
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
