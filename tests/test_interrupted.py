"""A real run, interrupted three times: what people see of it is one run."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import Group, Process

from tinyllama.checkpoint import reader
from tinyllama.monitor import report
from tinyllama.monitor.run_files import read_metrics

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_three_interruptions_leave_each_step_once(packed_folder: Any, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    out = tmp_path / "run"
    sources = [
        {"path": str(packed_folder([[list(range(3, 250)) * 20]], name=name)), "weight": weight}
        for name, weight in (("prose", 0.75), ("code", 0.25))
    ]
    config = {
        "out_dir": str(out),
        "model": {"name": "quickstart", "block_size": 32, "vocab_size": 400, "n_layer": 1, "n_embd": 32},
        "data": {"sources": sources, "validation": [{"path": sources[0]["path"]}]},
        "train": {"max_steps": 12, "global_batch_size": 4, "micro_batch_size": 4, "precision": "fp32"},
        "optim": {"warmup_steps": 2},
        "eval": {"interval": 4, "max_samples": 4},
        "checkpoint": {"interval": 4, "asynchronous": False},
        "log": {"interval": 1, "wandb": "offline"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    env = dict(os.environ, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", TORCHELASTIC_RUN_ID="tests")
    env |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    rank = Group([Process(sys.executable, ROOT / "tests" / "helpers" / "rank.py", warm=0, env=env, cwd=ROOT)])

    def run(*command: str) -> dict[str, Any]:
        name, *flags = command
        (answer,) = rank.ask([name, [*flags, "--config", str(tmp_path / "run.yaml")]])
        assert "result" in answer, answer
        return answer

    try:
        assert run("train_signalled", "6", "0")["result"] == 75  # a signal in step 6
        for last in (12, 12):  # two that died on the way to a checkpoint after steps they had told of
            assert run("train")["result"] == 0
            shutil.rmtree(out / "checkpoints" / f"step-{last:08d}")
            shutil.rmtree(out / "checkpoints" / "step-00000008", ignore_errors=True)
        said = run("train")["said"]
    finally:
        rank.kill()
    assert "resumed from" in said
    assert "val_loss" in said.split("tokens in all")[0]
    assert [int(row["step"]) for row in read_metrics(out / "metrics.csv")] == list(range(13))
    ids = {path.stem for path in out.glob("wandb/offline-run-*/*.wandb")}
    known = json.loads((out / "wandb.json").read_text())
    assert ids == {f"run-{known['id']}"}
    assert known["step"] == 12
    assert reader.read_state(out / "checkpoints" / "step-00000012")["wandb_id"] == known["id"]
    page = report.read_run(out)
    assert [event["kind"] for event in page["events"]].count("restart") == 3
    assert page["columns"]["step"] == list(range(13))
    tokens = {name: page["columns"][name][-1] for name in page["sources"]}
    assert sum(tokens.values()) == 12 * 4 * 32
    assert tokens["tokens_prose"] == pytest.approx(0.75 * 12 * 4 * 32, rel=0.2)
