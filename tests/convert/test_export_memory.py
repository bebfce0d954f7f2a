"""A checkpoint of 0.5 GB that four ranks saved, exported by a process of no group, and how much memory that takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_rank import CONFIG
from safetensors import safe_open

from tinyllama.convert import layout, native
from tinyllama.convert.weights import open_weights

SCRIPT = str(Path(__file__).parents[1] / "helpers" / "export_rank.py")


@pytest.mark.slow
def test_an_export_takes_less_than_one_and_a_half_times_the_weights(tmp_path: Path) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, SCRIPT, "save", str(rank), tmp_path / "store", tmp_path / "run"], env=env)
        for rank in range(4)
    ]
    assert [rank.wait() for rank in ranks] == [0] * 4
    (step_dir,) = (tmp_path / "run/checkpoints").iterdir()
    assert len(list(step_dir.glob("*.distcp"))) == 4
    command = [sys.executable, SCRIPT, "export", tmp_path / "run", tmp_path / "hf"]
    peak = int(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
    size = 4 * CONFIG.num_params()
    assert size > 500e6
    assert (tmp_path / "hf/model.safetensors").stat().st_size == pytest.approx(size, rel=1e-3)
    print(f"peak {peak / 1e6:.0f} MB above the imports, weights {size / 1e6:.0f} MB: {peak / size:.2f}")
    assert peak < 1.5 * size

    ours = open_weights(step_dir)
    with safe_open(tmp_path / "hf/model.safetensors", framework="pt") as file:
        for name, theirs in layout.keys(CONFIG):
            for key, part in layout.to_hf(theirs, ours.read(name), CONFIG).items():
                assert torch.equal(file.get_tensor(key), part)
    back = open_weights(native.write(tmp_path / "back", open_weights(tmp_path / "hf")))
    assert all(torch.equal(back.read(name), ours.read(name)) for name, _ in layout.keys(CONFIG))
