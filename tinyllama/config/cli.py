"""The command line: flags over YAML over defaults, and every error of the user as one ``error:`` line.

Written by hand, because a library's errors, merging of lists and reading of YAML would all have to be overruled.
"""

import argparse
import codecs
import contextlib
import difflib
import errno
import functools
import io
import os
import re
import reprlib
import select
import signal
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from tinyllama import InputError, printable, stdio
from tinyllama.config.bounds import MOST
from tinyllama.config.fields import field_doc

Config = TypeVar("Config")

MOST_CHARACTERS = 1_000_000
"""of a small file that a flag names"""

# errors the user can fix: a bad path, a full disk, missing permission
UNUSABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
}

_ENDING = (signal.SIGTERM, signal.SIGHUP)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call ``main`` and exit with what it returns (None is 0).

    An InputError prints its errors and exits with 2, and so does a path that cannot be used. Ctrl-C prints a line and
    exits with 130, SIGTERM with 143 and SIGHUP with 129; a closed stdout exits with 141: all as in shells. Letters that
    stdout's encoding lacks are escaped.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by a daemon: the next file would have its number
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (for good)
    if isinstance(sys.stdout, io.TextIOWrapper) and (sys.stdout.errors == "strict" or not _is_utf8(sys.stdout)):
        sys.stdout.reconfigure(errors="backslashreplace")  # of a C locale, it is surrogateescape
    for number in _ENDING:
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, _end)
    try:
        code = main()
        sys.stdout.flush()
        sys.exit(code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not any(events & select.POLLERR for _, events in poll.poll(0)):
            raise
        stdio.drop_stdout()  # it was stdout, which `head` has closed
        sys.exit(128 + signal.SIGPIPE)
    except (InputError, OSError) as error:
        lines = input_errors(error)
        if lines is None:
            raise
        for line in lines:
            print_error(line)
        sys.exit(2)
    finally:
        leave_signals()


def _is_utf8(stream: io.TextIOWrapper) -> bool:
    return codecs.lookup(stream.encoding).name == "utf-8"


def _end(number: int, frame: object) -> NoReturn:
    """End by an exception, which removes temporary files: a copy of the weights may take gigabytes."""
    leave_signals()  # a second one does not wait for that
    stdio.write_stderr(f"ended by {signal.Signals(number).name}\n".encode())
    sys.exit(128 + number)


def leave_signals() -> None:
    """From here on, the signals that ``run`` catches end the process at once, as Python calls no handler in long C."""
    for number in _ENDING:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_DFL)


def print_error(error: str) -> None:
    """Print one error of the input, in one line whatever it quotes."""
    with stdio.best_effort():  # a message that cannot be printed must not change the exit code
        print(f"error: {printable(error)}", file=sys.stderr, flush=True)


