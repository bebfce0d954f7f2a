"""Data preparation as a job array on two real nodes: a task killed and requeued, a node lost."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_array_survives_a_requeue_and_a_lost_node(cluster, tokenizer_file, tmp_path):
    source, output, alone = tmp_path / "in", tmp_path / "out", tmp_path / "alone"
    (source / "train").mkdir(parents=True)
    for number in range(8):
        with zstandard.open(source / f"train/{number}.jsonl.zst", "wt") as file:
            for i in range(8000):
                text = f"{number} {i} The little llama walked along the river. " * 30
                file.write(json.dumps({"text": text, "meta": {"redpajama_set_name": "RedPajamaC4"}}) + "\n")
    flags = ["--source", source, "--tokenizer", tokenizer_file, "--encoder", "sentencepiece", "--output"]
    subprocess.run([sys.executable, "scripts/prepare_slimpajama.py", *flags, alone], cwd=ROOT, check=True)

    script = ["scripts/slurm/prepare_data.sbatch", "scripts/prepare_slimpajama.py", *flags, output]
    log, one_cpu = tmp_path / "%A-%a", "--cpus-per-task=1"
    array = cluster.submit(log, [one_cpu, "--array=0-3"], *script)
    after = f"--dependency=afterok:{array.number}"
    finish = cluster.submit(log, [one_cpu, "--array=0", after], *script, "--finish").task(0)
    tasks = [array.task(number) for number in range(4)]

    array.until(lambda: len(list(output.glob("*.tmp"))) == 4)
    killed = next(task for task in tasks if task.facts()["NodeList"] == "node1")
    lost = [task for task in tasks if task.facts()["NodeList"] == "node2"]
    assert lost
    cluster.call("scontrol", "requeue", killed.number)
    for pid in cluster.processes("node2"):
        os.kill(pid, signal.SIGKILL)
    for task in (killed, *lost):
        task.until_requeued()
    cluster.call("on", "node2", "slurmd", "-N", "node2")
    assert finish.end(150) == ("COMPLETED", "0:0"), "".join(task.says() for task in tasks)
    assert files(output) == files(alone)
