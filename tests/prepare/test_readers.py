"""Documents longer than what is read at once, and fractions: what a reader gives, computed without it."""

import base64
import codecs
import gzip
import hashlib
import json
import lzma
import random
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pyarrow.parquet.encryption import CryptoFactory, EncryptionConfiguration, KmsClient, KmsConnectionConfig

from tinyllama import InputError
from tinyllama.prepare import readers
from tinyllama.prepare.inputs import Fields
from tinyllama.prepare.readers import DocumentReader

LLAMA = "\U0001f999"  # two \u escapes in ASCII JSON, four bytes of UTF-8


@pytest.fixture
def short(monkeypatch):
    """64 bytes are read at a time."""
    monkeypatch.setattr(readers, "BUFFER", 64)


def write_arrow(path: Path, batches: list[pa.RecordBatch]) -> Path:
    with pa.ipc.new_stream(path, batches[0].schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
    return path


def documents(reader: DocumentReader, most: int = 1 << 25) -> list[tuple[str, str]]:
    """Text and subset of each document; every chunk must be UTF-8, of the document's subset, and of ``most`` bytes."""
    found, parts, subsets = [], [], set()
    for text, subset, is_last in reader.chunks():
        assert len(text) <= most
        parts.append(text.decode())
        subsets.add(subset)
        if is_last:
            found.append(("".join(parts), *subsets))
            parts, subsets = [], set()
    assert parts == []
    return found


TEXTS = [
    "short",
    "x" * 200,
    "",
    'quotes " and \\ and "\\" ' * 20,
    "\n\t\0" * 100,
    "é" + LLAMA * 700,  # more escapes than a chunk takes, and pairs that an odd number of them does not end at
    "a" + "漢" * 750_000,  # more bytes than a chunk takes
    "y" * 63,
]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.zst"])
def test_lines_of_any_length(tmp_path, short, ending, ascii_only):
    rows = []
    for number, text in enumerate(TEXTS):
        other = {
            "id": "i" * (number * 30),
            "mark": 'ends in "',
            "numbers": [7] * 40,
            "nested": {"text": "no " * number * 20, "list": ["z" * 99, "", '"' * 50]},
        }
        meta = {"meta": {"redpajama_set_name": f"set {number % 2}"}}
        rows.append(other | {"text": text} | meta if number % 3 else {"text": text} | meta | other)
    payload = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows).encode()
    path = tmp_path / f"a{ending}"
    path.write_bytes(zstandard.compress(payload) if ending.endswith("zst") else payload)
    reader = DocumentReader(path, Fields(subsets=True))
    expected = [(text, f"set {number % 2}") for number, text in enumerate(TEXTS)]
    assert documents(reader) == expected
    assert (reader.repaired, reader.size) == (0, path.stat().st_size)
    reader = DocumentReader(path, Fields(subsets=True, leave_out=("set 1",)))
    assert documents(reader) == expected[::2]
    assert reader.dropped == {"set 1": 4}
    with pytest.raises(InputError, match="line 1: no key 'content', only"):
        list(DocumentReader(path, Fields("content")))


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_line_that_is_too_long(tmp_path, ending):
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(ending[6:], bytes)
    path = tmp_path / f"a{ending}"
    lines = [json.dumps({"text": "x" * size}).encode() for size in (10, 20, 30)]
    for end in (b"", b"\n"):  # an end of a line counts
        path.write_bytes(compress(b"\n\n".join(lines) + end))
        longest = len(lines[2]) + len(end)
        assert [len(text) for text in DocumentReader(path, Fields(longest=longest))] == [10, 20, 30]
        with pytest.raises(InputError) as info:
            list(DocumentReader(path, Fields(longest=longest - 1)))
        said = f"{path}: line 5: longer than {longest - 1} bytes: remove or split it, or raise --longest_document"
        assert str(info.value).startswith(said)
    found = iter(DocumentReader(path, Fields(longest=len(lines[1]) + 1)))
    assert [len(next(found)) for _ in range(2)] == [10, 20]  # what is before it was read


@pytest.mark.parametrize("ending", [".arrow", ".parquet"])
def test_a_row_that_is_too_long(tmp_path, ending):
    path, table = tmp_path / f"a{ending}", pa.table({"text": ["é" * 5, "é" * 10], "id": ["i" * 99] * 2})
    write_arrow(path, table.to_batches()) if ending == ".arrow" else pq.write_table(table, path)
    assert [len(text) for text in DocumentReader(path, Fields(longest=20))] == [5, 10]
    with pytest.raises(InputError, match="row 2: longer than 19 bytes: remove or split it, or raise --longest_docum"):
        list(DocumentReader(path, Fields(longest=19)))


