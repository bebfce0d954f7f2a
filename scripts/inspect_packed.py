"""Show what a folder of packed tokens holds, and check it.

python scripts/inspect_packed.py data/slimpajama [--tokenizer FILE] [--block_size 2048]
python scripts/inspect_packed.py data/slimpajama --verify    # hash every shard; those that differ are named, exit 2
"""

from pathlib import Path

from tinyllama import printable
from tinyllama.config import cli
from tinyllama.prepare.inspection import inspect_packed
from tinyllama.tokenizer import Tokenizer


def main() -> None:
    """Parse, inspect, print."""
    parser = cli.arguments(__doc__)
    parser.add_argument("folder", type=Path, help="the --output of a prepare command, or upstream's chunk files")
    parser.add_argument(
        "--verify", action="store_true", help="hash every shard again, and compare with the recorded hash"
    )
    parser.add_argument("--tokenizer", type=Path, help="show the beginning and the most frequent tokens as text")
    parser.add_argument(
        "--block_size",
        type=int,
        default=2048,
        help="context length to compare documents with, in tokens (default: 2048)",
    )
    args = parser.parse_args()
    tokenizer = Tokenizer(args.tokenizer) if args.tokenizer else None
    figures = inspect_packed(args.folder, args.verify, tokenizer, args.block_size)
    figures = {printable(key, 80): value for key, value in figures.items()}
    width = max(map(len, figures))
    for key, value in figures.items():
        print(f"{key:{width}}  {value:,}" if isinstance(value, int | float) else f"{key:{width}}  {printable(value)}")
    if args.verify:
        print(f"verified: the {figures['shards']:,} shards are what was written")


if __name__ == "__main__":
    cli.run(main)
