"""Write a checkpoint's weights, with our names and in the saved dtype, into one safetensors file.

python scripts/export_checkpoint.py CHECKPOINT FILE [--average 5]
"""

from pathlib import Path

from tinyllama import byte_size
from tinyllama.checkpoint import reader
from tinyllama.config import cli
from tinyllama.convert import tensor_file
from tinyllama.convert.average import open_average, source
from tinyllama.convert.weights import open_weights


def main() -> None:
    """Parse the flags, export and print."""
    parser = cli.arguments(__doc__)
    parser.add_argument("checkpoint", help="a step directory, or a run's out_dir for its newest step")
    parser.add_argument(
        "file", type=Path, help="the file to write, such as model.safetensors; an earlier export there is replaced"
    )
    parser.add_argument("--average", type=int, metavar="N", help="average the last N checkpoints up to it, in float32")
    args = parser.parse_args()
    step_dir = reader.resolve(args.checkpoint)
    weights = open_weights(step_dir) if args.average is None else open_average(step_dir, args.average)
    tensor_file.export(weights, args.file)
    print(f"{source(weights)} -> {args.file}: {byte_size(args.file.stat().st_size)}")


if __name__ == "__main__":
    cli.run(main)
