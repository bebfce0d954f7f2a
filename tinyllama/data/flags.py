"""The flags that all prepare commands share."""

import argparse
import re
from pathlib import Path
from typing import get_args

from tinyllama.data.encode import Choice
from tinyllama.data.prepare import Options
from tinyllama.data.workers import cores


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


