"""Tokenize your own text into a packed dataset. If it is killed, the same command continues where it stopped.

    python scripts/prepare_text.py --source PATH --tokenizer FILE --output DIR [--text_key text] [--workers N]

PATH is a file, a folder or a URL. A document is a line of .jsonl, .ndjson and .json (also .gz, .zst, .xz, .bz2), a row
of .parquet and .arrow (a dataset that `datasets` saved), or a whole .txt file. A dataset on the Hub is
hf://datasets/OWNER/NAME[@REVISION], of which --config_name chooses a configuration; hf://datasets/OWNER/NAME/FOLDER is
a folder of it. With --held_out 0.05, a twentieth of the documents goes to DIR_held_out instead, for validation.
"""

from tinyllama.config import cli
from tinyllama.prepare import flags
from tinyllama.prepare.done import check_not_held_out
from tinyllama.prepare.inputs import ENDINGS, find_inputs
from tinyllama.prepare.prepare import check, prepare


def main() -> None:
    """Parse, find the input files, check the outputs, prepare, print the summary."""
    parser = cli.arguments(__doc__)
    flags.add_arguments(parser)
    parser.add_argument("--text_key", default="text", help="key or column that holds the text (default: text)")
    flags.add_choice(parser)
    flags.add_held_out(parser)
    args = parser.parse_args()
    inputs = find_inputs(args.source, ENDINGS, split=args.split, config_name=args.config_name)
    parts = list(flags.parts(args, text_key=args.text_key))
    folder = flags.held_out_folder(args.output)
    if args.held_out or folder.exists():
        check(inputs, *parts[-1])  # before the first is written
    if not args.held_out:
        check_not_held_out(inputs, args.output, folder)
    for fields, options in parts:
        print(prepare(inputs, fields, options))


if __name__ == "__main__":
    cli.run(main)
