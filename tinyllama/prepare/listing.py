"""List the files at a source: a local file or folder, an archive, or a URL that fsspec knows."""

import heapq
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from tinyllama import InputError

_NO_FILE = "is a pipe, a socket or a device"
_HTTP = ("http://", "https://")
_CACHES = ("simplecache::", "filecache::", "blockcache::")  # of files that are read more than once


@dataclass
class Listing:
    """The files at a source, without those that are hidden: their names, or a folder's, begin with a dot."""

    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    """name (the path below the source, with ``/``) and bytes of each file, by its path or URL"""
    broken: dict[str, str] = field(default_factory=dict)
    """why a file cannot be read, by its path"""
    again: dict[str, str] = field(default_factory=dict)
    """names that lead to a folder or a file that is listed by another one, and the path of that"""
    hidden: int = 0
    """files and folders whose names begin with a dot"""
    elsewhere: int = 0
    """files of other configurations and splits of a dataset on the Hub"""


def is_url(source: str) -> bool:
    """Return whether ``source`` is a URL, also of an archive (``zip://*.jsonl::https://...``), not a local path."""
    return ("://" in source or "::" in source) and not os.path.exists(source)


def without_caches(source: str) -> str:
    """Return ``source`` without ``simplecache::`` and the like before it: each file is fetched once, and whole."""
    while source.startswith(_CACHES):
        source = source.partition("::")[2]
    return source


def list_files(source: str, folders: Collection[str]) -> Listing:
    """List the files in and below ``folders`` of ``source``, or the one file that it is.

    Raises InputError when ``source`` or a folder is missing or cannot be read.
    """
    return _remote(source, folders) if is_url(source) else _local(source, folders)


def _local(source: str, folders: Collection[str]) -> Listing:
    listing = Listing()
    if os.path.isfile(source):
        listing.files[source] = os.path.basename(source), os.stat(source).st_size
        return listing
    if os.path.exists(source) and not os.path.isdir(source):
        raise InputError(f"{source}: {_NO_FILE}: give a file or a folder")
    seen: dict[object, str] = {}
    for folder in folders:
        _walk(source, folder, listing, seen)
    return listing


def is_folder(source: str) -> bool:
    """Return whether there is a folder at this path or URL."""
    if not is_url(source):
        return os.path.isdir(source)
    fs, path = filesystem(source)
    try:
        return not source.startswith(_HTTP) and bool(fs.isdir(path))
    except Exception as error:  # each filesystem has types of its own
        raise unreachable(source, error) from None


def _walk(source: str, folder: str, listing: Listing, seen: dict[object, str]) -> None:
    """List what is below ``folder``: each real folder and file once, however many links lead to it.

    Links are followed last, so that what lies below the top itself keeps its own path. A link to a folder that holds
    the link, or the top, is not followed at all.
    """
    top = os.path.join(source, folder) if folder != "." else source
    real_top = os.path.realpath(top)
    folders, links = [top], list[str]()
    while folders or links:
        if not folders:
            link = heapq.heappop(links)
            target = os.path.realpath(link)
            if not os.path.isdir(link):
                _add(link, target, source, listing, seen)
            elif any(_holds(target, inner) for inner in (real_top, os.path.realpath(os.path.dirname(link)))):
                listing.again[_name(link, source)] = target
            else:
                folders.append(link)
            continue
        where = folders.pop()
        real = os.path.realpath(where)
        if real in seen:
            listing.again[_name(where, source)] = seen[real]
            continue
        seen[real] = where
        try:
            with os.scandir(where) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            hint = "" if os.path.lexists(top) else "; a dataset on the Hub is hf://datasets/OWNER/NAME"
            what = f"{where}: cannot be listed ({error.strerror})"
            raise InputError(f"{what}: check where the source files are{hint}") from None
        below = []
        for entry in entries:
            if entry.name.startswith("."):
                listing.hidden += 1
            elif entry.is_symlink():
                heapq.heappush(links, entry.path)
            elif entry.is_dir(follow_symlinks=False):
                below.append(entry.path)
            else:
                _add(entry.path, os.path.join(real, entry.name), source, listing, seen)
        folders += reversed(below)