def test_lone_surrogates_in_a_long_document_are_one_repair(tmp_path, short):
    lines = [
        r'{"text": "' + r"\ud83e\udd99\ud83e " * 600 + '"}',
        r'{"text": "' + "plain " * 20 + '"}',
        r'{"text": "\udd99"}',
        r'{"text": "' + r"a\\ud83e\\\ud83e" * 20 + '"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    reader = DocumentReader(tmp_path / "a.jsonl", Fields())
    assert list(reader) == [(LLAMA + "\ufffd ") * 600, "plain " * 20, "\ufffd", "a\\ud83e\\\ufffd" * 20]
    assert reader.repaired == 3


def test_a_nested_text_is_not_the_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"meta": {"text": "no"}, "text": "yes", "more": [{"text": "no"}]}\n')
    assert list(DocumentReader(path, Fields())) == ["yes"]
    path.write_text('{"meta": {"text": "no"}}\n')
    with pytest.raises(InputError, match=r"line 1: no key 'text', only \['meta'\]"):
        list(DocumentReader(path, Fields()))


def test_without_orjson(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orjson", None)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) + '{"text": "\\ud800"}\n{"text"')
    reader = DocumentReader(path, Fields())
    found = iter(reader)
    assert [next(found) for _ in range(len(TEXTS) + 1)] == [*TEXTS, "\ufffd"]
    assert reader.repaired == 1
    with pytest.raises(InputError, match=f"line {len(TEXTS) + 2}: not valid JSON"):
        next(found)


KINDS = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("ending", [".arrow", ".parquet"])
def test_tables_with_rows_of_any_length(tmp_path, short, ending, kind):
    texts = [*TEXTS[:5], LLAMA * 30, "a" + "漢" * 99] * 20
    columns = {"id": [str(number) for number in range(len(texts))], "content": pa.array(texts, kind)}
    path = tmp_path / f"a{ending}"
    if ending == ".arrow":
        write_arrow(path, pa.table(columns).to_batches(max_chunksize=33))
    else:
        pq.write_table(pa.table(columns), path, row_group_size=33)
    reader = DocumentReader(path, Fields("content"))
    assert documents(reader) == [(text, "") for text in texts]
    assert reader.size == path.stat().st_size
    assert reader.blake2b == hashlib.blake2b(path.read_bytes(), digest_size=32).hexdigest()


def test_errors_of_arrow_files(tmp_path):
    path = tmp_path / "a.arrow"

    def fault(key: str) -> str:
        with pytest.raises(InputError) as info:
            list(DocumentReader(path, Fields(key)))
        return str(info.value)

    columns = [{"a": ["x", "y"], "id": [1, 2], "b": [b"x", b"y"]}, {"a": ["z", None], "id": [3, 4], "b": [b"", b""]}]
    write_arrow(path, [pa.record_batch(batch) for batch in columns])
    assert f"{path}: row 4: 'a' is null, not a string" in fault("a")
    assert "column 'id' holds int64, not strings" in fault("id")
    assert "column 'b' holds binary, not strings" in fault("b")
    assert "no column 'text', only ['a', 'id', 'b']" in fault("text")
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    assert "not a readable arrow file" in fault("a")


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_json_lines_as_windows_writes_them(tmp_path, ending):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in ("one\r\n", "\ufefftwo")]
    path.write_bytes(codecs.BOM_UTF8 + ending.join([*lines, "", ""]).encode())
    assert list(DocumentReader(path, Fields())) == ["one\r\n", "\ufefftwo"]
    path.write_bytes("".join(codecs.BOM_UTF8.decode() + line + ending for line in lines).encode())
    with pytest.raises(InputError, match="line 2: not valid JSON"):  # it begins a file, and nothing else
        list(DocumentReader(path, Fields()))


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_two_columns_of_one_name(tmp_path, ending):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    path = tmp_path / f"a{ending}"
    write_arrow(path, table.to_batches()) if ending == ".arrow" else pq.write_table(table, path)
    with pytest.raises(InputError, match="has 2 columns called 'text': keep the one with the text"):
        list(DocumentReader(path, Fields()))


def test_an_arrow_stream_with_something_behind_it(tmp_path):
    path = write_arrow(tmp_path / "a.arrow", [pa.record_batch({"text": ["one", "two"]})])
    whole = path.read_bytes()
    for more in (b"garbage", b"garbage" + whole[-8:], whole):  # two streams are no stream of both
        path.write_bytes(whole + more)
        with pytest.raises(InputError) as info:
            list(DocumentReader(path, Fields()))
        if more.endswith(whole[-8:]):
            assert f"has {len(more)} bytes after the end of its stream: write what it holds as one" in str(info.value)


