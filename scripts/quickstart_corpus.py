"""Build a small corpus out of what every Python carries, laid out like SlimPajama and StarCoder.

python scripts/quickstart_corpus.py --output DIR

Prose, the topics of pydoc's help and the docstrings of the standard library, becomes DIR/slimpajama; code, the sources
of the standard library, DIR/starcoder. One text in 16 is held out: DIR/slimpajama/validation and
DIR/starcoder_validation. The same Python gives the same bytes; a finished corpus is left as it is.
"""

import ast
import hashlib
import io
import json
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import zstandard
from pyarrow import parquet

from tinyllama import InputError, cli, durable

# tests, applications, what is not of the library, and the topics, which are prose
LEFT_OUT = {"idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo"}


def sources(library: Path) -> Iterator[tuple[str, str]]:
    """Path below ``library`` and text of each module that is not a test."""
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if not LEFT_OUT & set(name.split("/")):
            text = path.read_bytes().decode("utf-8", "ignore")
            if text.strip():
                yield name, text


def docstrings(text: str) -> str:
    """The docstrings of a module and of what it defines, as one text."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    except SyntaxError:  # a template, not a module
        return ""
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def held_out(text: str) -> bool:
    """Whether a topic or a module, its docstrings with it, belongs to validation: by the hash of its text.

    Docstrings go where their module goes: it holds them too, and would tell training what validation asks.
    """
    return hashlib.blake2b(text.encode()).digest()[0] % 16 == 0


def write_slimpajama(path: Path, documents: list[tuple[str, str]]) -> None:
    """One ``.jsonl.zst`` shard of (subset, text)."""
    rows = [json.dumps({"text": text, "meta": {"redpajama_set_name": name}}) for name, text in documents]
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write(path, zstandard.compress("".join(row + "\n" for row in rows).encode()))
    print(f"{path}: {len(rows):,} documents")


def write_starcoder(path: Path, documents: list[tuple[str, str]]) -> None:
    """One parquet shard of (path, text)."""
    columns = {"max_stars_repo_path": [name for name, _ in documents], "content": [text for _, text in documents]}
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write(path, buffer.getvalue())
    print(f"{path}: {len(documents):,} documents")


def main() -> None:
    """Collect, split, write the shards, and the mark that they are whole."""
    parser = cli.arguments(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--library", type=Path, default=sysconfig.get_path("stdlib"), help="modules to take")
    args = parser.parse_args()
    mark = args.output / "corpus.json"
    made_from = {"python": platform.python_version(), "library": str(args.library)}
    if mark.exists() and json.loads(mark.read_text()) == made_from:
        print(f"{args.output} is whole")
        return
    mark.unlink(missing_ok=True)
    from pydoc_data.topics import topics

    modules = {text: name for name, text in sources(args.library)}  # each text once
    if not modules:
        raise InputError(f"{args.library}: no Python sources in it: give --library the folder of a standard library")
    for held in (False, True):
        code = [(name, text) for text, name in modules.items() if held_out(text) == held]
        prose = [("RedPajamaBook", text) for _, text in sorted(topics.items()) if held_out(text) == held]
        prose += [("RedPajamaC4", text) for text in (docstrings(text) for _, text in code) if len(text) > 200]
        prose += [("RedPajamaGithub", text) for _, text in code[:20]]  # as in SlimPajama: preparation leaves it out
        if held:
            write_slimpajama(args.output / "slimpajama/validation/chunk1/example_holdout_0.jsonl.zst", prose)
            write_starcoder(args.output / "starcoder_validation/python/train-00000-of-00001.parquet", code)
        else:
            for i in range(4):  # file names come again in every chunk, as in SlimPajama
                path = f"slimpajama/train/chunk{i // 2 + 1}/example_train_{i % 2}.jsonl.zst"
                write_slimpajama(args.output / path, prose[i::4])
            for i in range(2):
                write_starcoder(args.output / f"starcoder/python/train-{i:05d}-of-00002.parquet", code[i::2])
    durable.write(mark, json.dumps(made_from).encode())


if __name__ == "__main__":
    cli.run(main)
