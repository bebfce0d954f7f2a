"""Read the text column of a parquet file or an Arrow stream, some rows at a time.

What is decoded at once is bounded in bytes, whatever the file says of itself.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from tinyllama.prepare.inputs import SUBSET_KEY
from tinyllama.prepare.pages import batch_size, is_signed, page_sizes
from tinyllama.prepare.raw_file import NAME_THE_KEY, RawFile
from tinyllama.prepare.streams import BUFFER

_ROWS = 64  # of a parquet file at a time, or fewer that take _ROW_BYTES
_ROW_BYTES = 1 << 25
_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
_ARROW_FILE = b"ARROW1"
_PAGE = 4  # times the longest document, that a page of a parquet file may decompress to
_BATCH = 2  # and a batch of an Arrow stream, of which two are in memory at a time
_RATIO = 500  # of the sizes before and after compression: no text's is as high


class Table(RawFile):
    """A ``.parquet`` or ``.arrow`` file."""

    null_rows = 0
    """rows of a text column of type ``null``, which tables without rows have, too"""

    def batches(self) -> Iterator[tuple[Iterable[Any], Iterable[dict[str, Any]]]]:
        """Yield the text column, some rows at a time, and what names the subset of each row."""
        import pyarrow
        from pyarrow import parquet

        text_key = self.fields.text_key
        if self.suffix == ".parquet":
            table = parquet.ParquetFile(
                self.path, buffer_size=BUFFER, pre_buffer=False, page_checksum_verification=True
            )
            if is_signed(self.path, table.metadata.serialized_size):
                raise self.error("has encrypted columns", "write it without encryption")
            schema = table.schema_arrow
        else:
            source = pyarrow.memory_map(str(self.path))
            if source.read_at(len(_ARROW_FILE), 0) == _ARROW_FILE:
                raise self.error("is in Arrow's file format, as Feather is", "write it as parquet or as a stream")
            stream = pyarrow.ipc.open_stream(source)
            schema = stream.schema
            if source.read_at(len(_ARROW_END), max(0, source.size() - len(_ARROW_END))) != _ARROW_END:
                raise self.error("is cut short, it has no end mark", "download it again")
            self._check_arrow_batches()
        if (count := schema.names.count(text_key)) > 1:
            raise self.error(f"has {count} columns called {text_key!r}", "keep the one with the text")
        kind = schema.field(text_key).type if text_key in schema.names else None
        if kind in (None, pyarrow.null()):  # as tables of no rows have it
            rows = table.metadata.num_rows if self.suffix == ".parquet" else sum(batch.num_rows for batch in stream)
            if kind is not None and rows:
                self.null_rows = rows
            if kind is not None or not rows:
                return
            raise self.no_text("no column", schema.names)
        encoded = pyarrow.types.is_dictionary(kind)
        kind = kind.value_type if encoded else kind
        if str(kind) not in ("string", "large_string", "string_view"):
            raise self.error(f"column {text_key!r} holds {kind}, not strings", NAME_THE_KEY)
        naming = [name for name in (SUBSET_KEY, "meta") if name in schema.names] if self.fields.subsets else []
        is_struct = pyarrow.types.is_struct
        leaves = [f"{name}.{SUBSET_KEY}" if is_struct(schema.field(name).type) else name for name in naming]
        for batch in self._parquet_batches(table, [text_key, *leaves]) if self.suffix == ".parquet" else stream:
            column = batch.column(text_key)
            _check_offsets(column)
            texts = (value.value for value in column) if encoded else column  # decoded, it can be of any size
            there = [name for name in naming if name in batch.schema.names]  # a struct may lack the leaf
            yield texts, batch.select(there).to_pylist() if there else itertools.repeat({})

    def _parquet_batches(self, table: Any, leaves: list[str]) -> Iterator[Any]:
        """These columns of a parquet file; what is decoded at a time is bounded in bytes."""
        with open(self.path, "rb") as file:
            for number in range(table.num_row_groups):
                rows = self._rows_at_a_time(file, table.metadata.row_group(number), number + 1, leaves)
                yield from table.iter_batches(rows, row_groups=[number], columns=leaves, use_threads=False)

    def _rows_at_a_time(self, file: BinaryIO, group: Any, number: int, leaves: list[str]) -> int:
        largest, row_bytes = 1, _ROW_BYTES
        for column in map(group.column, range(group.num_columns)):
            if not any(f"{column.path_in_schema}.".startswith(f"{leaf}.") for leaf in leaves):
                continue
            size, compressed = column.total_uncompressed_size, column.total_compressed_size
            if size > max(self.fields.longest, _RATIO * compressed):
                what = f"row group {number}: {size:,} bytes of text in {compressed:,} compressed ones"
                raise self.error(f"{what}, which no text can be")
            # no value is larger than the page, or the dictionary's page, that it stands in
            largest = max(largest, *page_sizes(file, column), 1)
            if "DELTA_BYTE_ARRAY" in column.encodings:  # each can be as large, and pyarrow takes several times that
                row_bytes = _ROW_BYTES // 4
        self._check_size(f"row group {number}: a page", largest, _PAGE)
        return max(1, min(_ROWS, row_bytes // largest))

    def _check_arrow_batches(self) -> None:
        """Refuse an Arrow stream with a batch that decompresses to too much, or with more behind its end."""
        import pyarrow

        source = pyarrow.memory_map(str(self.path))
        for number, message in enumerate(pyarrow.ipc.MessageReader.open_stream(source)):
            self._check_size(f"batch {number}", batch_size(message), _BATCH)
        if rest := source.size() - source.tell():  # pyarrow would leave it out without a word
            raise self.error(f"has {rest:,} bytes after the end of its stream", "write what it holds as one stream")

    def _check_size(self, what: str, size: int, times: int) -> None:
        if size > times * self.fields.longest:
            hint = (
                f"write it in smaller ones, or give the prepare command --longest_document {size // (times << 20) + 1}"
            )
            raise self.error(f"{what} decompresses to {size:,} bytes at once", hint)


def _check_offsets(column: Any) -> None:
    """Raise ArrowInvalid for texts that do not lie in the column's own bytes: pyarrow believes what a file says."""
    import pyarrow

    plain = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}.get(column.type)
    (column.view(plain) if plain else column).validate(full=True)  # that it is UTF-8 is checked row by row
