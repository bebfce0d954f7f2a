"""Train a sentencepiece BPE vocabulary on raw text, with Llama 2's settings."""

import io
import os
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator

from tinyllama import InputError
from tinyllama.config import cli
from tinyllama.prepare.inputs import ENDINGS, Fields, find_inputs
from tinyllama.prepare.readers import DocumentReader

MAX_LINES = 300_000  # of a large corpus; more lines change little and take minutes
MAX_BYTES = 4192  # of a line: sentencepiece drops longer ones, without a word


def train(sources: list[str], vocab_size: int, split: str | None = None, config_name: str = "") -> bytes:
    """Train a tokenizer of ``vocab_size`` pieces on the text at each ``PATH[:KEY]``, and return its ``.model``.

    Lines too long for sentencepiece are cut, and their number is printed. Raises InputError if the text does not hold
    that many pieces.
    """
    import sentencepiece

    for source in sources:
        if not with_key(source)[0]:  # a shell variable that is not set
            raise InputError(f"--source {source!r} is not a path: give one")
    long: Counter[str] = Counter()
    text = sample(bounded(lines(sources, split, config_name), MAX_BYTES, long), MAX_LINES)
    if long["lines"]:
        print(f"{long['lines']:,} lines of more than {MAX_BYTES:,} bytes were cut for sentencepiece", file=sys.stderr)
    model = io.BytesIO()
    cli.leave_signals()  # it takes minutes in C++, and nothing has been written yet
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=model,
            vocab_size=vocab_size,
            # Llama 2's: what a text holds comes back from its tokens byte for byte
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            character_coverage=0.99995,
            minloglevel=2,
        )
    except ValueError as error:  # before it looks at the text
        raise InputError(f"--vocab_size {vocab_size} cannot be trained: give one below 2**31") from error
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or "give a larger one, or texts that are not empty"
        raise InputError(f"--vocab_size {vocab_size} cannot be trained on this text: {reason}") from error
    return model.getvalue()


def lines(sources: list[str], split: str | None = None, config_name: str = "") -> Iterator[str]:
    """Yield every line of every document at ``sources``, each PATH[:KEY]; what is not read is printed."""
    for one_source in sources:
        source, key = with_key(one_source)
        inputs = find_inputs(source, ENDINGS, split=split, config_name=config_name)
        for note in inputs.notes:
            print(f"{source}: {note}", file=sys.stderr)
        for one in inputs:
            with one.fetched() as file:
                for text in DocumentReader(file, Fields(text_key=key)):
                    yield from text.splitlines()


def with_key(source: str) -> tuple[str, str]:
    """Split PATH[:KEY] at the colon that begins the key, which those of a URL or of a file's name do not."""
    path, colon, key = source.rpartition(":")
    if not colon or path.endswith(":") or "/" in key or os.path.exists(source):
        return source, "text"
    return path, key or "text"


def bounded(lines: Iterable[str], size: int, long: Counter[str]) -> Iterator[str]:
    """Yield ``lines``, those of more than ``size`` bytes cut at a blank, or where there is none behind a letter.

    The blank is left out: sentencepiece puts one before every line. ``long`` counts what was cut.
    """
    for line in lines:
        text = line.encode()
        long["lines"] += len(text) > size
        start = 0
        while len(text) - start > size:
            end = text.rfind(b" ", start + 1, start + size + 1)
            blank = end > 0
            if not blank:
                end = start + size
                while text[end] & 0xC0 == 0x80:  # inside a letter
                    end -= 1
            yield text[start:end].decode()
            start = end + blank
        yield text[start:].decode()


def sample(lines: Iterable[str], count: int) -> list[str]:
    """At most ``count`` of ``lines``, each as likely as any other, and always the same ones.

    Algorithm R (Vitter 1985). sentencepiece samples too, but differently in every process, whatever its seed.
    """
    kept: list[str] = []
    generator = random.Random(0)
    for number, line in enumerate(lines):
        if number < count:
            kept.append(line)
        elif (place := generator.randrange(number + 1)) < count:
            kept[place] = line
    return kept
