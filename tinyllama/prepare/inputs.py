"""Find the input files of a dataset, name their shards, and say which of their documents are wanted.

A source is a folder or a file, local or at any URL that fsspec knows (``s3://``, ``gs://``, ``hf://`` ...).
"""

import errno
import fcntl
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tinyllama import InputError, printable
from tinyllama.data.metadata import MANIFEST
from tinyllama.prepare import hub
from tinyllama.prepare.listing import Listing, filesystem, is_folder, is_url, list_files, reason, without_caches

COMPRESSED = (".gz", ".zst", ".zstd", ".xz", ".bz2")
RECORDS = (
    *(kind + compressed for kind in (".jsonl", ".ndjson", ".json") for compressed in ("", *COMPRESSED)),
    *(".parquet", ".arrow"),
)
ENDINGS = (*RECORDS, ".txt")
SUBSET_KEY = "redpajama_set_name"  # SlimPajama's: in meta, or beside it in some copies
_ANY_ENDING = re.compile(f"({'|'.join(map(re.escape, ENDINGS))})$", re.IGNORECASE)
_FETCHED = "tinyllama-fetched-"  # folders in $TMPDIR, one for each process that has fetched a file
_REFUSED = (401, 403, 404, 410)  # a server's answers that are the same the next time
# of an archive: its bytes are wrong, or compressed in a way that Python does not know
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)
_LONGEST_NAME = 255 - len(".idx.npy.12345678.tmp")  # bytes that file systems leave for a shard's
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # how Python names the bytes of a path that are not
_SPLITS = "dataset_dict.json"  # beside the folders of the splits of a dataset that it saved
_OF_DATASETS = ("state.json", "dataset_info.json", _SPLITS, "dataset_infos.json")
_NO_CORPUS = re.compile(  # names of texts about a corpus
    r"(licen[cs]e|copying|copyright|notice|readme|changelog|authors|checksums?|(md5|sha\d+)(sums?)?|robots|requirements"
    r"|(file)?(list|names)|manifest|urls)([^a-z].*)?\.txt",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Fields:
    """Where a record keeps its text, and which records are left out."""

    text_key: str = "text"
    """key of a JSON object, column of a table"""
    subsets: bool = False
    """records are SlimPajama's: each must name its subset as ``redpajama_set_name``, in ``meta`` or beside it"""
    leave_out: tuple[str, ...] = ()
    """subsets to leave out; needs ``subsets``"""
    fraction: float = 1.0
    """share of the documents that is kept, each by a draw of its own"""
    seed: int = 0
    """of those draws, together with the input's name"""
    longest: int = 32 << 20
    """bytes of a JSON line or of a row's text; a longer one is an error (a ``.txt`` is read in parts, however long)"""
    unnamed: bool = False
    """with ``subsets``: records that name none are kept, too"""
    held_out: float = 0.0
    """share of the documents that is left out by the same draws, for a dataset of that ``fraction``"""

    @property
    def is_drawn(self) -> bool:
        """Return whether a draw decides which documents are kept."""
        return self.fraction < 1 or self.held_out > 0


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
        """Yield the path of the file on this machine; a remote one is copied whole to ``$TMPDIR`` first.

        So it crosses the network once: a parquet file is read at random and then hashed from end to end.
        """
        if not is_url(self.path):
            yield Path(self.path)
            return
        with _folder() as folder:
            local = folder / self.name.rpartition("/")[2]
            try:
                fs, path = filesystem(self.path)
                fs.get_file(path, str(local))
            except InputError:
                raise
            except Exception as error:  # each filesystem has types of its own
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise TmpdirError(error.errno, error.strerror, f"{folder} ($TMPDIR)") from None
                what = f"{self.path}: cannot be fetched ({reason(error)})"
                if isinstance(error, _DAMAGED) or "encrypted" in str(error):  # zipfile says so in a RuntimeError
                    hint = "it is damaged or encrypted: download it again, or unpack it and give the files"
                    raise InputError(f"{what}: {hint}") from None
                status = getattr(getattr(error, "response", error), "status_code", 0)
                if isinstance(error, FileNotFoundError | PermissionError) or status in _REFUSED:
                    raise InputError(f"{what}: check it and run again, what is done is kept") from None
                raise NotFetched(f"{what}: check the network and run again, what is done is kept") from None
            try:
                yield local
            except InputError as error:
                raise InputError(*(str(text).replace(str(local), self.path) for text in error.args)) from None


class NotFetched(RuntimeError):
    """The network's error, not the input's: the same input may be had later."""


class TmpdirError(OSError):
    """An input is being fetched to ``$TMPDIR``, which is full."""


class Inputs(list[Input]):
    """The input files of a dataset, in the order of their shards."""

    notes: tuple[str, ...] = ()
    """what a summary says of the files at the source that are no inputs, and of those that may be none"""
    origin: str | None = None
    """of a source on the Hugging Face Hub, the URL with the commit"""


def find_inputs(
    source: str | Path,
    endings: tuple[str, ...],
    folders: Iterable[str] = (".",),
    split: str | None = None,
    config_name: str | None = None,
) -> Inputs:
    """Return the files in and below ``source`` with one of ``endings``, each real one once, in their shards' order.

    ``folders`` narrows it to some folders of ``source``, and ``split`` to the folder, or to the files, whose names say
    that split; a ``source`` that is a file is the one input. Of a whole dataset on the Hub, ``config_name`` chooses the
    files of a configuration ("": of the default one); None takes the files as they lie. What begins with a dot and what
    ``datasets`` keeps beside its data are left out. Raises InputError for a folder that is missing or has no such file,
    for a file that cannot be reached, and for two inputs that would make shards of one name.
    """
    source, folders, origin = without_caches(str(source)), sorted(set(map(os.path.normpath, folders))), None
    if hub.SCHEME in source and is_url(source):
        source, origin = hub.pinned(source)
    chosen = None
    if config_name is not None and hub.is_dataset(source):
        chosen, split = hub.data_files(source, config_name, split), None
    elif config_name:
        raise InputError(f"--config_name {config_name}: {source} is not hf://datasets/OWNER/NAME: leave it out")
    if split and is_folder(where := f"{source.rstrip('/')}/{split}"):
        source, split = where, None
    listing = list_files(source, folders)
    if chosen is not None:
        listing.elsewhere = len(listing.files.keys() - chosen)
        listing.files = {url: file for url, file in listing.files.items() if url in chosen}
    names = {name for name, _ in listing.files.values()}
    packed = {os.path.dirname(name) for name in names if name.endswith(".idx.npy")}
    dropped: Counter[str] = Counter()
    found = []
    for path, (name, size) in listing.files.items():
        if path != source and _is_of_datasets(name, names):
            dropped["that datasets keeps beside its data"] += 1
        elif path != source and _is_packed(name, names, packed):
            dropped["of packed folders"] += 1
        elif not name.lower().endswith(endings):
            dropped[_ending(name)] += 1
        elif not _is_of_split(name, split):
            dropped["of other splits"] += 1
        else:
            found.append(Input(path, name, size))
    _check_one_split(source, found, names)
    for folder in folders:
        if folder not in listing.again and not any(Path(one.name).is_relative_to(folder) for one in found):
            raise _nothing(source, folder, listing, endings, split)
    inputs: dict[str, Input] = {}
    errors = []
    for one in sorted(found, key=lambda one: one.path):
        if _NOT_UTF8.search(one.path):
            errors.append(f"{one.path!r}: its name is not UTF-8: rename it")
        elif (size := len(one.shard.encode())) > _LONGEST_NAME:
            hint = f"give a --source nearer to it, or shorten its path to {_LONGEST_NAME} bytes"
            errors.append(f"{one.path}: would become a shard with a name of {size} bytes: {hint}")
        elif one.path in listing.broken:
            errors.append(f"{one.path}: {listing.broken[one.path]}")
        elif (other := inputs.setdefault(one.shard, one)) is not one:
            errors.append(f"{one.path}: would become the shard {one.shard}, as {other.path} does: rename one of them")
    if errors:
        raise InputError(*errors)
    result = Inputs(inputs[shard] for shard in sorted(inputs))
    result.origin = origin
    result.notes = tuple(_notes(listing, dropped, [one.name for one in result if one.path != source]))
    return result


def _is_of_datasets(name: str, names: set[str]) -> bool:
    """Return whether ``datasets`` keeps this file beside the data: its notes, or a cache of a dataset that it saved."""
    folder, slash, base = name.rpartition("/")
    cached = base.startswith("cache-") and base.endswith(".arrow")
    return base in _OF_DATASETS or (cached and any(f"{folder}{slash}{note}" in names for note in _OF_DATASETS))


def _is_packed(name: str, names: set[str], packed: set[str]) -> bool:
    """Return whether this is a file of ours, as where --output is below --source: NAME.json, or a manifest."""
    folder, base = os.path.split(name)
    return folder in packed and (base == MANIFEST or f"{name.removesuffix('.json')}.bin" in names)


def _ending(name: str) -> str:
    """Return the ending of a file as the summary names it."""
    parts = name.rpartition("/")[2].lower().split(".")
    ending = f".{'.'.join(parts[-2:])}" if len(parts) > 2 and f".{parts[-1]}" in COMPRESSED else f".{parts[-1]}"
    return ending if len(parts) > 1 and len(ending) < 20 else "without an ending"


def _is_of_split(name: str, split: str | None) -> bool:
    """Return whether a file's folder is called ``split`` or its own name has that word: train-00000, c4-train.00000."""
    if split is None:
        return True
    *folders, base = name.split("/")
    return split in folders or bool(re.search(rf"(?<![a-z0-9]){re.escape(split)}(?![a-z0-9])", base, re.IGNORECASE))


def _check_one_split(source: str, found: list[Input], names: set[str]) -> None:
    """Raise InputError if ``found`` has files of several splits of a dataset that ``datasets`` has saved."""
    for top in sorted(name.removesuffix(_SPLITS) for name in names if re.search(f"(^|/){_SPLITS}$", name)):
        splits = {one.name.removeprefix(top).partition("/")[0] for one in found if one.name.startswith(top)}
        if len(splits) > 1:
            raise InputError(f"{source}: {top or 'it'} has the splits {', '.join(sorted(splits))}: give one as --split")


def _nothing(source: str, folder: str, listing: Listing, endings: tuple[str, ...], split: str | None) -> InputError:
    plain = [ending for ending in endings if not ending.endswith(COMPRESSED)]
    compressed = f" (compressed ones too: {', '.join(COMPRESSED)})" if 0 < len(plain) < len(endings) else ""
    if list(listing.files) == [source] and split is None:
        hint = "give the address of one file" if source.startswith("http") else "rename or convert it"
        return InputError(f"{source}: ends in none of {', '.join(plain or endings)}{compressed}: {hint}")
    where = source if folder == "." else f"{source.rstrip('/')}/{folder}"
    text = ", rename files of plain text to .txt or put them into a .jsonl" if ".txt" in endings else ""
    what = f"no file ending in {' or '.join(plain or endings)}{compressed}"
    of_split = f" in a folder {split} or with {split} in its name" if split else ""
    return InputError(f"{where}: {what}{of_split} in or below it: check where they are{text}")


def _notes(listing: Listing, dropped: Counter[str], names: Collection[str]) -> Iterator[str]:
    if listing.elsewhere:
        dropped["of other configurations and splits"] = listing.elsewhere
    if listing.hidden:
        dropped["that begin with a dot"] = listing.hidden
    if dropped:
        counts = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
        yield f"not read: {some([f'{count:,} {what}' for what, count in counts], 12)}"
    if listing.again:
        links = [f"{name} ({path})" for name, path in sorted(listing.again.items())]
        yield f"read once, where the names in brackets are: {some(links)}"
    if notes := [name for name in names if _NO_CORPUS.fullmatch(name.rpartition("/")[2])]:
        yield f"read as text; remove what is not part of the corpus: {some(notes, 10)}"
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[_ANY_ENDING.sub("", name)].append(name)
    if twice := [" and ".join(sorted(group)) for group in alike.values() if len(group) > 1]:
        yield f"perhaps one text twice; keep one of each: {some(twice)}"


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first of ``names``, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(printable(name, 200) for name in names[:most]) + more


@contextmanager
def _folder() -> Iterator[Path]:
    """Yield a folder of this process in ``$TMPDIR``; those of processes that were killed are removed."""
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
