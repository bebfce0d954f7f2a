"""A raw file, and how errors in it are told: with the file, what is wrong, and the hint."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tinyllama import InputError
from tinyllama.prepare.inputs import Fields

NAME_THE_KEY = "name the one that holds the text (prepare_text.py --text_key KEY, train_tokenizer.py PATH:KEY)"
_WITHOUT_TEXT = {  # what corpora have in place of their text
    "blob_id": "The Stack v2 names files at Software Heritage; fetch their text first, as its dataset card explains",
    "tokens": "it holds a tokenizer's ids; decode them, or take the text (of Nemotron-ClimbMix: OptimalScale/ClimbMix)",
}


@dataclass
class RawFile:
    """A file of documents; its name's ending says its format."""

    path: Path
    fields: Fields

    @property
    def suffix(self) -> str:
        """The last ending of its name, in small letters."""
        return self.path.suffix.lower()

    def error(self, what: str, hint: str = "repair or remove it") -> InputError:
        """What is wrong with the file."""
        return InputError(f"{self.path}: {what}: {hint}")

    def too_long(self, where: str) -> InputError:
        """A document that is longer than ``fields.longest``."""
        hint = "remove or split it, or raise --longest_document of the prepare command"
        return self.error(f"{where} longer than {self.fields.longest:,} bytes", hint)

    def no_text(self, what: str, names: Iterable[str]) -> InputError:
        """Keys or columns, of which none is ``fields.text_key``."""
        names = list(names)
        hints = [hint for name, hint in _WITHOUT_TEXT.items() if name in names]
        return self.error(f"{what} {self.fields.text_key!r}, only {names[:10]}", *hints[:1] or [NAME_THE_KEY])
