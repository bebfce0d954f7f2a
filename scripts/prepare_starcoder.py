"""Tokenize StarCoder into a packed dataset. If it is killed, the same command continues where it stopped.

    python scripts/prepare_starcoder.py --source DIR --tokenizer FILE --output DIR [--languages python,go] [--workers N]

DIR is a folder or hf://datasets/bigcode/starcoderdata[@REVISION];
DIR/python/train-00000-of-00059.parquet becomes the shard python--train-00000-of-00059.parquet. In a Slurm array of N
tasks, give each --task $SLURM_ARRAY_TASK_ID/N, and run the command once more with --finish after them.
"""

from tinyllama.config import cli
from tinyllama.prepare import flags
from tinyllama.prepare.inputs import find_inputs
from tinyllama.prepare.prepare import prepare


def main() -> None:
    """Parse, find the input files, prepare, print the summary."""
    parser = cli.arguments(__doc__)
    flags.add_arguments(parser)
    parser.add_argument(
        "--languages", type=flags.folders, default=".", help="folders of --source, comma-separated (default: all)"
    )
    args = parser.parse_args()
    inputs = find_inputs(args.source, (".parquet",), args.languages)
    print(prepare(inputs, flags.fields(args, text_key="content"), flags.options(args)))


if __name__ == "__main__":
    cli.run(main)
