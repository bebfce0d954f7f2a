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
from packed import add, change, write_dataset

from tinyllama import InputError
from tinyllama.data import files
from tinyllama.data.packed import ShardWriter, write_manifest
from tinyllama.prepare import inspection, prepare
from tinyllama.prepare.inputs import Fields, find_inputs
from tinyllama.prepare.inspection import inspect_packed

ROOT = Path(__file__).parents[2]
HINT = "rerun the prepare command"


@pytest.fixture
def folder(tmp_path):
    write_dataset(tmp_path, {"a": [[5, 6, 2], [2]], "b": [[7, 8, 9, 10, 2]], "c": []})
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
        "bytes_of_text": "unknown",
        "bytes_per_token": "unknown",
        "over 2,048 tokens": "0.00% of the documents, 0.00% of the tokens",
        "vocab_size": 100,
        "max_token": 10,
        "tokenizer_sha256": "ab" * 32,
        "bos": "none",
        "eos": "2 after each document",
        "documents of 1 to 1 tokens": 1,
        "documents of 2 to 3 tokens": 1,
        "documents of 4 to 7 tokens": 1,
        "most_frequent": "2 33.3%, 5 11.1%, 6 11.1%, 7 11.1%, 8 11.1%, 9 11.1%, 10 11.1%",
        "bos twice in a row": "0 times in a sample of 9 tokens",
        "eos twice in a row": "1 times in a sample of 9 tokens",
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
    assert [Path(problem.split()[0]).name for problem in error.value.args] == ["a.bin", "b.bin"]


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


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "too long"])
def test_an_index_that_is_no_file_of_its_size_is_not_read(folder, kind):
    path = folder / "a.idx.npy"
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(content + bytes(10_000))
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
            found = list(threads.map(lambda _: files.read_index(folder / "a.idx.npy", 2, 4), range(3000)))
    finally:
        gc.set_threshold(*before)
        sys.setswitchinterval(interval)
        gc.callbacks.remove(busy)
    assert all(ends is not None and ends.tolist() == [3, 4] for ends in found)


def test_ids_outside_the_vocabulary_name_the_shard(folder):
    (folder / "b.bin").write_bytes(b"\xff" * 10)
    with pytest.raises(
        InputError, match=r"b\.bin: token 65535 at position 0 is outside the vocabulary of 100: delete b\.json"
    ):
        inspect_packed(folder)


def test_a_manifest_with_wrong_totals(folder):
    path = folder / "manifest.json"
    change(path, documents=0)
    with pytest.raises(InputError, match=r"manifest\.json is damaged \(9 tokens in 0 documents.*\): rerun"):
        inspect_packed(folder)
    change(path, documents=4)
    with pytest.raises(InputError, match=r"manifest\.json is damaged \(documents 4 is not that of its shards\): rerun"):
        inspect_packed(folder)
    for subsets in ([], {"C4": 1}):
        change(path, documents=3, subsets=subsets)
        with pytest.raises(InputError, match=r"manifest\.json is damaged \(subsets.* wrong type or value\): rerun"):
            inspect_packed(folder)


def dataset(folder, shards: dict[str, list[list[int]]], vocab_size: int = 100, **policy):
    """A folder of these shards by name, each a list of documents."""
    folder.mkdir()
    stated = {"tokenizer_sha256": "ab" * 32, "encoder": "none", "bos": False, "eos": True, "bos_id": 1, "eos_id": 2}
    for name, documents in shards.items():
        with ShardWriter(folder, name, vocab_size) as writer:
            for document in documents:
                add(writer, document)
            writer.finish(**stated | policy)
    write_manifest(folder, list(shards))
    return folder


def test_lengths_are_counted_by_powers_of_two(tmp_path):
    lengths = {"a": [0, 1, 2, 3, 4, 7, 8], "b": [1024, 1023, 0, 1]}
    folder = dataset(tmp_path / "x", {name: [[5] * length for length in of] for name, of in lengths.items()})
    figures = inspect_packed(folder)
    assert {key: value for key, value in figures.items() if key.startswith("documents of")} == {
        "documents of 0 to 0 tokens": 2,
        "documents of 1 to 1 tokens": 2,
        "documents of 2 to 3 tokens": 2,
        "documents of 4 to 7 tokens": 2,
        "documents of 8 to 15 tokens": 1,
        "documents of 512 to 1,023 tokens": 1,
        "documents of 1,024 to 2,047 tokens": 1,
    }
    assert (figures["documents"], figures["max_document_length"]) == (11, 1024)
    assert figures["mean_document_length"] == 188.5  # 2073 / 11 is 188.45...
    assert (figures["tokens"], figures["bytes"]) == (2073, 4146)


