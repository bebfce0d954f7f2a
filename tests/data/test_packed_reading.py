import os
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import change, write_dataset, write_shard

from tinyllama import InputError
from tinyllama.data.packed import OPEN_FILES, check_datasets, open_all, open_packed, write_manifest

SHARD = {"name": "a", "tokens": 3, "documents": 1, "max_token": 3, "blake2b": "0" * 64}


@pytest.fixture
def no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@settings(max_examples=40)
@given(data=st.data(), lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any))
def test_reads_are_slices_of_the_concatenation(shared, data, lengths):
    rng = np.random.default_rng(len(lengths))
    shards = {f"{i:03}": [rng.integers(0, 99, size)] for i, size in enumerate(lengths)}
    write_dataset(shared, shards)
    stream = np.concatenate([document for documents in shards.values() for document in documents])
    dataset = open_packed(shared)
    assert dataset.tokens == len(stream)
    for _ in range(8):
        start = data.draw(st.integers(0, len(stream)))
        count = data.draw(st.integers(0, len(stream) - start))
        np.testing.assert_array_equal(dataset.read(start, count), stream[start : start + count])
    block_size = data.draw(st.integers(1, 12))
    count = dataset.num_blocks(block_size)
    assert count == len(stream) // (block_size + 1)
    expected = stream[: count * (block_size + 1)].reshape(count, block_size + 1)
    order = np.array(data.draw(st.permutations(range(count))), dtype=np.int64)
    np.testing.assert_array_equal(dataset.blocks(order, block_size), expected[order])


