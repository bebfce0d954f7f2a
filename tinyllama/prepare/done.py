"""Find which shards of an output folder are done, and what a killed run has left.

A shard is done if its NAME.json names the input, with its size and hash. An input is only hashed again if it may have
changed: when a shard is finished, the modification time of its NAME.json is set to the ``ctime`` that the input had
before it was read. A program can set a modification time back, as ``cp -p`` and ``rsync -t`` do, but not a ``ctime``.
Renaming an input or changing its mode or owner changes its ``ctime``, too, and costs one more reading. Because the time
is not part of any file's content, the output stays reproducible; a copy of the output folder, which has other times,
costs one more reading of every input.
"""

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tinyllama import InputError
from tinyllama.atomic import check_is_file
from tinyllama.checkpoint.state import is_count
from tinyllama.data.files import open_regular
from tinyllama.data.metadata import MANIFEST, hash_file, is_text, read_shard_info
from tinyllama.prepare.inputs import ENDINGS, Input, some
from tinyllama.prepare.listing import is_url
from tinyllama.prepare.progress import Info

_TMP = re.compile(r"(.+)\.(?:bin|idx\.npy|json|bad)\.[0-9a-f]+\.tmp")
INDEX = ".idx.npy"
OF_A_RUN = ("events.jsonl", "metrics.csv")
"""names that only the out_dir of a run has, which would then refuse to resume among packed data"""
BAD = ".bad"  # NAME.bad says why an input could not be packed
# how a NAME.json or a manifest.json of ours begins, and which keys are in both
_BEGINNINGS = tuple(b'{\n "%s": ' % key for key in (b"added_tokens", b"blake2b", b"bos"))
_KEYS = (b'"dtype"', b'"format_version"', b'"tokenizer_sha256"')
METADATA = {  # of NAME.json, besides those of every shard
    "source": {"name": is_text, "bytes": is_count},
    "subsets": {str: {"documents": is_count, "tokens": is_count, "bytes": is_count}},
    "dropped": {str: is_count},
    "repaired": is_count,
}


