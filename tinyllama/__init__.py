"""TinyLlama: pretrain a small Llama on trillions of tokens."""

__version__ = "0.1.0"


class InputError(ValueError):
    """Wrong input: a file, a key or a value. Each argument is one problem and ends with a hint.

    Commands print each problem as one ``error:`` line and exit with status 2 (see ``tinyllama.config.cli.run``).
    Every other exception is a bug of ours and keeps its traceback.
    """

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.args)


def printable(text: object, most: int = 2000) -> str:
    """Return ``text`` as one line that is safe to print: what is not printable is escaped, and a long one is cut.

    Names, values of files and messages of other libraries may hold line ends, escape sequences of a terminal, marks
    that reverse the direction of writing, and megabytes. The end of a line is kept, as it has the hint.
    """
    line = str(text)
    if len(line) > most:
        line = f"{line[: most * 3 // 4]} ... {len(line) - most:,} characters ... {line[-(most // 4) :]}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def byte_size(count: float) -> str:
    """Return a number of bytes with three digits and the unit that fits it: 15.7 MB."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= 0.9995 * scale:
            number = count / scale
            return f"{number:,.{0 if number >= 99.95 else 1 if number >= 9.995 else 2}f} {unit}"
    return f"{count:.0f} bytes"
