"""Readers of raw text: one input file in, its documents out one at a time, in memory that does not grow with the file.

The name's ending says how a file is read: ``.jsonl``, ``.jsonl.gz``, ``.jsonl.zst`` (one JSON object a line),
``.parquet``, ``.arrow`` (one row a document; ``.arrow`` is what ``datasets`` saves), ``.txt`` (one document, byte for
byte).
"""

import codecs
import contextlib
import io
import json
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tinyllama import InputError
from tinyllama.prepare.inputs import Fields
from tinyllama.prepare.streams import Hashed, decompressed

LONG = 1 << 24  # bytes of a document that are read whole; a longer one comes in chunks
_CHUNK = 1 << 21  # bytes
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_BUFFER = 1 << 20  # bytes of text at a time
_ROWS = 64  # of a table at a time
_NAME_THE_KEY = "name the one that holds the text (prepare_text.py --text_key KEY, train_tokenizer.py PATH:KEY)"
_SURROGATE = re.compile("[\ud800-\udfff]")
_JSON_STRING = re.compile(rb'"([^"\\]*+(?:\\.[^"\\]*+)*+)"', re.DOTALL)
# what may be parsed alone: whole characters, whole escapes, both halves of a surrogate pair
_JSON_PART = re.compile(
    rb"(?:[^\\]{1,4096}(?![\x80-\xbf])|\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\u....|\\[^u]){1,512}", re.DOTALL
)


class TextChunk(NamedTuple):
    """A document, or a part of a long one."""

    text: bytes
    """UTF-8, whole characters"""
    subset: str
    """the subset that the document belongs to; "" where none is named"""
    is_last: bool
    """the document ends here"""


