"""Corpora on the Hugging Face Hub: a tiny one of our own, on this machine."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hub_stub import Files, Hub, serve

from tinyllama.data.packed import open_packed

ROOT = Path(__file__).parents[2]
CARD = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: "data/*/*"}
- config_name: sample
  data_files:
  - {split: train, path: "sample/*"}
  - {split: test, path: "held_out/*"}
---
"""


def parquet(**columns) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def corpus(mark: str = "") -> Files:
    files = {f"data/{name}/0.parquet": parquet(text=[f"{name} {mark}"]) for name in ("a", "b")}
    files |= {f"{name}/0.parquet": parquet(text=[f"{name} {mark}", "two"]) for name in ("sample", "held_out")}
    return files | {"README.md": CARD, ".gitattributes": b"", "notes.txt": b"not of any configuration"}


@pytest.fixture(scope="module")
def hub():
    with serve() as hub:
        yield hub


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def calls(hub: Hub, tmp_path_factory):
    """A process that knows this Hub alone."""
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path_factory.mktemp("home")), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tests/helpers/hub_calls.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | env, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(calls: subprocess.Popen, tokenizer_file: Path, tmp_path: Path):
    def run(script: str, source: str, *flags: str) -> Done:
        call = [ROOT / f"scripts/{script}.py", "--source", source, "--output", tmp_path / "out", *flags]
        if script != "train_tokenizer":
            call += ["--tokenizer", tokenizer_file]
        calls.stdin.write(json.dumps(list(map(str, call))) + "\n")
        calls.stdin.flush()
        return Done(*json.loads(calls.stdout.readline()))

    return run


def manifest(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out/manifest.json").read_bytes())


def shards(tmp_path: Path) -> list[str]:
    return [shard["name"] for shard in manifest(tmp_path)["shards"]]


def test_a_configuration_of_a_dataset(hub, run, tmp_path):
    commit = hub.push("owner/corpus", corpus())
    hub.fetched.clear()  # by other tests
    done = run("prepare_text", "hf://datasets/owner/corpus")
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path) == ["data--a--0.parquet", "data--b--0.parquet"]
    assert manifest(tmp_path)["origin"] == f"hf://datasets/owner/corpus@{commit}"
    assert "not read: 4 of other configurations and splits" in done.stdout
    fetched = [path for path in hub.fetched if path.endswith(".parquet")]
    assert sorted(fetched) == ["data/a/0.parquet", "data/b/0.parquet"]  # once each
    again = run("prepare_text", "hf://datasets/owner/corpus", "--config_name", "sample")
    assert again.returncode == 2
    assert "2 shards belong to no input" in again.stderr


@pytest.mark.parametrize(
    ("source", "flags", "names"),
    [
        ("", ["--config_name", "sample"], ["sample--0.parquet"]),
        ("", ["--config_name", "sample", "--split", "test"], ["held_out--0.parquet"]),
        ("/sample", [], ["0.parquet"]),
        ("/data/b/0.parquet", [], ["0.parquet"]),
        ("/data/*/*.parquet", [], ["a--0.parquet", "b--0.parquet"]),
    ],
)
def test_a_part_of_a_dataset(hub, run, tmp_path, source, flags, names):
    hub.push("owner/corpus", corpus())
    done = run("prepare_text", f"hf://datasets/owner/corpus{source}", *flags)
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path) == names


def test_the_commit_is_that_of_the_start_for_all_tasks_and_restarts(hub, run, tmp_path):
    first = hub.push("owner/moving", corpus("first"))
    task = run("prepare_text", "hf://datasets/owner/moving", "--task", "0/2")
    assert task.returncode == 0, task.stderr
    second = hub.push("owner/moving", corpus("second"))
    for flags in (["--task", "0/2"], ["--task", "1/2"], ["--finish"], []):
        other = run("prepare_text", "hf://datasets/owner/moving", *flags)
        assert other.returncode == 2
        (line,) = other.stderr.splitlines()
        assert line.startswith(
            f"error: {tmp_path}/out: origin was 'hf://datasets/owner/moving@{first}' for shard data--a"
        )
        assert f"@{second}' now: give --source hf://datasets/owner/moving@{first}, or use another --output" in line
    for flags in (["--task", "1/2"], ["--finish"]):
        done = run("prepare_text", f"hf://datasets/owner/moving@{first}", *flags)
        assert done.returncode == 0, done.stderr
    assert manifest(tmp_path)["origin"].endswith(first)
    assert open_packed(tmp_path / "out").documents == 2


