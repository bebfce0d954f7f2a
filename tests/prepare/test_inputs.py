import bz2
import errno
import gzip
import hashlib
import json
import lzma
import os
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tinyllama import InputError
from tinyllama.prepare.inputs import ENDINGS, Fields, Input, NotFetched, find_inputs
from tinyllama.prepare.prepare import Options, prepare
from tinyllama.prepare.readers import DocumentReader

TEXTS = ["one\ntwo", "", "  grüß 漢字 🦙  ", "</s> <s>\x00\r\n", "x" * 300_000]


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return b"".join(
        json.dumps({key: text, "other": 1}, ensure_ascii=i % 2 == 0).encode() + b"\n" for i, text in enumerate(texts)
    )


def compress(ending: str, payload: bytes) -> bytes:
    kinds = {".gz": gzip, ".zst": zstandard, ".zstd": zstandard, ".xz": lzma, ".bz2": bz2}
    kind = kinds.get(ending[ending.rindex(".") :].lower())
    return kind.compress(payload) if kind else payload


def read(path: Path, **fields) -> list[str]:
    return list(DocumentReader(path, Fields(**fields)))


def fault(path: Path, **fields) -> str:
    with pytest.raises(InputError) as info:
        read(path, **fields)
    (message,) = info.value.args
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "ending", [*(ending for ending in ENDINGS if "js" in ending), ".JSONL", ".Json.Zst", ".NDJSON.XZ"]
)
def test_jsonl_gives_the_texts_and_the_hash_of_the_raw_bytes(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    path.write_bytes(compress(ending, jsonl(TEXTS)))
    reader = DocumentReader(path, Fields())
    assert list(reader) == TEXTS
    assert reader.size == path.stat().st_size
    assert reader.blake2b == hashlib.blake2b(path.read_bytes(), digest_size=32).hexdigest()
    assert reader.dropped == {}
    assert reader.repaired == 0
    assert list(reader) == TEXTS  # a second reading starts anew
    assert reader.size == path.stat().st_size


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.xz", ".ndjson.bz2", ".parquet", ".txt"])
def test_nothing_in_a_file_is_no_document(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    else:
        path.write_bytes(compress(ending, b""))
    reader = DocumentReader(path, Fields())
    assert list(reader) == []
    assert reader.blake2b == hashlib.blake2b(path.read_bytes(), digest_size=32).hexdigest()


def test_blank_lines_are_no_documents_and_the_last_line_needs_no_newline(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "a"}\r\n  \n{"text": "b"}')
    assert read(path) == ["a", "b"]


def test_text_key(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(TEXTS, "content"))
    assert read(path, text_key="content") == TEXTS
    assert "line 1: no key 'text', only ['content', 'other']" in fault(path)


@given(
    st.lists(st.binary(max_size=50), max_size=6),
    st.integers(1, 7),
    st.lists(st.integers(0, 3), max_size=6),
)
def test_zst_of_any_frames_is_their_concatenation(tmp_path_factory, parts, level, skipped):
    path = tmp_path_factory.mktemp("zst") / "a.jsonl.zst"
    texts = [part.hex() for part in parts]
    frames = [zstandard.compress(jsonl([text]), level) for text in texts]
    for place in skipped:  # skippable and empty frames
        frames.insert(place, bytes.fromhex("502a4d18") + (3).to_bytes(4, "little") + b"abc")
        frames.insert(place, zstandard.compress(b""))
    path.write_bytes(b"".join(frames) or zstandard.compress(b""))
    assert read(path) == texts


def test_zst_of_more_frames_than_are_read_at_once(tmp_path):
    rng = np.random.default_rng(0)
    texts = [rng.bytes(5000).hex() for _ in range(60)]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(jsonl([text])) for text in texts))
    assert path.stat().st_size > 4 << 16
    assert read(path) == texts


def test_gz_of_many_members(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"".join(gzip.compress(jsonl([text])) for text in TEXTS))
    assert read(path) == TEXTS


