"""Continue a text, or several at once, with a model.

python scripts/generate.py CHECKPOINT --tokenizer FILE --prompt TEXT [--max_new_tokens N] [--temperature 0]
"""

import sys
import time

import torch

from tinyllama import InputError
from tinyllama.config import cli
from tinyllama.convert.tokenizer_files import matching_tokenizer
from tinyllama.convert.weights import open_weights
from tinyllama.eval import generate
from tinyllama.model import from_weights


def main() -> None:
    """Parse the flags, generate, and print the texts to stdout and the speed to stderr."""
    parser = cli.arguments(__doc__)
    parser.add_argument(
        "checkpoint", help="a step directory, a run's out_dir for its newest step, or a Hugging Face folder"
    )
    parser.add_argument("--tokenizer", required=True, help="the file that the data was prepared with")
    parser.add_argument("--prompt", required=True, action="append", help="the beginning of the text; may be repeated")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="tokens to add (default: 100)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: the likeliest token; above 0: sample (default: 0)"
    )
    parser.add_argument("--top_k", type=int, help="sample from this many likeliest tokens (default: all)")
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="sample from the likeliest tokens that reach this probability (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    args = parser.parse_args()
    weights = open_weights(args.checkpoint)
    config = weights.config
    tokenizer = matching_tokenizer(args.tokenizer, weights.metadata["tokenizer_sha256"], config)
    how = {key: getattr(args, key) for key in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    generate.check(config, **how)
    prompts = [tokenizer.encode(prompt) for prompt in args.prompt]
    if not all(prompts):
        raise InputError("--prompt is empty: give the beginning of a text")
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) > config.block_size:
            which = f"--prompt {number}" if len(prompts) > 1 else "--prompt"
            cut = f"the model reads only its last {config.block_size:,}, a whole context"
            print(f"{which} has {len(prompt):,} tokens: {cut}", file=sys.stderr)
    model = from_weights(config, weights.cast(torch.float32).load())
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    texts = [generate.Text(tokenizer, prompt) for prompt in prompts]
    count, started = 0, time.perf_counter()
    eos_ids = {tokenizer.eos_id, *weights.metadata["eos_ids"]} - {None}
    for step in generate.stream(model, prompts, **how, eos_ids=eos_ids):
        for text, token in zip(texts, step, strict=True):
            if token is not None:
                count += 1
                new = text.add(token)
                if len(texts) == 1:
                    print(new, end="", flush=True)
    seconds = time.perf_counter() - started
    rest = [text.rest() for text in texts]
    print(rest[0] if len(texts) == 1 else "\n\n".join(text.text for text in texts))
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
