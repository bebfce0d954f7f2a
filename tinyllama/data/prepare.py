"""Raw files to packed shards, one each, over worker processes; what a killed run had finished is not done again.

The bytes in the output folder depend on the inputs, the tokenizer and the fields alone: not on the number of workers,
on the order in which they finish, or on how often the run was killed and started again.
"""

import argparse
import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from tinyllama import InputError
from tinyllama.data import packed
from tinyllama.data.sources import Fields, Input, Source
from tinyllama.tokenizer import Tokenizer

Info = dict[str, Any]  # what a shard's NAME.json says

_TMP = re.compile(r"(.+)\.(?:bin|idx\.npy|json)\.[0-9a-f]+\.tmp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags all prepare commands share; ``prepare`` takes them by the same names."""
    parser.add_argument("--source", type=Path, required=True, help="where the raw files are")
    parser.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece .model or tokenizer.json")
    parser.add_argument("--output", type=Path, required=True, help="folder of the packed dataset")
    parser.add_argument("--workers", type=_count, help="processes; default: one for each core this process may use")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--task", type=_task, metavar="I/N", help="only task I (0..N-1) of N: an array job; no manifest")
    part.add_argument("--finish", action="store_true", help="only write the manifest, after all tasks")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes: give 1 or more")
    return int(text)


def _task(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1: give 0/4 to 3/4 for four tasks")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class _Recipe:
    """All that a worker needs to know besides its input."""

    output: Path
    tokenizer: Path
    eos_id: int
    fields: Fields
    policy: Info  # facts of every shard: one that says otherwise is of another dataset


def prepare(
    inputs: Sequence[Input],
    fields: Fields,
    tokenizer: Path,
    output: Path,
    workers: int | None = None,
    task: tuple[int, int] | None = None,
    finish: bool = False,
) -> str:
    """Pack every input that is not packed yet, write the manifest, and return a summary.

    The token stream is each document's tokens and then eos; there is no bos. A shard is done when its NAME.json agrees
    with the name and size of its input; an input that changed is packed again. ``task`` (i, n) packs inputs i, i + n,
    i + 2 n ... and writes no manifest; ``finish`` packs nothing.

    Raises InputError when the output folder holds shards of other settings or inputs, when there is no document at all,
    with ``finish`` when a shard is missing, and, after all other inputs are packed, with one fault for each bad input.
    Raises RuntimeError naming the input when a worker dies.
    """
    started = time.monotonic()
    recipe = _recipe(fields, tokenizer, output)
    mine = inputs if task is None else inputs[task[0] :: task[1]]
    infos = _done(inputs, mine, recipe)
    todo = [one for one in mine if one.shard not in infos]
    if finish and todo:
        raise InputError(
            f"{output}: {len(todo)} of {len(mine)} shards are missing ({_some([one.shard for one in todo])}): "
            "run the tasks that make them first"
        )
    _remove_stale(output, None if task is None else {one.shard for one in mine})
    if todo:
        infos |= _pack_all(todo, recipe, workers or _cores())
    if task is None:
        if not any(info["documents"] for info in infos.values()):
            raise InputError(f"{output}: not one document in {len(inputs)} input files: check --source")
        packed.write_manifest(output, list(infos))
    seconds = time.monotonic() - started
    return f"{output}: {len(infos):,} shards ({len(todo):,} new), {_counts(infos.values())}, {seconds:.1f} s"


def _recipe(fields: Fields, tokenizer: Path, output: Path) -> _Recipe:
    used = Tokenizer(tokenizer)
    if used.eos_id is None:
        raise InputError(f"{used.path}: has no end-of-document token: name its eos_token in tokenizer_config.json")
    policy = {
        "tokenizer_sha256": used.sha256,
        "encoder": used.encoder,
        "bos": False,
        "eos": True,
        "bos_id": used.bos_id,
        "eos_id": used.eos_id,
        "text_key": fields.text_key,
        "leave_out": list(fields.leave_out),
    }
    return _Recipe(output, used.path, used.eos_id, fields, policy)


def _done(inputs: Sequence[Input], mine: Sequence[Input], recipe: _Recipe) -> dict[str, Info]:
    """What is known of those shards of ``mine`` that are done."""
    output = recipe.output
    try:
        files = os.listdir(output)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{output}: {error.strerror}: give another --output") from None
    shards = {file.rpartition(".")[0] for file in files if file.endswith((".bin", ".json")) and file != packed.MANIFEST}
    if strangers := shards - {one.shard for one in inputs}:
        raise InputError(
            f"{output}: {len(strangers)} shards belong to no input ({_some(sorted(strangers))}): "
            "remove them or use another --output"
        )
    infos = {}
    for one in mine:
        info = packed.read_shard_info(output, one.shard)
        if info is None:
            continue
        for key, value in recipe.policy.items():
            if info.get(key) != value:
                raise InputError(
                    f"{output}: {key} was {info.get(key)!r} for shard {one.shard} and is {value!r} now: "
                    "use another --output"
                )
        if (info["source"]["name"], info["source"]["bytes"]) == (one.name, one.size):
            infos[one.shard] = info
    return infos


def _remove_stale(output: Path, shards: set[str] | None) -> None:
    """Remove what a killed run left of these shards (None: of all); those of other tasks may be in use."""
    for file in output.glob("*.tmp"):
        match = _TMP.fullmatch(file.name)
        if match and (shards is None or match[1] in shards):
            file.unlink(missing_ok=True)


def _pack_all(todo: Sequence[Input], recipe: _Recipe, workers: int) -> dict[str, Info]:
    """Pack over worker processes, the largest input first so that none is left running alone at the end.

    A pipe to each worker instead of a pool's queue: its end tells which worker died, and over which input.
    """
    recipe.output.mkdir(parents=True, exist_ok=True)
    (recipe.output / packed.MANIFEST).unlink(missing_ok=True)  # it must not list a shard that is about to change
    queue = sorted(todo, key=lambda one: one.size)
    infos: dict[str, Info] = {}
    faults: dict[str, InputError] = {}
    processes: dict[Any, SpawnProcess] = {}  # by our end of the pipe
    busy: dict[Any, Input] = {}

    def give(pipe: Any) -> None:
        if queue:
            busy[pipe] = queue.pop()
            with contextlib.suppress(OSError):  # a worker that is dead already: its pipe is at its end
                pipe.send(busy[pipe])

    context = multiprocessing.get_context("spawn")
    try:
        for _ in range(min(workers, len(queue))):
            ours, theirs = context.Pipe()
            processes[ours] = context.Process(target=_work, args=(theirs, recipe), daemon=True)
            processes[ours].start()
            theirs.close()
            give(ours)
        while busy:
            ready: Any = wait(list(busy))
            for pipe in ready:
                one = busy.pop(pipe)
                try:
                    outcome = pipe.recv()
                except (EOFError, OSError):
                    processes[pipe].join()
                    raise RuntimeError(
                        f"{one.path}: its worker died (exit code {processes[pipe].exitcode}; -9: killed, perhaps for "
                        "want of memory): run the command again, what is done is kept"
                    ) from None
                give(pipe)
                (faults if isinstance(outcome, InputError) else infos)[one.shard] = outcome
                said = "not packed" if isinstance(outcome, InputError) else _counts([outcome])
                print(f"[{len(infos) + len(faults)}/{len(todo)}] {one.name}: {said}", file=sys.stderr, flush=True)
    finally:
        for process in processes.values():
            process.kill()
            process.join()
    if faults:
        raise InputError(*(fault for shard in sorted(faults) for fault in faults[shard].args))
    return infos


def _work(pipe: Connection, recipe: _Recipe) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process of a terminal; the parent answers it
    threading.Thread(target=_die_with_parent, daemon=True).start()
    tokenizer = Tokenizer(recipe.tokenizer)
    while True:
        one = pipe.recv()
        try:
            pipe.send(_pack(one, recipe, tokenizer))
        except InputError as error:
            pipe.send(error)


def _die_with_parent() -> None:
    """A worker whose parent was killed -9 would else work on, beside the workers of the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _pack(one: Input, recipe: _Recipe, tokenizer: Tokenizer) -> Info:
    source = Source(one.path, recipe.fields)
    with packed.ShardWriter(recipe.output, one.shard, tokenizer.vocab_size) as writer:
        for text in source:
            ids = tokenizer.encode(text)
            ids.append(recipe.eos_id)
            writer.add(ids)
        return writer.finish(
            **recipe.policy,
            encoder_version=tokenizer.encoder_version,
            source={"name": one.name, "bytes": source.size, "blake2b": source.blake2b},
            dropped=source.dropped,
            repaired=source.repaired,
        )


def _cores() -> int:
    """Cores this process may use: in a container or a Slurm job fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _counts(infos: Collection[Info]) -> str:
    dropped = sum((Counter(info["dropped"]) for info in infos), Counter[str]())
    repaired = sum(info["repaired"] for info in infos)
    left_out = [f"{count:,} of {subset} left out" for subset, count in sorted(dropped.items())]
    notes = left_out + [f"{repaired:,} with lone surrogates replaced"] * bool(repaired)
    documents, tokens = (sum(info[key] for info in infos) for key in ("documents", "tokens"))
    noted = f" ({', '.join(notes)})" if notes else ""
    return f"{documents:,} documents{noted}, {tokens:,} tokens"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
