"""scripts/slurm/pretrain.sbatch, without Slurm: which node a failed start is blamed on, by the job's output."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "slurm" / "pretrain.sbatch"

KILLED = "srun: error: node1: task 0: Exited with exit code 1\nsrun: error: node2: task 1: Killed\n"
SILENT = "watchdog: dead, stopped or stuck in C code: rank 1 (node2, pid 7; step after step 5), silent for 60 s"


@pytest.mark.parametrize(
    ("output", "node"),
    [
        ("", ""),
        (KILLED, "node1"),
        (f"{SILENT}\n{KILLED}", "node2"),  # the node that hangs, whose task is the last to end
        (f"{SILENT}, rank 3 (node2, pid 8; step after step 5), silent for 60 s\n{KILLED}", "node2"),
        (f"{SILENT}, rank 0 (node9, pid 8; step after step 5), silent for 60 s\n{KILLED}", "node1"),
        (f"watchdog: dead, stopped or stuck in C code: rank 1 (never started)\n{KILLED}", "node1"),
        (f"watchdog: did not arrive: rank 1 (node2, pid 7; step after step 5)\n{KILLED}", "node1"),
        ("srun: error: gpu-17: tasks 0-7: Exited with exit code 1\n", "gpu-17"),
    ],
)
def test_the_node_that_is_blamed(output: str, node: str, tmp_path: Path) -> None:
    earlier = "srun: error: node7: task 3: Killed\n"  # of another start
    (tmp_path / "output").write_text(earlier + output)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho '   StdErr={tmp_path}/output'\n")
    scontrol.chmod(0o755)
    text = SCRIPT.read_text()
    function = text[text.index("first_to_fail() {") :].partition("\n}\n")[0] + "\n}\n"
    command = f"PATH={tmp_path}:$PATH; SLURM_JOB_ID=1; {function} first_to_fail {len(earlier) + 1}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (node, "")
