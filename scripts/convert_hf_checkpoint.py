"""Convert a Hugging Face folder of a Llama model into a checkpoint for train.init_from, generation and evaluation.

python scripts/convert_hf_checkpoint.py HF_DIR OUTPUT [--dtype bfloat16] [--no-verify]
"""

from argparse import BooleanOptionalAction
from pathlib import Path

from tinyllama import InputError
from tinyllama.config import cli
from tinyllama.convert import native
from tinyllama.convert.verify import exit_if_wrong, verified_line
from tinyllama.convert.weights import DTYPES, open_weights


def main() -> None:
    """Parse the flags, convert and print; exit with 1, with nothing written, when verification finds a difference."""
    parser = cli.arguments(__doc__)
    parser.add_argument("hf_dir", type=Path, help="config.json with safetensors or .bin files")
    parser.add_argument("output", type=Path, help="the folder to write; an earlier conversion there is replaced")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: as in the folder)")
    verify = "compare logits with transformers', and write nothing if they differ (the default)"
    parser.add_argument("--verify", action=BooleanOptionalAction, default=True, help=verify)
    args = parser.parse_args()
    if not (args.hf_dir / "config.json").is_file():
        raise InputError(f"{args.hf_dir} has no config.json: give a Hugging Face folder of a Llama model")
    weights = open_weights(args.hf_dir).cast(args.dtype)
    config = weights.config
    lines = [f"vocabulary: {config.vocab_size:,} pieces in {config.padded_vocab_size:,} rows"]

    def check(step_dir: Path) -> None:
        if args.verify:
            lines.append(verified_line(args.hf_dir, open_weights(step_dir), weights.dtype, is_foreign=True))

    with exit_if_wrong(args.output):
        step_dir = native.write(args.output, weights, check)
    print("\n".join([f"{args.hf_dir} -> {step_dir}", *lines]))


if __name__ == "__main__":
    cli.run(main)
