"""Readers of raw text: one input file in, its documents out one at a time, in memory that does not grow with the file.

The name's ending says how a file is read: ``.jsonl``, ``.jsonl.gz``, ``.jsonl.zst`` (one JSON object a line),
``.parquet`` (one row a document), ``.txt`` (one document, byte for byte).
"""

import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tinyllama import InputError

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_CHUNK = 1 << 16  # bytes of a compressed file at a time
_BUFFER = 1 << 20  # bytes of text at a time
_ROWS = 64  # of a parquet file at a time
_NAME_THE_KEY = "name the one that holds the text (prepare_text.py --text_key)"


@dataclass(frozen=True)
class Fields:
    """Where a record keeps its text, and which records are left out."""

    text_key: str = "text"
    """key of a JSON object, column of a parquet file"""
    leave_out: tuple[str, ...] = ()
    """subsets of SlimPajama to leave out, by the ``meta.redpajama_set_name`` that every record then must have"""


@dataclass(frozen=True)
class Input:
    """One raw file of a dataset."""

    path: Path
    name: str
    """path below the source folder, with ``/``"""
    size: int
    """bytes"""

    @property
    def shard(self) -> str:
        """Name of its packed shard: unlike the file's own name, different for every input of a dataset."""
        return self.name.replace("/", "--")


def find_inputs(source: Path, endings: tuple[str, ...], folders: Iterable[str] = (".",)) -> list[Input]:
    """The files in and below ``source`` whose names end so, in the order of their shards; links are followed.

    ``folders`` narrows it to some folders of ``source``; a ``source`` that is a file is the one input. Raises
    InputError for a folder that is missing or has no such file, for a file that cannot be reached, and for two inputs
    that would make shards of one name.
    """
    if source.is_file() and not source.name.endswith(endings):
        raise InputError(f"{source}: ends in none of {', '.join(endings)}: rename or convert it")
    files = (
        [source] if source.is_file() else [file for folder in set(folders) for file in _walk(source / folder, endings)]
    )
    inputs: dict[str, Input] = {}
    faults = []
    for file in sorted(files):
        name = file.name if file == source else file.relative_to(source).as_posix()
        try:
            one = Input(file, name, file.stat().st_size)
        except OSError as error:
            faults.append(f"{file}: cannot be opened ({error.strerror}): repair or remove it")
            continue
        if (other := inputs.setdefault(one.shard, one)) is not one:
            faults.append(f"{file}: would become the shard {one.shard}, as {other.path} does: rename one of them")
    if faults:
        raise InputError(*faults)
    return [inputs[shard] for shard in sorted(inputs)]


def _walk(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    def stop(error: OSError) -> NoReturn:
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror}): check where the source files are")

    walk = os.walk(folder, onerror=stop, followlinks=True)
    found = [Path(where, name) for where, _, names in walk for name in names if name.endswith(endings)]
    if not found:
        raise InputError(f"{folder}: no file ending in {' or '.join(endings)} in or below it: check where they are")
    return found


