"""Read the documents of a raw file one at a time, in memory that does not grow with the file.

The name's ending says how a file is read: ``.jsonl``, ``.ndjson``, ``.json``, compressed or not (one JSON object
a line), ``.parquet``, ``.arrow`` (one row a document; ``.arrow`` is what ``datasets`` saves), ``.txt`` (one document,
byte for byte).
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
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tinyllama import InputError
from tinyllama.prepare.inputs import COMPRESSED, SUBSET_KEY
from tinyllama.prepare.raw_file import RawFile
from tinyllama.prepare.streams import BUFFER, Hashed, NeedsDictionary, decompressed
from tinyllama.prepare.tables import Table

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LONG = 1 << 21  # bytes of a line whose values are counted before it is parsed: those of a shorter one take little
_ELEMENT = 32  # bytes of the longest line that there are, at least, for each value and key: in memory they take 100
_OPENING = np.isin(np.arange(256), list(b",:[{"))
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
class DocumentReader(RawFile):
    """Reads one raw file: ``chunks``, or iterating, yields its documents; after that the attributes say what was read.

    A lone surrogate (half of a pair like ``\\ud83e\\udd99``; JSON can write it, no encoder takes it) becomes U+FFFD
    and the document is counted as repaired. Everything else that is wrong raises InputError with the file, the line or
    row and the hint: a git-lfs pointer, a truncated or damaged file, bytes that are not UTF-8, a line that is too long
    or not a JSON object, a text that is missing or no string. Blank lines are skipped; an empty text is a document.
    """

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
        """Yield the text of each document, in the order of the file."""
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
        suffix = self.suffix
        try:
            raw = Hashed(self.path)
            with io.BufferedReader(raw, BUFFER) as file:
                head = file.peek()
                if head.startswith(_LFS_POINTER):
                    raise self.error("is a git-lfs pointer, not the data", "run git lfs pull in its folder")
                if not head and suffix in COMPRESSED:
                    raise self.error("is empty, which a compressed file never is", "download it again")
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
            raise self.error(f"cannot be read ({error.strerror or error})") from None
        except MemoryError:  # the machine's
            raise
        except Exception as error:  # of a library that this file is too much for
            raise self.error(f"cannot be read ({type(error).__name__}: {error})".replace("\n", " ")) from error

    def _unwanted(self) -> bool:
        """Return whether the next document is none of the fraction that is kept."""
        fields = self.fields
        unwanted = fields.is_drawn and not fields.held_out <= self._draws.random() < fields.fraction
        if unwanted:
            self.dropped["fraction"] += 1
        return unwanted

    def _lines(self, file: BinaryIO) -> Iterator[tuple[str, bytes]]:
        """Each line that is not blank, and how errors name it."""
        stream, longest = decompressed(file, self.suffix), self.fields.longest
        try:
            is_first, number = True, 0
            while True:
                number += 1
                line = stream.readline(longest + 1)
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)  # as Windows writes it; it is no part of the JSON
                if is_first and re.match(rb"\s*(\[|\{\s*\n)", line):
                    hint = "convert it, as with jq -c '.[]' a.json > a.jsonl, or remove it"
                    raise self.error(f"line {number}: begins an array or an object of many lines, not one a line", hint)
                if len(line) > longest:
                    raise self.too_long(f"line {number}:")
                if not line:
                    return
                if line.isspace():
                    number += _skip_blank_lines(stream)
                else:
                    is_first = False
                    yield f"line {number}:", line
        except EOFError:
            raise self.error("ends in the middle of its compressed data", "download it again") from None
        except NeedsDictionary:
            hint = "decompress it first, as with zstd -d -D DICTIONARY"
            raise self.error("is compressed with a dictionary", hint) from None
        except (OSError, zlib.error) as error:
            raise self.error(f"cannot be read ({error})", "download it again") from None

    def _records(self, file: BinaryIO) -> Iterator[TextChunk]:
        text_key = self.fields.text_key
        for where, line in self._lines(file):
            if self._unwanted():
                continue
            record = self._loads(line, where)
            if not isinstance(record, dict):
                raise self.error(f"{where} not a JSON object")
            if text_key not in record:
                raise self.no_text(f"{where} no key", record)
            subset = self._subset(record, where) if self.fields.subsets else ""
            if subset in self.fields.leave_out:
                self.dropped[subset] += 1
                continue
            text = record[text_key]
            if not isinstance(text, str):
                raise self.error(f"{where} {text_key!r} is {type(text).__name__}, not a string")
            yield TextChunk(self._utf8(text), subset, is_last=True)

    def _loads(self, line: bytes, where: str) -> Any:
        if len(line) > _LONG and (count := elements(line)) > self.fields.longest // _ELEMENT:
            hint = "remove it, or raise --longest_document of the prepare command"
            raise self.error(f"{where} {count:,} values and keys, which take too much memory", hint)
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
            raise self.error(f"{where} not UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise self.error(f"{where} not valid JSON ({error})") from None

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
        inner = meta.get(SUBSET_KEY) if isinstance(meta, dict) else None
        for subset in (record.get(SUBSET_KEY), inner, self._folder):
            if isinstance(subset, str) and subset:
                return subset
        if self.fields.unnamed:
            return ""
        raise self.error(
            f"{where} no meta.{SUBSET_KEY}, and none beside meta, so no subset can be left out",
            "give --keep_all_subsets to keep everything, or use prepare_text.py for other data",
        )

    def _rows(self) -> Iterator[TextChunk]:
        import pyarrow

        table, row = Table(self.path, self.fields), 0
        try:
            for column, records in table.batches():
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
                        raise self.error(f"row {row}: {self.fields.text_key!r} is null, not a string")
                    if buffer.size > self.fields.longest:
                        raise self.too_long(f"row {row}:")
                    text = buffer.to_pybytes()
                    try:
                        text.isascii() or text.decode()  # pyarrow does not see to it
                    except UnicodeDecodeError:
                        raise self.error(f"row {row}: not UTF-8") from None
                    yield TextChunk(text, subset, is_last=True)
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            kind = self.suffix.removeprefix(".")
            raise self.error(f"not a readable {kind} file ({reason})", "download it again") from None
        if table.null_rows:
            self.dropped["null"] = table.null_rows

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
                raise self.error(f"line {line}: not UTF-8", "convert it to UTF-8 or remove it") from None
            line += text.count(b"\n")
            size += len(text)
            if not chunk:
                break
            yield TextChunk(text, "", is_last=False)
        if size:
            yield TextChunk(b"", "", is_last=True)


def _skip_blank_lines(stream: Any) -> int:
    """Read past the blank lines that ``stream`` has in its buffer, and return how many there are.

    A file may have a hundred million of them, and ``readline`` takes half a microsecond for each.
    """
    ahead = stream.peek(1)
    blank = ahead[: len(ahead) - len(ahead.lstrip())]
    stream.read(blank.rfind(b"\n") + 1)
    return blank.count(b"\n")