def test_bos_and_eos_that_follow_one_another(tmp_path):
    documents = [[1, 1, 1, 5, 2], [1, 2, 2, 5, 2]]
    figures = inspect_packed(dataset(tmp_path / "x", {"a": documents}, bos=True))
    assert (figures["bos"], figures["eos"]) == ("1 before each document", "2 after each document")
    assert figures["bos twice in a row"] == "2 times in a sample of 10 tokens"
    assert figures["eos twice in a row"] == "1 times in a sample of 10 tokens"
    assert inspect_packed(dataset(tmp_path / "y", {"a": documents}, eos=False))["eos"] == "none"


def test_the_ten_most_frequent_tokens(tmp_path):
    counts = {token: 20 - abs(token - 16) for token in range(10, 22)}  # 16 is the most frequent, 15 and 17 next
    documents = [[token] * count for token, count in counts.items()]
    total = sum(counts.values())
    expected = sorted(counts, key=lambda token: (-counts[token], token))[:10]
    figures = inspect_packed(dataset(tmp_path / "x", {"a": documents}))
    assert figures["most_frequent"] == ", ".join(f"{token} {counts[token] / total:.1%}" for token in expected)


def test_a_long_stream_is_sampled_from_its_first_token_to_its_last(tmp_path, monkeypatch):
    assert inspection.SAMPLED == 4 * 2**20
    monkeypatch.setattr(inspection, "SAMPLED", 3 * 4096)
    size = 5 * 4096
    stream = np.full(size, 7)
    for start in (0, 2 * 4096, 4 * 4096):  # the three parts
        stream[start] = stream[start + 4095] = 8
    stream[[4096, 2 * 4096 - 1, 3 * 4096, 4 * 4096 - 1]] = 9  # what lies between them, at its ends
    documents = {"a": [stream[:1000].tolist()], "b": [stream[1000:9000].tolist()], "c": [stream[9000:].tolist()]}
    folder = dataset(tmp_path / "x", documents, vocab_size=10, eos_id=7)
    figures = inspect_packed(folder)
    assert figures["most_frequent"] == "7 100.0%, 8 0.0%"
    assert figures["eos twice in a row"] == f"{3 * 4093:,} times in a sample of {3 * 4096:,} tokens"
    for place, name, begin in ((0, "a", 0), (8192, "b", 1000), (size - 1, "c", 9000)):
        path = folder / f"{name}.bin"
        whole = path.read_bytes()
        wrong = np.frombuffer(whole, "<u2").copy()
        wrong[place - begin] = 10  # the first that is outside
        path.write_bytes(wrong.tobytes())
        with pytest.raises(InputError) as error:
            inspect_packed(folder)
        assert str(error.value) == (
            f"{path}: token 10 at position {place - begin} is outside the vocabulary of 10: "
            f"delete {name}.json and rerun the prepare command"
        )
        path.write_bytes(whole)


