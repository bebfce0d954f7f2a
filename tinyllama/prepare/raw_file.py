"""Describe what is wrong with a raw file: which file, what, and what to do about it."""

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
        """Return the suffix of its name in lower case."""
        return self.path.suffix.lower()

    def error(self, what: str, hint: str = "repair or remove it") -> InputError:
        """Return the error ``what`` about the file, with a ``hint``."""
        return InputError(f"{self.path}: {what}: {hint}")

    def too_long(self, where: str) -> InputError:
        """Return the error for a document at ``where`` that is longer than ``fields.longest``."""
        hint = "remove or split it, or raise --longest_document of the prepare command"
        return self.error(f"{where} longer than {self.fields.longest:,} bytes", hint)

    def no_text(self, what: str, names: Iterable[str]) -> InputError:
        """Return the error for a file whose keys or columns, ``names``, do not include ``fields.text_key``."""
        names = list(names)
        hints = [hint for name, hint in _WITHOUT_TEXT.items() if name in names]
        return self.error(f"{what} {self.fields.text_key!r}, only {names[:10]}", *hints[:1] or [NAME_THE_KEY])
