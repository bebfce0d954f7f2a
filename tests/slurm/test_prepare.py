"""Data preparation as a job array on two real nodes: a task killed and requeued, a node lost."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def doomed_cluster(tmp_path_factory) -> Iterator[Path]:
    """One of its own, for a node of it will be lost."""
    state = tmp_path_factory.mktemp("slurm")
    subprocess.run([HERE / "up.sh", state], check=True, capture_output=True, text=True)
    yield state
    subprocess.run([HERE / "down.sh", state], check=True)


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_array_survives_a_requeue_and_a_lost_node(doomed_cluster, tokenizer_file, tmp_path):
    source, output, alone = tmp_path / "in", tmp_path / "out", tmp_path / "alone"
    (source / "train").mkdir(parents=True)
    for number in range(8):
        with zstandard.open(source / f"train/{number}.jsonl.zst", "wt") as file:
            for i in range(8000):
                text = f"{number} {i} The little llama walked along the river. " * 30
                file.write(json.dumps({"text": text, "meta": {"redpajama_set_name": "RedPajamaC4"}}) + "\n")
    flags = ["--source", source, "--tokenizer", tokenizer_file, "--encoder", "sentencepiece", "--output"]
    command = ["scripts/prepare_slimpajama.py", *map(str, flags)]
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{doomed_cluster}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_CONF": f"{doomed_cluster}/slurm.conf",
    }

    def call(*args: object) -> str:
        done = subprocess.run(list(map(str, args)), env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    call(sys.executable, *command, alone)
    batch = ["--parsable", "--cpus-per-task=1", f"--output={tmp_path}/%A_%a.out", "--array"]
    script = ["scripts/slurm/prepare_data.sbatch", *command, output]
    array = call("sbatch", *batch, "0-3", *script)
    finish = call("sbatch", f"--dependency=afterok:{array}", *batch, "0", *script, "--finish")

    def state(task: str) -> str:
        return call("scontrol", "--oneliner", "show", "job", task).split("JobState=")[1].split()[0]

    wait_for(lambda: list(output.glob("*.tmp")), 60)
    call("scontrol", "requeue", f"{array}_1")
    (slurmd,) = (doomed_cluster / "run").glob("slurmd-node2.pid")
    os.kill(int(slurmd.read_text()), signal.SIGKILL)

    def finished() -> bool:
        for task in range(4):
            if state(f"{array}_{task}") == "PENDING":  # held for 120 s after a requeue
                subprocess.run(["scontrol", "update", f"JobId={array}_{task}", "StartTime=now"], env=env, check=False)
        return state(f"{finish}_0") in {"COMPLETED", "FAILED", "CANCELLED"}

    wait_for(finished, 150)
    assert state(f"{finish}_0") == "COMPLETED", [path.read_text() for path in tmp_path.glob("*.out")]
    assert files(output) == files(alone)
