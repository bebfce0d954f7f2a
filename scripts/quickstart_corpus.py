"""Build a small corpus out of what every Python carries, laid out like SlimPajama and StarCoder.

python scripts/quickstart_corpus.py --output DIR

Prose (pydoc's help, the standard library's docstrings) becomes DIR/slimpajama, code (the library) DIR/starcoder. One
text in 16 is held out for validation. The same Python gives the same bytes; a finished corpus is left as it is.
"""

import ast
import contextlib
import hashlib
import io
import json
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import zstandard
from pyarrow import parquet

from tinyllama import InputError, atomic
from tinyllama.config import cli

# tests, applications, what is not of the library, and the topics, which are prose
LEFT_OUT = {"idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo"}
# file names come again in every chunk, as in SlimPajama
PROSE = [f"train/chunk{chunk}/example_train_{i}.jsonl.zst" for chunk in (1, 2) for i in (0, 1)]
CODE = [f"python/train-{i:05d}-of-00002.parquet" for i in (0, 1)]
HELD_PROSE, HELD_CODE = ["validation/chunk1/example_holdout_0.jsonl.zst"], ["python/train-00000-of-00001.parquet"]


def docstrings(text: str) -> str:
    """Return the docstrings of a module and of what it defines, as one text."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # a template, or nested too deep for the parser
        return ""
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def held_out(text: str) -> bool:
    """By its hash, whether a topic or a module is for validation; docstrings, which a module holds, go with it."""
    return hashlib.blake2b(text.encode()).digest()[0] % 16 == 0


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the disk into an InputError with a hint."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): make room or give another --output") from None


def write(folder: Path, shards: list[str], rows: list[dict[str, Any]]) -> None:
    """Deal ``rows`` out to the shards of ``folder``, in the format that a shard's ending names."""
    for i, path in enumerate(folder / shard for shard in shards):
        dealt, buffer = rows[i :: len(shards)], io.BytesIO()
        if path.suffix == ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(dealt), buffer)
        else:
            buffer.write(zstandard.compress("".join(json.dumps(row) + "\n" for row in dealt).encode()))
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write(path, buffer.getvalue())
        print(f"{path}: {len(dealt):,} documents")


def main() -> None:
    """Collect, split, write the shards, and the mark that they are whole."""
    parser = cli.arguments(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the corpus")
    parser.add_argument(
        "--library",
        type=Path,
        default=sysconfig.get_path("stdlib"),
        help="folder of the modules to take (default: the standard library)",
    )
    args = parser.parse_args()
    mark = args.output / "corpus.json"
    made_from = json.dumps({"python": platform.python_version(), "library": str(args.library)}).encode()
    with writing(args.output):
        if args.output.is_file():
            raise InputError(f"--output {args.output} is a file: give a folder")
        whole = mark.exists() and mark.read_bytes() == made_from
        if not whole:
            mark.unlink(missing_ok=True)
    if whole:
        print(f"{args.output} is whole")
        return
    from pydoc_data.topics import topics

    # a link may lead nowhere
    found = [path for path in sorted(args.library.rglob("*.py")) if path.is_file()]
    files = [path for path in found if not LEFT_OUT & {*path.relative_to(args.library).parts}]
    modules = dict.fromkeys(text for path in files if (text := path.read_bytes().decode("utf-8", "ignore")).strip())
    if not modules:
        raise InputError(f"{args.library}: no Python sources in it: give --library the folder of a standard library")
    for held in (False, True):
        code = [text for text in modules if held_out(text) == held]
        prose = [("RedPajamaBook", text) for _, text in sorted(topics.items()) if held_out(text) == held]
        prose += [("RedPajamaC4", text) for text in map(docstrings, code) if len(text) > 200]
        prose += [("RedPajamaGithub", text) for text in code[:20]]  # as in SlimPajama: preparation leaves it out
        slimpajama = [{"text": text, "meta": {"redpajama_set_name": name}} for name, text in prose]
        write(args.output / "slimpajama", HELD_PROSE if held else PROSE, slimpajama)
        starcoder = [{"content": text} for text in code]
        write(args.output / ("starcoder_validation" if held else "starcoder"), HELD_CODE if held else CODE, starcoder)
    with writing(mark):
        atomic.write(mark, made_from)


if __name__ == "__main__":
    cli.run(main)
