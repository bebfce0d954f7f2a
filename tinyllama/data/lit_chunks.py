"""Upstream's packed chunk files (lit_gpt/packed_dataset.py): a 24-byte header, then that many tokens."""

import hashlib
import os
import struct
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama import InputError
from tinyllama.data.files import open_regular

MAGIC = b"LITPKDS"
HEADER = struct.Struct("<7sQBQ")  # magic, version, dtype code, tokens
DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are float32 and float64: no tokens
EDGE = 4096  # bytes hashed at each end of a file: all of 2 TB would take an hour


def scan(folder: Path) -> dict[str, Any]:
    """Return the arguments of a PackedDataset for a folder of ``*.bin`` chunk files, in order of name.

    Raises InputError, one error a file, when a header or a size is wrong or the dtypes differ.
    """
    names = sorted(name for name in os.listdir(folder) if name.endswith(".bin"))
    if not names:
        raise InputError(f"{folder} holds no packed data: give the --output of a prepare command")
    fingerprint = hashlib.blake2b(digest_size=32)
    headers: list[tuple[str, np.dtype, int]] = []
    errors: list[str] = []
    for name in names:
        try:
            with open_regular(folder / name) as file:
                head = file.read(EDGE)
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - EDGE))
                tail = file.read(EDGE)
        except OSError as problem:
            errors.append(f"{folder / name} cannot be read ({problem.strerror}): move it out of the folder")
            continue
        if error := _find_error(head, size):
            errors.append(f"{folder / name} {error}")
            continue
        _, _, code, count = HEADER.unpack_from(head)
        headers.append((name, np.dtype(DTYPES[code]), count))
        for part in (name.encode(), size.to_bytes(8, "little"), head, tail):  # hashed apart: no border can shift
            fingerprint.update(hashlib.blake2b(part).digest())
    for name, dtype, _ in headers:
        if dtype != headers[0][1]:
            errors.append(
                f"{folder / name} holds {dtype} tokens but {headers[0][0]} {headers[0][1]}: "
                "put each dtype into a folder of its own"
            )
    if errors:
        raise InputError(*errors)
    return {
        "fingerprint": fingerprint.hexdigest(),
        "dtype": headers[0][1],
        "files": names,
        "ends": list(accumulate(count for _, _, count in headers)),
        "header": HEADER.size,
    }


def _find_error(head: bytes, size: int) -> str | None:
    if size < HEADER.size or not head.startswith(MAGIC):
        return f"is not a chunk file, it does not start with {MAGIC.decode()}: move it out of the folder"
    _, version, code, count = HEADER.unpack_from(head)
    if version != 1 or code not in DTYPES:
        return (
            f"has version {version} and dtype code {code}, known are version 1 and codes {sorted(DTYPES)}: rewrite it"
        )
    expected = HEADER.size + count * np.dtype(DTYPES[code]).itemsize
    if size != expected:
        return f"has {size} bytes, not the {expected} its header promises: copy it again"
    return None
