"""TinyLlama: pretrain a small Llama on trillions of tokens."""

__version__ = "0.1.0"


class InputError(ValueError):
    """Report wrong input: a file, a key or a value. Each argument is one problem and ends with a hint.

    Commands print each problem as one ``error:`` line and exit with status 2 (see ``tinyllama.config.cli.run``).
    Every other exception is a bug of ours and keeps its traceback.
    """

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.args)
