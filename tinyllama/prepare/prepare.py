"""Raw files to packed shards, one each, over worker processes; what a killed run had finished is not done again.

The bytes in the output folder depend on the inputs, the tokenizer and the settings alone: not on the number of workers,
on the order in which they finish, or on how often the run was killed and started again. ``.bin``, ``.idx.npy`` and the
manifest do not depend on the encoder either; ``NAME.json`` says which one it was, so that an error found in one later
can be traced to its shards.
"""

import contextlib
import errno
import fcntl
import os
import re
import sys
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np

from tinyllama import InputError, atomic
from tinyllama.checkpoint.state import is_count
from tinyllama.data import packed
from tinyllama.data.files import open_regular
from tinyllama.data.metadata import MANIFEST, is_text, read_shard_info
from tinyllama.prepare import progress
from tinyllama.prepare.encode import Choice, Encoder, TokenChunk
from tinyllama.prepare.inputs import ENDINGS, IN_TMPDIR, Fields, Input, Inputs, some
from tinyllama.prepare.progress import Info
from tinyllama.prepare.readers import DocumentReader
from tinyllama.prepare.workers import Work, cores, over_workers
from tinyllama.throughput import duration
from tinyllama.tokenizer import Tokenizer

_TMP = re.compile(r"(.+)\.(?:bin|idx\.npy|json|bad)\.[0-9a-f]+\.tmp")
_INDEX = ".idx.npy"
_BAD = ".bad"  # NAME.bad says why an input could not be packed
_METADATA = {  # of NAME.json, besides those of every shard
    "source": {"name": is_text, "bytes": is_count},
    "subsets": {str: {"documents": is_count, "tokens": is_count, "bytes": is_count}},
    "dropped": {str: is_count},
    "repaired": is_count,
}
CONTEXTS = tuple(1 << power for power in range(9, 18))
"""context lengths, 512 to 131,072 tokens, for which the documents that are longer are counted"""
_MAX_BAD = 10  # inputs that may be bad one after another before one is good: then it is all of them, or a flag
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FLUSH = 1 << 20  # tokens written at a time: seldom, as writing pushes the encoder out of the caches
_FLUSH_PARTS = 1 << 17  # or arrays of them, each of which takes memory besides its tokens


@dataclass(frozen=True)
class Options:
    """How to prepare, whatever the inputs are."""

    tokenizer: Path
    """sentencepiece .model or tokenizer.json"""
    output: Path
    """folder of the packed dataset"""
    bos: bool = False
    """begin each document with bos"""
    eos: bool = True
    """end each document with eos"""
    encoder: Choice = "auto"
    """what encodes; the tokens are the same"""
    workers: int = field(default_factory=cores)
    """processes"""
    task: tuple[int, int] | None = None
    """(i, n): inputs i, i + n, i + 2 n ... only, and no manifest"""
    finish: bool = False
    """only write the manifest"""
    skip_bad_files: int = 0
    """inputs that may be left out because they cannot be read"""


@dataclass(frozen=True)
class _Recipe:
    """All that a worker needs to know besides its input."""

    output: Path
    tokenizer: Path
    encoder: Choice
    fields: Fields
    policy: Info  # metadata of every shard: one that says otherwise is of another dataset
    slow: str = ""  # which encoder ``auto`` fell back to, and why; "": it did not
    origin: Info = field(default_factory=dict)  # metadata of every shard of a source on the Hub: its commit


def prepare(inputs: Inputs, fields: Fields, options: Options) -> str:
    """Pack every input that is not packed yet, write the manifest, and return a summary.

    The token stream is each document's tokens, with bos before and eos after them if so chosen. A shard is done when
    its NAME.json agrees with the name and size of its input; an input that changed is packed again.

    Raises InputError when the output folder holds shards of other settings or inputs, when there is no document at all,
    with ``finish`` when a shard is missing, when the tokenizer changes meanwhile, and, after all other inputs are
    packed, with one error for each bad input when there are more of them than may be skipped; where the first ten are
    all bad, the others are not tried. Raises RuntimeError, after all others are packed too, naming each input whose
    worker died twice or whose ids the fast encoder got wrong.
    """
    started = time.monotonic()
    recipe = _recipe(fields, options, inputs.origin)
    try:
        if not options.finish:
            options.output.mkdir(parents=True, exist_ok=True)
        there = options.output.is_dir()
        with _locked(options.output, options.task) if there else contextlib.nullcontext():
            return _prepare(inputs, recipe, options, started)
    except ConnectionError:  # of a pipe, ours to a worker or the one that is read by `head`
        raise
    except OSError as error:  # the output's: those of the inputs and of the tokenizer are reported as InputErrors
        where = error.filename2 or error.filename or options.output
        room = "make room (what is done is kept) or " if error.errno in _NO_ROOM else ""
        other = "set another $TMPDIR" if str(where).endswith(IN_TMPDIR) else "give another --output"
        raise InputError(f"cannot write {where} ({error.strerror}): {room}{other}") from None


