"""A folder that a conversion writes: whole or not at all, over an earlier one but never over anything else."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyllama import InputError, __version__, atomic

MARK = "export.json"  # in a folder that a conversion wrote: what from, and the names in it


def refuse_foreign(output: Path) -> None:
    """Raise InputError for an ``output`` that is a file or has files that no conversion wrote."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: give a folder that does not exist yet")
    if foreign := sorted({path.name for path in output.glob("*")} - set(read_mark(output).get("files", ()))):
        raise InputError(f"{output} holds {foreign[0]}, which no export wrote: give another folder, or move it away")


def read_mark(output: Path) -> dict[str, Any]:
    """What the mark of ``output`` says; empty when it has none."""
    try:
        said = json.loads((output / MARK).read_text(encoding="utf-8"))
        return said if isinstance(said["files"], list) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


@contextlib.contextmanager
def create(output: Path, source: Path, facts: dict[str, Any]) -> Iterator[Path]:
    """A folder to write into, which becomes ``output`` when the block ends well and is gone when it does not.

    Every file in it has then reached the disk, and ``facts`` are in its mark. Raises InputError as refuse_foreign does,
    for an ``output`` that cannot be made, and for one that holds the ``source``, which would be lost.
    """
    given, output = output, output.resolve()  # a name even for "."
    try:
        if output in (source.resolve(), *source.resolve().parents) and output.exists():
            raise InputError(f"{given} holds {source}, which is to be converted: give another folder")
        refuse_foreign(output)
        unfinished, replaced = (output.with_name(f".{output.name}.{word}") for word in ("tmp", "replaced"))
        for stale in (unfinished, replaced):
            shutil.rmtree(stale, ignore_errors=True)
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot create {given}: {error.strerror}: give a folder that can be written") from None
    try:
        yield unfinished
        names = sorted([MARK, *(path.name for path in unfinished.iterdir())])
        write_json(unfinished / MARK, {"tinyllama": __version__, **facts, "files": names})
        for path in [*unfinished.rglob("*"), unfinished]:
            atomic.sync(path)
        if output.exists():
            output.rename(replaced)
        unfinished.rename(output)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError):  # a full disk
            raise InputError(f"cannot write {given}: {error.strerror}: make room, or give another folder") from None
        raise
    atomic.sync(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """``content``, to be read by people too."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
