"""The command line: flags over YAML over deerrors, and every error of the user as one ``error:`` line.

The only file that knows jsonargparse.
"""

import argparse
import difflib
import errno
import io
import itertools
import os
import re
import select
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from tinyllama import InputError, printable
from tinyllama.config.fields import field_doc

Config = TypeVar("Config")


# errors the user can fix: a bad path, a full disk, missing permission
UNUSABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
}


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call ``main`` and exit with what it returns (None is 0).

    An InputError prints its errors and exits with 2, and so does a path that cannot be used. Ctrl-C prints a line and
    exits with 130; a closed stdout exits with 141, as in shells. Letters that stdout's encoding lacks are escaped.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main()
        sys.stdout.flush()
        sys.exit(code)
    except InputError as error:
        for line in error.args:
            print(f"error: {printable(line)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not any(events & select.POLLERR for _, events in poll.poll(0)):
            raise
        # it was stdout, which `head` has closed, and what is left in its buffer would fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in UNUSABLE:
            raise
        path = error.filename or "a file that was being written"
        hint = "fix it or choose another path"
        print(f"error: cannot use {printable(path)} ({error.strerror}): {hint}", file=sys.stderr)
        sys.exit(2)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help lists what there is")


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Build a parser for a script whose docstring is ``doc``; a wrong command line raises InputError."""
    return _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def add_fields(parser: argparse.ArgumentParser, prefix: str, cls: type) -> None:
    """Add a flag ``--prefix.name`` for each field of the dataclass ``cls``; ``given`` reads them."""
    for name, kind in typing.get_type_hints(cls).items():
        (plain,) = {*(typing.get_args(kind) or (kind,))} - {type(None)}
        parser.add_argument(f"--{prefix}.{name}", type=_truth if plain is bool else plain, default=argparse.SUPPRESS)


def given(args: argparse.Namespace, prefix: str, cls: type[Config]) -> Config | None:
    """Make a ``cls`` of the flags of ``add_fields``; returns None when none was given."""
    values = {
        key.removeprefix(f"{prefix}."): value for key, value in vars(args).items() if key.startswith(f"{prefix}.")
    }
    return cls(**values) if values else None


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def parse(cls: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Read a tree of dataclasses from the command line: ``--config FILE`` and dotted flags, the later one winning.

    ``--help`` and ``--print_config`` print and exit. Raises InputError for a file that cannot be read, keys that
    do not exist (all of them, each with the nearest that does) and values of a wrong type.
    """
    import jsonargparse  # 0.3 s, and the preparation scripts do without it

    argv = list(sys.argv[1:] if argv is None else argv)
    keys = dict(_keys(cls))
    _refuse_unknown(cls, argv, keys)
    parser = jsonargparse.ArgumentParser(description=cls.__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file; flags given after it win")
    _add_settings(parser, cls)
    try:
        return _build(cls, parser.parse_args(_explicit(argv, keys)))
    except argparse.ArgumentError as error:
        raise InputError(_one_line(error.message, keys)) from error


def _add_settings(parser: Any, cls: type, prefix: str = "") -> None:
    """Add a flag for each field, whose help is the string under it and whose type leaves out the bounds."""
    group = parser.add_argument_group((cls.__doc__ or "").rstrip("."))
    kinds = _kinds(cls)
    for field in fields(cls):
        kind, key = kinds[field.name], f"{prefix}{field.name}"
        if is_dataclass(kind):
            _add_settings(parser, kind, f"{key}.")  # type: ignore[arg-type]
        else:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            group.add_argument(f"--{key}", type=kind, default=default, help=field_doc(cls, field).replace("%", "%%"))


def dump(config: Mapping[str, Any]) -> str:
    """Format ``config`` as YAML, in the order of its keys."""
    return yaml.safe_dump(config, sort_keys=False)


def _kinds(cls: type) -> dict[str, Any]:
    """Return the types of the fields without their bounds, unions as ``int | None``."""
    kinds = typing.get_type_hints(cls).items()
    unions = (typing.Union, types.UnionType)
    return {k: reduce(or_, typing.get_args(v)) if typing.get_origin(v) in unions else v for k, v in kinds}


def _keys(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of ``cls`` with their types, those of the items of its lists too."""
    for name, kind in _kinds(cls).items():
        yield prefix + name, kind
        for inner in (kind, *typing.get_args(kind)):
            if is_dataclass(inner):
                yield from _keys(inner, f"{prefix}{name}.")  # type: ignore[arg-type]


def _nearest(key: str, keys: Mapping[str, Any]) -> str:
    # a right name in a wrong group is nearer than any spelling
    same = [k for k in keys if k.rpartition(".")[2] == key.rpartition(".")[2]]
    close = same or difflib.get_close_matches(key, keys, n=1)
    return f"did you mean {close[0]}?" if close else "--help lists the keys"


def _refuse_unknown(cls: type, argv: Sequence[str], keys: Mapping[str, Any]) -> None:
    """Raise InputError for keys that ``cls`` does not have, in flags and in the YAML files they name."""
    errors = []
    files = []
    for i, word in enumerate(argv):
        match = re.match(r"--([\w.]+)\+?(?:=(.*))?$", word, re.DOTALL)
        if match is None:
            continue
        key, value = match.groups()
        if key == "config":
            files.append(value if value is not None else "".join(argv[i + 1 : i + 2]))
        elif is_dataclass(keys.get(key)):
            inside = next(k for k in keys if k.startswith(f"{key}."))
            errors.append(f"--{key} is a group: give its settings one by one, as in --{inside}")
        elif key not in keys and key.removesuffix(".help") not in {*keys, "help", "print_config"}:
            errors.append(f"unknown flag --{key}; {_nearest(key, keys)}")
    for file in files:
        try:
            content = yaml.load(Path(file).read_text(encoding="utf-8"), _Loader)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise InputError(f"cannot read the config {file}: {reason}; give --config a YAML file") from error
        except (yaml.YAMLError, RecursionError) as error:
            raise InputError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
        errors += [f"{file}: {error}" for error in _key_errors(content, cls, keys)]
    if errors:
        raise InputError(*errors)


class _Loader(yaml.SafeLoader):
    """Refuses what YAML forbids and PyYAML lets pass: a key twice, of which the second would hide the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _key_errors(content: Any, cls: type, keys: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield an error for each wrong key in a YAML file's ``content``, read as ``cls``."""
    if not isinstance(content, Mapping):
        yield f"{prefix.rstrip('.') or 'it'} is not a group of keys but {content!r}; --help lists the keys"
        return
    kinds = typing.get_type_hints(cls)
    for name, value in content.items():
        kind = kinds.get(name)
        if kind is None and f"{prefix}{name}" in keys:
            group, _, key = str(name).rpartition(".")
            yield f"{prefix}{name} is not nested: write {{{group}: {{{key}: ...}}}}, on two lines if you like"
        elif kind is None:
            yield f"unknown key {prefix}{name}; {_nearest(f'{prefix}{name}', keys)}"
        elif is_dataclass(kind):
            yield from _key_errors(value, kind, keys, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif value is None and type(None) not in typing.get_args(kind):
            yield f"{prefix}{name} is null: give a value, or leave it out for its default"
        elif typing.get_origin(kind) is list and isinstance(value, list):
            for item in value:
                yield from _key_errors(item, typing.get_args(kind)[0], keys, f"{prefix}{name}.")


def _explicit(argv: Sequence[str], keys: Mapping[str, Any]) -> list[str]:
    """Return ``argv`` as jsonargparse must see it: lists replace the earlier ones, and ``--dry_run`` alone is true.

    Jsonargparse would merge lists of one length item by item, so each is emptied before it is given.
    """
    words: list[str] = []
    for word, after in itertools.pairwise([*argv, ""]):
        flag = word.partition("=")[0]
        kind = keys.get(flag.removeprefix("--")) if flag.startswith("--") else None
        if typing.get_origin(kind) is list:
            words.append(f"{flag}=[]")
        is_alone = word == flag and (not after or after.startswith("--"))
        words.append(f"{word}=true" if kind is bool and is_alone else word)
    return words


def _one_line(message: str, keys: Mapping[str, Any]) -> str:
    """Shorten jsonargparse's many lines of types to one line in the words of the user."""
    value = re.search(r"Given value: (.*)", message)
    key = re.search(r'key "([\w.]+)"', message)
    if key and value and key[1] in keys:
        kind = keys[key[1]]
        expected = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
        return f"{key[1]} cannot be {value[1]}: expected {expected}"
    message = re.sub(r"Problem with given class_path '[\w.]+':\s*", "", message)
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    message = re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", message)
    return " ".join(re.sub(r'Parser key "([\w.]+)":', r"\1:", message).split())


def _build(cls: type[Config], values: Any) -> Config:
    """Make a ``cls`` of jsonargparse's namespaces; not by its ``instantiate``, which has changed its name."""

    def value(kind: Any, given: Any) -> Any:
        if is_dataclass(kind):
            return given if is_dataclass(given) else _build(kind, given)  # type: ignore[arg-type]
        if typing.get_origin(kind) is list:
            return [value(typing.get_args(kind)[0], item) for item in given]
        return given

    kinds = typing.get_type_hints(cls)
    return cls(**{f.name: value(kinds[f.name], getattr(values, f.name)) for f in fields(cls)})  # type: ignore[arg-type]
