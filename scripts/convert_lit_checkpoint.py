"""Convert a checkpoint into a folder that transformers' LlamaForCausalLM and AutoTokenizer load.

python scripts/convert_lit_checkpoint.py CHECKPOINT OUTPUT [--tokenizer FILE] [--dtype float32|bfloat16] [--verify]
"""

from pathlib import Path

from tinyllama import checkpoint, cli, convert


def main() -> int:
    """Parse, convert, print; 1 when the folder is not what was converted."""
    parser = cli.arguments(__doc__)
    parser.add_argument("checkpoint", help="a step directory, or a run's out_dir for its newest step")
    parser.add_argument("output", type=Path, help="the folder to write; an earlier export there is replaced")
    parser.add_argument("--tokenizer", help="the file that the data was prepared with, to be exported too")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (as in the checkpoint)")
    parser.add_argument("--verify", action="store_true", help="compare logits and token ids with transformers'")
    args = parser.parse_args()
    step_dir = convert.export(args.checkpoint, args.output, args.tokenizer, args.dtype)
    print(f"{step_dir} -> {args.output}")
    if args.verify:
        state, config = checkpoint.load_weights(step_dir), checkpoint.read_model_config(step_dir)
        difference = convert.verify(args.output, state, config)
        print(f"verify: max |logit difference| to transformers {difference:.1e}, tolerance {convert.TOLERANCE:.0e}")
        return int(not difference <= convert.TOLERANCE)
    return 0


if __name__ == "__main__":
    cli.run(main)