def test_block_layout(tmp_path):
    write_dataset(tmp_path, {"a": [[0, 1, 2, 3]], "b": [[4]], "c": [[5, 6, 7, 8, 9, 10]]})
    dataset = open_packed(tmp_path)
    assert dataset.num_blocks(2) == 3
    blocks = dataset.blocks(np.array([2, 0, 1, 1]), 2)
    assert blocks.dtype == np.dtype("<u2")
    assert blocks.tolist() == [[6, 7, 8], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
    assert dataset.num_blocks(10) == 1
    assert dataset.num_blocks(11) == 0
    assert dataset.blocks(np.array([], dtype=np.int64), 2).shape == (0, 3)


def test_outside_the_stream(tmp_path):
    write_dataset(tmp_path, {"a": [[0, 1, 2, 3]]})
    dataset = open_packed(tmp_path)
    for start, count in ((-1, 1), (0, 5), (4, 1), (2, -1)):
        with pytest.raises(IndexError):
            dataset.read(start, count)
    for block in (-1, 2):
        with pytest.raises(IndexError):
            dataset.blocks(np.array([block]), 1)
    assert dataset.read(4, 0).tolist() == []


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in Linux's /proc")
def test_thousands_of_shards_hold_few_handles(tmp_path, no_fsync):
    write_dataset(tmp_path, {f"{i:05}": [[i % 100, i // 100]] for i in range(2000)})
    dataset = open_packed(tmp_path)
    assert dataset.read(0, 4000).tolist() == [token for i in range(2000) for token in (i % 100, i // 100)]
    handles = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert sum(handle.startswith(str(tmp_path)) for handle in handles) == OPEN_FILES
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()  # what is mapped counts as this process's memory


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in Linux's /proc")
@pytest.mark.parametrize(("limit", "each"), [(60, 10), (7, 1), (1024, 20)])
def test_many_datasets_share_the_files_that_may_be_open(tmp_path, no_fsync, monkeypatch, limit, each):
    folders = [tmp_path / name for name in "abc"]
    for n, folder in enumerate(folders):
        folder.mkdir()
        write_dataset(folder, {f"{i:05}": [[i, n]] for i in range(20)})
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, 4096))
    ((a, b), (c,)) = open_all([str(folder) for folder in folders[:2]], [str(folders[2])])
    for n, dataset in enumerate((a, b, c)):
        assert dataset.read(0, 40).tolist() == [token for i in range(20) for token in (i, n)]
    handles = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert [sum(handle.startswith(str(folder)) for handle in handles) for folder in folders] == [each] * 3


@pytest.mark.parametrize("size", [0, 5, 6])
def test_a_file_that_shrinks_while_it_is_read(tmp_path, size):
    write_dataset(tmp_path, {"a": [[1, 2]], "b": [[3, 4, 5, 6]]})
    dataset = open_packed(tmp_path)
    os.truncate(tmp_path / "b.bin", size)
    assert dataset.read(0, 2).tolist() == [1, 2]
    with pytest.raises(InputError, match=r"b\.bin has become shorter since it was opened: prepare the folder again"):
        dataset.read(0, 6)


# folders that are not whole


def test_open_what_is_not_a_dataset(tmp_path):
    with pytest.raises(InputError, match="absent is not a folder: give the --output"):
        open_packed(tmp_path / "absent")
    with pytest.raises(InputError, match="holds no packed data"):
        open_packed(tmp_path)
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(InputError, match="holds no packed data"):
        open_packed(tmp_path)


def test_open_without_manifest_names_the_remedy(tmp_path):
    write_shard(tmp_path, "a", [[1]])
    with pytest.raises(InputError, match=r"manifest.json is missing: rerun the prepare command"):
        open_packed(tmp_path)


def test_open_after_a_kill_in_the_first_shard(tmp_path):
    (tmp_path / "a.bin.0123abcd.tmp").write_bytes(b"12")
    with pytest.raises(InputError, match=r"manifest.json is missing: rerun the prepare command"):
        open_packed(tmp_path)


def test_open_no_tokens(tmp_path):
    write_dataset(tmp_path, {"a": []})
    with pytest.raises(InputError, match="holds no tokens"):
        open_packed(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 7, 8])
def test_open_wrong_size(tmp_path, size):
    write_dataset(tmp_path, {"a": [[1, 2, 3]], "b": [[1, 2, 3]]})
    (tmp_path / "b.bin").write_bytes(bytes(size))
    with pytest.raises(InputError, match=rf"b.bin has {size} bytes, not the 6 .*: delete b.json and rerun"):
        open_packed(tmp_path)
    (tmp_path / "b.bin").unlink()
    with pytest.raises(InputError, match=r"b.bin is missing: delete b.json and rerun"):
        open_packed(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2 with uint16 tokens is not known here"),
        ({"dtype": "uint64"}, "format version 1 with uint64 tokens is not known here"),
        ({"shards": []}, "it lists no shards"),
        ({"fingerprint": "0" * 64}, "its fingerprint is not that of its shards"),
        ({"fingerprint": "0"}, "fingerprint is missing or of a wrong type or value"),
        ({"documents": 2}, "documents 2 is not that of its shards"),
        ({"tokens": 4}, "tokens 4 is not that of its shards"),
        ({"max_token": 4}, "max_token 4 is not that of its shards"),
        ({"vocab_size": 3}, "max_token 3 is outside the vocabulary of 3"),
        ({"vocab_size": 65536}, "a vocabulary of 65536 is not stored as uint16"),
        ({"eos_id": 100}, "eos_id 100 is outside the vocabulary of 100"),
        ({"eos_id": None}, "eos_id is null, and documents have eos"),
        ({"bos": True, "bos_id": None}, "bos_id is null, and documents have bos"),
        ({"dtype": []}, r"format version 1 with \[\] tokens is not known here"),
        *(({key: None}, f"{key} is missing") for key in ("shards", "fingerprint", "vocab_size")),
        *(({"shards": [SHARD | {key: {}}]}, rf"shards\[0\]\.{key} is missing or of a wrong") for key in SHARD),
        ({"shards": {"a": SHARD}}, "shards is missing or of a wrong type"),
        ({"subsets": {"C4": {}}}, r"subsets\.C4\.tokens is missing"),
    ],
)
def test_open_changed_manifest(tmp_path, changes, message):
    write_dataset(tmp_path, {"a": [[1, 2, 3]]})
    change(tmp_path / "manifest.json", **changes)
    with pytest.raises(InputError, match=rf"manifest.json(:| is damaged) \(?{message}.*: (rerun|use)"):
        open_packed(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, None])
def test_open_what_is_no_manifest(tmp_path, content):
    write_dataset(tmp_path, {"a": [[1, 2, 3]]})
    (tmp_path / "manifest.json").unlink()
    if content is None:
        (tmp_path / "manifest.json").mkdir()
    else:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest.json is damaged \(.*\): rerun the prepare command"):
        open_packed(tmp_path)


def test_open_a_shard_that_links_to_itself(tmp_path):
    write_dataset(tmp_path, {"a": [[1, 2, 3]]})
    (tmp_path / "a.bin").unlink()
    (tmp_path / "a.bin").symlink_to("a.bin")
    with pytest.raises(InputError, match=r"a.bin cannot be read \(.*symbolic links\): delete a.json and rerun"):
        open_packed(tmp_path)


def test_open_truncated_manifest(tmp_path):
    write_dataset(tmp_path, {"a": [[1, 2, 3]]})
    path = tmp_path / "manifest.json"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match=r"manifest.json is damaged .*: rerun"):
        open_packed(tmp_path)


def test_datasets_that_a_model_cannot_read(tmp_path):
    for name, documents, vocab_size, tokenizer in (("a", [[1] * 9], 100, "x"), ("b", [[1] * 8], 101, "y")):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name, name, documents, vocab_size, tokenizer_sha256=tokenizer)
        write_manifest(tmp_path / name, [name])
    a, b = open_packed(tmp_path / "a"), open_packed(tmp_path / "b")
    check_datasets([a, a], vocab_size=100, block_size=8)
    with pytest.raises(InputError) as error:
        check_datasets([a, b], vocab_size=100, block_size=8)
    vocabulary, tokens, tokenizers = error.value.args
    assert f"{tmp_path / 'b'} was made with a vocabulary of 101 and model.vocab_size is 100" in vocabulary
    assert f"{tmp_path / 'b'} holds 8 tokens and a block takes 9" in tokens
    assert f"{tmp_path / 'a'} and {tmp_path / 'b'} were made with different tokenizers" in tokenizers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bos": True}, r"one was prepared with bos False, eos True \(ids 1, 2\) and .*other with bos True, eos True"),
        ({"eos": False}, r"one was prepared with bos False, eos True \(.*other with bos False, eos False \(ids 1, 2\)"),
        ({"bos_id": 3}, r"\(ids 1, 2\) and .*other with bos False, eos True \(ids 3, 2\): prepare them alike"),
        ({"eos_id": 0}, r"\(ids 1, 2\) and .*other with bos False, eos True \(ids 1, 0\): prepare them alike"),
        ({"bos_id": None}, r"\(ids 1, 2\) and .*other with bos False, eos True \(ids None, 2\): prepare them alike"),
        (
            {"eos": False, "eos_id": None},
            r"\(ids 1, 2\) and .*other with bos False, eos False \(ids 1, None\): ",
        ),
    ],
)
def test_datasets_must_agree_on_bos_and_eos(packed_folder, changes, message):
    one = open_packed(packed_folder([[list(range(5, 40))]], "one"))
    other = open_packed(packed_folder([[list(range(5, 40))]], "other", **changes))
    check_datasets([one, one], vocab_size=400, block_size=8)
    with pytest.raises(InputError, match=message):
        check_datasets([one, one, other], vocab_size=400, block_size=8)