@pytest.mark.parametrize(("ending", "padding"), [(".jsonl.xz", bytes(8)), (".jsonl.xz", b""), (".jsonl.bz2", b"")])
def test_streams_behind_one_another(tmp_path, ending, padding):
    path = tmp_path / f"a{ending}"
    frames = [compress(ending, jsonl([text])) + padding for text in [*TEXTS, *TEXTS]]
    path.write_bytes(b"".join(frames))
    assert read(path) == [*TEXTS, *TEXTS]
    for rest in (b"x", frames[0][:20], bytes(8) + b"x"):  # lzma and bz2 themselves end there without a word
        path.write_bytes(b"".join(frames) + rest)
        assert "download it again" in fault(path)
    path.write_bytes(bytes(1000))  # room that was made for a download
    assert "download it again" in fault(path)


def test_an_xz_file_that_asks_for_much_memory(tmp_path):
    path = tmp_path / "a.jsonl.xz"
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 28}]
    path.write_bytes(lzma.compress(jsonl(TEXTS), filters=filters))
    assert "Memory usage limit" in fault(path)
    path.write_bytes(lzma.compress(jsonl(TEXTS), preset=9 | lzma.PRESET_EXTREME))
    assert read(path) == TEXTS


@pytest.mark.parametrize("text", ['[{"text": "a"}]', '[\n {"text": "a"}\n]', '{\n "text": "a"\n}', "[" + " " * 100])
@pytest.mark.parametrize("ending", [".json", ".json.gz"])
def test_an_array_is_one_error_that_says_so(tmp_path, text, ending):
    path = tmp_path / f"a{ending}"
    path.write_bytes(compress(ending, b"\n" + text.encode()))
    said = fault(path, longest=50)
    assert f"{path}: line 2: begins an array or an object of many lines, not one a line: convert it" in said


def test_zst_with_a_long_window(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    payload = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(payload.compress(jsonl(TEXTS)) + payload.flush())
    assert read(path) == TEXTS


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".jsonl.xz", ".jsonl.bz2"])
def test_truncated_at_any_byte_is_a_error(tmp_path, ending):
    whole = compress(ending, jsonl(TEXTS[:4]))
    path = tmp_path / f"a{ending}"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert "download it again" in fault(path)


