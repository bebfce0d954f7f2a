"""Let a model go on with a text.

python scripts/generate.py CHECKPOINT --tokenizer FILE --prompt TEXT [--max_new_tokens N] [--temperature 0]
"""

from tinyllama import cli
from tinyllama.generate import complete


def main() -> None:
    """Parse, generate, print."""
    parser = cli.arguments(__doc__)
    parser.add_argument("checkpoint", help="a step directory, or a run's out_dir for its newest step")
    parser.add_argument("--tokenizer", required=True, help="the file that the data was prepared with")
    parser.add_argument("--prompt", required=True, help="the beginning of the text")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="tokens to add (100)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token; above: drawn (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (0)")
    args = parser.parse_args()
    text = complete(args.checkpoint, args.tokenizer, args.prompt, args.max_new_tokens, args.temperature, args.seed)
    print(args.prompt + text)


if __name__ == "__main__":
    cli.run(main)
