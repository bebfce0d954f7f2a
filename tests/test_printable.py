"""What comes from files and other libraries is one line where it is printed, whatever it holds and however long."""

import os
import socket
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packed import change
from processes import Process

from tinyllama import InputError, byte_size, printable
from tinyllama.checkpoint import resume
from tinyllama.config import cli
from tinyllama.config.args import PretrainArgs

HOSTILE = {
    "clears the screen": ("a\x1b[2Jb", "a\\x1b[2Jb"),
    "sets the title": ("\x1b]0;root\x07", "\\x1b]0;root\\x07"),
    "one-byte control sequence": ("\x9b2J", "\\x9b2J"),
    "another line": ("ok\nerror: all is lost", "ok\\nerror: all is lost"),
    "over the line before": ("ok\rgone", "ok\\rgone"),
    "line separators": ("a\x85b\u2028c\u2029d\x0be", "a\\x85b\\u2028c\\u2029d\\x0be"),
    "right to left": ("\u202eexe.txt\u2066\u200f", "\\u202eexe.txt\\u2066\\u200f"),
    "nothing to see": ("a\u200bb\ufeffc\xad", "a\\u200bb\\ufeffc\\xad"),
    "no character": ("\udcff\x00\x7f", "\\udcff\\x00\\x7f"),
    "letters": ("Größe 学习 🦙 a/b.bin: 3 %", "Größe 学习 🦙 a/b.bin: 3 %"),
    "backslash": ("C:\\new", "C:\\new"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_not_printable_is_escaped(case: str) -> None:
    text, escaped = HOSTILE[case]
    assert printable(text) == escaped
    assert printable(Path(text.replace("\x00", ""))) == escaped.replace("\\x00", "")


def test_a_long_line_keeps_its_begin_and_its_end() -> None:
    hint = ": give another path"
    assert printable("a" * 10_000_000 + hint) == f"{'a' * 1500} ... 9,998,019 characters ... {'a' * 481}{hint}"
    assert len(printable("\U000e0001" * 10_000_000)) < 21_000
    assert printable("b" * 2000) == "b" * 2000
    assert printable("abcdefghijkl", most=8) == "abcdef ... 4 characters ... kl"


@given(st.text(st.characters(categories=None)))
def test_any_text_is_a_printable_line(text: str) -> None:
    assert printable(text).isprintable()


@pytest.mark.parametrize("case", HOSTILE)
def test_an_error_is_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, escaped = HOSTILE[case]

    def fail() -> None:
        raise InputError(f"{text} is wrong: mend it", "x" * 10**7)

    with pytest.raises(SystemExit) as end:
        cli.run(fail)
    first, second = capsys.readouterr().err.splitlines()
    assert (end.value.code, first) == (2, f"error: {escaped} is wrong: mend it")
    assert len(second) < 2100


def test_a_path_that_cannot_be_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a\nerror: b\x1b[2J"
    file.touch()
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: (file / "inside").write_text(""))
    said = (
        f"error: cannot use {tmp_path}/a\\nerror: b\\x1b[2J/inside (Not a directory): fix it or choose another path\n"
    )
    assert (end.value.code, capsys.readouterr().err) == (2, said)


RANK = """
from tinyllama import InputError
from tinyllama.config import cli
from tinyllama.train.as_rank import as_rank
def fail():
    raise InputError("a\\x1b[2J\\nerror: b: mend it")
cli.run(lambda: as_rank(fail))
"""


def test_an_error_of_many_ranks_is_one_line() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        env = dict(os.environ, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
    numbers = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    ranks = [Process(sys.executable, "-c", RANK, warm=0, env=env | number) for number in numbers]
    ends = [rank.end() for rank in ranks]
    assert [code for code, _, _ in ends] == [2, 2]
    assert "".join(said for _, _, said in ends) == "error: a\\x1b[2J\\nerror: b: mend it\n"


def is_one_line(error: str) -> bool:
    return error.startswith("error: ") and error.rstrip("\n").isprintable() and len(error) < 2100


def test_names_of_folders_are_one_line(tmp_path: Path, script) -> None:
    run = tmp_path / "run\x1b[2J\u202e\nerror: x"
    run.mkdir()
    code, out, err = script("report", run)
    assert (code, out, is_one_line(err)) == (2, "", True)
    (run / "metrics.csv").write_text("step,tokens\n1,2\n")
    (run / "config.yaml").write_text("model: 3")
    code, out, err = script("report", run)
    assert (code, out, is_one_line(err)) == (2, "", True)
    assert "\\x1b[2J\\u202e\\nerror: x/config.yaml" in err


@pytest.mark.parametrize(
    "content",
    [
        *['"\\e[2J\\nerror: x": 1', 'train: {max_steps: "\\e[2J\\u202E"}', "train: [\x85", "train: {precision: [1]}"],
        *[f"train: {{max_steps: {'9' * 5_000_000}x}}", f"{'k' * 2_000_000}: 1", 'train: "\\u202E\\n\\e]0;x\\a"'],
        *['"a\\nb": {"\\e": 1}', 'train: {resume: "\\n", "x\\ry": 2}'],
    ],
)
def test_keys_and_values_of_yaml_are_one_line(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run\x1b.yaml"
    file.write_text(content)
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: print(cli.parse(PretrainArgs, ["--config", str(file)])))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len(lines) >= 1
    assert all(map(is_one_line, lines)), lines


def test_the_reason_in_stopped_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "STOPPED").write_bytes(b"\xff\n\x1b[2J\nerror: x" + b"y" * 10**7)
    with pytest.raises(SystemExit):
        cli.run(lambda: resume.to_resume(tmp_path, "auto") and None)
    (line,) = capsys.readouterr().err.splitlines()
    assert is_one_line(line)
    assert line.endswith("or a branch from an older step")


def test_names_of_subsets_are_a_line_each(packed_folder, script) -> None:
    folder = packed_folder([[list(range(100))]])
    figures = {"documents": 1, "tokens": 100, "bytes": 100}
    subsets = {text: figures for text, _ in HOSTILE.values()} | {"x" * 10**6: figures}
    change(folder / "manifest.json", subsets=subsets)
    before = len(script("inspect_packed", packed_folder([[list(range(100))]], name="other"))[1].splitlines())
    code, out, err = script("inspect_packed", folder)
    assert (code, err) == (0, "")
    assert all(line.isprintable() and len(line) < 200 for line in out.splitlines())
    assert len(out.splitlines()) == before + 3 * len(subsets)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (15_749_000, "15.7 MB"), (99_940_000, "99.9 MB")),
        *((99_960_000, "100 MB"), (999_400_000, "999 MB"), (999_600_000, "1.00 GB"), (9_996_000_000, "10.0 GB")),
        *((13_200_580_608, "13.2 GB"), (409e9, "409 GB"), (6e12, "6.00 TB"), (1234e12, "1,234 TB")),
    ],
)
def test_a_number_of_bytes_has_three_digits(count: float, text: str) -> None:
    assert byte_size(count) == text
