"""Create an output folder completely or not at all; it replaces an earlier conversion, but never anything else."""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyllama import InputError, __version__, atomic, folder_lock, printable

MARK = "export.json"  # marks a folder that a conversion wrote; it holds the source and the names of all files


def read_mark(output: Path) -> dict[str, Any]:
    """Return the content of the mark of ``output``; empty when it has none."""
    try:
        mark = json.loads((output / MARK).read_text(encoding="utf-8")) if (output / MARK).is_file() else {}
        return mark if isinstance(mark["files"], list) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def check_name(path: Path, hint: str) -> None:
    """Raise InputError if ``path`` is not UTF-8: safetensors opens no such file."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path}: its name is not UTF-8, and safetensors cannot open it: {hint}") from None


@contextlib.contextmanager
def create(output: Path, source: Path, metadata: dict[str, Any]) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``output`` when the block succeeds, and is removed when it fails.

    Its files are synced to the disk first, and its mark holds ``metadata``. Raises InputError for an ``output`` that
    is a file, cannot be created, has files that no conversion wrote, holds the ``source``, which would be lost, or that
    another conversion writes.
    """
    given, output = output, output.resolve()  # a name even for "."
    with contextlib.ExitStack() as lock:
        try:
            if output in (source.resolve(), *source.resolve().parents) and output.exists():
                raise InputError(f"{given} holds {source}, which is to be converted: give another folder")
            if output.exists() and not output.is_dir():
                raise InputError(f"{output} is a file: give a folder that does not exist yet")
            if not output.parent.exists():  # if it is a file, the lock is refused as "not a directory"
                output.parent.mkdir(parents=True, exist_ok=True)
            lock.enter_context(_locked(output))
            partial, replaced = (output.with_name(f".{output.name}.{word}") for word in ("tmp", "replaced"))
            _put_back(replaced, output)
            written = read_mark(output).get("files", ())
            if foreign := sorted(path.name for path in output.glob("*") if path.name not in written):
                raise InputError(
                    f"{output} holds {printable(foreign[0])}, which no export wrote: "
                    "give another folder, or move it away"
                )
            for stale in (partial, replaced):
                _remove(stale)
            partial.mkdir()
        except OSError as error:
            raise InputError(f"cannot create {given}: {why(error)}: give a folder that can be written") from None
        try:
            yield partial
            names = sorted([MARK, *(path.name for path in partial.iterdir())])
            write_json(partial / MARK, {"tinyllama": __version__, **metadata, "files": names})
            for path in [*partial.rglob("*"), partial]:
                atomic.sync(path)
            if output.exists():
                output.rename(replaced)
            partial.rename(output)
        except BaseException as error:
            _remove(partial)
            with contextlib.suppress(OSError):  # the next conversion tries again
                _put_back(replaced, output)
            if isinstance(error, OSError):  # a full disk
                raise InputError(f"cannot write {given}: {why(error)}: make room, or give another folder") from None
            raise
        atomic.sync(output.parent)
        _remove(replaced)


def _put_back(replaced: Path, output: Path) -> None:
    """Give the earlier conversion its name again if it was set aside and no other has taken its place."""
    if read_mark(replaced) and not any(output.glob("*")):
        replaced.rename(output)


def _remove(folder: Path) -> None:
    """Remove ``folder``, its mark first: what is left when that is interrupted is not taken for a conversion."""
    with contextlib.suppress(OSError):
        (folder / MARK).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _locked(output: Path) -> contextlib.AbstractContextManager[None]:
    """Let one conversion at a time write ``output``, as its temporary names are fixed; InputError: another does.

    What one that was killed has left, the next finds by its name.
    """

    def busy() -> None:
        raise InputError(f"another conversion is writing {output}: wait until it has ended, or give another folder")

    return folder_lock.locked(output.with_name(f".{output.name}.lock"), busy, fcntl.flock)


def why(error: OSError) -> str:
    """Return what the system says of ``error``, or its text: one that a library raises may have no number."""
    return error.strerror or printable(error)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
