"""Numbers as people and programs write them, in every numeric setting: each is taken, or refused in one line."""

import math
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from tinyllama import InputError
from tinyllama.config import cli
from tinyllama.config.args import DataArgs, PretrainArgs, Source, TrainArgs, check
from tinyllama.config.bounds import bounds

TEXTS = (
    *("1", "-1", "0", "-0", "-0.0", "1.5", "1e3", "1e-400", "1e400", "-1e400", "1e15", "1e16", "1e309", "nan", "-nan"),
    *("inf", "-inf", ".inf", "-.inf", ".nan", "1_000", "1__0", "_1", "0x10", "0o17", "0b1", "010", "1:30", "+1", " 1 "),
    *("1,000", "1.000.000", "1e", "e1", "--1", "1k", "١٢", "½", "1j", "true", "null", "~", "", "x" * 5000),
    *("9" * 400, "9" * 5000, "-" + "9" * 5000, "0." + "9" * 5000, "0x" + "f" * 5000, str(10**4299), "1" + "_0" * 4000),
)


def keys(cls: type, prefix: str = "") -> Iterator[str]:
    """The numeric settings of ``cls`` and of the groups in it."""
    yield from dict.fromkeys(f"{prefix}{name}" for name, *_ in bounds(cls))
    for name, kind in get_type_hints(cls).items():
        if is_dataclass(kind):
            yield from keys(kind, f"{prefix}{name}.")  # type: ignore[arg-type]


KEYS = list(keys(PretrainArgs))


def lines(*argv: str) -> tuple[str, ...]:
    """What parsing and checking ``argv`` say; () when they take it."""
    try:
        check(cli.parse(PretrainArgs, [*argv, '--data.sources=[{"path": "x"}]']))
    except InputError as error:
        return error.args
    return ()


def nested(key: str, text: str) -> dict[str, Any]:
    content: Any = text
    for name in reversed(key.split(".")):
        content = {name: content}
    return content


@pytest.mark.parametrize("key", KEYS)
def test_a_number_of_any_size_in_any_setting_ends_in_one_line(key: str, tmp_path: Path) -> None:
    length = [] if key.startswith("train.max_") else ["--train.max_steps=10"]
    path = tmp_path / "run.yaml"
    for text in TEXTS:
        path.write_text(yaml.safe_dump(nested(key, text)))  # quoted where YAML would make something else of it
        by_file = [line.removeprefix(f"{path}: ") for line in lines(*length, "--config", str(path))]
        assert by_file == list(lines(*length, f"--{key}={text}")), text[:20]
        path.write_text(f"{key.replace('.', ': {')}: {text}{'}' * key.count('.')}")  # as a person would write it
        for line in [*by_file, *lines(*length, "--config", str(path))]:
            assert "\n" not in line
            assert len(line) < 400


@pytest.mark.parametrize("text", ["1e400", "nan", "-1", "9" * 5000])
def test_a_weight_of_any_size_ends_in_one_line(text: str) -> None:
    for name in ("weight", "final_weight"):
        with pytest.raises(InputError) as caught:
            check(
                cli.parse(PretrainArgs, [f'--data.sources=[{{"path": "x", "{name}": {text}}}]', "--train.max_steps=1"])
            )
        assert all(len(line) < 400 for line in caught.value.args)


def test_numbers_that_are_taken_are_those_that_were_meant() -> None:
    def value(key: str, text: str) -> Any:
        found: Any = cli.parse(PretrainArgs, [f"--{key}={text}"])
        for name in key.split("."):
            found = getattr(found, name)
        return found

    assert value("train.max_steps", "1_000") == 1000
    assert value("train.max_steps", "010") == 10  # not octal, as YAML 1.1 would have it
    assert value("train.max_steps", "-0") == 0
    assert value("optim.lr", "1e-400") == 0
    assert value("optim.lr", "1e400") == math.inf
    assert value("optim.lr", "4e-4") == 4e-4
    assert math.isnan(value("optim.lr", "nan"))
    for text in ("0x10", "1e3", "1:30", "1.0", "1,000"):
        with pytest.raises(InputError, match=f"train.max_steps cannot be '{text}': expected int | null"):
            value("train.max_steps", text)


def test_a_number_that_python_does_not_print_is_told_by_its_length() -> None:
    said = (
        "train.max_tokens is a number of more than 100 digits: it must be greater than 0, at most 1,000,000,000,000,000"
    )
    assert lines(f"--train.max_tokens={10**4299}") == (said,)
    args = PretrainArgs(data=DataArgs([Source("x")]))
    for huge in (10**5000, -(10**5000)):
        with pytest.raises(InputError) as caught:
            check(replace(args, train=TrainArgs(max_tokens=huge)))
        assert caught.value.args == (said,)
