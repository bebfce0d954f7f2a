"""Bytes of a raw file: hashed on their way in, and decompressed."""

import gzip
import hashlib
import io
from pathlib import Path
from typing import Any, BinaryIO

BUFFER = 1 << 20  # bytes at a time
_ZSTD_PIECE = 1 << 11  # bytes of zstandard decompressed at a time: of every four, 128 kB can come


class Hashed(io.FileIO):
    """A file whose bytes are hashed as a BufferedReader reads them."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.size = 0
        self.hash = hashlib.blake2b(digest_size=32)

    def readinto(self, buffer: Any) -> int:  # noqa: D102
        count = super().readinto(buffer)
        self.hash.update(memoryview(buffer)[:count])
        self.size += count
        return count


def decompressed(file: BinaryIO, suffix: str) -> Any:
    """The text of a file of JSON lines: EOFError or OSError where it is cut short or damaged."""
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    return io.BufferedReader(_Zstd(file), BUFFER) if suffix == ".zst" else file


class _Zstd(io.RawIOBase):
    """The decompressed bytes of zstandard frames; EOFError where the last frame is cut short.

    zstandard's own reader ends there without a word.
    """

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._error = zstandard.ZstdError
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
            piece = self._rest or self._file.read(_ZSTD_PIECE)
            if not piece:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(piece))
            except self._error as error:
                raise OSError(error) from None
            self._rest = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
