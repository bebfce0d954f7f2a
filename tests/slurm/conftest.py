"""A real Slurm of two nodes, its jobs, and a tiny run for them."""

import contextlib
import csv
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[2]


class Job:
    """A batch job and what it prints."""

    def __init__(self, cluster: "Cluster", number: str, output: Path, out_dir: Path) -> None:
        self.cluster, self.number, self.output, self.out_dir = cluster, number, output, out_dir

    def task(self, number: int) -> "Job":
        """One task of an array whose output has its number for %A and %a."""
        output = str(self.output).replace("%A", self.number).replace("%a", str(number))
        return Job(self.cluster, f"{self.number}_{number}", Path(output), self.out_dir)

    def says(self) -> str:
        """What it has printed, but for the line of each step."""
        lines = self.output.read_text().splitlines(keepends=True) if self.output.exists() else []
        return "".join(line for line in lines if not line.startswith("step "))

    def facts(self) -> dict[str, str]:
        """What Slurm knows of it."""
        words = self.cluster.call("scontrol", "--oneliner", "show", "job", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, true: Callable[[], bool], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.facts()}\n{self.says()}")
            time.sleep(0.2)

    def until_step(self, step: int) -> None:
        self.until(lambda: self.done() >= step)

    def ranks(self) -> list[int]:
        """The pids of its ranks, one on each node."""
        lines = {**self.cluster.processes("node1"), **self.cluster.processes("node2")}
        return [pid for pid, line in lines.items() if re.match(r"\S*python\S* pretrain/train.py ", line)]

    def done(self) -> int:
        """The last step in its metrics.csv."""
        steps = [row["step"] for row in self.metrics()]
        return int(steps[-1]) if steps else 0

    def metrics(self) -> list[dict[str, str]]:
        """The columns that a disturbance must not change, of the rows that are whole."""
        path = self.out_dir / "metrics.csv"
        with path.open() if path.exists() else open(os.devnull) as file:
            rows = [row for row in csv.DictReader(file) if row["skipped"]]
        return [{name: row[name] for name in ("step", "tokens", "loss", "lr", "grad_norm")} for row in rows]

    def until_requeued(self, restarts: int = 1, seconds: float = 300) -> None:
        """Return when it runs again, without the two minutes that Slurm would hold it."""

        def is_in(*states: str) -> bool:
            facts = self.facts()
            return facts["JobState"] in states and facts["Restarts"] == str(restarts)

        self.until(lambda: is_in("PENDING", "RUNNING"), seconds)
        time.sleep(2)  # slurmd refuses a job that starts within the second in which it was killed
        with contextlib.suppress(subprocess.CalledProcessError):  # it has started meanwhile
            self.cluster.call("scontrol", "update", f"JobId={self.number}", "StartTime=now")
        self.until(lambda: is_in("RUNNING"), seconds)

    def end(self, seconds: float = 600) -> tuple[str, str]:
        """Its state and exit status when it is over and nothing of it is left on the nodes."""
        self.until(lambda: self.facts()["JobState"] not in {"PENDING", "RUNNING", "COMPLETING"}, seconds)
        self.until(lambda: self.cluster.commands() == {"slurmd"}, 30)
        facts = self.facts()
        return facts["JobState"], facts["ExitCode"]


class Cluster:
    """What up.sh brought up in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.env |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}

    def call(self, *command: object) -> str:
        words = [str(word) for word in command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.run(words, env=self.env, cwd=ROOT, text=True, timeout=300, check=True, **pipes).stdout

    def namespace(self, node: str) -> str:
        (name,) = [n for n in (self.folder / "namespaces").read_text().split() if n.endswith(f"-{node}")]
        return name

    def processes(self, node: str) -> dict[int, str]:
        """What runs on a node: command lines by pid."""
        found = {}
        for pid in self.call("ip", "netns", "pids", self.namespace(node)).split():
            path = Path("/proc", pid, "cmdline")
            if path.exists() and (words := path.read_bytes().replace(b"\0", b" ")):
                found[int(pid)] = words.decode()
        return found

    def commands(self) -> set[str]:
        """The programs that run on the nodes."""
        lines = [line for node in ("node1", "node2") for line in self.processes(node).values()]
        return {line.split(" ")[0].split("/")[-1].rstrip(":") for line in lines}

    def submit(self, output: Path, options: list[str], *command: object, out_dir: Path = Path()) -> Job:
        number = self.call("sbatch", "--parsable", f"--output={output}", *options, *command).strip()
        return Job(self, number, output, out_dir)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    here = Path(__file__).parent
    subprocess.run(["bash", here / "up.sh", folder], check=True)
    try:
        yield Cluster(folder)
    finally:
        subprocess.run(["bash", here / "down.sh", folder], check=True)  # fails if anything is left running


@pytest.fixture(autouse=True)
def no_job_left(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.call("scancel", "--user=root")  # of a test that has failed


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on tiny data; its learning rate does not hang on the number of steps."""
    from packed import add

    from tinyllama.data.packed import ShardWriter, write_manifest

    folder = tmp_path_factory.mktemp("data")
    policy = {"tokenizer_sha256": "0" * 64, "encoder": "none", "bos": False, "eos": True, "bos_id": 1, "eos_id": 2}
    rng = np.random.default_rng(0)
    with ShardWriter(folder, "shard-00000", 256) as writer:
        for start in rng.integers(3, 250, 400):
            add(writer, [int(3 + (start + i) % 250) for i in range(rng.integers(20, 90))] + [2])
        writer.finish(**policy)
    write_manifest(folder, ["shard-00000"])
    config = {
        "model": {"name": "quickstart", "block_size": 32, "vocab_size": 256, "n_layer": 2, "n_embd": 32}
        | {"intermediate_size": 64},
        "data": {"sources": [{"path": str(folder)}]},
        "train": {"max_steps": 600, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
        "optim": {"lr": 1e-3, "min_lr": 1e-3, "warmup_steps": 5},
        "checkpoint": {"interval": 50},
        "log": {"interval": 1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