def test_arrow_files_that_are_no_stream(tmp_path):
    table = pa.table({"text": ["one", "two"]})
    for compression in (None, "zstd"):
        with pa.ipc.new_file(
            tmp_path / "a.arrow", table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)
        ) as f:
            f.write_table(table)
        with pytest.raises(
            InputError, match=r"a\.arrow: is in Arrow's file format, as Feather is: write it as parquet"
        ):
            list(DocumentReader(tmp_path / "a.arrow", Fields()))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("offsets", [[0, 1 << 30, 3], [0, 3, 1], [-1, 2, 3], [0, 2, 1 << 30]], ids=str)
def test_texts_that_lie_outside_of_an_arrow_file(tmp_path, kind, offsets):
    path = write_arrow(tmp_path / "a.arrow", [pa.record_batch([pa.array(["ab", "c"], kind)], names=["text"])])
    size = np.int32 if kind == pa.string() else np.int64
    right, wrong = (np.array(numbers, size).tobytes() for numbers in ([0, 2, 3], offsets))
    assert path.read_bytes().count(right) == 1
    path.write_bytes(path.read_bytes().replace(right, wrong))
    with pytest.raises(InputError, match=r"a\.arrow: not a readable arrow file \(.*: download it again"):
        list(DocumentReader(path, Fields()))


@pytest.mark.parametrize(
    ("plaintext_footer", "encrypted", "reason"),
    [
        (True, "text", "has encrypted columns"),
        (True, "other", "has encrypted columns"),
        (False, "text", "encrypted metadata"),
    ],
)
def test_encrypted_parquet(tmp_path, plaintext_footer, encrypted, reason):
    class Keys(KmsClient):
        def wrap_key(self, key_bytes, master_key_identifier):
            return base64.b64encode(key_bytes)

    path, table = tmp_path / "a.parquet", pa.table({"text": ["one", "two"], "other": [1, 2]})
    settings = EncryptionConfiguration("footer", column_keys={"column": [encrypted]}, plaintext_footer=plaintext_footer)
    encryption = CryptoFactory(lambda _: Keys()).file_encryption_properties(KmsConnectionConfig(), settings)
    with pq.ParquetWriter(path, table.schema, encryption_properties=encryption) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match=reason):
        documents(DocumentReader(path, Fields()))


def test_a_frame_that_needs_a_dictionary(tmp_path):
    texts = [json.dumps({"text": f"text number {i} of many that are alike"}).encode() for i in range(2000)]
    dictionary = zstandard.train_dictionary(4096, texts)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor(dict_data=dictionary).compress(b"\n".join(texts)))
    with pytest.raises(InputError, match="is compressed with a dictionary: decompress it first"):
        documents(DocumentReader(path, Fields()))


def test_an_arrow_file_cut_short_anywhere(tmp_path):
    path = tmp_path / "a.arrow"
    table = pa.table({"text": ["one", "two", "three"]})
    write_arrow(path, table.to_batches(max_chunksize=1))
    whole = path.read_bytes()
    assert list(DocumentReader(path, Fields())) == ["one", "two", "three"]
    for size in range(len(whole)):  # among them the ends of batches, where pyarrow says nothing
        path.write_bytes(whole[:size])
        with pytest.raises(InputError) as info:
            list(DocumentReader(path, Fields()))
        assert str(info.value).startswith(f"{path}: ")
        assert str(info.value).endswith(": download it again")


@pytest.mark.parametrize("error", [RuntimeError("two\nlines"), ValueError("two lines"), KeyError("two lines")])
def test_whatever_reading_raises_is_the_files_error(tmp_path, monkeypatch, error):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one"]}), path)

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(pq, "ParquetFile", fail)
    with pytest.raises(InputError) as info:
        list(DocumentReader(path, Fields()))
    assert str(info.value).replace("'", "") == (
        f"{path}: cannot be read ({type(error).__name__}: two lines): repair or remove it"
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_that_is_null(tmp_path, kind):
    path = tmp_path / "a.arrow"
    write_arrow(path, pa.table({"text": pa.array(["one", None], kind)}).to_batches())
    with pytest.raises(InputError, match="row 2: 'text' is null, not a string"):
        list(DocumentReader(path, Fields()))


@pytest.mark.parametrize("size", [3, 300])
def test_a_row_that_is_not_utf8(tmp_path, short, size):
    payload = b"ab" + b"x" * size + b"\xff"
    ends = np.array([0, 2, len(payload)], "<i4")
    column = pa.StringArray.from_buffers(2, pa.py_buffer(ends), pa.py_buffer(payload))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="row 2: not UTF-8"):
        list(DocumentReader(tmp_path / "a.parquet", Fields()))