@dataclass
class DocumentReader:
    """Reads one raw file: ``chunks``, or iterating, yields its documents; after that the attributes say what was read.

    A lone surrogate (half of a pair like ``\\ud83e\\udd99``; JSON can write it, no encoder takes it) becomes U+FFFD
    and the document is counted as repaired. Everything else that is wrong raises InputError with the file, the line or
    row and the hint: a git-lfs pointer, a truncated or damaged file, bytes that are not UTF-8, a line that is not a
    JSON object, a text that is missing or no string. Blank lines are skipped; an empty text is a document.
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
    """documents left out, by their subset or ``fraction``"""
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
        """Yield the documents in the order of the file; one longer than ``LONG`` comes in several chunks."""
        self.dropped = dict.fromkeys(self.fields.leave_out, 0)
        if self.fields.fraction < 1:
            self.dropped["fraction"] = 0
        self._draws = random.Random(f"{self.fields.seed} {self.name}")  # random() of a text seed is the same everywhere
        self.repaired = 0
        try:
            with Hashed(self.path) as file:
                if file.starts_with(_LFS_POINTER):
                    raise self._error("is a git-lfs pointer, not the data", "run git lfs pull in its folder")
                if self.path.suffix in (".gz", ".zst") and self.path.stat().st_size == 0:
                    raise self._error("has no bytes, which is no compressed file", "download it again")
                if self.path.suffix in (".parquet", ".arrow"):
                    yield from self._rows()
                elif self.path.suffix == ".txt":
                    yield from self._whole(file)
                else:
                    # it closes the file when it goes: not before the hash
                    stream = decompressed(file, self.path.suffix)
                    yield from self._records(stream)
                while file.read(_BUFFER):  # pyarrow opens a file itself, and the hash is of every byte
                    pass
                self.size, self.blake2b = file.size, file.hash.hexdigest()
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror})") from None

    def _unwanted(self) -> bool:
        """Whether the next document is none of the fraction that is kept."""
        unwanted = self.fields.fraction < 1 and self._draws.random() >= self.fields.fraction
        if unwanted:
            self.dropped["fraction"] += 1
        return unwanted

    def _lines(self, stream: Any) -> Iterator[bytes | bytearray]:
        try:
            while line := stream.readline(LONG):
                if len(line) == LONG:
                    line = bytearray(line)  # grows in place: a long line is never in memory twice
                    while not line.endswith(b"\n") and (more := stream.readline(LONG)):
                        line += more
                yield line
        except EOFError:
            raise self._error("ends in the middle of its compressed data", "download it again") from None
        except (OSError, zlib.error) as error:
            raise self._error(f"cannot be read ({error})", "download it again") from None

    def _records(self, stream: Any) -> Iterator[TextChunk]:
        text_key = self.fields.text_key
        for number, line in enumerate(self._lines(stream), 1):
            if line.isspace() or self._unwanted():
                continue
            where = f"line {number}:"
            long: dict[str, tuple[int, int]] = {}
            record = self._loads(_without_long_strings(line, long) if isinstance(line, bytearray) else line, where)
            if not isinstance(record, dict):
                raise self._error(f"{where} not a JSON object")
            if text_key not in record:
                raise self._error(f"{where} no key {text_key!r}, only {list(record)[:10]}", _NAME_THE_KEY)
            subset = self._subset(record, where) if self.fields.subsets else ""
            if subset in self.fields.leave_out:
                self.dropped[subset] += 1
                continue
            text = record[text_key]
            if not isinstance(text, str):
                raise self._error(f"{where} {text_key!r} is {type(text).__name__}, not a string")
            if not long or text not in long:  # a text takes time to hash
                yield TextChunk(self._utf8(text), subset, is_last=True)
                continue
            repaired = self.repaired
            for part in _JSON_PART.finditer(line, *long[text]):
                text = self._loads(b'"' + part[0] + b'"', where)
                yield TextChunk(self._utf8(text), subset, is_last=False)
            self.repaired = min(self.repaired, repaired + 1)  # a document, however many chunks
            yield TextChunk(b"", subset, is_last=True)

    def _loads(self, line: bytes | bytearray, where: str) -> Any:
        # what orjson refuses, lone surrogates above all, json may take; and it says better what is wrong
        with contextlib.suppress(ImportError, ValueError):  # without orjson json gives the same, at half the speed
            import orjson

            return orjson.loads(line)
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
        subset = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
        if not isinstance(subset, str):
            raise self._error(
                f"{where} no meta.redpajama_set_name, so not SlimPajama", "use prepare_text.py for other data"
            )
        return subset

    def _rows(self) -> Iterator[TextChunk]:
        import pyarrow

        row = 0
        try:
            for column in _parquet(self) if self.path.suffix == ".parquet" else _arrow(self):
                for value in column:
                    row += 1
                    if self._unwanted():
                        continue
                    buffer = value.as_buffer()
                    if buffer is None:
                        raise self._error(f"row {row}: {self.fields.text_key!r} is null, not a string")
                    try:
                        yield from _cut(memoryview(buffer))
                    except UnicodeDecodeError:
                        raise self._error(f"row {row}: not UTF-8") from None
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            kind = self.path.suffix.removeprefix(".")
            raise self._error(f"not a readable {kind} file ({reason})", "download it again") from None

    def _whole(self, file: io.RawIOBase) -> Iterator[TextChunk]:
        if self._unwanted():
            return
        decoder, line, size = codecs.getincrementaldecoder("utf-8")(), 1, 0
        while True:
            chunk = file.read(LONG) or b""
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

    def _error(self, what: str, hint: str = "repair or remove it") -> InputError:
        return InputError(f"{self.path}: {what}: {hint}")


def _without_long_strings(line: bytearray, found: dict[str, tuple[int, int]]) -> bytes:
    """``line`` with a stand-in for each string of 1 MB and more, whose places are put into ``found``."""
    parts: list[bytes | bytearray] = []
    done = 0
    for string in _JSON_STRING.finditer(line):
        start, end = string.span(1)
        if end - start >= _BUFFER:
            name = f"\0{len(found)}"
            found[name] = start, end
            parts += [line[done:start], b"\\u0000", name[1:].encode()]
            done = end
    return b"".join([*parts, line[done:]])


def _cut(text: memoryview) -> Iterator[TextChunk]:
    """A document of a table; the reader behind wants UTF-8 and pyarrow does not see to it."""
    if len(text) < LONG:
        yield TextChunk(_checked(bytes(text)), "", is_last=True)
        return
    start = 0
    while start < len(text):
        end = start + _CHUNK
        while end < len(text) and text[end] & 0xC0 == 0x80:  # inside a character
            end += 1
        yield TextChunk(_checked(bytes(text[start:end])), "", is_last=False)
        start = end
    yield TextChunk(b"", "", is_last=True)


def _checked(text: bytes) -> bytes:
    if not text.isascii():
        text.decode()
    return text


def _parquet(reader: DocumentReader) -> Iterator[Any]:
    """The text column in batches."""
    from pyarrow import parquet

    file = parquet.ParquetFile(reader.path, buffer_size=_BUFFER, pre_buffer=False)
    _check_column(reader, file.schema_arrow)
    for batch in file.iter_batches(_ROWS, columns=[reader.fields.text_key], use_threads=False):
        yield _strings(batch.column(0))


def _arrow(reader: DocumentReader) -> Iterator[Any]:
    """The text column in batches."""
    import pyarrow

    with pyarrow.memory_map(str(reader.path)) as file:
        batches = pyarrow.ipc.open_stream(file)
        _check_column(reader, batches.schema)
        for batch in batches:
            yield _strings(batch.column(reader.fields.text_key))


def _check_column(reader: DocumentReader, schema: Any) -> None:
    import pyarrow

    text_key = reader.fields.text_key
    if text_key not in schema.names:
        raise reader._error(f"no column {text_key!r}, only {schema.names[:10]}", _NAME_THE_KEY)
    kind = schema.field(text_key).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(kind) not in ("string", "large_string", "string_view"):
        raise reader._error(f"column {text_key!r} holds {kind}, not strings", _NAME_THE_KEY)


def _strings(column: Any) -> Any:
    import pyarrow

    return column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
