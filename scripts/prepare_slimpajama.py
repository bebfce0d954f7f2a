"""Tokenize SlimPajama, its GitHub subset left out, into a packed dataset. Killed, it goes on where it stopped.

    python scripts/prepare_slimpajama.py --source DIR --tokenizer FILE --output DIR [--split train] [--workers N]

DIR/train/chunk1/example_train_0.jsonl.zst becomes the shard chunk1--example_train_0.jsonl.zst. As a Slurm array of N
tasks, each runs with --task $SLURM_ARRAY_TASK_ID/N, and one last command with --finish.
"""

from tinyllama import cli
from tinyllama.data.prepare import add_arguments, prepare
from tinyllama.data.sources import Fields, find_inputs


def main() -> None:
    """Parse, find the input files, prepare, print the summary."""
    parser = cli.arguments(__doc__)
    add_arguments(parser)
    parser.add_argument("--split", default="train", help="folder of --source (default: train)")
    args = parser.parse_args()
    inputs = find_inputs(args.source / args.split, (".jsonl.zst",))
    fields = Fields(leave_out=("RedPajamaGithub",))  # StarCoder has the code
    print(prepare(inputs, fields, args.tokenizer, args.output, args.workers, args.task, args.finish))


if __name__ == "__main__":
    cli.run(main)
