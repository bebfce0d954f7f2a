import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tinyllama.data.packed import open_packed

ROOT = Path(__file__).parents[2]


def command(name: str, source: Path, tokenizer: Path, output: Path, *flags: str) -> list[str]:
    paths = ["--source", source, "--tokenizer", tokenizer, "--output", output]
    return [sys.executable, *map(str, [ROOT / "scripts" / f"prepare_{name}.py", *paths, *flags])]


def environment(*folders: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*folders, ROOT]))}


def run(*args, **flags) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=300, env=environment(), **flags)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def slimpajama(tmp_path_factory) -> Path:
    """Six shards over two chunks with the same file names, each some tenths of a second of work."""
    source = tmp_path_factory.mktemp("slimpajama")
    for number in range(6):
        path = source / "train" / f"chunk{number % 2 + 1}" / f"example_train_{number // 2}.jsonl.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zstandard.open(path, "wt") as file:
            for i in range(300):
                text = f"{number} {i} The little llama walked along the river. " * 30
                name = "RedPajamaGithub" if i % 10 == 0 else "RedPajamaC4"
                file.write(json.dumps({"text": text, "meta": {"redpajama_set_name": name}}) + "\n")
    return source


@pytest.fixture(scope="module")
def undisturbed(slimpajama, tokenizer_file, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed")
    done = run("slimpajama", slimpajama, tokenizer_file, output, "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "6 shards (6 new), 1,620 documents (180 of RedPajamaGithub left out)" in done.stdout
    assert len(done.stderr.splitlines()) == 6
    whole = files(output)
    assert len(whole) == 6 * 3 + 1
    assert "chunk2--example_train_1.jsonl.zst.bin" in whole
    return whole


def workers_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def start(*args) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(*args), start_new_session=True, env=environment(), **pipes)


@pytest.mark.parametrize(
    ("pattern", "number", "kill"),
    [("*.tmp", 1, os.killpg), ("*.bin", 1, os.kill), ("*.json", 1, os.killpg), ("*.json", 3, os.kill)],
)
def test_killed_and_run_again(slimpajama, undisturbed, tokenizer_file, tmp_path, pattern, number, kill):
    output = tmp_path / "out"
    process = start("slimpajama", slimpajama, tokenizer_file, output, "--workers", "2")
    wait_for(lambda: len(list(output.glob(pattern))) >= number)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert not (output / "manifest.json").exists()
    again = run("slimpajama", slimpajama, tokenizer_file, output, "--workers", "2")
    assert again.returncode == 0, again.stderr
    assert files(output) == undisturbed


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments(slimpajama, undisturbed, tokenizer_file, tmp_path, kills):
    rng = random.Random(0)
    output = tmp_path / "out"
    args = ("slimpajama", slimpajama, tokenizer_file, output, "--workers", "2", "--encoder", "sentencepiece")
    done = 0
    while done < kills:
        process = start(*args)
        time.sleep(rng.uniform(0.4, 2.5))
        while process.poll() is None and done < kills:
            done += 1
            with contextlib.suppress(OSError, IndexError):
                victim = rng.choice(workers_of(process.pid)) if rng.random() < 0.5 else process.pid
                os.kill(victim, signal.SIGKILL)
                if victim == process.pid:
                    break
            time.sleep(rng.uniform(0, 1))
        process.communicate(timeout=300)  # it does not hang
        for path in output.glob("chunk1--example_train_*.json"):  # so that there is always something to do
            path.unlink()
    assert run(*args).returncode == 0
    assert bare(files(output)) == bare(undisturbed)


def bare(folder: dict[str, bytes]) -> dict[str, bytes]:
    """Without what says which encoder it was."""
    return {name: b"" if b"encoded_by" in text else text for name, text in folder.items()}


def test_no_worker_outlives_its_parent(tokenizer_file, tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text((json.dumps({"text": "The little llama walked along the river. " * 30}) + "\n") * 50_000)
    process = start("text", source, tokenizer_file, tmp_path / "out")
    wait_for(lambda: list((tmp_path / "out").glob("*.tmp")))
    (worker,) = workers_of(process.pid)
    process.kill()
    process.communicate(timeout=300)  # the pipes end when nobody holds them any more
    wait_for(lambda: not Path(f"/proc/{worker}").exists())
    assert list((tmp_path / "out").glob("*.json")) == []  # it did not work on to the end of its shard


def test_a_killed_worker_is_replaced_once(slimpajama, undisturbed, tokenizer_file, tmp_path):
    output = tmp_path / "out"
    process = start("slimpajama", slimpajama, tokenizer_file, output, "--workers", "1")
    wait_for(lambda: workers_of(process.pid))
    (worker,) = workers_of(process.pid)
    left = []
    while not left:  # stopped in the middle of a shard
        os.kill(worker, signal.SIGCONT)
        wait_for(lambda: list(output.glob("*.tmp")))
        os.kill(worker, signal.SIGSTOP)
        left = list(output.glob("*.tmp"))
    os.kill(worker, signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert files(output) == undisturbed  # and nothing of what was left


def test_a_worker_killed_twice_is_named_and_the_run_ends(tokenizer_file, tmp_path):
    source, output = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_text((json.dumps({"text": "The little llama walked along the river. " * 30}) + "\n") * 50_000)
    process = start("text", source, tokenizer_file, output, "--encoder", "sentencepiece")
    for number in (1, 2):  # the killed one's unfinished file stays
        wait_for(lambda number=number: len(list(output.glob("*.tmp"))) == number)
        (worker,) = workers_of(process.pid)
        os.kill(worker, signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1
    assert f"RuntimeError: {source}: its worker died twice (exit code -9" in said.replace(
        f"{source}: {source}", f"{source}"
    )


def test_a_full_disk_is_one_line_and_ends_the_run(slimpajama, tokenizer_file, tmp_path):
    output = tmp_path / "out"
    small = ["prlimit", "--fsize=16384"]  # no file may be larger: stands for a disk that is full
    args = ("slimpajama", slimpajama, tokenizer_file, output, "--workers", "2")
    done = subprocess.run([*small, *command(*args)], capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: cannot write {output} (File too large): make room (what is done is kept)")
    assert list(output.iterdir()) == []


def test_tasks_and_finish(slimpajama, undisturbed, tokenizer_file, tmp_path):
    output = tmp_path / "out"
    args = ("slimpajama", slimpajama, tokenizer_file, output)
    tasks = [start(*args, "--task", f"{i}/2", "--workers", "1") for i in range(2)]  # at the same time, as in an array
    for task in tasks:
        _, said = task.communicate(timeout=300)
        assert task.returncode == 0, said
    assert "manifest.json" not in files(output)
    assert run(*args, "--finish").returncode == 0
    assert files(output) == undisturbed


def test_without_torch(slimpajama, undisturbed, tokenizer_file, tmp_path):
    (tmp_path / "hook").mkdir()
    absent = ["torch", "lightning", "transformers", "datasets", "tqdm", "pandas"]
    (tmp_path / "hook" / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n")
    env = environment(tmp_path / "hook")
    proof = subprocess.run([sys.executable, "-c", "import torch"], env=env, capture_output=True, text=True)
    assert "ModuleNotFoundError" in proof.stderr
    output = tmp_path / "out"
    done = subprocess.run(
        command("slimpajama", slimpajama, tokenizer_file, output), env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert files(output) == undisturbed


def test_starcoder(tokenizer_file, tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    for language in ("python", "go", "c"):
        (source / language).mkdir(parents=True)
        pq.write_table(pa.table({"content": [f"# {language}"]}), source / language / "train-00000-of-00001.parquet")
    assert run("starcoder", source, tokenizer_file, output, "--languages", "python,go").returncode == 0
    names = [shard["name"] for shard in json.loads((output / "manifest.json").read_bytes())["shards"]]
    assert names == ["go--train-00000-of-00001.parquet", "python--train-00000-of-00001.parquet"]
    assert run("starcoder", source, tokenizer_file, output).returncode == 0  # every folder: one more
    assert open_packed(output).documents == 3
    narrower = run("starcoder", source, tokenizer_file, output, "--languages", "go")
    assert narrower.returncode == 2
    assert "2 shards belong to no input" in narrower.stderr
    missing = run("starcoder", source, tokenizer_file, output, "--languages", "go,rust")
    assert missing.returncode == 2
    assert f"error: {source}/rust: " in missing.stderr


def test_text(tokenizer_file, tmp_path):
    source = tmp_path / "book.txt"
    source.write_text("The little llama")
    assert run("text", source, tokenizer_file, tmp_path / "a").returncode == 0
    assert open_packed(tmp_path / "a").documents == 1
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"body": "a"}\n')
    assert run("text", tmp_path / "in", tokenizer_file, tmp_path / "b", "--text_key", "body").returncode == 0
    wrong = run("text", tmp_path / "in", tokenizer_file, tmp_path / "c")
    assert wrong.returncode == 2
    assert "line 1: no key 'text', only ['body']: name the one" in wrong.stderr


@pytest.mark.parametrize("name", ["slimpajama", "starcoder", "text"])
def test_no_input_is_an_error_line_and_leaves_nothing(tokenizer_file, tmp_path, name):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    for source, said in [(tmp_path / "gone", "No such file"), (tmp_path / "empty", "no file ending in")]:
        done = run(name, source, tokenizer_file, tmp_path / "out")
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: {source}")
        assert said in line
        assert not (tmp_path / "out").exists()


def test_bad_shards_are_named_at_the_end(slimpajama, undisturbed, tokenizer_file, tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    subprocess.run(["cp", "-r", slimpajama, source], check=True)
    bad = source / "train/chunk1/example_train_0.jsonl.zst", source / "train/chunk2/example_train_2.jsonl.zst"
    whole = [path.read_bytes() for path in bad]
    bad[0].write_bytes(whole[0][:-10])
    bad[1].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n")
    done = run("slimpajama", source, tokenizer_file, output)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == done.stderr.splitlines()[-2:]
    assert [str(path) in line for path, line in zip(bad, errors, strict=True)] == [True, True]
    assert len(files(output)) == 4 * 3 + 2  # and why not, of two
    for path, payload in zip(bad, whole, strict=True):
        path.write_bytes(payload)
    assert "6 shards (2 new)" in run("slimpajama", source, tokenizer_file, output).stdout
    assert files(output) == undisturbed
