"""The input files of a dataset: where they are, what their shards are called, and which of their documents are wanted.

A source is a folder or a file, local or at any URL that fsspec knows (``s3://``, ``gs://``, ``hf://`` ...).
"""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tinyllama import InputError

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".txt")
_FETCHED = "tinyllama-fetched-"  # folders in $TMPDIR, one for each process that has fetched a file
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # how Python names the bytes of a path that are not
_DATASETS_STATE = "state.json"  # beside the .arrow files of a dataset that ``datasets`` saved


@dataclass(frozen=True)
class Fields:
    """Where a record keeps its text, and which records are left out."""

    text_key: str = "text"
    """key of a JSON object, column of a table"""
    subsets: bool = False
    """records are SlimPajama's: each must name its subset in ``meta.redpajama_set_name``"""
    leave_out: tuple[str, ...] = ()
    """subsets to leave out; needs ``subsets``"""
    fraction: float = 1.0
    """share of the documents that is kept, each by a draw of its own"""
    seed: int = 0
    """of those draws, together with the input's name"""
    longest: int = 32 << 20
    """bytes of a JSON line or of a row's text; a longer one is an error (a ``.txt`` is read in parts, however long)"""


@dataclass(frozen=True)
class Input:
    """One raw file of a dataset."""

    path: str
    """local path or URL"""
    name: str
    """path below the source folder, with ``/``"""
    size: int
    """bytes"""

    @property
    def shard(self) -> str:
        """Name of its packed shard: unlike the file's own name, different for every input of a dataset."""
        return self.name.replace("/", "--")

    @contextmanager
    def fetched(self) -> Iterator[Path]:
        """The file on this machine; a remote one is copied whole to ``$TMPDIR`` first.

        So it crosses the network once: a parquet file is read at random and then hashed from end to end.
        """
        if "://" not in self.path:
            yield Path(self.path)
            return
        with _folder() as folder:
            local = folder / self.name.rpartition("/")[2]
            try:
                fs, path = _filesystem(self.path)
                fs.get_file(path, str(local))
            except InputError:
                raise
            except Exception as error:  # each filesystem has types of its own
                raise InputError(
                    f"{self.path}: cannot be fetched ({_reason(error)}): check it and run again, what is done is kept"
                ) from None
            yield local


def find_inputs(source: str | Path, endings: tuple[str, ...], folders: Iterable[str] = (".",)) -> list[Input]:
    """The files in and below ``source`` whose names end so, in the order of their shards; local links are followed.

    ``folders`` narrows it to some folders of ``source``; a ``source`` that is a file is the one input. Raises
    InputError for a folder that is missing or has no such file, for a file that cannot be reached, and for two inputs
    that would make shards of one name.
    """
    find = _find_remote if "://" in str(source) else _find_local
    inputs: dict[str, Input] = {}
    errors = []
    for one in sorted(find(str(source), endings, set(folders)), key=lambda one: one.path):
        if _NOT_UTF8.search(one.path):
            errors.append(f"{one.path!r}: its name is not UTF-8: rename it")
        elif one.size < 0:
            errors.append(f"{one.path}: cannot be opened (a link to nothing, or no permission): repair or remove it")
        elif (other := inputs.setdefault(one.shard, one)) is not one:
            errors.append(f"{one.path}: would become the shard {one.shard}, as {other.path} does: rename one of them")
    if errors:
        raise InputError(*errors)
    return [inputs[shard] for shard in sorted(inputs)]


def _find_local(source: str, endings: tuple[str, ...], folders: set[str]) -> Iterator[Input]:
    def stop(error: OSError) -> NoReturn:
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror}): check where the source files are")

    top = Path(source)
    if top.is_file():
        yield Input(str(top), _with_ending(top.name, source, endings), top.stat().st_size)
        return
    for folder in sorted(folders):
        walk = os.walk(top / folder, onerror=stop, followlinks=True)
        found = [Path(where, name) for where, _, names in walk for name in _wanted(names, endings)]
        if not found:
            raise _nothing(top / folder, endings)
        for file in found:
            try:
                size = file.stat().st_size
            except OSError:
                size = -1
            yield Input(str(file), file.relative_to(top).as_posix(), size)


def _find_remote(source: str, endings: tuple[str, ...], folders: set[str]) -> Iterator[Input]:
    fs, top = _filesystem(source)
    top = top.rstrip("/")
    for folder in sorted(folders):
        root = top if folder == "." else f"{top}/{folder}"
        try:
            if fs.isfile(root):
                name = _with_ending(root.rpartition("/")[2], source, endings)
                yield Input(source, name, fs.size(root))
                return
            listed = fs.find(root, detail=True)
        except InputError:
            raise
        except Exception as error:  # each filesystem has types of its own
            raise InputError(
                f"{source}: cannot be listed ({_reason(error)}): check the address and the rights"
            ) from None
        names: dict[str, list[str]] = {}
        for path in listed:
            where, _, name = path.rpartition("/")
            names.setdefault(where, []).append(name)
        found = [f"{where}/{name}" for where in names for name in _wanted(names[where], endings)]
        if not found:
            raise _nothing(fs.unstrip_protocol(root), endings)
        for path in found:
            yield Input(fs.unstrip_protocol(path), path.removeprefix(f"{top}/"), listed[path]["size"])


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder of this process in ``$TMPDIR``; those of processes that were killed are removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{_FETCHED}*"):
        with suppress(OSError), _held(left):  # not while its process lives
            shutil.rmtree(left, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix=f"new-{_FETCHED}"))  # which no other process takes for one that was left
    with _held(new):
        folder = new.rename(new.with_name(new.name.removeprefix("new-")))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold ``folder``, as one process at a time can until it dies; OSError: another does, or it is gone."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _wanted(names: list[str], endings: tuple[str, ...]) -> list[str]:
    """Of the names in one folder; ``datasets`` leaves files of its cache beside those of a dataset it saved."""
    cached = "cache-" if _DATASETS_STATE in names else "\0"
    return [name for name in names if name.endswith(endings) and not name.startswith(cached)]


def _with_ending(name: str, source: str, endings: tuple[str, ...]) -> str:
    if not name.endswith(endings):
        raise InputError(f"{source}: ends in none of {', '.join(endings)}: rename or convert it")
    return name


def _nothing(folder: object, endings: tuple[str, ...]) -> InputError:
    hint = "check where they are" + ", rename files of plain text to .txt or put them into a .jsonl" * (
        ".txt" in endings
    )
    return InputError(f"{folder}: no file ending in {' or '.join(endings)} in or below it: {hint}")


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # a package that is not installed, a protocol nobody knows
        raise InputError(f"{url}: cannot be reached ({_reason(error)}): install it or correct the address") from None
    except Exception as error:  # each filesystem has types of its own
        raise InputError(f"{url}: cannot be reached ({_reason(error)}): check the address and the rights") from None


def _reason(error: Exception) -> str:
    return (str(error) or repr(error)).partition("\n")[0].rstrip(".")
