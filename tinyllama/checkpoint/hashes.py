"""Hash a checkpoint's files as they are written, keep the hashes in its state.json, and compare them before loading.

They are XXH3-128, as ``xxhsum -H2`` prints them, which is as fast as memory. They find damage, not forgery. The hash of
state.json itself is of its content without that hash.
"""

import io
import json
from pathlib import Path
from typing import Any

import xxhash

ALGORITHM = "XXH3-128"


class HashedFile(io.BufferedWriter):
    """A new file that hashes what is written to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self._hash = xxhash.xxh3_128()

    def write(self, data: Any) -> int:  # noqa: D102 (io's)
        self._hash.update(data)
        return super().write(data)

    def fileno(self) -> int:  # noqa: D102 (io's)
        self.flush()  # DCP asks for it to fsync the file, and does not flush before
        return super().fileno()

    def hexdigest(self) -> str:
        """Return the hash of all that was written."""
        return self._hash.hexdigest()


def of_bytes(payload: bytes) -> str:
    """Return the hash of ``payload``."""
    return xxhash.xxh3_128(payload).hexdigest()


def of_file(path: Path) -> str:
    """Return the hash of a file's content."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(2**22))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def last_files(state: dict[str, Any], config: str, hashes: dict[str, str]) -> dict[str, bytes]:
    """Return the files that complete a checkpoint, by name: config.yaml, and state.json with all hashes."""
    payload = config.encode()
    return {"config.yaml": payload, "state.json": seal(state, hashes | {"config.yaml": of_bytes(payload)})}


def seal(state: dict[str, Any], hashes: dict[str, str]) -> bytes:
    """Return the bytes of a state.json that holds ``state`` and ``hashes`` by file name, its own among them."""
    sealed = hashes | {"state.json": _of_content(state, hashes)}
    return json.dumps({**state, "hash_algorithm": ALGORITHM, "hashes": sealed}, indent=2).encode()


def unseal(payload: bytes) -> tuple[dict[str, Any], dict[str, str] | None]:
    """Return what ``seal`` was given, without hashes if an earlier version wrote it. Raises ValueError for damage."""
    try:
        state = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its state.json is no JSON: {error}") from error
    if not isinstance(state, dict):
        raise ValueError("its state.json is not an object")
    algorithm, hashes = state.pop("hash_algorithm", None), state.pop("hashes", None)
    if algorithm is None and hashes is None:
        return state, None
    own = hashes.pop("state.json", None) if isinstance(hashes, dict) else None
    if algorithm != ALGORITHM or own != _of_content(state, hashes):
        raise ValueError("state.json does not match its hash")
    return state, hashes


def _of_content(state: dict[str, Any], hashes: dict[str, str]) -> str:
    return of_bytes(json.dumps([state, hashes], sort_keys=True).encode())