def test_a_text_file_longer_than_what_is_read_at_once(tmp_path, short):
    path = tmp_path / "a.txt"
    for text in ("x" * 63 + "漢字\r\n" * 40, "é" * 64, "x" * 64, "x" * 128):
        path.write_bytes(text.encode())
        assert documents(DocumentReader(path, Fields()), most=66) == [(text, "")]  # what a character began with goes on
    path.write_bytes(b"one\n" * 50 + b"two\xff\n")
    with pytest.raises(InputError, match="line 51: not UTF-8"):
        list(DocumentReader(path, Fields()))
    path.write_bytes(("one\n" * 50 + "é").encode()[:-1])  # half a character at the end
    with pytest.raises(InputError, match="line 51: not UTF-8"):
        list(DocumentReader(path, Fields()))


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.xz"])
@pytest.mark.parametrize("blank", ["\n", "\r\n", " \t\n\n\x0c\n", "\n" * 99_999 + " \n"])
def test_blank_lines_are_counted_however_many_there_are(tmp_path, ending, blank):
    many = blank * (2 if len(blank) > 9 else 70_000)  # more than is read at a time
    path, count = tmp_path / f"a{ending}", many.count("\n")
    compress = {".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    good = [f'{{"text": "{n}"}}' for n in range(3)]
    for between in ("", "  "):  # what begins the line of the next document, too
        lines = f"{many}{between}{good[0]}\n{good[1]}\n{many}{between}{good[2]}"
        path.write_bytes(compress(lines.encode()))
        assert list(DocumentReader(path, Fields())) == ["0", "1", "2"]
        path.write_bytes(compress(f"{lines}\n{many}{between}bad\n{many}".encode()))
        with pytest.raises(InputError, match=f"line {3 * count + 4}: not valid JSON"):
            list(DocumentReader(path, Fields()))


@pytest.mark.parametrize("seed", [0, 7])
def test_a_fraction_is_drawn_document_by_document(tmp_path, seed):
    texts = [str(number) for number in range(200)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps({"text": text}) for text in texts))  # blank lines between
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    for name in ("one/a", "two/a"):
        draws = random.Random(f"{seed} {name}")
        kept = [text for text in texts if draws.random() < 0.3]
        for path in (tmp_path / "a.jsonl", tmp_path / "a.parquet"):
            reader = DocumentReader(path, Fields(fraction=0.3, seed=seed), name)
            for _ in range(2):  # reading again draws again
                assert list(reader) == kept
                assert reader.dropped == {"fraction": 200 - len(kept)}
    (tmp_path / "a.txt").write_text("text")
    for name in map(str, range(20)):
        reader = DocumentReader(tmp_path / "a.txt", Fields(fraction=0.5, seed=seed), name)
        wanted = random.Random(f"{seed} {name}").random() < 0.5
        assert list(reader) == ["text"] * wanted
        assert reader.dropped == {"fraction": 1 - wanted}


def test_what_is_left_out_takes_part_in_the_draws(tmp_path):
    rows = [{"text": str(n), "meta": {"redpajama_set_name": f"set {n % 2}"}} for n in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draws = random.Random("3 a.jsonl")
    kept = [n for n in range(100) if draws.random() < 0.4]
    reader = DocumentReader(tmp_path / "a.jsonl", Fields("text", True, ("set 0",), 0.4, 3), "a.jsonl")
    assert documents(reader) == [(str(n), "set 1") for n in kept if n % 2]
    assert reader.dropped == {"set 0": sum(n % 2 == 0 for n in kept), "fraction": 100 - len(kept)}


def test_a_page_that_does_not_match_its_checksum(tmp_path):
    path, text = tmp_path / "a.parquet", "the little llama walked along"
    table = pa.table({"text": [text]})
    pq.write_table(
        table, path, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True
    )
    assert list(DocumentReader(path, Fields())) == [text]
    whole = path.read_bytes()
    place = whole.index(text.encode())
    path.write_bytes(whole[:place] + b"T" + whole[place + 1 :])
    with pytest.raises(InputError, match=r"a\.parquet: not a readable parquet file \(could not verify page integrity"):
        list(DocumentReader(path, Fields()))
