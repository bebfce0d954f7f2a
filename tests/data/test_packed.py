import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from packed import POLICY, add, write_dataset, write_shard

from tinyllama import InputError
from tinyllama.data import metadata
from tinyllama.data.packed import ShardWriter, open_packed, read_shard_info, write_manifest


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def hash_of_the_rest(content: dict) -> str:
    rest = {key: value for key, value in sorted(content.items()) if key != "metadata_blake2b"}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=32).hexdigest()


# the bytes


def test_exact_bytes_and_facts(tmp_path):
    info = write_shard(
        tmp_path, "a.jsonl.zst", [[1, 2, 3], np.array([258], dtype=np.uint32)], vocab_size=300, dropped=7
    )
    assert names(tmp_path) == ["a.jsonl.zst.bin", "a.jsonl.zst.idx.npy", "a.jsonl.zst.json"]
    assert (tmp_path / "a.jsonl.zst.bin").read_bytes() == bytes([1, 0, 2, 0, 3, 0, 2, 1])
    ends = np.load(tmp_path / "a.jsonl.zst.idx.npy")
    assert (ends.dtype, ends.tolist()) == (np.dtype("<u8"), [3, 4])
    assert info == json.loads((tmp_path / "a.jsonl.zst.json").read_text())
    assert info == read_shard_info(tmp_path, "a.jsonl.zst")
    assert info == POLICY | {
        "metadata_blake2b": hash_of_the_rest(info),
        "format_version": 1,
        "name": "a.jsonl.zst",
        "dtype": "uint16",
        "vocab_size": 300,
        "tokens": 4,
        "documents": 2,
        "max_token": 258,
        "dropped": 7,
        "blake2b": hashlib.blake2b(bytes([1, 0, 2, 0, 3, 0, 2, 1]), digest_size=32).hexdigest(),
        "index_blake2b": hashlib.blake2b((tmp_path / "a.jsonl.zst.idx.npy").read_bytes(), digest_size=32).hexdigest(),
    }


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "bytes_of_last"),
    [(65535, "uint16", b"\xfe\xff"), (65536, "uint32", b"\xff\xff\0\0"), (65537, "uint32", b"\0\0\1\0")],
)
def test_dtype_at_the_border(tmp_path, vocab_size, dtype, bytes_of_last):
    info = write_shard(tmp_path, "a", [[vocab_size - 1]], vocab_size)
    write_manifest(tmp_path, ["a"])
    assert info["dtype"] == dtype
    assert (tmp_path / "a.bin").read_bytes() == bytes_of_last
    dataset = open_packed(tmp_path)
    assert dataset.dtype == np.dtype(dtype)
    assert dataset.read(0, 1).tolist() == [vocab_size - 1]
    assert dataset.max_token == vocab_size - 1


@pytest.mark.parametrize("bad", [100, 2**40, -1])
@pytest.mark.parametrize("kind", [list, np.array])
def test_token_outside_the_vocabulary(tmp_path, bad, kind):
    with pytest.raises(InputError, match=rf"s: token {bad} at position 1 is outside the vocabulary of 100: "):  # noqa: SIM117
        with ShardWriter(tmp_path, "s", 100) as writer:
            add(writer, kind([99, bad, 5]))
    assert names(tmp_path) == []


def test_empty_document_and_empty_shard(tmp_path):
    info = write_shard(tmp_path, "a", [[], [5], []])
    assert (info["tokens"], info["documents"], info["max_token"]) == (1, 3, 5)
    assert np.load(tmp_path / "a.idx.npy").tolist() == [0, 1, 1]
    info = write_shard(tmp_path, "b", [])
    assert (info["tokens"], info["documents"], info["max_token"]) == (0, 0, -1)
    assert write_manifest(tmp_path, ["b", "a"])["max_token"] == 5
    assert open_packed(tmp_path).read(0, 1).tolist() == [5]


def test_documents_come_in_pieces(tmp_path):
    with ShardWriter(tmp_path, "a", 100) as writer:
        writer.append(np.array([1, 99, 3, 4]), [2])  # a document, and the beginning of another
        writer.append(np.array([5]), [])
        writer.append(np.array([6, 7, 8], dtype=np.uint32), np.array([1, 2]))
        info = writer.finish(**POLICY)
    assert np.fromfile(tmp_path / "a.bin", "<u2").tolist() == [1, 99, 3, 4, 5, 6, 7, 8]
    assert np.load(tmp_path / "a.idx.npy").tolist() == [2, 6, 7]
    assert (info["tokens"], info["documents"], info["max_token"]) == (8, 3, 99)


def test_facts_cannot_replace_counts(tmp_path):
    with pytest.raises(TypeError, match="tokens"):
        write_shard(tmp_path, "a", [[1]], tokens=9)
    assert names(tmp_path) == []


# writers that stop, meet or follow each other


