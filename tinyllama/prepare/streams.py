"""Bytes of a raw file: hashed on their way in, and decompressed."""

import gzip
import hashlib
import io
from pathlib import Path
from typing import Any

_CHUNK = 1 << 16  # bytes of a compressed file at a time
_BUFFER = 1 << 20  # bytes of text at a time


def decompressed(file: io.RawIOBase, suffix: str) -> Any:
    """The text of a file of JSON lines: EOFError or OSError where it is cut short or damaged."""
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    return io.BufferedReader(_Zstd(file) if suffix == ".zst" else file, _BUFFER)


class Hashed(io.RawIOBase):
    """A file whose bytes are hashed as they are read."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.size = 0
        self.hash = hashlib.blake2b(digest_size=32)

    def starts_with(self, prefix: bytes) -> bool:
        """Whether the file does; nothing is read by that."""
        head = self._file.read(len(prefix))
        self._file.seek(0)
        return head == prefix

    def readable(self) -> bool:  # noqa: D102
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: D102
        count = self._file.readinto(buffer)
        self.hash.update(memoryview(buffer)[:count])
        self.size += count
        return count

    def close(self) -> None:  # noqa: D102
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

    def readable(self) -> bool:  # noqa: D102
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