def input_errors(error: InputError | OSError) -> Sequence[str] | None:
    """Return what to tell the user of an error in the input, a line each; None if the error is of another kind."""
    if isinstance(error, InputError):
        return error.args
    if error.errno not in UNUSABLE:
        return None
    path = error.filename or "a file that was being written"
    return [f"cannot use {path} ({error.strerror}): fix it or choose another path"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help lists the flags")


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Build a parser for a script whose docstring is ``doc``; a wrong command line raises InputError."""
    return _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def count(text: str) -> int:
    """Return the number in ``text``, a flag's that counts something: 1 or more."""
    with contextlib.suppress(ValueError):
        if 0 < (number := int(text)) <= MOST:
            return number
    raise argparse.ArgumentTypeError(f"{reprlib.repr(text)} is not a count: give a whole number from 1 to {MOST:,}")


class _Given(argparse.Action):
    """Appends the flag and its text to ``given``: the later one wins, be it a setting or a file of them."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        namespace.given = [*getattr(namespace, "given", ()), (self.dest, values)]


def add_fields(parser: argparse.ArgumentParser, cls: type, prefix: str = "") -> None:
    """Add a flag for each field of ``cls`` and of the dataclasses in it, helped by the string under it."""
    group = parser.add_argument_group((cls.__doc__ or "").rstrip("."))
    kinds = _kinds(cls)
    for field in fields(cls):
        key, kind = f"{prefix}{field.name}", kinds[field.name]
        if is_dataclass(kind):
            add_fields(parser, kind, f"{key}.")  # type: ignore[arg-type]
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        text = f"{field_doc(cls, field)} (type: {_name(kind)}, default: {'null' if default is None else default})"
        how: dict[str, Any] = {"nargs": "?", "const": "true"} if kind is bool else {}
        how |= {"metavar": field.name.upper(), "help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
        group.add_argument(f"--{key}", action=_Given, **how)


def given(args: argparse.Namespace, settings: Config, prefix: str = "", errors: Sequence[str] = ()) -> Config:
    """Return ``settings`` with the flags of ``add_fields``; raises InputError with ``errors`` and what is wrong."""
    kinds, errors = _kinds(type(settings), prefix), list(errors)  # type: ignore[arg-type]
    for key, text in getattr(args, "given", ()):
        found: list[str] = []
        if key == "config":
            settings = _updated(settings, _load(text), kinds, found)
            errors += [f"{text}: {error}" for error in found]
        else:
            content = _parsed(text, f"--{key}") if typing.get_origin(kinds[key]) is list else text
            for name in reversed(key.removeprefix(prefix).split(".")):
                content = {name: content}
            settings = _updated(settings, content, kinds, found, prefix)
            errors += found
    if errors:
        raise InputError(*errors)
    return settings


def parse(cls: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Read a tree of dataclasses from the command line: ``--config FILE`` and dotted flags, the later one winning.

    ``--help`` and ``--print_config`` print and exit. Raises InputError for a file that cannot be read, or with all
    keys that do not exist, each with the nearest that does, and all values of a wrong type.
    """
    parser = _parser(cls, sys.argv[0])  # type: ignore[arg-type]
    args, unknown = parser.parse_known_args(argv)
    flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    if unknown and not flags:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    kinds = _kinds(cls)  # type: ignore[arg-type]
    config = given(args, cls(), errors=[f"unknown flag {flag}; {_nearest(flag.lstrip('-'), kinds)}" for flag in flags])
    if args.print_config:
        print(dump(asdict(config)), end="")  # type: ignore[call-overload]
        sys.exit(0)
    return config


@functools.cache
def _parser(cls: type, _script: str) -> argparse.ArgumentParser:
    """Build the parser of ``parse``, once for a script: its errors and help name ``sys.argv[0]``."""
    parser = arguments(f"{cls.__doc__} Flags override the YAML file of --config, and that overrides the defaults.")
    parser.add_argument("--config", action=_Given, metavar="FILE", help="YAML file; flags given after it win")
    parser.add_argument("--print_config", action="store_true", help="print all settings as YAML and exit")
    add_fields(parser, cls)
    return parser


def dump(config: Mapping[str, Any]) -> str:
    """Format ``config`` as YAML, in the order of its keys."""
    return yaml.safe_dump(config, sort_keys=False)


@functools.cache
def _kinds(cls: type, prefix: str = "") -> Mapping[str, Any]:
    """Return the types of the dotted keys of ``cls``, those of the items of its lists too."""
    kinds: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        kinds[prefix + name] = kind
        for inner in (kind, *typing.get_args(kind)):
            if is_dataclass(inner):
                kinds |= _kinds(inner, f"{prefix}{name}.")  # type: ignore[arg-type]
    return kinds


def _nearest(key: str, kinds: Mapping[str, Any]) -> str:
    """Say which of the keys in ``kinds`` may be meant by ``key``."""
    if inside := [k for k in kinds if k.startswith(f"{key}.")]:
        return f"it is a group: give its settings one by one, as in --{inside[0]}"
    # a right name in a wrong group is nearer than any spelling
    same = [k for k in kinds if k.rpartition(".")[2] == key.rpartition(".")[2]]
    close = same or difflib.get_close_matches(key, kinds, n=1)
    return f"did you mean {close[0]}?" if close else "--help lists the keys"


class _Loader(yaml.BaseLoader):
    """Leaves every value text, or None where there is none.

    It refuses aliases and a key given twice, of which the second would hide the first.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for a tree of any size
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"*{event.anchor} is an alias: write its value out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        return None if node.style is None and not node.value else super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_text(file: str | Path) -> str:
    """Return the text of a small file that a flag names, which may be a pipe: a shell's ``<(...)`` is one.

    A pipe that nobody writes to is empty, instead of being waited for. Raises InputError for a file that is not small,
    such as a device that has no end.
    """
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8") as opened:
        os.set_blocking(opened.fileno(), True)
        text = opened.read(MOST_CHARACTERS + 1)
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"{file} has more than {MOST_CHARACTERS:,} characters: give the file that is meant")
    return text


def _load(file: str) -> Any:
    try:
        return _parsed(read_text(file), file)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InputError(f"cannot read the config {file}: {reason}; give --config a YAML file") from error


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _updated(base: Any, content: Any, kinds: Mapping[str, Any], errors: list[str], prefix: str = "") -> Any:
    """Return ``base``, an instance of a dataclass or a dataclass, with the values of ``content``, nested and text.

    What is wrong with them is appended to ``errors``.
    """
    if content is None and prefix:  # a group whose keys are all commented out
        return base
    if not isinstance(content, dict):
        errors.append(
            f"{prefix[:-1] or 'it'} is not a group of keys but {reprlib.repr(content)}; --help lists the keys"
        )
        return base
    values: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        kind = kinds.get(key)
        if kind is None:
            errors.append(f"unknown key {key}; {_nearest(key, kinds)}")
        elif "." in name:
            group, _, last = name.rpartition(".")
            errors.append(f"{key} is not nested: write {{{group}: {{{last}: ...}}}}, on two lines if you like")
        elif is_dataclass(kind):
            values[name] = _updated(getattr(base, name), value, kinds, errors, f"{key}.")
        elif typing.get_origin(kind) is list and isinstance(value, list):
            (item,) = typing.get_args(kind)
            if is_dataclass(item) and not all(isinstance(each, dict) for each in value):
                errors.append(f"{key} cannot be {reprlib.repr(value)}: expected {_name(kind)}")
            elif is_dataclass(item):
                values[name] = [_updated(item, each, kinds, errors, f"{key}.") for each in value]
            else:
                values[name] = [_value(each, item, key, errors) for each in value]
        else:
            values[name] = _value(value, kind, key, errors)
    if not errors:  # a field whose two defaults are alike has none
        missing = [f.name for f in fields(base) if f.default is f.default_factory and f.name not in values]
        errors += [f"{prefix}{name} is missing" for name in missing]
    if errors:
        return base
    return base(**values) if isinstance(base, type) else replace(base, **values)


def _value(text: Any, kind: Any, key: str, errors: list[str]) -> Any:
    """Return what ``text`` is as a ``kind``; if it is none, append an error of ``key``."""
    try:
        value = _typed(text, kind)
    except ValueError:
        errors.append(f"{key} cannot be {reprlib.repr(text or '')}: expected {_name(kind)}")
        return None
    if isinstance(value, str) and not _NAMEABLE.fullmatch(value):
        errors.append(f"{key} cannot be {reprlib.repr(value)}: it has a NUL or half of a surrogate pair")
    return value


def _options(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _name(kind: Any) -> str:
    """Name a type in YAML's words: ``int | null``, ``full | node | none | int``, ``[{path: ...}, ...]``."""
    if is_dataclass(kind):
        required = [field.name for field in fields(kind) if field.default is field.default_factory]
        return f"{{{', '.join(f'{name}: ...' for name in required)}}}"
    if typing.get_origin(kind) is list:
        return f"[{_name(*typing.get_args(kind))}, ...]"
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(typing.get_args(kind))
    options = _options(kind)
    return " | ".join(map(_name, options)) if len(options) > 1 else kind.__name__.replace("NoneType", "null")


_NAMEABLE = re.compile(r"[^\0\ud800-\udc7f\udd00-\udfff]*")
"""what a file can be named; U+DC80 to U+DCFF are how Python reads the bytes of a name that is not UTF-8"""

_WORDS: dict[Any, dict[str, Any]] = {bool: {"true": True, "false": False}, type(None): {"null": None, "~": None}}


def _typed(text: Any, kind: Any) -> Any:
    """Return what ``text`` is as a ``kind``; raises ValueError if it is none. None, as in YAML, is null."""
    if text is None and type(None) in _options(kind):
        return None
    for option in sorted(_options(kind), key=lambda option: option is str):  # last, because any text is one
        words = _WORDS.get(option) or {word: word for word in typing.get_args(option)}
        if isinstance(text, str) and text.lower() in words:
            return words[text.lower()]
        if isinstance(text, str) and not words:
            with contextlib.suppress(ValueError):
                return option(text)
    raise ValueError(text)