@dataclass
class Source:
    """One input file: iterating gives the text of each document; after that the attributes say what was read.

    A lone surrogate (half of a pair like ``\\ud83e\\udd99``; JSON can write it, no encoder takes it) becomes U+FFFD
    and the document is counted as repaired. Everything else that is wrong raises InputError with the file, the line or
    row and the remedy: a git-lfs pointer, a truncated or damaged file, bytes that are not UTF-8, a line that is not a
    JSON object, a text that is missing or no string. Blank lines are skipped; an empty text is a document.
    """

    path: Path
    fields: Fields
    size: int = field(init=False)
    """bytes of the file, as it was read"""
    blake2b: str = field(init=False)
    """of the file's raw bytes, hexadecimal"""
    dropped: dict[str, int] = field(init=False)
    """documents of each subset left out"""
    repaired: int = field(init=False)
    """documents that had lone surrogates"""

    def __iter__(self) -> Iterator[str]:
        """The text of each document, in the order of the file."""
        self.dropped = dict.fromkeys(self.fields.leave_out, 0)
        self.repaired = 0
        try:
            file = _Hashed(self.path)
        except OSError as error:
            raise self._fault(f"cannot be opened ({error.strerror})") from None
        with file:
            if file.starts_with(_LFS_POINTER):
                raise self._fault("is a git-lfs pointer, not the data", "run git lfs pull in its folder")
            if self.path.suffix == ".parquet":
                yield from self._rows()
            elif self.path.suffix == ".txt":
                yield from self._whole(file)
            else:
                stream = _decompressed(file, self.path.suffix)
                yield from self._records(self._lines(stream))
            while file.read(_BUFFER):  # pyarrow opens a parquet file itself, and the hash is of every byte
                pass
            self.size, self.blake2b = file.size, file.hash.hexdigest()

    def _lines(self, stream: Iterable[bytes]) -> Iterator[bytes]:
        try:
            yield from stream
        except EOFError:
            raise self._fault("ends in the middle of its compressed data", "download it again") from None
        except (OSError, zlib.error) as error:
            raise self._fault(f"cannot be read ({error})", "download it again") from None

    def _records(self, lines: Iterable[bytes]) -> Iterator[str]:
        text_key = self.fields.text_key
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            where = f"line {number}:"
            try:
                record = json.loads(line.decode())
            except UnicodeDecodeError:
                raise self._fault(f"{where} not UTF-8") from None
            except (ValueError, RecursionError) as error:
                raise self._fault(f"{where} not valid JSON ({error})") from None
            if not isinstance(record, dict):
                raise self._fault(f"{where} not a JSON object")
            if text_key not in record:
                raise self._fault(f"{where} no key {text_key!r}, only {list(record)[:10]}", _NAME_THE_KEY)
            if self.fields.leave_out and (subset := self._subset(record, where)) in self.dropped:
                self.dropped[subset] += 1
            else:
                yield self._checked(record[text_key], where)

    def _subset(self, record: dict[str, Any], where: str) -> str:
        meta = record.get("meta")
        subset = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
        if not isinstance(subset, str):
            raise self._fault(
                f"{where} no meta.redpajama_set_name, so not SlimPajama", "use prepare_text.py for other data"
            )
        return subset

    def _rows(self) -> Iterator[str]:
        import pyarrow
        from pyarrow import parquet

        text_key, row = self.fields.text_key, 0
        try:
            file = parquet.ParquetFile(self.path, buffer_size=_BUFFER, pre_buffer=False)
            if text_key not in file.schema_arrow.names:
                raise self._fault(f"no column {text_key!r}, only {file.schema_arrow.names[:10]}", _NAME_THE_KEY)
            for batch in file.iter_batches(_ROWS, columns=[text_key], use_threads=False):
                for value in batch.column(0):
                    row += 1
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError:
                        raise self._fault(f"row {row}: not UTF-8") from None
                    yield self._checked(text, f"row {row}:")
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise self._fault(f"not a readable parquet file ({reason})", "download it again") from None

    def _whole(self, file: io.RawIOBase) -> Iterator[str]:
        payload = file.readall()
        try:
            text = payload.decode()
        except UnicodeDecodeError as error:
            line = payload.count(b"\n", 0, error.start) + 1
            raise self._fault(f"line {line}: not UTF-8", "convert it to UTF-8 or remove it") from None
        if text:
            yield text

    def _checked(self, text: object, where: str) -> str:
        if not isinstance(text, str):
            kind = type(text).__name__
            raise self._fault(f"{where} {self.fields.text_key!r} is {kind}, not a string")
        try:
            text.encode()
        except UnicodeEncodeError:
            self.repaired += 1
            return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
        return text

    def _fault(self, what: str, remedy: str = "repair or remove it") -> InputError:
        return InputError(f"{self.path}: {what}: {remedy}")


def _decompressed(file: io.RawIOBase, suffix: str) -> Iterable[bytes]:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    return io.BufferedReader(_Zstd(file) if suffix == ".zst" else file, _BUFFER)


class _Hashed(io.RawIOBase):
    """A file whose bytes are hashed as they are read."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.size = 0
        self.hash = hashlib.blake2b(digest_size=32)

    def starts_with(self, prefix: bytes) -> bool:
        head = self._file.read(len(prefix))
        self._file.seek(0)
        return head == prefix

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self.hash.update(memoryview(buffer)[:count])
        self.size += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Zstd(io.RawIOBase):
    """The decompressed bytes of zstandard frames; EOFError where the last frame is cut short.

    zstandard's own reader ends there without a word.
    """

    def __init__(self, file: io.RawIOBase) -> None:
        import zstandard

        self._library = zstandard
        # frames written with --long=31 ask for a window of 2 GiB; others take what they need
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._file = file
        self._frame: Any = None  # the frame being read
        self._rest = b""  # compressed, behind the end of the last frame
        self._ready = memoryview(b"")  # decompressed, not handed out yet

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._rest or self._file.read(_CHUNK)
            if not chunk:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(chunk))
            except self._library.ZstdError as error:
                raise OSError(error) from None
            self._rest = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