def find_done(
    inputs: Sequence[Input], mine: Sequence[Input], output: Path, facts: Info, threads: int
) -> dict[str, Info]:
    """Return the metadata of those shards of ``mine`` that are done.

    ``facts`` is the metadata that every shard of the dataset shares. ``threads`` read the inputs that may have changed.
    Raises InputError where a shard says otherwise, is damaged, or belongs to none of ``inputs``.
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
    infos: dict[str, Info] = {}
    doubtful: list[Input] = []
    own = {one.shard for one in mine}
    for shard in sorted(shards - own)[:1]:  # another task's: all must agree, and not only in the end
        _check_agrees(output, read_shard_info(output, shard), facts)
    for one in mine:
        try:
            info = read_shard_info(output, one.shard, METADATA)
        except InputError:
            if not _is_our_json(path := output / f"{one.shard}.json"):
                raise _of_another(path) from None
            raise
        if info is None:
            continue
        _check_agrees(output, info, facts)
        if (info["source"]["name"], info["source"]["bytes"]) == (one.name, one.size):
            infos[one.shard] = info
            status = status_of(one)
            if not is_url(one.path) and not (status and _has_time(output / f"{one.shard}.json", status.st_ctime_ns)):
                doubtful.append(one)
    if doubtful:
        size = sum(one.size for one in doubtful)
        what = f"{len(doubtful):,} inputs ({size / 1e9:,.1f} GB) that may have changed since they were packed"
        print(f"comparing {what}", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(threads) as pool:
        same = pool.map(lambda one: _is_same(one, output, infos[one.shard]), doubtful)
        changed = {one.shard for one, is_same in zip(doubtful, same, strict=True) if not is_same}
    return {shard: info for shard, info in infos.items() if shard not in changed}


def check_ours(output: Path, todo: Sequence[Input]) -> None:
    """Refuse to replace or remove what another program wrote, before anything is written.

    Raises InputError for the folder of a run, and for a manifest.json or a NAME.bin or NAME.bad of an input ``todo``
    that is not ours, and FileExistsError for what is not a file. A NAME.bin has no marks, so it is taken for ours where
    there is any other file of ours: it may be of a damaged shard whose NAME.json was deleted.
    """
    if found := [name for name in OF_A_RUN if (output / name).exists()]:
        raise InputError(f"{output} is the folder of a run ({found[0]}): give another --output")
    manifest = output / MANIFEST
    check_is_file(manifest)
    if manifest.exists() and not _is_our_json(manifest):
        raise _of_another(manifest)
    begun = manifest.exists() or any(output.glob(f"*{INDEX}"))
    for one in todo:
        tokens, _, bad = paths = [output / f"{one.shard}{ending}" for ending in (".bin", INDEX, BAD)]
        for path in paths:
            check_is_file(path)
        if tokens.exists() and not begun:
            raise _of_another(tokens)
        if bad.exists() and bad.stat().st_size and not is_marker(bad):
            raise _of_another(bad)


def check_not_held_out(inputs: Sequence[Input], output: Path, held_out: Path) -> None:
    """Raise InputError if an earlier run has held out in ``held_out`` what is now going into ``output``, too.

    It has if a shard there is a share of a file that is called as one of ``inputs``, in whatever folder: ``--source``
    may be a folder above or below by now, and the file may have grown.
    """
    names = {one.shard.rpartition("--")[2] for one in inputs}
    for file in sorted(os.listdir(held_out)) if held_out.is_dir() else []:
        shard = file.removesuffix(INDEX)
        if shard == file or shard.rpartition("--")[2] not in names:
            continue
        info = read_shard_info(held_out, shard)
        share = info.get("fraction") if info else None
        if isinstance(share, float) and share < 1:
            raise InputError(
                f"{held_out} holds documents for validation that {output} would hold, too ({some([shard])}): "
                "give the same --held_out, or move that folder away"
            )


def _of_another(path: Path) -> InputError:
    return InputError(f"{path} was not written by a prepare command: move it away, or give another --output")


def _is_our_json(path: Path) -> bool:
    """Return whether a NAME.json or manifest.json is ours, perhaps damaged or cut short, or has no content to lose.

    As ours appear complete or not at all, one that begins unlike them and lacks the keys of them all is another's,
    whether it can be parsed or not.
    """
    if path.is_dir():
        return False
    try:
        with open_regular(path) as file:
            content = file.read()
    except OSError:  # whose reader reports it
        return True
    if not content.strip(b"\0 \n{}"):
        return True
    begins = any(content.startswith(ours) or ours.startswith(content) for ours in _BEGINNINGS)
    return begins or all(key in content for key in _KEYS)


def status_of(one: Input) -> os.stat_result | None:
    """Return the status of an input's file; None for a URL, and where there is none, which its reader reports."""
    try:
        return None if is_url(one.path) else os.stat(one.path)
    except OSError:
        return None


def set_time(output: Path, shard: str, status: os.stat_result | None) -> None:
    """Note at a shard the ``status`` that its input had before it was read."""
    if status:
        with contextlib.suppress(OSError):  # another user's file: the input is read again each time
            os.utime(output / f"{shard}.json", ns=(status.st_ctime_ns, status.st_ctime_ns))


def _has_time(path: Path, wanted: int) -> bool:
    """Return whether a file bears the time ``wanted`` (ns), or as much of it as its file system keeps (seconds)."""
    there, unit = path.stat().st_mtime_ns, 1
    while unit < 10**9 and there % (10 * unit) == 0:
        unit *= 10
    return there == wanted // unit * unit


def _is_same(one: Input, output: Path, info: Info) -> bool:
    """Return whether an input has the bytes that its shard was made of; if so, it is not read the next time."""
    status = status_of(one)
    try:
        is_same = hash_file(Path(one.path)) == info["source"].get("blake2b")
    except OSError:  # which its reader reports
        return False
    if is_same:
        set_time(output, one.shard, status)
    return is_same


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
    """Return whether a file ``*.bad`` is one of ours, which names its input: other programs call files so, too."""
    shard = path.name.removesuffix(BAD)
    return shard.lower().endswith(ENDINGS) and path.is_file() and shard in reason(path).replace("/", "--")


def reason(marker: Path) -> str:
    """Return what a NAME.bad says."""
    try:
        with open_regular(marker) as file:
            return file.read(2**16).decode(errors="replace")
    except OSError as error:
        raise InputError(f"{marker} cannot be read ({error.strerror}): delete it and rerun its task") from None