@pytest.mark.parametrize("place", range(0, 8 * 10, 7))
def test_verify_sees_one_bit(folder, place):
    path = folder / "b.bin"
    changed = bytearray(path.read_bytes())
    changed[place // 8] ^= 1 << place % 8
    path.write_bytes(changed)
    with pytest.raises(InputError) as error:
        inspect_packed(folder, verify=True)
    assert error.value.args == (f"{path} is not what was written, its hash differs: delete b.json and {HINT}",)


def test_verify_sees_another_end_of_a_document(folder):
    np.save(folder / "a.idx.npy", np.array([2, 4], dtype=np.uint64))  # 3 and 4 are right
    assert inspect_packed(folder)["documents"] == 3
    with pytest.raises(InputError) as error:
        inspect_packed(folder, verify=True)
    path = folder / "a.idx.npy"
    assert error.value.args == (f"{path} is not what was written, its hash differs: delete a.json and {HINT}",)
    change(folder / "a.json", index_blake2b=None)  # of a version that recorded none
    assert inspect_packed(folder, verify=True)["documents"] == 3


@pytest.mark.parametrize("ends", [[3, 4, 4], [2, 5], [3, 3], [-1, 4], [[3], [4]], [4], []], ids=str)
def test_ends_that_these_documents_cannot_have(folder, ends):
    np.save(folder / "a.idx.npy", np.array(ends, dtype=np.int64))  # 3 and 4 are right
    with pytest.raises(InputError, match=r"a.idx.npy is missing or does not fit its .bin: delete a.json and rerun"):
        inspect_packed(folder)


def test_every_error_of_a_folder_at_once(folder):
    (folder / "a.idx.npy").unlink()
    (folder / "a.bin").write_bytes(bytes(8))
    np.save(folder / "b.idx.npy", np.array([4]))
    with pytest.raises(InputError) as error:
        inspect_packed(folder, verify=True)
    index, content = ".idx.npy is missing or does not fit its .bin", ".bin is not what was written, its hash differs"
    found = [("a", index), ("a", content), ("b", index)]
    assert error.value.args == tuple(f"{folder / name}{what}: delete {name}.json and {HINT}" for name, what in found)


def test_shares_and_text(tokenizer_file, tmp_path):
    from tinyllama.prepare.inputs import Fields, find_inputs
    from tinyllama.prepare.prepare import Options, prepare
    from tinyllama.tokenizer import Tokenizer

    tokenizer = Tokenizer(tokenizer_file)
    texts = {"go": "the llama", "c": "one two three, " * 40}
    for name, text in texts.items():
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.txt").write_text(text)
    options = Options(tokenizer_file, tmp_path / "out", encoder="sentencepiece")
    prepare(find_inputs(tmp_path / "in", (".txt",)), Fields(), options)
    figures = inspect_packed(tmp_path / "out", tokenizer=Tokenizer(tokenizer_file))
    ids = {name: [*tokenizer.encode(text), 2] for name, text in texts.items()}
    stream = ids["c"] + ids["go"]
    for name, part in ids.items():
        assert figures[f"share of {name}"] == f"{len(part) / len(stream):.2%} of the tokens"
    assert figures["begins"] == repr(tokenizer.decode(stream[:100]))
    counts = {i: stream.count(i) for i in sorted(set(stream))}
    frequent = sorted(counts, key=lambda i: -counts[i])[:10]
    assert figures["most_frequent"] == ", ".join(
        f"{tokenizer.decode([i])!r} {counts[i] / len(stream):.1%}" for i in frequent
    )
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer_file.read_bytes() + b"\x9a\x3f\x00")
    with pytest.raises(InputError, match="is not what .* was made with"):
        inspect_packed(tmp_path / "out", tokenizer=Tokenizer(other))


def prepared(tmp_path: Path, tokenizer_file: Path, rows: dict[str, list[tuple[str, str]]]) -> Path:
    """A folder prepared from SlimPajama's records, (subset, text) each, by file."""
    (tmp_path / "in").mkdir()
    for name, records in rows.items():
        lines = [json.dumps({"text": text, "meta": {"redpajama_set_name": subset}}) for subset, text in records]
        (tmp_path / "in" / name).write_text("\n".join(lines))
    options = prepare.Options(tokenizer_file, tmp_path / "out", encoder="sentencepiece")
    prepare.prepare(find_inputs(tmp_path / "in", (".jsonl",)), Fields(subsets=True), options)
    return tmp_path / "out"


@pytest.mark.usefixtures("one_process")
def test_bytes_per_token_and_what_is_longer_than_the_context(tokenizer_file, tmp_path, monkeypatch):
    # digits are tokens of their own, and a blank is put before each text: "123" is four tokens, and eos
    rows = {
        "a.jsonl": [("Web", "1" * 9), ("Book", "2" * 4), ("Web", "3" * 8), ("Book", "4" * 18)],  # 11, 6, 10, 20 tokens
        "b.jsonl": [("Book", "漢"), ("Book", "5" * 8)],  # ▁, three bytes and eos: 5 tokens, 3 bytes; 10 tokens
        "c.jsonl": [("Web", "6" * 9)],  # 11 tokens
    }
    monkeypatch.setattr(prepare, "CONTEXTS", (1, 10))
    folder = prepared(tmp_path, tokenizer_file, rows)
    figures = inspect_packed(folder, block_size=10)
    assert figures["tokens"] == 73
    assert (figures["bytes_of_text"], figures["bytes_per_token"]) == (59, round(59 / 73, 3))
    assert figures["over 10 tokens"] == f"{3 / 7:.2%} of the documents, {42 / 73:.2%} of the tokens"
    assert figures["bytes_per_token of Book"] == round(33 / 41, 3)
    assert figures["over 10 tokens of Book"] == f"25.00% of the documents, {20 / 41:.2%} of the tokens"
    assert figures["bytes_per_token of Web"] == round(26 / 32, 3)
    assert figures["over 10 tokens of Web"] == f"{2 / 3:.2%} of the documents, {22 / 32:.2%} of the tokens"
    figures = inspect_packed(folder, block_size=9)
    assert figures["over 9 tokens"] == f"{5 / 7:.2%} of the documents, {62 / 73:.2%} of the tokens"
    assert figures["over 9 tokens of Web"] == "not recorded"
    assert (
        inspect_packed(folder, block_size=1)["over 1 tokens of Web"]
        == "100.00% of the documents, 100.00% of the tokens"
    )

    done = command(folder, "--block_size", 10)
    assert re.search(r"^over 10 tokens of Book +25\.00% of the documents, 48\.78% of the tokens$", done.stdout, re.M)
    done = command(folder, "--block_size", 0)
    assert (done.returncode, done.stderr) == (2, "error: --block_size 0 is not a context length: give 1 or more\n")


