"""Small files of much text: a worker's memory is bounded by the longest document, whatever a file decompresses to."""

import bz2
import gzip
import json
import lzma
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from processes import Process

from tinyllama.prepare.inputs import Fields
from tinyllama.prepare.readers import DocumentReader, elements

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak of memory")

MB = 1 << 20
FRACTION = 0.02  # of the documents that are read: encoding them takes long
# what a worker does with each input of stdin, in a fork, whose peak of memory is its own
CODE = """
import json, os, re, sys
from pathlib import Path
from tinyllama import InputError
from tinyllama.prepare.inputs import ENDINGS, Fields, find_inputs
from tinyllama.prepare.prepare import Options, _packer, _recipe
import pyarrow.parquet, sentencepiece

def pack(source, tokenizer, output, fields):
    options = Options(Path(tokenizer), Path(output), encoder="sentencepiece")
    try:
        info = _packer(_recipe(eval(fields), options))(*find_inputs(source, ENDINGS))
        return f"{info['documents']} {info['dropped']}"
    except InputError as error:
        return str(error)

for line in sys.stdin:
    if os.fork() == 0:
        said = pack(*json.loads(line))
        peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
        print(json.dumps([said, peak]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def packer() -> Iterator[Process]:
    process = Process(sys.executable, "-c", CODE)
    yield process
    process.close()
    assert process.end()[0] == 0, process.said()


@pytest.fixture
def packed(packer: Process, tokenizer_file: Path, tmp_path: Path) -> Callable[..., str]:
    """A function that returns what packing a file says, which must take less than 400 MB, or ``most``."""

    def packed(path: Path, fields: str = "Fields()", most: int = 400) -> str:
        (tmp_path / "out").mkdir()
        packer.tell(json.dumps([str(path), str(tokenizer_file), str(tmp_path / "out"), fields]))
        said, peak = json.loads(packer.line())
        assert peak < most
        return said

    return packed


def kept(path: Path, documents: int) -> str:
    draws = random.Random(f"0 {path.name}")
    count = sum(draws.random() < FRACTION for _ in range(documents))
    return f"{count} {{'fraction': {documents - count}}}"


def zst(*parts: bytes) -> bytes:
    compress = zstandard.ZstdCompressor().compressobj()
    return b"".join(compress.compress(part) for part in parts) + compress.flush()


def test_one_line_of_zst(tmp_path, packed):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zst(b'{"text": "', *[b"x" * MB] * 800))
    assert path.stat().st_size < 40_000
    assert packed(path).startswith(f"{path}: line 1: longer than 33,554,432 bytes: remove or split it")


def test_many_lines_of_zst(tmp_path, packed):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zst(*[json.dumps({"text": " " * MB}).encode() + b"\n"] * 200))
    assert path.stat().st_size < 100_000
    assert packed(path, f"Fields(fraction={FRACTION})") == kept(path, 200)


def test_one_line_of_gz(tmp_path, packed):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "fine"}\n{"text": "' + b"\\n" * (40 * MB), 1))
    assert path.stat().st_size < 500_000
    assert packed(path).startswith(f"{path}: line 2: longer than 33,554,432 bytes")


@pytest.mark.parametrize("kind", ["xz", "bz2"])
def test_one_line_of_many_streams(tmp_path, packed, kind):
    path = tmp_path / f"a.jsonl.{kind}"
    compress = {"xz": lzma.compress, "bz2": bz2.compress}[kind]
    path.write_bytes(compress(b'{"text": "fine"}\n{"text": "') + compress(b"x" * (16 * MB)) * 50)
    assert path.stat().st_size < 150_000
    assert packed(path).startswith(f"{path}: line 2: longer than 33,554,432 bytes")


@pytest.mark.parametrize("kind", ["xz", "bz2"])
def test_many_lines_of_one_stream(tmp_path, packed, kind):
    path = tmp_path / f"a.json.{kind}"
    compress = lzma.LZMACompressor(preset=0) if kind == "xz" else bz2.BZ2Compressor()
    line = json.dumps({"text": " " * MB}).encode() + b"\n"
    path.write_bytes(b"".join(compress.compress(line) for _ in range(50)) + compress.flush())
    assert packed(path, f"Fields(fraction={FRACTION})") == kept(path, 50)


def test_a_torn_line_of_escapes(tmp_path, packed):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "' + b'x\\\\\\"' * (6 * MB))
    assert packed(path).startswith(f"{path}: line 2: not valid JSON")


def test_one_letter_of_four_bytes_in_the_longest_document(tmp_path, packed):
    path = tmp_path / "a.jsonl"
    line = '{"meta": {"redpajama_set_name": "C4"}, "text": "🦙' + "x" * (32 * MB - 100) + '"}\n'
    path.write_text(line * 2)  # Python's string takes 128 MB
    assert packed(path, "Fields(subsets=True, leave_out=('C4',))") == "0 {'C4': 2}"


def test_a_row_many_times(tmp_path, packed):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x " * (15 * MB)] * 25}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    assert packed(path, f"Fields(fraction={FRACTION})") == kept(path, 25)


def test_a_row_of_arrow_many_times(tmp_path, packed):
    path = tmp_path / "a.arrow"
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 25, pa.int8()), pa.array(["x " * (15 * MB)]))
    with pa.ipc.new_stream(path, pa.schema({"text": text.type})) as stream:
        stream.write_batch(pa.record_batch({"text": text}))
    assert packed(path, f"Fields(fraction={FRACTION})") == kept(path, 25)


def test_a_page_of_blanks(tmp_path, packed):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [" " * (16 * MB)] * 8})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    assert column.total_compressed_size < 10_000
    assert packed(path) == (
        f"{path}: row group 1: {column.total_uncompressed_size:,} bytes of text in {column.total_compressed_size:,} "
        "compressed ones, which no text can be: repair or remove it"
    )


def test_zeros_beside_the_text(tmp_path, packed):
    path = tmp_path / "a.parquet"
    zeros = pa.FixedSizeBinaryArray.from_buffers(pa.binary(400), MB // 10, [None, pa.py_buffer(bytes(40 * MB))])
    table = pa.table({"text": ["a"] * len(zeros), "score": zeros})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    assert pq.ParquetFile(path).metadata.row_group(0).column(1).total_compressed_size < 40_000
    assert packed(path, "Fields(fraction=1e-4)").startswith("10 ")  # a column that is not read


def test_millions_of_values_in_a_line(tmp_path, packed):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "a", "x": [' + b"[]," * (10 * MB) + b"[]]}\n")
    said = packed(path)
    assert said.startswith(f"{path}: line 2: {20 * MB + 6:,} values and keys, which take too much memory: remove it")


@pytest.mark.parametrize(
    ("line", "count"),
    [
        (b'{"a": [1, 2, {}], "b": "x"}', 8),
        (b'["[,:{", 1]', 2),
        (rb'["\"[,\\", "\\\",", [",\""]]', 4),
        (b'["' + b"," * (3 * MB) + b'", [], []]', 5),
        (b"[" + b"[]," * MB + b'"' + b"," * MB, 2 * MB + 1),  # torn
    ],
)
def test_the_values_of_a_line_are_counted_outside_strings(line, count):
    assert elements(line) == count


def test_a_long_text_of_brackets_is_a_text(tmp_path, packed):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": '[],{"a":\\' * (2 * MB)}) + "\n")
    assert packed(path, "Fields(fraction=1e-9)") == "0 {'fraction': 1}"
    reader = DocumentReader(path, Fields())
    assert [len(text) for text in reader] == [18 * MB]


def compressible(count: int) -> list[str]:
    """16 MB each, of which compression leaves a little more than a 500th."""
    rng = np.random.default_rng(0)
    return [rng.bytes(16 * MB // 400).hex() + " " * (16 * MB * 199 // 200) for _ in range(count)]


PARQUET = {
    "plain": {"use_dictionary": False},
    "dictionary": {},
    "prefixes": {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
    "lengths": {"use_dictionary": False, "column_encoding": {"text": "DELTA_LENGTH_BYTE_ARRAY"}},
    "version 2": {"use_dictionary": False, "data_page_version": "2.0"},
}


@pytest.mark.parametrize("kind", ["plain", *(pytest.param(kind, marks=pytest.mark.slow) for kind in [*PARQUET][1:])])
def test_a_page_that_is_compressed_less(tmp_path, packed, kind):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": compressible(9)}), path, compression="zstd", **PARQUET[kind])
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    assert 350 < column.total_uncompressed_size / column.total_compressed_size < 500
    said = packed(path)
    assert re.match(
        rf"{path}: row group 1: a page decompresses to 150,99\d,\d+ bytes at once: write it in smaller", said
    )


def test_rows_of_which_few_are_long(tmp_path, packed):
    path = tmp_path / "a.parquet"
    texts = (compressible(4) + ["b"] * 3000) * 2
    schema = pa.schema({"text": pa.string()})
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False, data_page_size=MB) as writer:
        writer.write_table(pa.table({"text": texts}))
    assert packed(path, "Fields(fraction=1e-9)") == "0 {'fraction': 6008}"


@pytest.mark.slow
def test_values_that_begin_as_the_one_before(tmp_path, packed):
    path, table = tmp_path / "a.parquet", pa.table({"text": ["x" * (30 * MB)] * 64})
    pq.write_table(table, path, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}, compression="zstd")
    assert packed(path, "Fields(fraction=1e-9)") == "0 {'fraction': 64}"


def test_values_that_share_their_beginning(tmp_path, packed):
    """A page of 1 MB holds 100 MB of them."""
    path, start = tmp_path / "a.parquet", "the llama " * 100_000
    table = pa.table({"text": [f"{start}{number}" for number in range(100)]})
    pq.write_table(table, path, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}, compression="zstd")
    assert packed(path, "Fields(fraction=1e-9)", most=250) == "0 {'fraction': 100}"


@pytest.mark.parametrize("rows", [3, 50])
def test_a_compressed_batch_of_arrow(tmp_path, packed, rows):
    path, table = tmp_path / "a.arrow", pa.table({"text": [" " * (16 * MB)] * 50})
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
        stream.write_table(table, max_chunksize=rows)
    said = packed(path, "Fields(fraction=1e-9)")
    size = 50 * 16 * MB + 51 * 4
    too_large = f"{path}: batch 1 decompresses to {size:,} bytes at once: write it in smaller ones, or give the "
    assert said.startswith(too_large if rows == 50 else "0 {'fraction': 50}")


def test_a_compressed_dictionary_of_arrow(tmp_path, packed):
    path = tmp_path / "a.arrow"
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 25, pa.int8()), pa.array([" " * (100 * MB)]))
    with pa.ipc.new_stream(
        path, pa.schema({"text": text.type}), options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as stream:
        stream.write_batch(pa.record_batch({"text": text}))
    assert packed(path).startswith(f"{path}: batch 1 decompresses to 104,857,608 bytes at once")
