"""scripts/slurm/*.sbatch on a real Slurm of two nodes: what stops a run leaves its loss curve the undisturbed one's."""

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slurm

NODES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0"]  # over what the script asks for

Start = Callable[..., "Job"]  # noqa: F821  # of conftest.py


@pytest.fixture
def start(cluster, config_file: Path, tmp_path: Path) -> Start:
    """A function that submits pretrain.sbatch with Slurm's options and flags of train.py."""

    def submit(*flags: object, options: tuple[str, ...] = ()):
        script = ["scripts/slurm/pretrain.sbatch", "--config", config_file, "--out_dir", tmp_path / "run"]
        return cluster.submit(tmp_path / "output", [*NODES, *options], *script, *flags, out_dir=tmp_path / "run")

    return submit


@pytest.fixture(scope="session")
def undisturbed(cluster, config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list]:
    """What a run of so many steps that nothing happens to writes into its metrics.csv."""
    known: dict[int, list] = {}

    def metrics(steps: int) -> list:
        if steps not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            script = ["scripts/slurm/pretrain.sbatch", "--config", config_file, "--out_dir", folder / "run"]
            flags = ["--train.max_steps", steps]
            job = cluster.submit(folder / "output", NODES, *script, *flags, out_dir=folder / "run")
            assert job.end(300) == ("COMPLETED", "0:0"), job.says()
            assert "ranks    node1: rank 0\nranks    node2: rank 1\n" in job.says()
            known[steps] = job.metrics()
        return known[steps]

    return metrics


def test_a_first_start(undisturbed) -> None:
    rows = undisturbed(600)
    assert [int(row["step"]) for row in rows] == list(range(1, 601))
    assert float(rows[-1]["loss"]) < 0.7 * float(rows[0]["loss"])


def test_usr1_saves_requeues_and_goes_on(start: Start, undisturbed) -> None:
    expected = undisturbed(600)
    job = start()
    job.until_step(120)
    job.cluster.call("scancel", "--signal=USR1", job.number)
    job.until_requeued()
    assert job.end() == ("COMPLETED", "0:0"), job.says()
    assert "stopped by SIGUSR1 at step " in job.says()
    assert "restart 0: stopped with a checkpoint: requeued" in job.says()
    assert "resumed from " in job.says()
    assert job.metrics() == expected


def test_a_killed_task_is_retried(start: Start, undisturbed) -> None:
    expected = undisturbed(600)
    job = start()
    job.until_step(120)
    os.kill(job.ranks()[1], signal.SIGKILL)
    assert job.end() == ("COMPLETED", "0:0"), job.says()
    assert job.says().count("retried in 15 s") == 1
    assert job.facts()["Restarts"] == "0"
    assert len((job.out_dir / "crashes.log").read_text().splitlines()) == 1
    assert job.metrics() == expected


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_node_that_fails_first_each_time_is_excluded_if_others_are_left(cluster, tmp_path: Path, nodes: int) -> None:
    """With a recipe that fails on node1, and no pause between retries."""
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "train.py").write_text(
        "import os, socket, sys, time\n"
        "if socket.gethostname() == 'node1' and os.environ.get('SLURM_RESTART_COUNT', '0') == '0': sys.exit(1)\n"
        "time.sleep(1)\n"
    )
    (tmp_path / "tinyllama").symlink_to(ROOT / "tinyllama")
    script = (ROOT / "scripts" / "slurm" / "pretrain.sbatch").read_text()
    assert script.count("patience=15 ") == 1
    (tmp_path / "pretrain.sbatch").write_text(script.replace("patience=15 ", "patience=0 "))
    options = [f"--nodes={nodes}", *NODES[1:], f"--chdir={tmp_path}"]
    job = cluster.submit(tmp_path / "output", options, tmp_path / "pretrain.sbatch", "--out_dir", tmp_path / "run")
    job.until_requeued()
    assert job.end() == ("COMPLETED", "0:0"), job.says()
    crashes = (tmp_path / "run" / "crashes.log").read_text().splitlines()
    assert len(crashes) == 4
    assert all(line.endswith("exit status 1, first on node1") for line in crashes)
    if nodes == 1:
        assert "node1 failed first each time: excluded" in job.says()
        assert job.facts()["ExcNodeList"] == "node1"
        assert "restart 1: starts on node2, 1 ranks" in job.says()
    else:
        assert "node1 failed first each time; it is not excluded, as only 1 other nodes are up" in job.says()
        assert job.facts()["ExcNodeList"] == "(null)"


