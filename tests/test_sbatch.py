"""The batch scripts without Slurm: which node a failed start is blamed on, by the job's output, and bad input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "slurm" / "pretrain.sbatch"

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


@pytest.mark.slow
def test_acceptance_of_a_config_that_is_not_there_tries_nothing(tmp_path: Path) -> None:
    for name in ("pretrain", "tinyllama"):
        (tmp_path / name).symlink_to(ROOT / name)
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NUM_NODES": "2"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | job | {"SLURM_JOB_NODELIST": "node[1-2]", "PATH": path}
    command = ["bash", ROOT / "scripts" / "slurm" / "acceptance.sbatch", "--config", "nothing.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    error = "error: cannot read the config nothing.yaml: No such file or directory; give --config a YAML file\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", error)
    assert not (tmp_path / "out").exists()