def _holds(folder: str, path: str) -> bool:
    return PurePosixPath(path).is_relative_to(folder)


def _name(path: str, source: str) -> str:
    return path.removeprefix(source).lstrip("/") or "."


def _add(path: str, real: str, source: str, listing: Listing, seen: dict[object, str]) -> None:
    name = _name(path, source)
    try:
        status = os.stat(path)
    except OSError:
        listing.files[path] = name, 0
        listing.broken[path] = "cannot be opened (a link to nothing, or no permission): repair or remove it"
        return
    # the names of one file share its number; so may unrelated files on some network file systems, but not its count
    key = (status.st_dev, status.st_ino) if status.st_nlink > 1 else real
    if key in seen:
        listing.again[name] = seen[key]
        return
    seen[key] = path
    listing.files[path] = name, status.st_size
    if not stat.S_ISREG(status.st_mode):
        listing.broken[path] = f"{_NO_FILE}: put a file in its place or remove it"


def _remote(source: str, folders: Collection[str]) -> Listing:
    fs, top = filesystem(source)
    if "file" in fs.protocol:  # fsspec goes round in links
        local, url = _local(top, folders), fs.unstrip_protocol
        local.files = {url(path): file for path, file in local.files.items()}
        local.broken = {url(path): why for path, why in local.broken.items()}
        return local
    chain = "".join(source.partition("::")[1:])  # where an archive is
    listing, base = Listing(), fs.unstrip_protocol(top)
    try:
        # over http there are files alone, and whether there is one also depends on the network
        if source.startswith(_HTTP) or fs.isfile(top):
            files = {source: fs.info(top)}
            base = source.removesuffix(chain).rpartition("/")[0]
        else:
            if is_pattern := not fs.exists(top) and set(top) & set("*?["):
                found = fs.glob(top, detail=True)
                start = min(top.find(sign) for sign in is_pattern)
                base = fs.unstrip_protocol(top[:start].rpartition("/")[0])
            else:
                tops = [top if folder == "." else f"{top.rstrip('/')}/{folder}" for folder in folders]
                found = {path: info for below in tops for path, info in fs.find(below, detail=True).items()}
            files = {fs.unstrip_protocol(path) + chain: found[path] for path in sorted(found)}
    except Exception as error:  # each filesystem has types of its own
        raise unreachable(source, error) from None
    for url, info in files.items():
        name = url.removesuffix(chain).removeprefix(base).lstrip("/")
        if source.startswith(_HTTP):
            name = name.partition("?")[0].partition("#")[0]
        if info["type"] != "file":
            continue
        if url != source and any(part.startswith(".") for part in name.split("/")):
            listing.hidden += 1
            continue
        listing.files[url] = name, info["size"] or 0
        if info["size"] is None:
            listing.broken[url] = "its server does not say how large it is: download it and give the local file"
    return listing


def filesystem(url: str) -> tuple[Any, str]:
    """Return the filesystem of ``url`` and the path there; raises InputError."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # a package that is not installed, a protocol nobody knows
        raise InputError(
            f"{url}: cannot be reached ({reason(error)}): correct the address, install what it needs, or download it"
        ) from None
    except Exception as error:  # each filesystem has types of its own
        raise InputError(
            f"{url}: cannot be reached ({reason(error)}): check the address and your permissions"
        ) from None


def unreachable(source: str, error: Exception) -> InputError:
    """Return what to tell the user of a source that could not be listed."""
    rights = "; gated and private datasets need hf auth login" if "hf://" in source else ""
    return InputError(f"{source}: cannot be listed ({reason(error)}): check the address and your permissions{rights}")


def reason(error: Exception) -> str:
    """Return the first line of what an exception says."""
    if isinstance(error, FileNotFoundError):
        if isinstance(error.__cause__, Exception):  # fsspec's, of a server that does not answer
            return reason(error.__cause__)
        return error.strerror or f"not found: {error}"
    return (str(error) or repr(error)).partition("\n")[0].rstrip(".")