@contextlib.contextmanager
def _locked(output: Path, task: tuple[int, int] | None) -> Iterator[None]:
    """Let one run at a time, or one of each task, work in ``output``; another one, as of a requeued job, waits.

    The lock ends with the process that holds it, on whichever machine that is. Where there are no locks, none is held.
    """
    path = output / ".lock"
    if path.exists() and not path.is_file():  # open would wait for the other end of a pipe
        raise FileExistsError(errno.EEXIST, "it is there and is not a file", str(path))
    place = (0, 0) if task is None else (1, task[0])  # bytes of it, from where on: 0 are all
    with open(path, "ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, *place)
        except (BlockingIOError, PermissionError):
            print(f"waiting for another run that works in {output}", file=sys.stderr, flush=True)
            fcntl.lockf(file, fcntl.LOCK_EX, *place)
        except OSError:
            pass  # no locks on this file system
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            with _locked(output, task):  # that run was the last and has removed the file
                yield
            return
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # another task works on
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.fstat(file.fileno()).st_size:  # ours is empty
                    path.unlink()


def _prepare(inputs: Inputs, recipe: _Recipe, options: Options, started: float) -> str:
    output, task = options.output, options.task
    mine = inputs if task is None else inputs[task[0] :: task[1]]
    infos = _done(inputs, mine, recipe)
    todo = [one for one in mine if one.shard not in infos]
    made: dict[str, Info] = {}
    bad: dict[str, str] = {}
    if options.finish:
        markers = {one.shard: output / f"{one.shard}{_BAD}" for one in todo}
        bad = {shard: _reason(marker) for shard, marker in markers.items() if marker.exists()}
        if missing := sorted(markers.keys() - bad.keys()):
            raise InputError(
                f"{output}: {len(missing)} of {len(mine)} shards are missing ({some(missing)}): "
                "run the tasks that make them first"
            )
        todo = []
    stale = None if task is None else {one.shard for one in mine}
    _remove_stale(output, stale)
    if todo:
        most = None if infos or options.skip_bad_files >= _MAX_BAD else _MAX_BAD
        try:
            made, bad = _pack_all(todo, recipe, options.workers, most)
        finally:
            _remove_stale(output, stale)  # of workers that died meanwhile or were stopped
    infos |= made
    if len(bad) > options.skip_bad_files:
        raise InputError(*(bad[shard] for shard in sorted(bad)))
    total = progress.total(infos.values())
    if task is None:
        if not total["documents"] and (count := total["dropped"].get("fraction")):
            for shard, ending in product(infos, (".json", ".bin", _INDEX)):  # of no use to another share or seed
                (output / f"{shard}{ending}").unlink(missing_ok=True)
            raise InputError(
                f"{output}: none of {count:,} documents was drawn: give a larger share or another --seed (a .txt file "
                "is one document: split it, or make its parts lines of a .jsonl)"
            )
        if not total["documents"]:
            raise InputError(f"{output}: not one document in {len(inputs)} input files: check --source")
        figures = {key: total[key] for key in ("subsets", "dropped", "repaired")}
        packed.write_manifest(output, list(infos), **figures, skipped=sorted(bad), **recipe.origin)
        for marker in output.glob(f"*{_BAD}"):
            if marker.name.removesuffix(_BAD) not in bad and _is_marker(marker):  # of an input that was removed
                marker.unlink(missing_ok=True)
    empty = [infos[shard]["source"]["name"] for shard in sorted(infos) if _is_empty(infos[shard])]
    lines = [progress.table(total), *inputs.notes]
    lines += [f"without a document: {len(empty):,} files ({some(empty)})"] * bool(empty)
    lines += [f"skipped: {bad[shard]}" for shard in sorted(bad)]
    lines += [recipe.slow] * bool(made and recipe.slow)
    took = duration(time.monotonic() - started)
    lines.append(f"{output}: {len(infos):,} shards ({len(made):,} new), {progress.counts(total)}, {took}")
    return "\n".join(lines)


def _is_marker(path: Path) -> bool:
    """Whether a file ``*.bad`` is one of ours, which names its input: other programs call files so, too."""
    shard = path.name.removesuffix(_BAD)
    return shard.lower().endswith(ENDINGS) and path.is_file() and shard in _reason(path).replace("/", "--")


def _reason(marker: Path) -> str:
    """Return what a NAME.bad says."""
    try:
        with open_regular(marker) as file:
            return file.read(2**16).decode(errors="replace")
    except OSError as error:
        raise InputError(f"{marker} cannot be read ({error.strerror}): delete it and rerun its task") from None


def _recipe(fields: Fields, options: Options, origin: str | None = None) -> _Recipe:
    used = Tokenizer(options.tokenizer)
    for name, wanted, token in (("bos", options.bos, used.bos_id), ("eos", options.eos, used.eos_id)):
        if wanted and token is None:
            named = f", or name its {name}_token in tokenizer_config.json" if used.encoder == "tokenizers" else ""
            raise InputError(f"{used.path}: has no {name} token: give --no-{name}{named}")
    encoder = Encoder(used, options.encoder)
    slow = f"encoded by {encoder.name} at a tenth of the speed: {encoder.fell_back}" if encoder.fell_back else ""
    policy = {
        "tokenizer_sha256": used.sha256,
        "encoder": used.encoder,
        "bos": options.bos,
        "eos": options.eos,
        "bos_id": used.bos_id,
        "eos_id": used.eos_id,
        "text_key": fields.text_key,
        "leave_out": list(fields.leave_out),
        "fraction": [fields.held_out, fields.fraction] if fields.held_out else fields.fraction,
        "seed": fields.seed if fields.is_drawn else None,
    }
    if used.added_tokens:  # shards without the key are of a version that took them for text
        policy["added_tokens"] = used.added_tokens
    chosen: Choice = "sentencepiece" if encoder.fell_back or options.encoder == "sentencepiece" else "fast"
    return _Recipe(options.output, used.path, chosen, fields, policy, slow, {"origin": origin} if origin else {})


def _done(inputs: Sequence[Input], mine: Sequence[Input], recipe: _Recipe) -> dict[str, Info]:
    """Return the metadata of those shards of ``mine`` that are done."""
    output = recipe.output
    try:
        files = os.listdir(output)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{output}: {error.strerror}: give another --output") from None
    # a shard's first file, which no other program calls so: a .json may be somebody's raw data
    shards = {file.removesuffix(_INDEX) for file in files if file.endswith(_INDEX)}
    if unknown := shards - {one.shard for one in inputs}:
        raise InputError(
            f"{output}: {len(unknown)} shards belong to no input ({some(sorted(unknown))}): "
            "remove their files (NAME.bin, NAME.idx.npy and NAME.json), or use another --output"
        )
    infos = {}
    own = {one.shard for one in mine}
    for shard in sorted(shards - own)[:1]:  # another task's: all must agree, and not only in the end
        _agrees(output, read_shard_info(output, shard), recipe)
    for one in mine:
        info = read_shard_info(output, one.shard, _METADATA)
        if info is None:
            continue
        _agrees(output, info, recipe)
        if (info["source"]["name"], info["source"]["bytes"]) == (one.name, one.size):
            infos[one.shard] = info
    return infos


def _agrees(output: Path, info: Info | None, recipe: _Recipe) -> None:
    """Raise InputError if a shard is of another dataset than is being prepared."""
    for key, value in (recipe.policy | {"origin": None} | recipe.origin).items():
        if info and info.get(key) != value:
            origin = f"give --source {info[key]}, or " if key == "origin" and info.get(key) else ""
            raise InputError(
                f"{output}: {key} was {info.get(key)!r} for shard {info['name']} and is {value!r} now: "
                f"{origin}use another --output"
            )


def _remove_stale(output: Path, shards: set[str] | None) -> None:
    """Remove what the killed left of these shards (None: of all); those of other tasks may be in use."""
    for file in output.glob("*.tmp"):
        match = _TMP.fullmatch(file.name)
        if match and (shards is None or match[1] in shards):
            file.unlink(missing_ok=True)


def _pack_all(
    todo: Sequence[Input], recipe: _Recipe, workers: int, most: int | None
) -> tuple[dict[str, Info], dict[str, str]]:
    """Pack the inputs; return the metadata of each shard that was made, and the error of each bad input.

    ``most`` is how many may be bad while none is good; then InputError.
    """
    (recipe.output / MANIFEST).unlink(missing_ok=True)  # it must not list a shard that is about to change
    infos: dict[str, Info] = {}
    bad: dict[str, str] = {}
    failed: dict[str, str] = {}
    with contextlib.closing(progress.Progress(todo)) as bar:
        for one, outcome in over_workers(todo, _packer, recipe, workers):
            marker = recipe.output / f"{one.shard}{_BAD}"
            if isinstance(outcome, InputError):
                bad[one.shard] = str(outcome)
                atomic.write(marker, str(outcome).encode())  # a later --finish counts it
            elif isinstance(outcome, Exception):
                failed[one.shard] = str(outcome)
            else:
                infos[one.shard] = outcome
                marker.unlink(missing_ok=True)
            bar.add(one, outcome)
            if most and len(bad) == most < len(todo) and not infos:
                left = f"{len(todo) - most:,} more inputs were not tried, as these {most} were all bad"
                raise InputError(*bad.values(), f"{left}: check the flags and the source")
    if failed:
        raise RuntimeError("\n".join([*failed.values(), *bad.values()]))
    return infos, bad


def _packer(recipe: _Recipe) -> Work:
    tokenizer = Tokenizer(recipe.tokenizer, known_sha256=recipe.policy["tokenizer_sha256"])
    _check_unchanged(tokenizer, recipe.policy)
    encoder = Encoder(tokenizer, recipe.encoder)

    def pack(one: Input) -> Info:
        with one.fetched() as path:
            reader = DocumentReader(path, recipe.fields, one.name)
            with packed.ShardWriter(recipe.output, one.shard, tokenizer.vocab_size) as writer:
                subsets = _write(writer, encoder.stream(reader.chunks()), recipe, one)
                return writer.finish(
                    **recipe.policy,
                    **recipe.origin,
                    encoded_by=encoder.name,
                    source={"name": one.name, "bytes": reader.size, "blake2b": reader.blake2b},
                    subsets=subsets,
                    dropped=reader.dropped,
                    repaired=reader.repaired,
                )

    return pack


def _check_unchanged(tokenizer: Tokenizer, policy: Info) -> None:
    """Raise InputError if the tokenizer is not that of the run: a worker may start hours after it."""
    changed = None
    if tokenizer.sha256 != policy["tokenizer_sha256"]:
        changed = tokenizer.path
    elif (tokenizer.bos_id, tokenizer.eos_id) != (policy["bos_id"], policy["eos_id"]):
        changed = tokenizer.path.with_name("tokenizer_config.json")
    if changed:
        raise InputError(
            f"{changed} has changed since this run began: put the first one back and run again (what is done is kept), "
            "or give another --output"
        )


def _write(
    writer: packed.ShardWriter, chunks: Iterable[TokenChunk], recipe: _Recipe, one: Input
) -> dict[str, dict[str, int]]:
    """Write the documents, many at a time; returns the figures of each subset.

    They are documents, tokens, bytes of text, and how many documents are longer than each of ``CONTEXTS``, with how
    many tokens.
    """
    policy = recipe.policy
    begin, end = ([np.array([policy[f"{name}_id"]], np.uint32)] if policy[name] else [] for name in ("bos", "eos"))
    folder = one.name.partition("/")[0] if "/" in one.name else "."  # StarCoder's languages; SlimPajama says itself
    figures: dict[str, Counter[str]] = defaultdict(Counter)
    long: dict[str, array[int]] = defaultdict(lambda: array("Q"))  # tokens of each document that CONTEXTS tell apart
    parts: list[np.ndarray] = []
    ends: list[int] = []
    size = start = 0  # tokens in parts; where among them the document begins, which may be before the first
    begun = False
    for ids, num_bytes, subset, is_last in chunks:
        before = size
        new = [ids] if begun else [*begin, ids]
        if is_last:
            new += end
        parts += new
        size += sum(map(len, new))
        begun = not is_last
        counts = figures[subset or folder]
        counts["tokens"] += size - before
        counts["bytes"] += num_bytes
        if is_last:
            counts["documents"] += 1
            ends.append(size)
            if size - start > CONTEXTS[0]:
                long[subset or folder].append(size - start)
            start = size
        if size >= _FLUSH or len(parts) >= _FLUSH_PARTS:
            writer.append(np.concatenate(parts), ends)
            start -= size
            parts, ends, size = [], [], 0
    if parts:
        writer.append(np.concatenate(parts), ends)
    return {subset: _figures(figures[subset], np.array(long[subset])) for subset in sorted(figures)}


def _figures(counts: Counter[str], long: np.ndarray) -> dict[str, int]:
    """Return the counts, and how many of the ``long`` documents are longer than each of ``CONTEXTS``."""
    figures = {key: counts[key] for key in ("documents", "tokens", "bytes")}
    for context in CONTEXTS:
        over = long[long > context]
        figures |= {f"documents_over_{context}": len(over), f"tokens_over_{context}": int(over.sum())}
    return figures


def _is_empty(info: Info) -> bool:
    """Whether there was nothing in the input, not even something to leave out."""
    return not info["documents"] and not any(info["dropped"].values())
