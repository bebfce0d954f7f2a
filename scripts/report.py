"""Write report.html for one run, or comparing several: a single file that opens anywhere, without a network.

python scripts/report.py out/RUN [out/OTHER ...] [--output FILE]
"""

from pathlib import Path

from tinyllama import printable
from tinyllama.config import cli
from tinyllama.monitor import report
from tinyllama.monitor.run_files import read_metrics


def main() -> None:
    """Parse the flags, write the report, and print the first run's loss and the report's path."""
    parser = cli.arguments(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="out_dir of each run")
    parser.add_argument(
        "--output", type=Path, help="the file to write (default: report.html in the first run's out_dir)"
    )
    args = parser.parse_args()
    output = args.output or args.runs[0] / "report.html"
    report.write(args.runs, output)
    print(*report.picture(read_metrics(args.runs[0] / "metrics.csv")), sep="\n")
    print(f"report   {printable(output)}")


if __name__ == "__main__":
    cli.run(main)
