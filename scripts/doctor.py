"""Check whether this machine is ready for training, and say how to fix what is not; exits with 1 if anything is wrong.

python scripts/doctor.py [--out_dir DIR]
"""

from pathlib import Path

from tinyllama import printable
from tinyllama.config import cli


def main() -> int:
    """Parse the flags, check the machine and print the findings."""
    parser = cli.arguments(__doc__)
    parser.add_argument(
        "--out_dir", type=Path, default=Path("out"), help="folder that runs will be written to (default: out)"
    )
    args = parser.parse_args()
    try:
        from tinyllama.tools import doctor
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        print(f"wrong  torch cannot be imported: {type(error).__name__}: {printable(reason)}")
        print("       -> pip install -e ., with a torch for this machine's CUDA, or for its CPU")
        return 1
    wrong = 0
    for finding in doctor.examine(args.out_dir):
        wrong += finding.state == doctor.WRONG
        print(f"{finding.state:<6} {finding.name:<20} {printable(finding.text)}", flush=True)
        if finding.hint:
            print(f"{'':<27} -> {finding.hint}", flush=True)
    print(f"{wrong} wrong" if wrong else "nothing is wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    cli.run(main)