@pytest.mark.usefixtures("one_process")
def test_what_an_older_folder_does_not_record_is_unknown(tokenizer_file, tmp_path):
    rows = {"a.jsonl": [("Web", "1"), ("Book", "2")], "b.jsonl": [("Web", "1")]}
    folder = prepared(tmp_path, tokenizer_file, rows)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for key in ("bytes", "documents_over_2048"):
        del manifest["subsets"]["Web"][key]
    change(folder / "manifest.json", subsets=manifest["subsets"])
    figures = inspect_packed(folder)
    assert figures["over 2,048 tokens"] == "0.00% of the documents, 0.00% of the tokens"
    assert figures["over 2,048 tokens of Book"] == "0.00% of the documents, 0.00% of the tokens"
    assert figures["over 2,048 tokens of Web"] == "not recorded"
    assert (figures["bytes_per_token"], figures["bytes_per_token of Web"]) == ("unknown", "unknown")
    assert figures["bytes_per_token of Book"] == round(1 / 3, 3)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrong", [-5, True, "x", None, 1.5, [3]], ids=repr)
@pytest.mark.parametrize("key", ["bytes", "documents", "documents_over_2048", "tokens_over_2048"])
def test_figures_that_are_no_counts_are_not_shown(tokenizer_file, tmp_path, wrong, key):
    folder = prepared(tmp_path, tokenizer_file, {"a.jsonl": [("Web", "1")]})
    subsets = json.loads((folder / "manifest.json").read_bytes())["subsets"]
    subsets["Web"][key] = wrong
    change(folder / "manifest.json", subsets=subsets)
    figures = inspect_packed(folder)
    if key == "bytes":
        expected = {"bytes_of_text": "unknown", "bytes_per_token": "unknown", "bytes_per_token of Web": "unknown"}
    else:
        expected = {"bytes_of_text": 1, "over 2,048 tokens of Web": "not recorded"}
    assert figures.items() >= expected.items()


def test_verify_reads_what_a_shard_says_of_itself(folder):
    (folder / "b.json").write_text("[]")
    assert inspect_packed(folder)["tokens"] == 9  # whoever trains needs none of it
    with pytest.raises(InputError, match=r"b\.json is damaged .*: delete b\.json and rerun the prepare command"):
        inspect_packed(folder, verify=True)


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


def test_the_command_shows_text_and_large_numbers(tokenizer_file, tmp_path, script):
    from tinyllama.tokenizer import Tokenizer

    tokenizer = Tokenizer(tokenizer_file)
    documents = [[*tokenizer.encode("the llama"), 2]] * 1000
    folder = dataset(tmp_path / "x", {"a": documents[1:], "b": documents[:1]}, 400, tokenizer_sha256=tokenizer.sha256)
    code, out, err = script("inspect_packed", folder, "--tokenizer", tokenizer_file)
    assert (code, err) == (0, "")
    figures = dict(re.split("  +", line, maxsplit=1) for line in out.splitlines())
    tokens = 1000 * len(documents[0])
    assert (figures["shards"], figures["documents"], figures["tokens"]) == ("2", "1,000", f"{tokens:,}")
    assert figures["mean_document_length"] == f"{len(documents[0])}.0"
    assert figures["begins"].startswith("'the llama the llama")
    assert not any(line.startswith("verified") for line in out.splitlines())
    assert len({line.index(value) for line, value in zip(out.splitlines(), figures.values(), strict=True)}) == 1
    _, out, _ = script("inspect_packed", folder, "--verify")
    assert out.splitlines()[-1] == "verified: the 2 shards are what was written"
    assert "begins" not in out
