"""Score a checkpoint on lm-eval's tasks or its perplexity on a dataset, print the scores and add them to eval.csv.

python scripts/evaluate_harness.py CHECKPOINT|RUN --tokenizer FILE --tasks commonsense [--watch] [--perplexity DIR]
"""

from functools import partial
from pathlib import Path

from tinyllama import InputError, printable
from tinyllama.checkpoint.reader import DamagedError, say_passed_over
from tinyllama.config import cli
from tinyllama.convert.tokenizer_files import matching_tokenizer
from tinyllama.convert.weights import open_weights
from tinyllama.eval import harness, perplexity

POLL_SECONDS = 30
MAX_BATCH = 65536  # beyond any GPU's memory


def main() -> None:
    """Parse the flags, and evaluate one checkpoint, or each checkpoint of a run as it appears until the run is done."""
    parser = cli.arguments(__doc__)
    parser.add_argument("checkpoint", type=Path, help="a step directory, a run's out_dir, or a Hugging Face folder")
    parser.add_argument("--tokenizer", required=True, help="the file that the data was prepared with")
    parser.add_argument("--tasks", default="", help="commonsense, problem_solving or tasks of lm-eval, comma-separated")
    parser.add_argument("--include_path", type=Path, help="folder with YAML files of more lm-eval tasks")
    parser.add_argument(
        "--perplexity", type=Path, metavar="DIR", help="compute the perplexity of a packed dataset or a folder of texts"
    )
    parser.add_argument("--watch", action="store_true", help="evaluate every checkpoint of the run as it appears")
    parser.add_argument("--batch_size", type=int, default=16, help="requests or samples at once (default: 16)")
    parser.add_argument("--allow_code_execution", action="store_true", help="let humaneval run what the model writes")
    args = parser.parse_args()
    tasks, left_out = harness.resolve([name for name in args.tasks.split(",") if name], args.allow_code_execution)
    if not tasks and args.perplexity is None:
        raise InputError("nothing to evaluate: give --tasks (commonsense, say) or --perplexity DIR")
    if args.include_path is not None and not args.include_path.is_dir():
        raise InputError(f"--include_path {args.include_path} is not a folder: give the one with your tasks' YAML")
    for name in left_out:
        print(f"left out: {name}, which runs code that the model writes (--allow_code_execution)")

    if not 1 <= args.batch_size <= MAX_BATCH:
        raise InputError(f"--batch_size is {args.batch_size}: give 1 to {MAX_BATCH:,}")

    def score(path: Path) -> None:
        weights = open_weights(path)
        tokenizer = matching_tokenizer(args.tokenizer, weights.metadata["tokenizer_sha256"], weights.config)
        file = harness.csv_of(weights)
        harness.read_scores(file)  # fails now rather than after hours of work
        scores = []
        if tasks:
            scores += harness.evaluate(
                weights, tokenizer, tasks, args.include_path, args.batch_size, args.allow_code_execution
            )
        if args.perplexity is not None:
            scores += perplexity.perplexity(weights, args.perplexity, tokenizer, args.batch_size)
        try:
            print(f"{weights.path}\n{harness.table(scores)}", flush=True)
        finally:  # of hours of work, also where nobody reads what it prints, or its disk is full
            harness.append(file, scores)
        print(f"-> {file}", flush=True)

    if not args.watch:
        score(args.checkpoint)
        return
    names = harness.scored_names(tasks, args.include_path)
    names |= {args.perplexity.name} if args.perplexity is not None else set()
    for step_dir in harness.watch(args.checkpoint, names, POLL_SECONDS):
        try:
            score(step_dir)
        except DamagedError as error:
            say_passed_over([error.problem], partial(print, flush=True))
        except (InputError, OSError) as error:
            if step_dir.exists():
                raise
            print(f"{step_dir} was removed by its run while it was read: {printable(error)}", flush=True)


if __name__ == "__main__":
    cli.run(main)
