"""Train a sentencepiece BPE tokenizer with Llama 2's settings.

python scripts/train_tokenizer.py --source PATH[:KEY] ... --output tokenizer.model [--vocab_size 32000]

PATH is a file, a folder or a URL of raw text as prepare_text.py takes it, KEY the key or column that holds the text
(default: text), as in raw/starcoder:content. Lines are sampled from all of it. A tokenizer that is there is left as it
is.
"""

import os
from pathlib import Path

from tinyllama import InputError, atomic
from tinyllama.config import cli
from tinyllama.prepare import flags, train_tokenizer
from tinyllama.tokenizer import Tokenizer


def main() -> None:
    """Parse, train, write."""
    parser = cli.arguments(__doc__)
    parser.add_argument(
        "--source", nargs="+", required=True, metavar="PATH[:KEY]", help="raw text, and the key or column that holds it"
    )
    parser.add_argument("--output", type=Path, required=True, help="the .model file to write")
    parser.add_argument("--vocab_size", type=int, default=32000, help="pieces of the vocabulary (default: 32000)")
    flags.add_choice(parser)
    args = parser.parse_args()
    if args.output.suffix == ".json":  # which is read as a tokenizer.json
        model = args.output.with_suffix(".model")
        raise InputError(f"--output {args.output}: a sentencepiece model does not end in .json: give {model}")
    # not Path.exists, which raises for a name that is too long
    kept = ", which was there and is left as it is" if os.path.exists(args.output) else ""
    if not kept:
        model = train_tokenizer.train(args.source, args.vocab_size, args.split, args.config_name)
        try:
            target = atomic.behind_link(args.output)
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic.write(target, model)
        except OSError as error:
            raise InputError(f"{args.output} cannot be written ({error.strerror}): give another --output") from error
    found = Tokenizer(args.output)
    if found.vocab_size != args.vocab_size:
        raise InputError(f"{args.output} has {found.vocab_size} pieces, not {args.vocab_size}: give another --output")
    print(f"{args.output}: {found.vocab_size:,} pieces, sha256 {found.sha256[:16]}{kept}")


if __name__ == "__main__":
    cli.run(main)