@pytest.mark.parametrize("vocab_size", [399, 401])
def test_the_vocabulary_must_be_the_models(packed_folder, vocab_size):
    one = open_packed(packed_folder([[list(range(5, 40))]]))
    with pytest.raises(InputError, match=f"a vocabulary of 400 and model.vocab_size is {vocab_size}: set"):
        check_datasets([one], vocab_size=vocab_size, block_size=8)


def test_chunk_files_of_upstream_go_with_any_tokenizer(packed_folder, tmp_path):
    one = open_packed(packed_folder([[list(range(5, 40))]]))
    (tmp_path / "lit").mkdir()
    (tmp_path / "lit/a.bin").write_bytes(struct.pack("<7sQBQ", b"LITPKDS", 1, 8, 9) + bytes(18))
    lit = open_packed(tmp_path / "lit")
    check_datasets([lit, one, lit], vocab_size=400, block_size=8)
    with pytest.raises(InputError, match=r"lit holds 9 tokens and a block takes 10"):
        check_datasets([one, lit], vocab_size=400, block_size=9)


def test_a_read_that_gives_less_than_asked_for_is_gone_on_with(tmp_path, monkeypatch):
    write_dataset(tmp_path, {"a": [list(range(40))], "b": [list(range(40, 60))]})
    preadv = os.preadv
    # one call gives 2 GiB at most, and a network's file system whatever it likes: here a token and a half
    monkeypatch.setattr(os, "preadv", lambda file, into, at: preadv(file, [memoryview(into[0]).cast("B")[:3]], at))
    dataset = open_packed(tmp_path)
    assert dataset.read(1, 58).tolist() == list(range(1, 59))
    assert dataset.blocks(np.array([4, 3]), 10).tolist() == [list(range(44, 55)), list(range(33, 44))]