def test_truncated_behind_a_whole_frame(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(jsonl(["a"])) + zstandard.compress(jsonl(["b"]))[:-1])
    assert "ends in the middle" in fault(path)


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".jsonl.xz", ".jsonl.bz2"])
def test_not_compressed_at_all(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    path.write_bytes(jsonl(TEXTS))
    assert "download it again" in fault(path)


def test_damaged_zst(tmp_path):
    rng = np.random.default_rng(0)
    payload = bytearray(
        zstandard.ZstdCompressor(write_checksum=True).compress(jsonl([rng.bytes(20_000).hex() for _ in range(5)]))
    )
    payload[len(payload) // 2] ^= 0xFF
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(payload)
    assert "cannot be read" in fault(path)


def test_damaged_gz(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(jsonl(["a", "b"]))
    for damaged in (whole[:10] + b"\xff" * 20 + whole[30:], whole[:-8] + bytes(8)):  # no such block; no such sum
        path.write_bytes(damaged)
        assert "cannot be read" in fault(path)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt"])
def test_git_lfs_pointer(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    assert "git lfs pull" in fault(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "a"', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'["text"]', "not a JSON object"),
        (b'{"texts": "a"}', "no key 'text', only ['texts']"),
        (b'{"text": null}', "'text' is NoneType, not a string"),
        (b'{"text": 12}', "'text' is int, not a string"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(jsonl(["a", "b"]) + b"\n" + line + b"\n" + jsonl(["c"])))
    assert f"line 4: {said}" in fault(path)


def test_lone_surrogates_become_replacement_characters_and_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        r'{"text": "a\ud800b\udc00\udc00"}',
        r'{"text": "\ud83e\udd99"}',
        r'{"text": "end\udbff"}',
        '{"text": "�"}',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    reader = DocumentReader(path, Fields())
    assert list(reader) == ["a�b��", "🦙", "end�", "�"]
    assert reader.repaired == 2


def test_slimpajama_leaves_out_a_set_and_counts_it(tmp_path):
    sets = ["RedPajamaC4", "RedPajamaGithub", "RedPajamaWikipedia", "RedPajamaGithub"]
    path = tmp_path / "a.jsonl.zst"
    rows = [json.dumps({"text": str(i), "meta": {"redpajama_set_name": name}}) for i, name in enumerate(sets)]
    path.write_bytes(zstandard.compress("\n".join(rows).encode()))
    reader = DocumentReader(path, Fields(subsets=True, leave_out=("RedPajamaGithub",)))
    assert list(reader) == ["0", "2"]
    assert reader.dropped == {"RedPajamaGithub": 2}
    assert read(path) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("meta", ["{}", '"RedPajamaC4"', "null", '{"redpajama_set_name": 3}'])
def test_slimpajama_without_a_set_name_is_a_error(tmp_path, meta):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a", "meta": {meta}}}\n')
    assert "line 1: no meta.redpajama_set_name" in fault(path, subsets=True, leave_out=("RedPajamaGithub",))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_over_row_groups(tmp_path, kind):
    path = tmp_path / "train-00000-of-00001.parquet"
    texts = TEXTS * 40
    table = pa.table({"content": pa.array(texts, kind), "id": list(range(len(texts)))})
    pq.write_table(table, path, row_group_size=90)
    reader = DocumentReader(path, Fields(text_key="content"))
    assert list(reader) == texts
    assert reader.size == path.stat().st_size
    assert reader.blake2b == hashlib.blake2b(path.read_bytes(), digest_size=32).hexdigest()


def test_parquet_errors(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"code": ["a"], "id": [1]}), path)
    assert "no column 'content', only ['code', 'id']" in fault(path, text_key="content")
    assert "column 'id' holds int64, not strings" in fault(path, text_key="id")
    pq.write_table(pa.table({"content": ["a", "b", None]}), path)
    assert "row 3: 'content' is null, not a string" in fault(path, text_key="content")
    broken = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 2], "<i4")), pa.py_buffer(b"a\xff"))
    pq.write_table(pa.table({"content": broken}), path)
    assert "row 2: not UTF-8" in fault(path, text_key="content")


def test_truncated_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": ["text " * 1000] * 10}), path)
    whole = path.read_bytes()
    for size in (0, 3, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "not a readable parquet file" in fault(path, text_key="content")
    path.write_bytes(whole[:4] + b"\xff" * 100 + whole[104:])
    assert "not a readable parquet file" in fault(path, text_key="content")


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_a_column_of_type_null_has_no_documents(tmp_path, ending):
    path = tmp_path / f"a{ending}"

    def write(table: pa.Table) -> DocumentReader:
        if ending == ".parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table)
        return DocumentReader(path, Fields())

    reader = write(pa.table({"text": pa.nulls(3), "id": [1, 2, 3]}))
    assert list(reader) == []
    assert reader.dropped == {"null": 3}
    for table in (pa.table({"text": pa.nulls(0)}), pa.table({"other": pa.array([], pa.int8())}), pa.table({})):
        reader = write(table)  # of no rows
        assert list(reader) == []
        assert reader.dropped == {}
    write(pa.table({"other": pa.nulls(2)}))
    assert "no column 'text', only ['other']" in fault(path)


def test_a_text_file_is_one_document_byte_for_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\ntwo\n漢".encode())
    reader = DocumentReader(path, Fields())
    assert list(reader) == ["one\r\ntwo\n漢"]
    assert reader.blake2b == hashlib.blake2b(path.read_bytes(), digest_size=32).hexdigest()
    path.write_bytes(b"one\ntwo\nthr\xff")
    assert "line 3: not UTF-8" in fault(path)


def test_a_file_that_cannot_be_opened(tmp_path):
    assert "No such file" in fault(tmp_path / "gone.jsonl.zst")
    (tmp_path / "folder.jsonl").mkdir()
    assert "directory" in fault(tmp_path / "folder.jsonl")


def test_memory_does_not_grow_with_the_file(tmp_path):
    line = json.dumps({"text": "many words and more words " * 400}).encode() + b"\n"
    zst, parquet = tmp_path / "a.jsonl.zst", tmp_path / "a.parquet"
    with zstandard.open(zst, "wb") as file:
        for _ in range(10_000):  # 100 MB in some KB
            file.write(line)
    with pq.ParquetWriter(parquet, pa.schema({"text": pa.string()})) as writer:
        for group in range(10):
            writer.write_table(pa.table({"text": [f"{group} {i} " + "words " * 1700 for i in range(1000)]}))
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from tinyllama.prepare.readers import DocumentReader\n"
        "from tinyllama.prepare.inputs import Fields\n"
        "import pyarrow.parquet, zstandard\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert sum(1 for _ in DocumentReader(Path(sys.argv[1]), Fields())) == 10_000\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    for path in (zst, parquet):
        run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        assert int(run.stdout) < 40_000, path  # kilobytes, of 90,000 and more


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)


