"""Convert a checkpoint into a folder that transformers' LlamaForCausalLM and AutoTokenizer load.

python scripts/convert_lit_checkpoint.py CHECKPOINT OUTPUT [--tokenizer FILE] [--dtype bfloat16] [--verify]
python scripts/convert_lit_checkpoint.py CHECKPOINT OUTPUT --average 5 [...]
python scripts/convert_lit_checkpoint.py lit_model.pth OUTPUT --model.name tinyllama_1.1b [--model.n_layer 3 ...]
"""

from pathlib import Path

from tinyllama import InputError
from tinyllama.config import cli
from tinyllama.config.args import ModelArgs
from tinyllama.convert import hf_folder
from tinyllama.convert.average import open_average, source
from tinyllama.convert.tokenizer_files import matching_tokenizer
from tinyllama.convert.verify import summarize, verify
from tinyllama.convert.weights import DTYPES, open_weights


def main() -> int:
    """Parse the flags, convert and print; return 1 when --verify finds a difference."""
    parser = cli.arguments(__doc__)
    parser.add_argument("checkpoint", help="a step directory, a run's out_dir for its newest step, or upstream's .pth")
    parser.add_argument("output", type=Path, help="the folder to write; an earlier export there is replaced")
    parser.add_argument("--tokenizer", help="the file that the data was prepared with, to be exported too")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (as in the checkpoint)")
    parser.add_argument("--average", type=int, metavar="N", help="the mean of the last N steps up to it, in float32")
    parser.add_argument("--verify", action="store_true", help="compare logits and token ids with transformers'")
    cli.add_fields(parser, ModelArgs, "model.")
    args = parser.parse_args()
    sizes = cli.given(args, ModelArgs(), "model.") if "given" in args else None
    if sizes and Path(args.checkpoint).is_dir():
        raise InputError(f"{args.checkpoint} says its model's sizes itself: leave the --model flags out")
    if args.average is None:
        weights = open_weights(args.checkpoint, sizes.resolve() if sizes else None)
    else:
        weights = open_average(args.checkpoint, args.average)
    weights = weights.cast(args.dtype)
    trained_with, tokenizer = weights.metadata["tokenizer_sha256"], None
    if args.tokenizer is not None:
        tokenizer = matching_tokenizer(args.tokenizer, trained_with, weights.config)
    hf_folder.write(args.output, weights, tokenizer)
    print(f"{source(weights)} -> {args.output}")
    if not args.verify:
        return 0
    text, code = summarize(verify(args.output, weights, weights.dtype))
    print(text)
    return code


if __name__ == "__main__":
    cli.run(main)
