"""Convert a Hugging Face folder of a Llama model into a checkpoint for train.init_from, generation and evaluation.

python scripts/convert_hf_checkpoint.py HF_DIR OUTPUT [--dtype bfloat16] [--verify]
"""

from pathlib import Path

from tinyllama import InputError
from tinyllama.config import cli
from tinyllama.convert import native
from tinyllama.convert.verify import summarize, verify
from tinyllama.convert.weights import DTYPES, open_weights


def main() -> int:
    """Parse the flags, convert and print; return 1 when --verify finds a difference."""
    parser = cli.arguments(__doc__)
    parser.add_argument("hf_dir", type=Path, help="config.json with safetensors or .bin files")
    parser.add_argument("output", type=Path, help="the folder to write; an earlier conversion there is replaced")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (as in the folder)")
    parser.add_argument("--verify", action="store_true", help="compare logits and token ids with transformers'")
    args = parser.parse_args()
    if not (args.hf_dir / "config.json").is_file():
        raise InputError(f"{args.hf_dir} has no config.json: give a Hugging Face folder of a Llama model")
    weights = open_weights(args.hf_dir).cast(args.dtype)
    config = weights.config
    step_dir = native.write(args.output, weights)
    print(f"{args.hf_dir} -> {step_dir}")
    print(f"vocabulary: {config.vocab_size:,} pieces in {config.padded_vocab_size:,} rows")
    if not args.verify:
        return 0
    text, code = summarize(verify(args.hf_dir, open_weights(step_dir), weights.dtype))
    print(text)
    return code


if __name__ == "__main__":
    cli.run(main)
