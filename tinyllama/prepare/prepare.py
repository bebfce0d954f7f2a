"""Pack raw files into shards, one for each file, with worker processes; a rerun keeps what a killed run had finished.

The bytes in the output folder depend on the inputs, the tokenizer and the settings alone: not on the number of workers,
on the order in which they finish, or on how often the run was killed and started again. ``.bin``, ``.idx.npy`` and the
manifest do not depend on the encoder either; ``NAME.json`` says which one it was, so that an error found in one later
can be traced to its shards.
"""

import contextlib
import errno
import fcntl
import sys
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np

from tinyllama import InputError, atomic, folder_lock
from tinyllama.data import packed
from tinyllama.data.metadata import MANIFEST
from tinyllama.prepare import progress
from tinyllama.prepare.done import (
    BAD,
    INDEX,
    check_ours,
    find_done,
    is_marker,
    reason,
    remove_stale,
    set_time,
    status_of,
)
from tinyllama.prepare.encode import Choice, Encoder, TokenChunk
from tinyllama.prepare.inputs import Fields, Input, Inputs, TmpdirError, some
from tinyllama.prepare.progress import Info
from tinyllama.prepare.readers import DocumentReader
from tinyllama.prepare.workers import Work, cores, over_workers
from tinyllama.throughput import duration
from tinyllama.tokenizer import Tokenizer

CONTEXTS = tuple(1 << power for power in range(9, 18))
"""context lengths, 512 to 131,072 tokens, for which the documents that are longer are counted"""
_MAX_BAD = 10  # inputs that may be bad one after another before one is good: then it is all of them, or a flag
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LONG = 32_000_000  # bytes of inputs from where a slow encoder is worth a line: it takes a core a minute or so
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

    @property
    def facts(self) -> Info:
        """Metadata that every shard of the dataset shares; None: which none has."""
        return self.policy | {"origin": None} | self.origin


def prepare(inputs: Inputs, fields: Fields, options: Options) -> str:
    """Pack every input that is not packed yet, write the manifest, and return a summary.

    The token stream is each document's tokens, with bos before and eos after them if so chosen. A shard is done if its
    NAME.json agrees with its input; an input of which a byte has changed is packed again (see done.py). An input at a
    URL is not fetched for that: its name and size are compared, and the commit of one on the Hub.

    Raises InputError
    - if the output folder has shards of other settings or inputs, or a file of another program in the way, or cannot be
      written;
    - with ``finish``, if a shard is missing;
    - if the tokenizer changes meanwhile, or if there is no document at all;
    - once all other inputs are packed, with one error for each bad input, if more are bad than may be skipped. If the
      first ten are all bad, the others are not tried.

    Raises RuntimeError, once all others are packed, naming each input that could not be fetched, whose worker died
    twice, or for which the fast encoder returned wrong ids. If the first three end by failed fetches or dead workers,
    the others are not tried.
    """
    started = time.monotonic()
    recipe = _recipe(fields, options, inputs.origin)
    with _working(options, make=not options.finish):
        return _prepare(inputs, recipe, options, started)


def check(inputs: Inputs, fields: Fields, options: Options) -> None:
    """Raise the InputError that ``prepare`` would raise for what its output folder holds, and write nothing."""
    recipe = _recipe(fields, options, inputs.origin)
    with _working(options, make=False):
        _examine(inputs, recipe, options)


@contextlib.contextmanager
def _working(options: Options, *, make: bool) -> Iterator[None]:
    """Hold the output folder, which is made first or else may not be there; its errors become InputErrors."""
    try:
        if make:
            options.output.mkdir(parents=True, exist_ok=True)
        there = options.output.is_dir()
        with _locked(options.output, options.task) if there else contextlib.nullcontext():
            yield
    except ConnectionError:  # of a pipe, ours to a worker or the one that is read by `head`
        raise
    except OSError as error:  # the output's: those of the inputs and of the tokenizer are reported as InputErrors
        where = error.filename2 or error.filename or options.output
        room = "make room (what is done is kept) or " if error.errno in _NO_ROOM else ""
        other = "set another $TMPDIR" if isinstance(error, TmpdirError) else "give another --output"
        raise InputError(f"cannot write {where} ({error.strerror}): {room}{other}") from None


def _locked(output: Path, task: tuple[int, int] | None) -> contextlib.AbstractContextManager[None]:
    """Let one run at a time, or one of each task, work in ``output``; another one, as of a requeued job, waits."""

    def busy() -> None:
        print(f"waiting for another run that works in {output}", file=sys.stderr, flush=True)

    place = (0, 0) if task is None else (1, task[0])
    return folder_lock.locked(output / ".lock", busy, fcntl.lockf, *place)


