"""Two runs into one output folder: the second waits for the first, unless they do different tasks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllama.data.packed import open_packed
from tinyllama.prepare import prepare
from tinyllama.prepare.inputs import ENDINGS, Fields, find_inputs
from tinyllama.prepare.prepare import Options

ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path) -> Path:
    for name in "ab":
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / f"in/{name}.jsonl").write_text(json.dumps({"text": f"the llama {name}"}) + "\n")
    (tmp_path / "out").mkdir()
    return tmp_path / "in"


def start(source: Path, tokenizer: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "scripts/prepare_text.py", "--source", source, "--output", source.with_name("out")]
    command += ["--tokenizer", tokenizer, "--encoder", "sentencepiece", "--workers", "1", *flags]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("first", "second"), [(None, ()), (None, ("--task", "1/2")), ((1, 2), ()), ((1, 2), ("--task", "1/2"))]
)
def test_a_second_run_waits(source, tokenizer_file, first, second):
    output = source.with_name("out")
    with prepare._locked(output, first):
        unfinished = output / "b.jsonl.bin.0123abcd.tmp"
        unfinished.touch()  # of the first
        waits = start(source, tokenizer_file, *second)
        assert waits.stderr.readline() == f"waiting for another run that works in {output}\n"
        assert unfinished.exists()
        assert not list(output.glob("*.json"))
    out, err = waits.communicate(timeout=300)
    assert waits.returncode == 0, err
    assert f"{output}: {'1 shard (1 new)' if second else '2 shards (2 new)'}" in out
    assert not unfinished.exists()
    assert not (output / ".lock").exists()


def test_another_task_does_not_wait(source, tokenizer_file):
    output = source.with_name("out")
    with prepare._locked(output, (0, 2)):
        out, err = start(source, tokenizer_file, "--task", "1/2").communicate(timeout=300)
        assert "1 shard (1 new)" in out
        assert "waiting" not in err
        assert (output / ".lock").exists()  # the first still has it
        again = start(source, tokenizer_file, "--task", "0/2")
        assert again.stderr.readline().startswith("waiting")
    again.communicate(timeout=300)
    assert again.returncode == 0
    assert not (output / ".lock").exists()


def test_the_lock_of_a_killed_run_is_free(source, tokenizer_file):
    output = source.with_name("out")
    code = "from tinyllama.prepare import prepare; from pathlib import Path; import sys\n"
    code += "with prepare._locked(Path(sys.argv[1]), None): print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, output], **pipes) as killed:
        assert killed.stdout.readline() == b"held\n"
        killed.kill()
    options = Options(tokenizer_file, output, encoder="sentencepiece", workers=1)
    assert "2 shards (2 new)" in prepare.prepare(find_inputs(source, ENDINGS), Fields(), options)
    assert open_packed(output).documents == 2
    assert not (output / ".lock").exists()
