"""Steps of srun in a job of four tasks on two nodes, and what its ranks print together."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm

STEPS = """#!/bin/bash
srun -n 1 python tests/helpers/launched.py served
srun python tests/helpers/launched.py fail "one error" || echo "exit code $?"
srun --nodes 2 -n 2 python tests/helpers/launched.py served
python tests/helpers/launched.py served || echo "exit code $?"
"""


def test_steps_are_launches_whatever_the_job_is(cluster, tmp_path: Path) -> None:
    script = tmp_path / "steps.sh"
    script.write_text(STEPS)
    # neither a shell's name nor tasks of the job that are not the step's matter
    job = cluster.submit(tmp_path / "output", ["--nodes=2", "--ntasks-per-node=2", "--job-name=bash"], script)
    assert job.end() == ("COMPLETED", "0:0"), job.says()
    ours = [line for line in job.says().splitlines() if line and not line.startswith(("srun: ", "[W"))]
    assert ours == [
        "0100007F",  # one rank, which listens on 127.0.0.1
        "error: one error",  # of four ranks
        "exit code 2",
        "0" * 32,  # on two nodes rank 0 listens on every interface
        "error: the job has 4 tasks, and this is not one of them: start it with srun python ...",
        "exit code 2",
    ]
