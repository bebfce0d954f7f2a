"""The input files of a dataset: where they are, what their shards are called, and which of their documents are wanted.

A source is a folder or a file, local or at any URL that fsspec knows (``s3://``, ``gs://``, ``hf://`` ...).
"""

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Container, Iterable, Iterator
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
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise OSError(error.errno, error.strerror, f"{folder} ($TMPDIR)") from None
                what = f"{self.path}: cannot be fetched ({_reason(error)})"
                if isinstance(error, FileNotFoundError | PermissionError):
                    raise InputError(f"{what}: check it and run again, what is done is kept") from None
                raise NotFetched(f"{what}: check the network and run again, what is done is kept") from None
            try:
                yield local
            except InputError as error:
                raise InputError(*(str(text).replace(str(local), self.path) for text in error.args)) from None


class NotFetched(RuntimeError):
    """The network's error, not the input's: the same input may be had later."""


def find_inputs(source: str | Path, endings: tuple[str, ...], folders: Iterable[str] = (".",)) -> list[Input]:
    """The files in and below ``source`` whose names end so, in the order of their shards; local links are followed.

    ``folders`` narrows it to some folders of ``source``; a ``source`` that is a file is the one input. Raises
    InputError for a folder that is missing or has no such file, for a file that cannot be reached, and for two inputs
    that would make shards of one name.
    """
    source = str(source)
    listed = _list_remote if "://" in source else _list_local
    inputs: dict[str, Input] = {}
    errors = []
    for folder in sorted(set(folders)):
        top, files = listed(source, folder)
        found = [path for path in files if path.endswith(endings) and not _is_cache(path, files)]
        if not found:
            raise _nothing(source, folder, files, endings)
        for path in sorted(found):
            one = Input(path, path.removeprefix(top).lstrip("/"), files[path])
            if _NOT_UTF8.search(path):
                errors.append(f"{path!r}: its name is not UTF-8: rename it")
            elif one.size < 0:
                errors.append(f"{path}: cannot be opened (a link to nothing, or no permission): repair or remove it")
            elif (other := inputs.setdefault(one.shard, one)) is not one:
                errors.append(f"{path}: would become the shard {one.shard}, as {other.path} does: rename one of them")
    if errors:
        raise InputError(*errors)
    return [inputs[shard] for shard in sorted(inputs)]


def _list_local(source: str, folder: str) -> tuple[str, dict[str, int]]:
    """The folder that names are relative to, and the files by path with their sizes, -1 where one cannot be opened."""

    def stop(error: OSError) -> NoReturn:
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror}): check where the source files are")

    top = Path(source)
    if top.is_file():
        return str(top.parent), {str(top): top.stat().st_size}
    walk = os.walk(top / folder, onerror=stop, followlinks=True)
    paths = [os.path.join(where, name) for where, _, names in walk for name in names]
    return str(top), {path: _size(path) for path in paths}


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _list_remote(source: str, folder: str) -> tuple[str, dict[str, int]]:
    fs, top = _filesystem(source)
    try:
        if fs.isfile(top):
            return source.rpartition("/")[0], {source: fs.size(top)}
        files = fs.find(top if folder == "." else f"{top.rstrip('/')}/{folder}", detail=True)
    except Exception as error:  # each filesystem has types of its own
        raise InputError(f"{source}: cannot be listed ({_reason(error)}): check the address and the rights") from None
    return fs.unstrip_protocol(top), {fs.unstrip_protocol(path): info["size"] for path, info in files.items()}


def _is_cache(path: str, files: Container[str]) -> bool:
    """Whether ``datasets`` left this file of its cache beside those of a dataset that it saved."""
    folder, name = os.path.split(path)
    return name.startswith("cache-") and f"{folder}/{_DATASETS_STATE}" in files


def _nothing(source: str, folder: str, files: Collection[str], endings: tuple[str, ...]) -> InputError:
    if list(files) == [source]:
        return InputError(f"{source}: ends in none of {', '.join(endings)}: rename or convert it")
    where = source if folder == "." else f"{source.rstrip('/')}/{folder}"
    text = ", rename files of plain text to .txt or put them into a .jsonl" if ".txt" in endings else ""
    return InputError(f"{where}: no file ending in {' or '.join(endings)} in or below it: check where they are{text}")


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
