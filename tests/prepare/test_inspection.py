import gc
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tinyllama import InputError
from tinyllama.data.packed import ShardWriter, write_manifest
from tinyllama.prepare import inspection
from tinyllama.prepare.inspection import inspect_packed

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    facts = {
        "tokenizer_sha256": "ab" * 32,
        "encoder": "sentencepiece",
        "bos": False,
        "eos": True,
        "bos_id": 1,
        "eos_id": 2,
    }
    for name, documents in {"a": [[5, 6, 2], [2]], "b": [[7, 8, 9, 10, 2]], "c": []}.items():
        with ShardWriter(tmp_path, name, 100) as writer:
            for document in documents:
                writer.add(document)
            writer.finish(**facts)
    write_manifest(tmp_path, ["a", "b", "c"])
    return tmp_path


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "scripts/inspect_packed.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "."},
    )


def test_figures(folder):
    figures = inspect_packed(folder)
    assert re.fullmatch("[0-9a-f]{64}", figures.pop("fingerprint"))
    assert figures == {
        "shards": 3,
        "tokens": 9,
        "bytes": 18,
        "dtype": "uint16",
        "documents": 3,
        "mean_document_length": 3.0,
        "max_document_length": 5,
        "vocab_size": 100,
        "max_token": 10,
        "tokenizer_sha256": "ab" * 32,
        "bos": "none",
        "eos": "2 after each document",
        "documents of 1 to 1 tokens": 1,
        "documents of 2 to 3 tokens": 1,
        "documents of 4 to 7 tokens": 1,
        "most_frequent": "2 33.3%, 5 11.1%, 6 11.1%, 7 11.1%, 8 11.1%, 9 11.1%, 10 11.1%",
        "bos behind bos": "0 times in 9 tokens",
        "eos behind eos": "1 times in 9 tokens",
    }
    assert inspect_packed(folder, verify=True).items() >= figures.items()


def test_verify_names_each_changed_shard(folder):
    path = folder / "b.bin"
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert inspect_packed(folder)["tokens"] == 9  # only reading all of it can tell
    with pytest.raises(InputError, match=r"b.bin is not what was written, its hash differs: delete b.json and rerun"):
        inspect_packed(folder, verify=True)
    (folder / "a.bin").write_bytes(bytes(8))
    with pytest.raises(InputError) as error:
        inspect_packed(folder, verify=True)
    assert [Path(fault.split()[0]).name for fault in error.value.args] == ["a.bin", "b.bin"]


@pytest.mark.parametrize(
    "ends", [b"\x93NUMPY broken", b"", b"\x93NUMPY\x01\0\x10\0{(((((((((((((((", b"zip", [3], [3, 5], [4, 3], [[3, 4]]]
)
def test_damaged_index(folder, ends):
    if ends == b"zip":
        np.savez(folder / "a.npz", np.array([3, 4]))
        (folder / "a.npz").replace(folder / "a.idx.npy")
    elif isinstance(ends, bytes):
        (folder / "a.idx.npy").write_bytes(ends)
    else:
        np.save(folder / "a.idx.npy", np.array(ends, dtype=np.uint64))
    with pytest.raises(InputError, match=r"a.idx.npy is missing or does not fit its .bin: delete a.json and rerun"):
        inspect_packed(folder)


def test_threads_read_every_index(folder):
    # what makes Python 3.11's ast fail in threads: a collector that runs Python in the middle of a parse
    busy = lambda *_: sum(range(200))  # noqa: E731
    gc.callbacks.append(busy)
    before, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(5, 2, 2)
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            shard = {"name": "a", "documents": 2, "tokens": 4}
            found = list(threads.map(lambda _: inspection._document_ends(folder, shard), range(3000)))
    finally:
        gc.set_threshold(*before)
        sys.setswitchinterval(interval)
        gc.callbacks.remove(busy)
    assert all(ends is not None and ends.tolist() == [3, 4] for ends in found)


def test_ids_outside_the_vocabulary_name_the_shard(folder):
    (folder / "b.bin").write_bytes(b"\xff" * 10)
    with pytest.raises(InputError, match=r"b\.bin holds token id 65535, outside its vocabulary of 100: delete b\.json"):
        inspect_packed(folder)


def test_a_manifest_with_wrong_totals(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"documents": 0}))
    assert inspect_packed(folder)["mean_document_length"] == 3.0  # its shards' counts are what is checked
    for subsets in ([], {"C4": 1}):
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {"subsets": subsets}))
        with pytest.raises(InputError, match=r"manifest\.json is damaged \(subsets.* wrong type\): rerun"):
            inspect_packed(folder)


def test_shares_and_text(tokenizer_file, tmp_path):
    from tinyllama.prepare.inputs import Fields, find_inputs
    from tinyllama.prepare.prepare import Options, prepare
    from tinyllama.tokenizer import Tokenizer

    for name, text in {"go": "the llama", "c": "the llama"}.items():
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.txt").write_text(text)
    options = Options(tokenizer_file, tmp_path / "out", encoder="sentencepiece")
    prepare(find_inputs(tmp_path / "in", (".txt",)), Fields(), options)
    figures = inspect_packed(tmp_path / "out", tokenizer=Tokenizer(tokenizer_file))
    assert (figures["share of c"], figures["share of go"]) == ("50.00% of the tokens",) * 2
    assert "the llama" in figures["begins"]
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer_file.read_bytes() + b"\x9a\x3f\x00")
    with pytest.raises(InputError, match="is not what .* was made with"):
        inspect_packed(tmp_path / "out", tokenizer=Tokenizer(other))


def test_upstream_chunks(tmp_path):
    tokens = np.arange(5, dtype="<u2")
    header = b"LITPKDS" + (1).to_bytes(8, "little") + bytes([8]) + len(tokens).to_bytes(8, "little")
    (tmp_path / "chunk.bin").write_bytes(header + tokens.tobytes())
    figures = inspect_packed(tmp_path)
    assert (figures["shards"], figures["tokens"], figures["dtype"]) == (1, 5, "uint16")
    with pytest.raises(InputError, match="carry no hashes: leave --verify out"):
        inspect_packed(tmp_path, verify=True)


def test_command(folder):
    done = command(folder, "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^tokens +9$", done.stdout, re.M)
    assert re.search(r"^tokenizer_sha256 +(ab){32}$", done.stdout, re.M)
    assert done.stdout.splitlines()[-1] == "verified: the 3 shards are what was written"
    (folder / "b.bin").write_bytes(bytes(10))
    done = command(folder, "--verify")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*b\.bin is not what was written.*\n", done.stderr)


def test_command_help_and_bad_arguments(tmp_path):
    done = command("--help")
    assert done.returncode == 0
    assert "--verify" in done.stdout
    done = command(tmp_path, "--verfy")
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*--verfy.*\n", done.stderr)
