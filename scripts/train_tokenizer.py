"""Train a sentencepiece BPE tokenizer with Llama 2's settings.

python scripts/train_tokenizer.py --source PATH[:KEY] ... --output tokenizer.model [--vocab_size 32000]

PATH is a file or folder of raw text as prepare_text.py takes it, KEY the key or column that holds the text (default:
text), as in raw/starcoder:content. Lines are sampled from all of it. A tokenizer that is there is left as it is.
"""

import io
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from tinyllama import InputError, cli, durable
from tinyllama.data.readers import Source
from tinyllama.data.sources import ENDINGS, Fields, find_inputs
from tinyllama.tokenizer import Tokenizer

MAX_LINES = 300_000  # of a large corpus; more lines change little and take minutes


def lines(sources: list[str]) -> Iterator[str]:
    """Every line of every document of ``sources``."""
    for source in sources:
        path, _, key = source.partition(":")
        for one in find_inputs(Path(path), ENDINGS):
            with one.fetched() as file:
                for text in Source(file, Fields(text_key=key or "text")):
                    yield from text.splitlines()


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


def train(sources: list[str], vocab_size: int) -> bytes:
    """A sentencepiece model; raises InputError when the text does not have ``vocab_size`` pieces in it."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample(lines(sources), MAX_LINES)),
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
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or "give a larger one, or text that is not empty"
        raise InputError(f"--vocab_size {vocab_size} cannot be trained on this text: {reason}") from error
    return model.getvalue()


def main() -> None:
    """Parse, train, write."""
    parser = cli.arguments(__doc__)
    parser.add_argument("--source", nargs="+", required=True, metavar="PATH[:KEY]", help="raw text")
    parser.add_argument("--output", type=Path, required=True, help="the .model file to write")
    parser.add_argument("--vocab_size", type=int, default=32000, help="pieces (32000)")
    args = parser.parse_args()
    if not args.output.exists():
        args.output.parent.mkdir(parents=True, exist_ok=True)
        durable.write(args.output, train(args.source, args.vocab_size))
    found = Tokenizer(args.output)
    if found.vocab_size != args.vocab_size:
        raise InputError(f"{args.output} has {found.vocab_size} pieces, not {args.vocab_size}: give another --output")
    print(f"{args.output}: {found.vocab_size:,} pieces, sha256 {found.sha256[:16]}")


if __name__ == "__main__":
    cli.run(main)
