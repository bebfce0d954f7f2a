"""Convert a checkpoint into a folder that transformers' LlamaForCausalLM and AutoTokenizer load.

python scripts/convert_lit_checkpoint.py CHECKPOINT OUTPUT [--tokenizer FILE] [--dtype bfloat16] [--no-verify]
python scripts/convert_lit_checkpoint.py CHECKPOINT OUTPUT --average 5 [...]
python scripts/convert_lit_checkpoint.py CHECKPOINT OUTPUT --license apache-2.0 --push_to_hub OWNER/NAME
python scripts/convert_lit_checkpoint.py lit_model.pth OUTPUT --model.name tinyllama_1.1b [--model.n_layer 3 ...]
"""

from argparse import BooleanOptionalAction
from pathlib import Path

from tinyllama import InputError
from tinyllama.checkpoint.names import run_dir, step_of
from tinyllama.config import cli
from tinyllama.config.args import ModelArgs
from tinyllama.convert import hf_folder, hub
from tinyllama.convert.average import open_average, source
from tinyllama.convert.tokenizer_files import matching_tokenizer
from tinyllama.convert.verify import exit_if_wrong, verified_line
from tinyllama.convert.weights import DTYPES, open_weights
from tinyllama.monitor.model_card import model_card


def main() -> None:
    """Parse the flags, convert and print; exit with 1, with nothing written, when verification finds a difference."""
    parser = cli.arguments(__doc__)
    parser.add_argument("checkpoint", help="a step directory, a run's out_dir for its newest step, or upstream's .pth")
    parser.add_argument("output", type=Path, help="the folder to write; an earlier export there is replaced")
    parser.add_argument("--tokenizer", help="the file that the data was prepared with; it is exported, too")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: as in the checkpoint)")
    parser.add_argument("--average", type=int, metavar="N", help="average the last N checkpoints up to it, in float32")
    verify = "compare logits and token ids with transformers', and write nothing if they differ (the default)"
    parser.add_argument("--verify", action=BooleanOptionalAction, default=True, help=verify)
    parser.add_argument("--license", metavar="ID", help="license for the model card, as the Hub names it: apache-2.0")
    parser.add_argument(
        "--push_to_hub", metavar="OWNER/NAME", help="upload the folder to this model repository of the Hub"
    )
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
    if args.push_to_hub is not None:
        hub.check(args.push_to_hub)
    source_dir = weights.path if step_of(weights.path) is None else run_dir(weights.path)
    title, model = args.push_to_hub or source_dir.resolve().name, args.push_to_hub or "."
    card = model_card(weights, title, model, args.license)
    lines = [f"{source(weights)} -> {args.output}"]

    def check(folder: Path) -> None:
        if args.verify:
            lines.append(verified_line(folder, weights, weights.dtype))

    with exit_if_wrong(args.output):
        hf_folder.write(args.output, weights, tokenizer, check=check, more=card)
    print("\n".join(lines))
    if args.push_to_hub is not None:
        print(f"{args.output} -> {hub.push(args.output, args.push_to_hub)}")


if __name__ == "__main__":
    cli.run(main)
