"""Text files are UTF-8, whatever the locale of the machine that writes or reads them."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllama.prepare.inputs import Input

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("tinyllama", "pretrain", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
OPEN = {"open": 0, "read_text": None, "write_text": None}  # where the mode stands among the arguments of a method
OTHERS = ("os", "webbrowser")  # have an open() that is not of text


def in_locale_encoding(text: str) -> list[str]:
    """The calls of ``text`` that open a file as text and leave the encoding to the locale."""
    found = []
    for call in ast.walk(ast.parse(text)):
        if not isinstance(call, ast.Call):
            continue
        if isinstance(call.func, ast.Attribute) and call.func.attr in OPEN:
            if isinstance(call.func.value, ast.Name) and call.func.value.id in OTHERS:
                continue
            name, place = call.func.attr, OPEN[call.func.attr]
        elif isinstance(call.func, ast.Name) and call.func.id == "open":
            name, place = "open", 1
        else:
            continue
        values = [*call.args[place : place + 1]] if place is not None else []
        values += [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
        binary = any(isinstance(value, ast.Constant) and "b" in str(value.value) for value in values)
        positional = name == "read_text" and call.args
        if not binary and not positional and not any(keyword.arg == "encoding" for keyword in call.keywords):
            found.append(ast.unparse(call))
    return found


def test_what_leaves_the_encoding_to_the_locale_is_found() -> None:
    bad = ["path.read_text()", "path.write_text('x')", "open(path)", "open(path, 'w')", "path.open()", "path.open('a')"]
    good = ["path.read_text('utf-8')", "path.write_text('x', encoding='utf-8')", "open(path, 'rb')", "path.open('xb')"]
    assert in_locale_encoding("\n".join(bad + good)) == bad


def test_every_text_file_is_opened_as_utf8() -> None:
    assert len(SOURCES) > 60
    assert {path: found for path in SOURCES if (found := in_locale_encoding(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C.UTF-8"}])
def test_letters_that_stdout_lacks_are_escaped(locale: dict[str, str]) -> None:
    said = "größer: 漢字\n"
    say = f"from tinyllama.config import cli; cli.run(lambda: print({said!a}, end=''))"
    env = os.environ | locale | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", say], env=env, cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == (said.encode() if "UTF-8" in str(locale) else said.encode("ascii", "backslashreplace"))


def test_a_reason_is_read_back_in_a_locale_without_its_letters(tokenizer_file: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "raw", tmp_path / "out"
    source.mkdir()
    output.mkdir()
    (source / "a.txt").write_text("a", encoding="utf-8")
    reason = "größer als erlaubt: 漢字"
    # what a task leaves of an input that it could not pack
    (output / f"{Input('', 'a.txt', 1).shard}.bad").write_bytes(reason.encode())
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    flags = ["--source", source, "--tokenizer", tokenizer_file, "--output", output, "--finish"]
    command = [sys.executable, "scripts/prepare_text.py", *flags]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, encoding="ascii")
    assert (done.returncode, done.stderr) == (2, f"error: {reason.encode('ascii', 'backslashreplace').decode()}\n")
