"""Data preparation where torch is not installed, as on a cluster's CPU nodes."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENOUGH = ("numpy", "zstandard", "pyarrow", "sentencepiece", "tokenizers", "PyYAML")


@pytest.mark.slow
def test_a_whole_preparation(tmp_path: Path, tokenizer_file: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    bare = str(tmp_path / "venv/bin/python")
    subprocess.run([bare, "-m", "pip", "install", "--quiet", *ENOUGH], check=True)
    assert subprocess.run([bare, "-c", "import torch"], capture_output=True).returncode == 1

    def run(python: str, script: str, *args: object) -> str:
        command = [python, f"scripts/{script}.py", *map(str, args)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout

    assert "--tokenizer" in run(bare, "prepare_slimpajama", "--help")
    run(sys.executable, "quickstart_corpus", "--output", tmp_path / "raw")
    manifests = []
    for python in (bare, sys.executable):
        packed = tmp_path / ("bare" if python == bare else "full")
        for script, folder in (("prepare_slimpajama", "slimpajama"), ("prepare_starcoder", "starcoder")):
            where = ["--source", tmp_path / "raw" / folder, "--output", packed / folder]
            run(python, script, *where, "--tokenizer", tokenizer_file)
            run(python, "inspect_packed", packed / folder, "--verify")
            manifests.append((packed / folder / "manifest.json").read_bytes())
    assert manifests[:2] == manifests[2:]
