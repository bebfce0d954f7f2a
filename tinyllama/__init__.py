"""TinyLlama: pretrain a small Llama on trillions of tokens."""

__version__ = "0.1.0"


class InputError(ValueError):
    """What the user gave is wrong: a file, a key, a value. Each argument is one fault and names its remedy.

    Commands print each fault as one ``error:`` line and exit with status 2 (see ``tinyllama.config.cli.run``);
    every other exception is a defect of ours and keeps its traceback.
    """

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.args)
