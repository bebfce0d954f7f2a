"""Hash the bytes of a raw file as they are read, and decompress them."""

import bz2
import gzip
import hashlib
import io
import lzma
from pathlib import Path
from typing import Any, BinaryIO

from tinyllama.data.metadata import DIGEST_SIZE

BUFFER = 1 << 20  # bytes at a time
_XZ_MEMORY = 1 << 27  # that xz may take: its highest level takes half of it


class NeedsDictionary(OSError):
    """A frame of zstandard was compressed with a dictionary, which stands in another file."""


class Hashed(io.FileIO):
    """A file whose bytes are hashed as a BufferedReader reads them: at its end, what ``hash_file`` returns."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.size = 0
        self.hash = hashlib.blake2b(digest_size=DIGEST_SIZE)

    def readinto(self, buffer: Any) -> int:  # noqa: D102
        count = super().readinto(buffer)
        self.hash.update(memoryview(buffer)[:count])
        self.size += count
        return count


def decompressed(file: BinaryIO, suffix: str) -> Any:
    """Return a file of the decompressed bytes; reading raises EOFError or OSError where it is cut short or damaged."""
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    kinds: dict[str, type[_Frames]] = {".zst": _Zstd, ".zstd": _Zstd, ".xz": _Xz, ".bz2": _Bz2}
    return io.BufferedReader(kinds[suffix](file), BUFFER) if suffix in kinds else file


class _Frames(io.RawIOBase):
    """The decompressed bytes of frames, one behind another; EOFError where the last one is cut short.

    The readers of zstandard, lzma and bz2 end there, or at a frame that is none, without a word. What is decompressed
    at a time is bounded.
    """

    piece = BUFFER  # compressed bytes that are read at a time
    padding = b""  # bytes that may stand behind a frame

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: Any = None  # the frame being read
        self._rest = b""  # compressed, behind the end of the last frame
        self._padding = b""  # none before the first frame
        self._ready = memoryview(b"")  # decompressed, not handed out yet

    def begin(self) -> Any:
        """Return what decompresses the next frame."""
        raise NotImplementedError

    def decompress(self, compressed: bytes) -> bytes:
        """Return some bytes of the frame; OSError where it is damaged."""
        try:
            return self._frame.decompress(compressed, BUFFER)
        except lzma.LZMAError as error:
            raise OSError(error) from None

    def readable(self) -> bool:  # noqa: D102
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            # there may be more to come of what a frame was given
            waits = self._frame is not None and not getattr(self._frame, "needs_input", True)
            piece = b"" if waits else self._rest or self._file.read(self.piece)
            if not piece and not waits:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._rest = b""
            if self._frame is None:
                piece = piece.lstrip(self._padding)
                if not piece:
                    continue
                self._frame = self.begin()
            self._ready = memoryview(self.decompress(piece))
            if self._frame.eof:
                self._rest, self._frame, self._padding = self._frame.unused_data, None, self.padding
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


class _Zstd(_Frames):
    piece = 1 << 11  # of every four bytes 128 kB can come, and there is no bound to give

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        super().__init__(file)
        self._error = zstandard.ZstdError
        # frames written with --long=31 ask for a window of 2 GiB; others take what they need
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)

    def begin(self) -> Any:
        return self._decompressor.decompressobj()

    def decompress(self, compressed: bytes) -> bytes:
        try:
            return self._frame.decompress(compressed)
        except self._error as error:
            raise (NeedsDictionary if "dictionary" in str(error).lower() else OSError)(error) from None


class _Bz2(_Frames):
    def begin(self) -> Any:
        return bz2.BZ2Decompressor()


class _Xz(_Frames):
    padding = b"\0"

    def begin(self) -> Any:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY)
