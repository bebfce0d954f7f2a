"""What an output folder of prepared shards holds: which of them are done, and what a killed run has left."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from tinyllama import InputError
from tinyllama.checkpoint.state import is_count
from tinyllama.data.files import open_regular
from tinyllama.data.metadata import is_text, read_shard_info
from tinyllama.prepare.inputs import ENDINGS, Input, some
from tinyllama.prepare.progress import Info

_TMP = re.compile(r"(.+)\.(?:bin|idx\.npy|json|bad)\.[0-9a-f]+\.tmp")
INDEX = ".idx.npy"
BAD = ".bad"  # NAME.bad says why an input could not be packed
METADATA = {  # of NAME.json, besides those of every shard
    "source": {"name": is_text, "bytes": is_count},
    "subsets": {str: {"documents": is_count, "tokens": is_count, "bytes": is_count}},
    "dropped": {str: is_count},
    "repaired": is_count,
}


def done(inputs: Sequence[Input], mine: Sequence[Input], output: Path, facts: Info) -> dict[str, Info]:
    """Return the metadata of those shards of ``mine`` that are done.

    ``facts`` is the metadata that every shard of the dataset shares. Raises InputError where one says otherwise, is
    damaged, or belongs to none of ``inputs``.
    """
    try:
        files = os.listdir(output)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{output}: {error.strerror}: give another --output") from None
    # a shard's first file, which no other program calls so: a .json may be somebody's raw data
    shards = {file.removesuffix(INDEX) for file in files if file.endswith(INDEX)}
    if unknown := shards - {one.shard for one in inputs}:
        raise InputError(
            f"{output}: {len(unknown)} shards belong to no input ({some(sorted(unknown))}): "
            "remove their files (NAME.bin, NAME.idx.npy and NAME.json), or use another --output"
        )
    infos = {}
    own = {one.shard for one in mine}
    for shard in sorted(shards - own)[:1]:  # another task's: all must agree, and not only in the end
        _check_agrees(output, read_shard_info(output, shard), facts)
    for one in mine:
        info = read_shard_info(output, one.shard, METADATA)
        if info is None:
            continue
        _check_agrees(output, info, facts)
        if (info["source"]["name"], info["source"]["bytes"]) == (one.name, one.size):
            infos[one.shard] = info
    return infos


def _check_agrees(output: Path, info: Info | None, facts: Info) -> None:
    """Raise InputError if a shard is of another dataset than is being prepared."""
    for key, value in facts.items():
        if info and info.get(key) != value:
            origin = f"give --source {info[key]}, or " if key == "origin" and info.get(key) else ""
            raise InputError(
                f"{output}: {key} was {info.get(key)!r} for shard {info['name']} and is {value!r} now: "
                f"{origin}use another --output"
            )


def remove_stale(output: Path, shards: set[str] | None) -> None:
    """Remove what the killed left of these shards (None: of all); those of other tasks may be in use."""
    for file in output.glob("*.tmp"):
        match = _TMP.fullmatch(file.name)
        if match and (shards is None or match[1] in shards):
            file.unlink(missing_ok=True)


def is_marker(path: Path) -> bool:
    """Whether a file ``*.bad`` is one of ours, which names its input: other programs call files so, too."""
    shard = path.name.removesuffix(BAD)
    return shard.lower().endswith(ENDINGS) and path.is_file() and shard in reason(path).replace("/", "--")


def reason(marker: Path) -> str:
    """Return what a NAME.bad says."""
    try:
        with open_regular(marker) as file:
            return file.read(2**16).decode(errors="replace")
    except OSError as error:
        raise InputError(f"{marker} cannot be read ({error.strerror}): delete it and rerun its task") from None
