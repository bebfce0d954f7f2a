"""Define the flags that all prepare commands share."""

import argparse
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from tinyllama import InputError
from tinyllama.prepare.encode import Choice
from tinyllama.prepare.inputs import Fields
from tinyllama.prepare.prepare import Options
from tinyllama.prepare.workers import cores

_MOST_MEGABYTES = 1_000_000  # of a document, as bytes far below what a 64-bit size can be; more are a typing error
_MOST_TASKS = 1_000_000  # each has a byte of the lock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shared flags to ``parser``."""
    parser.add_argument(
        "--source",
        type=_source,
        required=True,
        help="where the raw files are: a path or an fsspec URL (s3://..., hf://datasets/OWNER/NAME)",
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece .model or tokenizer.json")
    parser.add_argument("--output", type=_folder, required=True, help="folder of the packed dataset")
    parser.add_argument("--bos", action=argparse.BooleanOptionalAction, default=False, help="begin documents with bos")
    parser.add_argument("--eos", action=argparse.BooleanOptionalAction, default=True, help="end documents with eos")
    parser.add_argument(
        "--encoder",
        choices=get_args(Choice),
        default="auto",
        help="all give the same ids (default: auto, the fastest that does)",
    )
    parser.add_argument(
        "--fraction", type=_fraction, default=1.0, help="share of the documents to keep, 0 to 1 (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed that chooses what --fraction keeps (default: 0)")
    parser.add_argument(
        "--longest_document",
        type=_at_least(1, "megabytes", _MOST_MEGABYTES),
        default=32,
        metavar="MB",
        help="MB of the longest JSON line or table row; workers may take eight times as much (default: 32)",
    )
    parser.add_argument(
        "--skip_bad_files",
        type=_at_least(0, "files"),
        default=0,
        metavar="N",
        help="leave out up to N files that cannot be read (default: 0)",
    )
    parser.add_argument(
        "--workers",
        type=_at_least(1, "processes"),
        default=cores(),
        help="number of processes (default: one for each core this process may use)",
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--task",
        type=_task,
        metavar="I/N",
        help="do only task I (0..N-1) of N, as in an array job, and write no manifest",
    )
    part.add_argument("--finish", action="store_true", help="only write the manifest, after all tasks are done")


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose a part of a source."""
    parser.add_argument(
        "--split",
        type=split,
        help="a folder of --source, or a word in its file names (default: all; for a dataset on the Hub: train)",
    )
    parser.add_argument("--config_name", default="", help="configuration of a dataset on the Hub (default: its own)")


def options(args: argparse.Namespace) -> Options:
    """Return the options of ``prepare`` that the flags ask for."""
    if os.path.realpath(args.output) == os.path.realpath(args.source):
        raise InputError(f"--output {args.output} is the --source: give a folder of its own")
    return Options(**{name: getattr(args, name) for name in Options.__dataclass_fields__})


def fields(args: argparse.Namespace, **more: Any) -> Fields:
    """Return the fields of the documents that the flags ask for, and ``more`` of them."""
    return Fields(fraction=args.fraction, seed=args.seed, longest=args.longest_document << 20, **more)


def add_held_out(parser: argparse.ArgumentParser) -> None:
    """Add the flag that splits a corpus in two."""
    parser.add_argument(
        "--held_out",
        type=_fraction,
        default=0.0,
        metavar="SHARE",
        help="share of the documents to put into OUTPUT_held_out instead, for validation (default: none)",
    )


def parts(args: argparse.Namespace, **more: Any) -> Iterator[tuple[Fields, Options]]:
    """Yield what to prepare: the documents that are held out, if a share of them is asked for, then all others."""
    if args.held_out == 1:
        raise InputError("--held_out 1 leaves nothing to train on: give a smaller share, such as 0.05")
    wanted, how = fields(args, **more), options(args)
    held_out = wanted.fraction * args.held_out
    if held_out:
        beside = argparse.Namespace(**vars(args) | {"output": held_out_folder(args.output)})
        yield replace(wanted, fraction=held_out), options(beside)
    yield replace(wanted, held_out=held_out), how


def held_out_folder(output: Path) -> Path:
    """Return where documents of ``output`` are held out: beside it, which . and .. have no name for."""
    return Path(f"{output if output.name not in ('', '..') else output.resolve()}_held_out")


def split(text: str) -> str:
    """Return ``text``, the name of a split; the type of a flag."""
    if not text:
        raise argparse.ArgumentTypeError("'' is not a split: give its name, or leave the flag out")
    return text


def folders(text: str) -> list[str]:
    """Return the folders that ``text`` names, with commas; the type of a flag."""
    if not (found := [name for name in text.split(",") if name]):
        raise argparse.ArgumentTypeError(f"{text!r} names no folder: give some, or leave the flag out")
    return found


def _source(text: str) -> str:
    if not text:  # a shell variable that is not set: it would be taken for the current folder
        raise argparse.ArgumentTypeError("'' is not a path: give one")
    return text


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' is not a folder: give its path")
    return Path(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share of the documents: give a number above 0, up to 1")
    return value


def _at_least(least: int, what: str, most: float = math.inf) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            hint = f"give {least} or more" if most == math.inf else f"give {least} to {most:,}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {what}: {hint}")
        return int(text)

    return parse


def _task(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1: give 0/4 to 3/4 for four tasks")
    if int(match[2]) > _MOST_TASKS:
        raise argparse.ArgumentTypeError(f"{text!r} asks for too many tasks: give an N up to {_MOST_TASKS:,}")
    return int(match[1]), int(match[2])
