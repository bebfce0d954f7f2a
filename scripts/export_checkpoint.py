"""Write a checkpoint's weights, with our names and in the saved dtype, into one safetensors file.

python scripts/export_checkpoint.py CHECKPOINT FILE
"""

from pathlib import Path

from tinyllama.checkpoint import reader
from tinyllama.config import cli
from tinyllama.convert import tensor_file
from tinyllama.convert.weights import open_weights


def main() -> None:
    """Parse the flags, export and print."""
    parser = cli.arguments(__doc__)
    parser.add_argument("checkpoint", help="a step directory, or a run's out_dir for its newest step")
    parser.add_argument(
        "file", type=Path, help="the file to write, such as model.safetensors; an existing one is replaced"
    )
    args = parser.parse_args()
    step_dir = reader.resolve(args.checkpoint)
    tensor_file.export(open_weights(step_dir), args.file)
    print(f"{step_dir} -> {args.file}: {args.file.stat().st_size / 1e9:.3f} GB")


if __name__ == "__main__":
    cli.run(main)