def test_find_inputs_in_order_of_their_shards(tmp_path):
    for name in ("chunk2/a.jsonl.zst", "chunk10/b.jsonl.zst", "chunk10/sub/c.jsonl.zst", "d.txt"):
        touch(tmp_path / name)
    inputs = find_inputs(tmp_path, (".jsonl.zst",))
    assert [one.shard for one in inputs] == [
        "chunk10--b.jsonl.zst",
        "chunk10--sub--c.jsonl.zst",
        "chunk2--a.jsonl.zst",
    ]
    assert inputs[1] == Input(str(tmp_path / "chunk10/sub/c.jsonl.zst"), "chunk10/sub/c.jsonl.zst", 11)


def test_inputs_are_in_order_of_their_shards_not_of_their_paths(tmp_path):
    touch(tmp_path / "a-b/x.txt", tmp_path / "a/x.txt")  # "-" comes before "/", and before "b"
    assert [one.shard for one in find_inputs(tmp_path, ENDINGS)] == ["a--x.txt", "a-b--x.txt"]


def test_find_inputs_of_some_folders_or_one_file(tmp_path):
    touch(*(tmp_path / name for name in ("python/a.parquet", "go/a.parquet", "c/a.parquet")))
    assert [one.name for one in find_inputs(tmp_path, (".parquet",), ["python", "go", "go"])] == [
        "go/a.parquet",
        "python/a.parquet",
    ]
    assert find_inputs(tmp_path / "c/a.parquet", ENDINGS) == [Input(str(tmp_path / "c/a.parquet"), "a.parquet", 9)]


def test_find_inputs_errors(tmp_path):
    def faults(*args) -> tuple[str, ...]:
        with pytest.raises(InputError) as info:
            find_inputs(*args)
        return info.value.args

    touch(tmp_path / "notes.md", tmp_path / "go/a.parquet")
    (message,) = faults(tmp_path / "gone", ENDINGS)
    assert f"{tmp_path / 'gone'}: cannot be listed (No such file or directory)" in message
    (message,) = faults(tmp_path, (".jsonl", ".txt"))
    assert f"{tmp_path}: no file ending in .jsonl or .txt" in message
    assert "rename files of plain text to .txt or put them into a .jsonl" in message
    assert "rust" in faults(tmp_path, (".parquet",), ["go", "rust"])[0]
    assert "notes.md: ends in none of" in faults(tmp_path / "notes.md", ENDINGS)[0]

    touch(tmp_path / "x--y/z.txt", tmp_path / "x/y--z.txt")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    no_utf8 = tmp_path / os.fsdecode(b"\xff.jsonl")  # in a locale of Latin-1 it is a letter, and no error
    no_utf8.touch()
    dangling, twice, *names = faults(tmp_path, ENDINGS)
    letter = no_utf8.name == "\xff.jsonl"
    assert names == ([] if letter else [f"'{tmp_path}/\\udcff.jsonl': its name is not UTF-8: rename it"])
    assert "dangling.txt: cannot be opened (a link to nothing" in dangling
    assert "x--y--z.txt" in twice
    assert "rename" in twice