def _prepare(inputs: Inputs, recipe: _Recipe, options: Options, started: float) -> str:
    output, task = options.output, options.task
    infos, todo, bad = _examine(inputs, recipe, options)
    made: dict[str, Info] = {}
    stale = None if task is None else {one.shard for one in inputs[task[0] :: task[1]]}
    remove_stale(output, stale)
    if todo:
        if recipe.slow and sum(one.size for one in todo) >= _LONG:
            print(recipe.slow, file=sys.stderr, flush=True)
        most = None if infos or options.skip_bad_files >= _MAX_BAD else _MAX_BAD
        try:
            made, bad = _pack_all(todo, recipe, options.workers, most)
        finally:
            remove_stale(output, stale)  # of workers that died meanwhile or were stopped
    infos |= made
    if len(bad) > options.skip_bad_files:
        raise InputError(*(bad[shard] for shard in sorted(bad)))
    total = progress.total(infos.values())
    if task is None:
        if not total["documents"] and (count := total["dropped"].get("fraction")):
            for shard, ending in product(infos, (".json", ".bin", INDEX)):  # of no use to another share or seed
                (output / f"{shard}{ending}").unlink(missing_ok=True)
            raise InputError(
                f"{output}: none of {count:,} documents was drawn: give a larger share or another --seed (a .txt file "
                "is one document: split it, or make its parts lines of a .jsonl)"
            )
        if not total["documents"]:
            raise InputError(f"{output}: not one document in {len(inputs)} input files: check --source")
        figures = {key: total[key] for key in ("subsets", "dropped", "repaired")}
        packed.write_manifest(output, list(infos), **figures, skipped=sorted(bad), **recipe.origin)
        for marker in output.glob(f"*{BAD}"):
            if marker.name.removesuffix(BAD) not in bad and is_marker(marker):  # of an input that was removed
                marker.unlink(missing_ok=True)
    empty = [infos[shard]["source"]["name"] for shard in sorted(infos) if _is_empty(infos[shard])]
    lines = [progress.table(total), *inputs.notes]
    lines += [f"files without a document: {len(empty):,} ({some(empty)})"] * bool(empty)
    lines += [f"skipped: {bad[shard]}" for shard in sorted(bad)]
    took = duration(time.monotonic() - started)
    shards = "1 shard" if len(infos) == 1 else f"{len(infos):,} shards"
    lines.append(f"{output}: {shards} ({len(made):,} new), {progress.counts(total)}, {took}")
    return "\n".join(lines)


def _examine(inputs: Inputs, recipe: _Recipe, options: Options) -> tuple[dict[str, Info], list[Input], dict[str, str]]:
    """Return the shards that are done, the inputs to pack, and, with ``finish``, why shards will never be there.

    Raises InputError for an output folder of something else, and, with ``finish``, if a shard is missing.
    """
    output, task = options.output, options.task
    mine = inputs if task is None else inputs[task[0] :: task[1]]
    infos = find_done(inputs, mine, output, recipe.facts, options.workers)
    todo = [one for one in mine if one.shard not in infos]
    check_ours(output, [] if options.finish else todo)
    if not options.finish:
        return infos, todo, {}
    markers = {one.shard: output / f"{one.shard}{BAD}" for one in todo}
    bad = {shard: reason(marker) for shard, marker in markers.items() if marker.exists()}
    if missing := sorted(markers.keys() - bad.keys()):
        raise InputError(
            f"{output}: {len(missing)} of {len(mine)} shards are missing ({some(missing)}): "
            "run the tasks that make them first"
        )
    return infos, [], bad


def _recipe(fields: Fields, options: Options, origin: str | None = None) -> _Recipe:
    used = Tokenizer(options.tokenizer)
    for name, wanted, token in (("bos", options.bos, used.bos_id), ("eos", options.eos, used.eos_id)):
        if wanted and token is None:
            named = f", or name its {name}_token in tokenizer_config.json" if used.encoder == "tokenizers" else ""
            raise InputError(f"{used.path}: has no {name} token: give --no-{name}{named}")
    encoder = Encoder(used, options.encoder)
    slow = f"encoding with {encoder.name} at a tenth of the speed: {encoder.fell_back}" if encoder.fell_back else ""
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
            marker = recipe.output / f"{one.shard}{BAD}"
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
        before = status_of(one)
        with one.fetched() as path:
            reader = DocumentReader(path, recipe.fields, one.name)
            with packed.ShardWriter(recipe.output, one.shard, tokenizer.vocab_size) as writer:
                subsets = _write(writer, encoder.stream(reader.chunks()), recipe, one)
                after = status_of(one)
                if before and after and (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
                    hint = "run again when it is complete, what is done is kept"
                    raise InputError(f"{one.path}: changed while it was being read: {hint}")
                info = writer.finish(
                    **recipe.policy,
                    **recipe.origin,
                    encoded_by=encoder.name,
                    source={"name": one.name, "bytes": reader.size, "blake2b": reader.blake2b},
                    subsets=subsets,
                    dropped=reader.dropped,
                    repaired=reader.repaired,
                )
        set_time(recipe.output, one.shard, before)
        return info

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
    """Return whether there was nothing in the input, not even something to leave out."""
    return not info["documents"] and not any(info["dropped"].values())
