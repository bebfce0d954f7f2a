"""Tokenize your own text into a packed dataset. If it is killed, the same command continues where it stopped.

    python scripts/prepare_text.py --source PATH --tokenizer FILE --output DIR [--text_key text] [--workers N]

PATH is a file, a folder or a URL. A document is a line of .jsonl, .ndjson and .json (also .gz, .zst, .xz, .bz2), a row
of .parquet and .arrow (a dataset that `datasets` saved), or a whole .txt file. A dataset on the Hub is
hf://datasets/OWNER/NAME[@REVISION], of which --config_name chooses a configuration; hf://datasets/OWNER/NAME/FOLDER is
a folder of it. With --held_out 0.05, a twentieth of the documents goes to DIR_held_out instead, for validation.
"""

from tinyllama.config import cli
from tinyllama.prepare import flags
from tinyllama.prepare.inputs import ENDINGS, find_inputs
from tinyllama.prepare.prepare import prepare


def main() -> None:
    """Parse, find the input files, prepare, print the summary."""
    parser = cli.arguments(__doc__)
    flags.add_arguments(parser)
    parser.add_argument("--text_key", default="text", help="key or column that holds the text (default: text)")
    flags.add_choice(parser)
    flags.add_held_out(parser)
    args = parser.parse_args()
    inputs = find_inputs(args.source, ENDINGS, split=args.split, config_name=args.config_name)
    for fields, options in flags.parts(args, text_key=args.text_key):
        print(prepare(inputs, fields, options))


if __name__ == "__main__":
    cli.run(main)
