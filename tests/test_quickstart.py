import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_whole_workflow_twice(tmp_path: Path) -> None:
    # what git tracks and nothing else, with the virtual environment of this run
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    env = dict(os.environ, PYTHONPATH=str(tmp_path))

    def quickstart() -> str:
        command = ["bash", "scripts/quickstart.sh"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = quickstart()
    assert "stopped by SIGUSR1 at step 1" in said
    assert "exit status 75" in said
    assert "resumed from out/quickstart/checkpoints/step-000001" in said
    assert "both wrote the same" in said
    assert "saved    out/quickstart/checkpoints/step-000001" in said.split("exit status 75")[0]  # the closing card
    assert said.endswith("819,200 tokens\nreport   out/quickstart/report.html\n")
    rows = (tmp_path / "out/quickstart/metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    losses = [float(row.split(",")[header.index("val_loss")]) for row in rows[1:] if row.split(",")[3]]
    assert losses[0] == pytest.approx(7.625, abs=0.5)  # ln 2048
    assert losses[-1] < 0.6 * losses[0]
    weights = (tmp_path / "out/quickstart/hf/model.safetensors").read_bytes()

    again = quickstart()
    assert "has checkpoints already" in again
    assert again.count("(0 new)") == 4
    assert "both wrote the same" in again
    assert (tmp_path / "out/quickstart/hf/model.safetensors").read_bytes() == weights
