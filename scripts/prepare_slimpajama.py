"""Tokenize SlimPajama, without its GitHub subset, into a packed dataset.

    python scripts/prepare_slimpajama.py --source DIR --tokenizer FILE --output DIR [--split train] [--workers N]
        [--exclude RedPajamaGithub,...] [--fraction 0.1 --seed 0]

DIR is a folder or hf://datasets/OWNER/NAME[@REVISION], as published (train/chunk1/example_train_0.jsonl.zst, which
becomes the shard chunk1--example_train_0.jsonl.zst) or in parquet (data/train-00000-of-00100.parquet). If it is killed,
the same command continues where it stopped. In a Slurm array of N tasks, give each --task $SLURM_ARRAY_TASK_ID/N, and
run the command once more with --finish after them.
"""

import difflib

from tinyllama import InputError
from tinyllama.config import cli
from tinyllama.prepare import flags
from tinyllama.prepare.inputs import find_inputs
from tinyllama.prepare.prepare import prepare

SUBSETS = [
    f"RedPajama{name}" for name in ("ArXiv", "Book", "C4", "CommonCrawl", "Github", "StackExchange", "Wikipedia")
]


def main() -> None:
    """Parse, find the input files, prepare, print the summary."""
    parser = cli.arguments(__doc__)
    flags.add_arguments(parser)
    parser.add_argument(
        "--split",
        type=flags.split,
        default="train",
        help="a folder of --source, or a word in its file names (default: train)",
    )
    subsets = parser.add_mutually_exclusive_group()
    # StarCoder has the code
    subsets.add_argument(
        "--exclude", default="RedPajamaGithub", help="subsets to leave out, comma-separated (default: RedPajamaGithub)"
    )
    subsets.add_argument(
        "--keep_all_subsets", action="store_true", help="leave out nothing, not even documents that name no subset"
    )
    args = parser.parse_args()
    exclude = () if args.keep_all_subsets else tuple(sorted(filter(None, set(args.exclude.split(",")))))
    for name in set(exclude) - set(SUBSETS):
        nearest = ", ".join(difflib.get_close_matches(name, SUBSETS, 1, 0))
        raise InputError(f"--exclude {name}: SlimPajama has no such subset; did you mean {nearest}?")
    inputs = find_inputs(args.source, (".jsonl.zst", ".parquet"), split=args.split)
    fields = flags.fields(args, subsets=True, leave_out=exclude, unnamed=args.keep_all_subsets)
    print(prepare(inputs, fields, flags.options(args)))


if __name__ == "__main__":
    cli.run(main)
