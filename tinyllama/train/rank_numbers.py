"""End a script whose environment has a rank that is no number, in one line, when this module is imported.

Lightning reads these variables when it is imported itself, which is before anything of a script runs.
"""

import os
import sys

from tinyllama.config import cli

for _name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
    if not os.environ.get(_name, "0").isdecimal():
        cli.print_error(
            f"the environment variable {_name} is {os.environ[_name]!r}: it must be a whole number, as a launcher sets "
            "it; unset it to train on this machine alone"
        )
        sys.exit(2)
