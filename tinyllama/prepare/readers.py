"""Readers of raw text: one input file in, its documents out one at a time, in memory that does not grow with the file.

The name's ending says how a file is read: ``.jsonl``, ``.ndjson``, ``.json``, compressed or not (one JSON object
a line), ``.parquet``, ``.arrow`` (one row a document; ``.arrow`` is what ``datasets`` saves), ``.txt`` (one document,
byte for byte).
"""

import codecs
import contextlib
import io
import itertools
import json
import random
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tinyllama import InputError
from tinyllama.prepare.inputs import COMPRESSED, Fields
from tinyllama.prepare.pages import batch_size, is_signed, page_sizes
from tinyllama.prepare.streams import BUFFER, Hashed, NeedsDictionary, decompressed

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_ROWS = 64  # of a parquet file at a time, or fewer that take _ROW_BYTES
_ROW_BYTES = 1 << 25
_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
_ARROW_FILE = b"ARROW1"
_PAGE = 4  # times the longest document, that a page of a parquet file may decompress to
_BATCH = 2  # and a batch of an Arrow stream, of which two are in memory at a time
_SUBSET = "redpajama_set_name"  # SlimPajama's key: in meta, or beside it in some copies
_RATIO = 500  # of the sizes before and after compression: no text's is as high
_NAME_THE_KEY = "name the one that holds the text (prepare_text.py --text_key KEY, train_tokenizer.py PATH:KEY)"
_LONG = 1 << 21  # bytes of a line whose values are counted before it is parsed: those of a shorter one take little
_ELEMENT = 32  # bytes of the longest line that there are, at least, for each value and key: in memory they take 100
_OPENING = np.isin(np.arange(256), list(b",:[{"))
_WITHOUT_TEXT = {  # what corpora have in place of their text
    "blob_id": "The Stack v2 names files at Software Heritage; fetch their text first, as its dataset card explains",
    "tokens": "it holds a tokenizer's ids; decode them, or take the text (of Nemotron-ClimbMix: OptimalScale/ClimbMix)",
}
_SURROGATE = re.compile("[\ud800-\udfff]")


class TextChunk(NamedTuple):
    """A document, or a part of a long one."""

    text: bytes
    """UTF-8, whole characters"""
    subset: str
    """the subset that the document belongs to; "" where none is named"""
    is_last: bool
    """the document ends here"""


def elements(line: bytes) -> int:
    """Return how many values and keys a line of JSON has, or more: commas, colons and brackets outside strings."""
    bare = line.replace(b"\\\\", b"").replace(b'\\"', b"")  # what is left of quotes begins or ends a string
    count, inside = 0, np.uint8(0)
    for start in range(0, len(bare), BUFFER):
        piece = np.frombuffer(bare, np.uint8, min(BUFFER, len(bare) - start), start)
        parity = (np.cumsum(piece == ord('"'), dtype=np.uint8) + inside) & 1
        inside = parity[-1]
        count += int(np.count_nonzero(_OPENING[piece] & (parity == 0)))
    return count


