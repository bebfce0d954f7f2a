"""Compare runs: held-out loss at equal tokens, and what one needs to reach the loss that another ends with.

python scripts/compare_runs.py out/RUN out/OTHER [out/OTHER ...] [--json] [--output FILE]

Tokens and training time of a run that was branched from a checkpoint include those before it.
"""

import json
from pathlib import Path

from tinyllama import printable
from tinyllama.config import cli
from tinyllama.monitor import compare, report


def main() -> None:
    """Parse the flags, compare and print."""
    parser = cli.arguments(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="out_dir of each run; the first is the one to compare with")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--output", type=Path, help="also write report.py's page of the runs to this file")
    args = parser.parse_args()
    curves = compare.read_curves(args.runs)
    if args.output is not None:
        report.write(args.runs, args.output)
    found = compare.compare(curves)
    if args.json:
        print(json.dumps(found, indent=2, default=str))
        return
    print(*compare.lines(curves, found), sep="\n")
    if args.output is not None:
        print(f"\nreport   {printable(args.output)}")


if __name__ == "__main__":
    cli.run(main)