def test_files_of_a_cache_count_where_no_dataset_was_saved(tmp_path):
    touch(tmp_path / "saved/state.json", tmp_path / "saved/cache-1.arrow", tmp_path / "saved/data-0.arrow")
    touch(tmp_path / "other/cache-1.arrow")
    assert [one.name for one in find_inputs(tmp_path, ENDINGS)] == ["other/cache-1.arrow", "saved/data-0.arrow"]


def test_names_and_sizes_at_a_url(tmp_path):
    touch(tmp_path / "go/sub/a.txt", tmp_path / "b.txt", tmp_path / "notes.md")
    (tmp_path / "b.txt").write_bytes(bytes(321))
    found = find_inputs(f"file://{tmp_path}", ENDINGS)
    assert found == [
        Input(f"file://{tmp_path}/b.txt", "b.txt", 321),
        Input(f"file://{tmp_path}/go/sub/a.txt", "go/sub/a.txt", 5),
    ]
    assert find_inputs(f"file://{tmp_path}/b.txt", ENDINGS) == found[:1]
    with found[0].fetched() as path:
        assert path.read_bytes() == bytes(321)
        assert path.parent != tmp_path
    assert not path.exists()


@pytest.fixture
def remote(monkeypatch):
    """One file at a URL, and a function that makes fetching it fail."""
    fs = fsspec.filesystem("memory")
    fs.pipe("/remote/a.jsonl", b'{"text": "one"}\n{"text"\n')
    (one,) = find_inputs("memory://remote", ENDINGS)

    def fail(error: Exception) -> None:
        def get_file(*arguments, **options):
            raise error

        monkeypatch.setattr(type(fs), "get_file", get_file)

    yield one, fail
    fs.rm("/remote", recursive=True)


@pytest.mark.parametrize(
    "error", [TimeoutError("no answer"), ConnectionResetError(104, "reset"), RuntimeError("503"), OSError("unknown")]
)
def test_a_network_that_is_down_is_not_the_inputs_error(remote, error):
    one, fail = remote
    fail(error)
    with pytest.raises(NotFetched, match="^memory://.*a.jsonl: cannot be fetched .*: check the network and run again"):
        one.fetched().__enter__()


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError(13, "Permission denied")])
def test_a_remote_file_that_may_not_be_read_is_the_inputs_error(remote, error):
    one, fail = remote
    fail(error)
    with pytest.raises(InputError, match="^memory://.*a.jsonl: cannot be fetched .*: check it and run again"):
        one.fetched().__enter__()


@pytest.mark.parametrize("error", [zlib.error("invalid"), EOFError("short"), tarfile.ReadError("bad checksum")])
def test_what_cannot_be_unpacked_is_the_inputs_error(remote, error):
    one, fail = remote
    fail(error)
    with pytest.raises(
        InputError, match="^memory://.*a.jsonl: cannot be fetched .*: it is damaged or encrypted: download"
    ):
        one.fetched().__enter__()


def test_a_full_folder_of_temporary_files_is_named(remote):
    one, fail = remote
    fail(OSError(errno.ENOSPC, "No space left on device", "x"))
    with pytest.raises(OSError, match=r"No space left on device: '.*tinyllama-fetched-.* \(\$TMPDIR\)'"):
        one.fetched().__enter__()


def test_another_output_is_no_hint_for_a_full_folder_of_temporary_files(remote, tokenizer_file, tmp_path, one_process):
    _, fail = remote
    fail(OSError(errno.ENOSPC, "No space left on device", "x"))
    said = r"\(\$TMPDIR\) \(No space left on device\): make room \(what is done is kept\) or set another \$TMPDIR$"
    with pytest.raises(InputError, match=said):
        prepare(find_inputs("memory://remote", ENDINGS), Fields(), Options(tokenizer_file, tmp_path / "out"))


def test_the_error_of_a_remote_file_names_its_url(remote):
    one, _ = remote
    with pytest.raises(InputError, match=f"^{one.path}: line 2: not valid JSON"), one.fetched() as path:
        list(DocumentReader(path, Fields()))