@pytest.mark.slow
def test_bad_input_is_not_retried(start: Start) -> None:
    job = start("--train.global_batch_size", 7)
    assert job.end() == ("FAILED", "2:0"), job.says()
    assert "error: train.global_batch_size 7 is not a multiple of 2 ranks" in job.says()
    assert "bad input: not retried" in job.says()
    assert not job.out_dir.exists()


@pytest.mark.slow
def test_a_job_of_a_higher_priority_preempts(start: Start, undisturbed, tmp_path: Path) -> None:
    expected = undisturbed(600)
    job = start()
    job.until_step(120)
    urgent = ["--partition=high", "--nodes=2", "--exclusive", "--time=1", "--wrap=sleep 3"]
    other = job.cluster.submit(tmp_path / "urgent", urgent)
    other.until(lambda: other.facts()["JobState"] == "COMPLETED")
    job.until_requeued()
    assert job.end() == ("COMPLETED", "0:0"), job.says()
    assert re.search(r"stopped by SIGTERM at step \d+; unless Slurm requeues the job, sbatch of the same", job.says())
    assert job.metrics() == expected


@pytest.mark.slow
def test_a_time_limit(start: Start, undisturbed) -> None:
    expected = undisturbed(600)
    job = start(options=("--time=3", "--signal=USR1@30"))
    job.until_step(1)
    for pid in job.ranks():
        os.kill(pid, signal.SIGSTOP)  # so that the minutes pass and the steps do not; Slurm's signal wakes them
    job.until_requeued(seconds=240)
    job.cluster.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=UNLIMITED")
    assert job.end() == ("COMPLETED", "0:0"), job.says()
    assert "stopped by SIGUSR1 at step " in job.says()
    assert "restart 0: stopped with a checkpoint: requeued" in job.says()
    assert job.metrics() == expected


@pytest.mark.slow
def test_a_dead_node(start: Start, undisturbed) -> None:
    expected = undisturbed(600)
    job = start()
    job.until_step(120)
    for pid in job.cluster.processes("node2"):
        os.kill(pid, signal.SIGKILL)
    job.until(lambda: "DOWN" in job.cluster.call("sinfo", "--noheader", "--Node", "--format=%N %T").upper())
    job.cluster.call("on", "node2", "slurmd", "-N", "node2")
    job.until_requeued()
    assert job.end() == ("COMPLETED", "0:0"), job.says()
    assert job.metrics() == expected


@pytest.mark.slow
def test_acceptance(cluster, config_file: Path, tmp_path: Path) -> None:
    job = cluster.submit(tmp_path / "output", NODES, "scripts/slurm/acceptance.sbatch", "--config", config_file)
    assert job.end() == ("COMPLETED", "0:0"), job.says()
    verdicts = [line for line in job.says().splitlines() if line.startswith(("pass", "fail"))]
    assert len(verdicts) == 8
    assert all(line.startswith("pass") for line in verdicts)
    assert job.says().endswith("all passed\n")


@pytest.mark.slow
def test_a_rehearsal(cluster, config_file: Path, tmp_path: Path) -> None:
    for name in ("pretrain", "scripts", "tinyllama"):
        (tmp_path / name).symlink_to(ROOT / name)
    env = cluster.env | {"OPTIONS": " ".join(NODES)}
    command = ["scripts/rehearse.sh", "--config", config_file, "--train.max_steps", "400"]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    log = tmp_path / "out" / "rehearsal" / "log"
    assert ran.returncode == 0, ran.stdout + ran.stderr + log.read_text()
    checks = [line.split(" s  ")[1] for line in ran.stdout.splitlines() if line.startswith("pass")]
    assert len(checks) == 10, ran.stdout
    assert checks[1:4] == [
        "saved a checkpoint at SIGUSR1 and stopped",
        "requeued",
        "resumed from the checkpoint",
    ]
    assert ran.stdout.endswith("all passed\n")