@pytest.mark.parametrize(
    ("source", "flags", "said"),
    [
        ("owner/none", [], "cannot be listed ("),
        ("owner/corpus@nope", [], "cannot be listed ("),
        (
            "owner/corpus",
            ["--config_name", "nope"],
            "not found. Available: ['default', 'sample']: give a --config_name",
        ),
        ("owner/corpus", ["--split", "nope"], "has the splits train: give one as --split"),
        ("owner/corpus/none", [], "no file ending in"),
        ("owner/corpus/sample", ["--config_name", "sample"], "is not hf://datasets/OWNER/NAME: leave it out"),
        ("corpus", [], "cannot be listed ("),
    ],
)
def test_what_is_not_there_is_one_line(hub, run, tmp_path, source, flags, said):
    hub.push("owner/corpus", corpus())
    done = run("prepare_text", f"hf://datasets/{source}", *flags)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not (tmp_path / "out").exists()


def test_a_gated_dataset_is_one_line_before_anything_is_fetched(hub, run, tmp_path):
    hub.push("owner/gated", corpus())
    hub.gated.add("owner/gated")
    done = run("prepare_text", "hf://datasets/owner/gated/sample")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    said = "is gated: accept its terms on its page, and log in with hf auth login"
    assert line == f"error: hf://datasets/owner/gated/sample: {said}"
    assert not (tmp_path / "out").exists()


def test_a_file_that_was_removed_is_the_inputs_error(hub, run, tmp_path):
    commit = hub.push("owner/removed", corpus())
    tree = hub.tree
    del hub.commits["owner/removed"][commit]["data/a/0.parquet"]
    hub.tree = lambda files, *rest: tree(files | {"data/a/0.parquet": b"was here"}, *rest)
    done = run("prepare_text", "hf://datasets/owner/removed", "--skip_bad_files", "1")
    hub.tree = tree
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path) == ["data--b--0.parquet"]
    assert "skipped: hf://datasets/owner/removed@" in done.stdout


def test_no_network_is_one_line(tokenizer_file, tmp_path):
    call = [sys.executable, ROOT / "scripts/prepare_text.py", "--source", "hf://datasets/owner/corpus"]
    call += ["--tokenizer", tokenizer_file, "--output", tmp_path / "out"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, call)), capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: hf://datasets/owner/corpus: cannot be listed (")


def test_a_tokenizer_is_trained_on_the_same_files(hub, run, tmp_path):
    rows = [f"{number} {number * 7919:b}".translate({48: "no", 49: "ri"}) for number in range(200)]
    hub.push("owner/rows", {"train.jsonl": "".join(json.dumps({"body": row}) + "\n" for row in rows).encode()})
    for source in ("hf://datasets/owner/rows:body", "hf://datasets/owner/rows/train.jsonl:body"):
        done = run("train_tokenizer", source, "--output", str(tmp_path / "a.model"), "--vocab_size", "280")
        assert done.returncode == 0, done.stderr
        (tmp_path / "a.model").unlink()
    hub.push("owner/corpus", corpus())
    done = run("train_tokenizer", "hf://datasets/owner/corpus", "--config_name", "nope")
    assert (done.returncode, "Available: ['default', 'sample']" in done.stderr) == (2, True)


def test_slimpajama_and_starcoder_from_the_hub(hub, run, tmp_path):
    lines = "".join(
        json.dumps({"text": name, "meta": {"redpajama_set_name": name}}) + "\n"
        for name in ("RedPajamaC4", "RedPajamaGithub")
    )
    files = {
        f"{split}/chunk1/example_{split}_0.jsonl.zst": zstandard.compress(lines.encode()) for split in ("train", "test")
    }
    commit = hub.push("owner/slim", files | {"README.md": b""})
    done = run("prepare_slimpajama", "hf://datasets/owner/slim")
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path) == ["chunk1--example_train_0.jsonl.zst"]  # as of a folder
    assert "1 document (1 of RedPajamaGithub left out)" in done.stdout
    assert manifest(tmp_path)["origin"] == f"hf://datasets/owner/slim@{commit}"
    hub.push("owner/star", {f"{name}/train-0.parquet": parquet(content=[name]) for name in ("go", "c")})
    done = run(
        "prepare_starcoder", "hf://datasets/owner/star@main", "--languages", "go", "--output", str(tmp_path / "star")
    )
    assert done.returncode == 0, done.stderr
    assert open_packed(tmp_path / "star").files == ["go--train-0.parquet.bin"]