@dataclass
class DocumentReader:
    """Reads one raw file: ``chunks``, or iterating, yields its documents; after that the attributes say what was read.

    A lone surrogate (half of a pair like ``\\ud83e\\udd99``; JSON can write it, no encoder takes it) becomes U+FFFD
    and the document is counted as repaired. Everything else that is wrong raises InputError with the file, the line or
    row and the hint: a git-lfs pointer, a truncated or damaged file, bytes that are not UTF-8, a line that is too long
    or not a JSON object, a text that is missing or no string. Blank lines are skipped; an empty text is a document.
    """

    path: Path
    fields: Fields
    name: str = ""
    """of the input; with ``fields.seed`` it decides which documents a fraction is"""
    size: int = field(init=False)
    """bytes of the file, as it was read"""
    blake2b: str = field(init=False)
    """of the file's raw bytes, hexadecimal"""
    dropped: dict[str, int] = field(init=False)
    """documents left out, by their subset, as not of the ``fraction``, or as rows of a column of type ``null``"""
    repaired: int = field(init=False)
    """documents that had lone surrogates"""

    def __iter__(self) -> Iterator[str]:
        """The text of each document, in the order of the file."""
        parts: list[bytes] = []
        for chunk in self.chunks():
            parts.append(chunk.text)
            if chunk.is_last:
                yield b"".join(parts).decode()
                parts.clear()

    def chunks(self) -> Iterator[TextChunk]:
        """Yield the documents in the order of the file; that of a large ``.txt`` comes in several chunks."""
        self.dropped = dict.fromkeys(self.fields.leave_out, 0)
        if self.fields.is_drawn:
            self.dropped["fraction"] = 0
        self._draws = random.Random(f"{self.fields.seed} {self.name}")  # random() of a text seed is the same everywhere
        folders = Path(self.name).parts[:-1]  # some copies have a folder for each subset
        self._folder = next((folder for folder in folders if folder.startswith("RedPajama")), None)
        self.repaired = 0
        suffix = self._suffix
        try:
            raw = Hashed(self.path)
            with io.BufferedReader(raw, BUFFER) as file:
                head = file.peek()
                if head.startswith(_LFS_POINTER):
                    raise self._error("is a git-lfs pointer, not the data", "run git lfs pull in its folder")
                if not head and suffix in COMPRESSED:
                    raise self._error("has no bytes, which is no compressed file", "download it again")
                if suffix in (".parquet", ".arrow"):
                    yield from self._rows()
                else:
                    yield from self._whole(file) if suffix == ".txt" else self._records(file)
                while file.read(BUFFER):  # pyarrow opens a file itself, and the hash is of every byte
                    pass
                self.size, self.blake2b = raw.size, raw.hash.hexdigest()
        except InputError:
            raise
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror or error})") from None
        except MemoryError:  # the machine's
            raise
        except Exception as error:  # of a library that this file is too much for
            raise self._error(f"cannot be read ({type(error).__name__}: {error})".replace("\n", " ")) from error

    @property
    def _suffix(self) -> str:
        return self.path.suffix.lower()

    def _unwanted(self) -> bool:
        """Whether the next document is none of the fraction that is kept."""
        fields = self.fields
        unwanted = fields.is_drawn and not fields.held_out <= self._draws.random() < fields.fraction
        if unwanted:
            self.dropped["fraction"] += 1
        return unwanted

    def _lines(self, file: BinaryIO) -> Iterator[tuple[str, bytes]]:
        """Each line that is not blank, and how errors name it."""
        stream, longest = decompressed(file, self._suffix), self.fields.longest
        try:
            is_first, number = True, 0
            while True:
                number += 1
                line = stream.readline(longest + 1)
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)  # as Windows writes it; it is no part of the JSON
                if is_first and re.match(rb"\s*(\[|\{\s*\n)", line):
                    hint = "convert it, as with jq -c '.[]' a.json > a.jsonl, or remove it"
                    raise self._error(
                        f"line {number}: begins an array or an object of many lines, not one a line", hint
                    )
                if len(line) > longest:
                    raise self._too_long(f"line {number}:")
                if not line:
                    return
                if line.isspace():
                    number += _skip_blank_lines(stream)
                else:
                    is_first = False
                    yield f"line {number}:", line
        except EOFError:
            raise self._error("ends in the middle of its compressed data", "download it again") from None
        except NeedsDictionary:
            hint = "decompress it first, as with zstd -d -D DICTIONARY"
            raise self._error("is compressed with a dictionary", hint) from None
        except (OSError, zlib.error) as error:
            raise self._error(f"cannot be read ({error})", "download it again") from None

    def _records(self, file: BinaryIO) -> Iterator[TextChunk]:
        text_key = self.fields.text_key
        for where, line in self._lines(file):
            if self._unwanted():
                continue
            record = self._loads(line, where)
            if not isinstance(record, dict):
                raise self._error(f"{where} not a JSON object")
            if text_key not in record:
                raise self._no_text(f"{where} no key", record)
            subset = self._subset(record, where) if self.fields.subsets else ""
            if subset in self.fields.leave_out:
                self.dropped[subset] += 1
                continue
            text = record[text_key]
            if not isinstance(text, str):
                raise self._error(f"{where} {text_key!r} is {type(text).__name__}, not a string")
            yield TextChunk(self._utf8(text), subset, is_last=True)

    def _loads(self, line: bytes, where: str) -> Any:
        if len(line) > _LONG and (count := elements(line)) > self.fields.longest // _ELEMENT:
            hint = "remove it, or raise --longest_document of the prepare command"
            raise self._error(f"{where} {count:,} values and keys, which take too much memory", hint)
        try:
            import orjson

            return orjson.loads(line)
        except ImportError:  # json gives the same, at half the speed
            pass
        except ValueError:  # json takes some of it, lone surrogates above all, and says better what is wrong
            pass
        try:
            return json.loads(line.decode())
        except UnicodeDecodeError:
            raise self._error(f"{where} not UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise self._error(f"{where} not valid JSON ({error})") from None

    def _utf8(self, text: str) -> bytes:
        try:
            return text.encode()
        except UnicodeEncodeError:
            self.repaired += 1
            return _SURROGATE.sub("\ufffd", text).encode()

    def _subset(self, record: dict[str, Any], where: str) -> str:
        meta = record.get("meta")
        if isinstance(meta, str):
            with contextlib.suppress(ValueError, RecursionError):
                meta = json.loads(meta)
        inner = meta.get(_SUBSET) if isinstance(meta, dict) else None
        for subset in (record.get(_SUBSET), inner, self._folder):
            if isinstance(subset, str) and subset:
                return subset
        if self.fields.unnamed:
            return ""
        raise self._error(
            f"{where} no meta.{_SUBSET}, and none beside meta, so no subset can be left out",
            "give --keep_all_subsets to keep everything, or use prepare_text.py for other data",
        )

    def _rows(self) -> Iterator[TextChunk]:
        import pyarrow

        row = 0
        try:
            for column, records in self._columns():
                for value, record in zip(column, records, strict=False):
                    row += 1
                    if self._unwanted():
                        continue
                    subset = self._subset(record, f"row {row}:") if self.fields.subsets else ""
                    if subset in self.fields.leave_out:
                        self.dropped[subset] += 1
                        continue
                    buffer = value.as_buffer()
                    if buffer is None:
                        raise self._error(f"row {row}: {self.fields.text_key!r} is null, not a string")
                    if buffer.size > self.fields.longest:
                        raise self._too_long(f"row {row}:")
                    text = buffer.to_pybytes()
                    try:
                        text.isascii() or text.decode()  # pyarrow does not see to it
                    except UnicodeDecodeError:
                        raise self._error(f"row {row}: not UTF-8") from None
                    yield TextChunk(text, subset, is_last=True)
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            kind = self._suffix.removeprefix(".")
            raise self._error(f"not a readable {kind} file ({reason})", "download it again") from None

    def _columns(self) -> Iterator[tuple[Iterable[Any], Iterable[dict[str, Any]]]]:
        """The text column of a table, some rows at a time, and what names the subset of each row."""
        import pyarrow
        from pyarrow import parquet

        text_key = self.fields.text_key
        if self._suffix == ".parquet":
            table = parquet.ParquetFile(
                self.path, buffer_size=BUFFER, pre_buffer=False, page_checksum_verification=True
            )
            if is_signed(self.path, table.metadata.serialized_size):
                raise self._error("has encrypted columns", "write it without encryption")
            schema = table.schema_arrow
        else:
            source = pyarrow.memory_map(str(self.path))
            if source.read_at(len(_ARROW_FILE), 0) == _ARROW_FILE:
                raise self._error("is in Arrow's file format, as Feather is", "write it as parquet or as a stream")
            stream = pyarrow.ipc.open_stream(source)
            schema = stream.schema
            if source.read_at(len(_ARROW_END), max(0, source.size() - len(_ARROW_END))) != _ARROW_END:
                raise self._error("is cut short, it has no end mark", "download it again")
            self._check_batches()
        if (count := schema.names.count(text_key)) > 1:
            raise self._error(f"has {count} columns called {text_key!r}", "keep the one that is meant")
        kind = schema.field(text_key).type if text_key in schema.names else None
        if kind in (None, pyarrow.null()):  # as tables of no rows have it
            rows = table.metadata.num_rows if self._suffix == ".parquet" else sum(batch.num_rows for batch in stream)
            if kind is not None and rows:
                self.dropped["null"] = rows
            if kind is not None or not rows:
                return
            raise self._no_text("no column", schema.names)
        encoded = pyarrow.types.is_dictionary(kind)
        kind = kind.value_type if encoded else kind
        if str(kind) not in ("string", "large_string", "string_view"):
            raise self._error(f"column {text_key!r} holds {kind}, not strings", _NAME_THE_KEY)
        naming = [name for name in (_SUBSET, "meta") if name in schema.names] if self.fields.subsets else []
        is_struct = pyarrow.types.is_struct
        leaves = [f"{name}.{_SUBSET}" if is_struct(schema.field(name).type) else name for name in naming]
        for batch in self._batches(table, [text_key, *leaves]) if self._suffix == ".parquet" else stream:
            column = batch.column(text_key)
            _check_offsets(column)
            texts = (value.value for value in column) if encoded else column  # decoded, it can be of any size
            there = [name for name in naming if name in batch.schema.names]  # a struct may lack the leaf
            yield texts, batch.select(there).to_pylist() if there else itertools.repeat({})

    def _batches(self, table: Any, leaves: list[str]) -> Iterator[Any]:
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
                raise self._error(f"{what}, which no text can be")
            # no value is larger than the page, or the dictionary's page, that it stands in
            largest = max(largest, *page_sizes(file, column), 1)
            if "DELTA_BYTE_ARRAY" in column.encodings:  # each can be as large, and pyarrow takes several times that
                row_bytes = _ROW_BYTES // 4
        self._check_size(f"row group {number}: a page", largest, _PAGE)
        return max(1, min(_ROWS, row_bytes // largest))

    def _check_batches(self) -> None:
        """Refuse an Arrow stream with a batch that decompresses to too much, or with more behind its end."""
        import pyarrow

        source = pyarrow.memory_map(str(self.path))
        for number, message in enumerate(pyarrow.ipc.MessageReader.open_stream(source)):
            self._check_size(f"batch {number}", batch_size(message), _BATCH)
        if rest := source.size() - source.tell():  # pyarrow would leave it out without a word
            raise self._error(f"has {rest:,} bytes behind the end of its stream", "write what it holds as one stream")

    def _check_size(self, what: str, size: int, times: int) -> None:
        if size > times * self.fields.longest:
            hint = (
                f"write it in smaller ones, or give the prepare command --longest_document {size // (times << 20) + 1}"
            )
            raise self._error(f"{what} decompresses to {size:,} bytes at once", hint)

    def _whole(self, file: BinaryIO) -> Iterator[TextChunk]:
        if self._unwanted():
            return
        decoder, line, size = codecs.getincrementaldecoder("utf-8")(), 1, 0
        while True:
            chunk = file.read(BUFFER)
            try:
                text = decoder.decode(chunk, final=not chunk).encode()
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise self._error(f"line {line}: not UTF-8", "convert it to UTF-8 or remove it") from None
            line += text.count(b"\n")
            size += len(text)
            if not chunk:
                break
            yield TextChunk(text, "", is_last=False)
        if size:
            yield TextChunk(b"", "", is_last=True)

    def _too_long(self, where: str) -> InputError:
        hint = "remove or split it, or raise --longest_document of the prepare command"
        return self._error(f"{where} longer than {self.fields.longest:,} bytes", hint)

    def _no_text(self, what: str, names: Iterable[str]) -> InputError:
        names = list(names)
        hints = [hint for name, hint in _WITHOUT_TEXT.items() if name in names]
        return self._error(f"{what} {self.fields.text_key!r}, only {names[:10]}", *hints[:1] or [_NAME_THE_KEY])

    def _error(self, what: str, hint: str = "repair or remove it") -> InputError:
        return InputError(f"{self.path}: {what}: {hint}")


def _skip_blank_lines(stream: Any) -> int:
    """Read past the blank lines that ``stream`` has in its buffer, and return how many there are.

    A file may have a hundred million of them, and ``readline`` takes half a microsecond for each.
    """
    ahead = stream.peek(1)
    blank = ahead[: len(ahead) - len(ahead.lstrip())]
    stream.read(blank.rfind(b"\n") + 1)
    return blank.count(b"\n")


def _check_offsets(column: Any) -> None:
    """Raise ArrowInvalid for texts that do not lie in the column's own bytes: pyarrow believes what a file says."""
    import pyarrow

    plain = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}.get(column.type)
    (column.view(plain) if plain else column).validate(full=True)  # that it is UTF-8 is checked row by row