def test_abandoned_writer_leaves_nothing(tmp_path):
    with ShardWriter(tmp_path, "a", 100) as writer:
        add(writer, [1, 2])
        assert [name.endswith(".tmp") for name in names(tmp_path)] == [True]
    assert names(tmp_path) == []
    with pytest.raises(KeyError), ShardWriter(tmp_path, "a", 100) as writer:
        raise KeyError
    assert names(tmp_path) == []


def test_two_writers_on_one_shard(tmp_path):
    with ShardWriter(tmp_path, "a", 100) as one, ShardWriter(tmp_path, "a", 100) as two:
        add(one, [1, 2])
        add(two, [1, 2])
        first = one.finish(**POLICY)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".tmp"}
        assert two.finish(**POLICY) == first
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert read_shard_info(tmp_path, "a") == first


@pytest.mark.parametrize("step", range(4))
def test_json_never_describes_other_tokens(tmp_path, monkeypatch, step):
    # stop the second preparation of a shard at each rename: what is left is whole and old, whole and new, or not done
    old = write_shard(tmp_path, "a", [[1, 2]])
    real, renames = os.replace, []

    def replace(source, target):
        if len(renames) == step:
            raise OSError("killed")
        renames.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    if step < 3:
        with pytest.raises(OSError, match="killed"):
            write_shard(tmp_path, "a", [[3, 4]])
        assert read_shard_info(tmp_path, "a") is None
    else:
        assert write_shard(tmp_path, "a", [[3, 4]]) != old
        assert (tmp_path / "a.bin").read_bytes() == bytes([3, 0, 4, 0])
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
    assert [Path(target).name for target in renames] == ["a.idx.npy", "a.bin", "a.json"][:step]


