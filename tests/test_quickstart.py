import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_whole_workflow_twice(tmp_path: Path) -> None:
    # what git tracks and nothing else, with the virtual environment of this run, and what the quickstart has made here
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    env = dict(os.environ, PYTHONPATH=str(tmp_path))
    run = tmp_path / "out" / "quickstart"

    def quickstart() -> str:
        command = ["bash", "scripts/quickstart.sh"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "both wrote the same" in done.stdout
        assert done.stdout.endswith("819,200 tokens\nreport   out/quickstart/report.html\n")
        return done.stdout

    if (ROOT / "out" / "quickstart" / "hf").exists():
        for folder in ("data/quickstart", "out/quickstart"):
            shutil.copytree(ROOT / folder, tmp_path / folder)
    else:
        said = quickstart()
        assert "exit status 75" in said
        assert "saved    out/quickstart/checkpoints/step-000001" in said.split("exit status 75")[0]  # the closing card
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (stop,) = [event for event in events if event["event"] == "stop"]
    assert stop["by"] == "SIGUSR1"
    assert 100 <= stop["step"] < 200
    starts = [(event["step"], event["resumed_from"]) for event in events if event["event"] == "start"]
    assert starts[:2] == [(0, None), (stop["step"], f"out/quickstart/checkpoints/step-{stop['step']:08d}")]
    rows = (run / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    losses = [float(row.split(",")[header.index("val_loss")]) for row in rows[1:] if row.split(",")[3]]
    assert losses[0] == pytest.approx(7.625, abs=0.5)  # ln 2048
    assert losses[-1] < 0.6 * losses[0]
    weights = (run / "hf" / "model.safetensors").read_bytes()

    again = quickstart()
    assert "has checkpoints already" in again
    assert again.count("(0 new)") == 4
    assert (run / "hf" / "model.safetensors").read_bytes() == weights