def test_every_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def synced(handle):
        events.append(("synced", os.fstat(handle).st_ino, os.fstat(handle).st_size))
        fsync(handle)

    def renamed(source, target):
        events.append((Path(target).name, os.stat(source).st_ino, os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_dataset(tmp_path, {"a": [list(range(90))]})
    folder = tmp_path.stat().st_ino
    order = ["a.idx.npy", "a.bin", "a.json", "manifest.json"]
    assert [name for name, *_ in events if name != "synced"] == order
    for file in order:
        (place,) = (i for i, (name, *_) in enumerate(events) if name == file)
        size = (tmp_path / file).stat().st_size
        assert events[place][2] == size  # nothing is left in a buffer
        assert ("synced", events[place][1], size) in events[:place], file
        assert events[place + 1][:2] == ("synced", folder), file  # and so is the name, before what comes next


def test_file_modes_follow_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        write_dataset(tmp_path, {"a": [[1]]})
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


def test_read_shard_info_of_a_damaged_shard(tmp_path):
    assert read_shard_info(tmp_path, "a") is None
    write_shard(tmp_path, "a", [[1, 2, 3]])
    (tmp_path / "a.idx.npy").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"a.idx.npy is missing: delete a.json and rerun"):
        read_shard_info(tmp_path, "a")
    (tmp_path / "moved").rename(tmp_path / "a.idx.npy")
    (tmp_path / "a.bin").write_bytes(b"12345")
    with pytest.raises(InputError, match=r"a.bin has 5 bytes, not the 6 it was written with: delete a.json and rerun"):
        read_shard_info(tmp_path, "a")
    (tmp_path / "a.bin").unlink()
    with pytest.raises(InputError, match=r"a.bin is missing: delete a.json"):
        read_shard_info(tmp_path, "a")
    for text in ("", "[]", "{}", '{"format_version": 1'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(InputError, match=r"a.json is damaged .*: delete a.json and rerun"):
            read_shard_info(tmp_path, "a")
    (tmp_path / "a.json").write_text('{"format_version": 2, "dtype": "uint16"}')
    with pytest.raises(InputError, match=r"a.json: format version 2 .* is not known here"):
        read_shard_info(tmp_path, "a")


# the manifest


def test_manifest_says_it_all_in_order_of_name(tmp_path):
    b, a, z = (write_shard(tmp_path, name, [[i, i], [i]]) for i, name in enumerate(["b", "a", "Z"], start=4))
    manifest = write_manifest(tmp_path, ["b", "a", "Z"])
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    keys = ("name", "tokens", "documents", "max_token", "blake2b")
    assert manifest == POLICY | {
        "metadata_blake2b": hash_of_the_rest(manifest),
        "format_version": 1,
        "dtype": "uint16",
        "vocab_size": 100,
        "tokens": 9,
        "documents": 6,
        "max_token": 6,
        "shards": [{key: info[key] for key in keys} for info in (z, a, b)],
        "fingerprint": manifest["fingerprint"],
    }
    dataset = open_packed(str(tmp_path))
    assert dataset.read(0, 9).tolist() == [6, 6, 6, 5, 5, 5, 4, 4, 4]
    assert (dataset.path, dataset.fingerprint) == (tmp_path, manifest["fingerprint"])
    assert (dataset.vocab_size, dataset.tokens, dataset.documents, dataset.max_token) == (100, 9, 6, 6)
    assert dataset.tokenizer_sha256 == "ab" * 32
    assert (dataset.bos, dataset.eos, dataset.bos_id, dataset.eos_id) == (False, True, 1, 2)


def test_the_largest_token_of_any_shard(tmp_path):
    manifest = write_dataset(tmp_path, {"a": [[4]], "b": [[7, 1]], "c": [[2, 2], [5]]})
    assert (manifest["max_token"], manifest["tokens"], manifest["documents"]) == (7, 6, 4)
    dataset = open_packed(tmp_path)
    assert (dataset.max_token, dataset.tokens, dataset.documents) == (7, 6, 4)


def test_manifest_needs_done_shards(tmp_path):
    with pytest.raises(InputError, match="no shard to list"):
        write_manifest(tmp_path, [])
    write_shard(tmp_path, "a", [[1]])
    with pytest.raises(InputError, match="shard b is not done: rerun"):
        write_manifest(tmp_path, ["a", "b"])
    assert "manifest.json" not in names(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer_sha256", "cd"),
        ("encoder", "tokenizers"),
        ("eos", False),
        ("bos", True),
        ("eos_id", 3),
        ("bos_id", None),
    ],
)
def test_shards_that_disagree(tmp_path, key, value):
    for name in "abc":
        write_shard(tmp_path, name, [[1]], **({key: value} if name == "c" else {}))
    with pytest.raises(InputError, match=f"{key} is {POLICY[key]} in shard a and {value} in shard c: prepare each"):
        write_manifest(tmp_path, ["c", "b", "a"])


def test_shards_of_two_vocabularies_disagree(tmp_path):
    write_shard(tmp_path, "a", [[1]], vocab_size=100)
    write_shard(tmp_path, "b", [[1]], vocab_size=101)
    with pytest.raises(InputError, match="vocab_size is 100 in shard a and 101 in shard b"):
        write_manifest(tmp_path, ["a", "b"])


def fingerprint(folder: Path, shards: dict[str, list], vocab_size: int = 100, **facts) -> str:
    folder.mkdir()
    for name, documents in shards.items():
        write_shard(folder, name, documents, vocab_size, **facts)
    return write_manifest(folder, list(shards))["fingerprint"]


def test_fingerprint_is_of_the_token_stream(tmp_path):
    base = fingerprint(tmp_path / "base", {"a": [[1, 2], [3]], "b": [[4]]})
    same = [
        fingerprint(tmp_path / "again", {"b": [[4]], "a": [[1, 2], [3]]}),
        fingerprint(tmp_path / "facts", {"a": [[1, 2], [3]], "b": [[4]]}, encoder_version="9", dropped=3),
    ]
    assert set(same) == {base}
    others = [
        {"a": [[1, 2], [3]], "b": [[5]]},
        {"a": [[2, 1], [3]], "b": [[4]]},
        {"a": [[1, 2], [3]]},
        {"a": [[4]], "b": [[1, 2], [3]]},
        {"a": [[1, 2], [3], [4]]},
        {"a": [[1, 2], [3]], "b": [[4], [0]]},
    ]
    changed = [fingerprint(tmp_path / f"other{i}", shards) for i, shards in enumerate(others)]
    changed.append(fingerprint(tmp_path / "uint32", {"a": [[1, 2], [3]], "b": [[4]]}, vocab_size=70000))
    assert len({base, *changed}) == 1 + len(changed)
    # the same bytes, read as two tokens or as one
    assert fingerprint(tmp_path / "two", {"a": [[1, 0]]}) != fingerprint(
        tmp_path / "one", {"a": [[1]]}, vocab_size=70000
    )


def test_the_fingerprint_never_changes(tmp_path):
    # runs that resume compare it with the one they started with: a change here refuses them all
    write_dataset(tmp_path, {"a": [[1, 2], [3]], "b": [[4]]})
    hashes = [hashlib.blake2b(bytes(tokens), digest_size=32).hexdigest() for tokens in ([1, 0, 2, 0, 3, 0], [4, 0])]
    stream = f'{{"dtype": "uint16", "shards": [[3, "{hashes[0]}"], [1, "{hashes[1]}"]]}}'
    expected = hashlib.blake2b(stream.encode(), digest_size=32).hexdigest()
    assert open_packed(tmp_path).fingerprint == json.loads((tmp_path / "manifest.json").read_text())["fingerprint"]
    assert open_packed(tmp_path).fingerprint == expected
    stream = b'{"dtype": "uint32", "shards": [[5, "ab"]]}'
    expected = hashlib.blake2b(stream, digest_size=32).hexdigest()
    assert metadata.fingerprint("uint32", [{"name": "a", "tokens": 5, "documents": 1, "blake2b": "ab"}]) == expected


def test_facts_are_the_same_bytes_whatever_their_order(tmp_path):
    for number, more in enumerate(({"x": 1, "y": {"a": 1, "b": 2}}, {"y": {"b": 2, "a": 1}, "x": 1})):
        (tmp_path / str(number)).mkdir()
        write_shard(tmp_path / str(number), "a", [[1]], **more)
        write_manifest(tmp_path / str(number), ["a"], **more)
    for name in ("a.json", "manifest.json"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
