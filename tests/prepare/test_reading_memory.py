"""Small files of much text: a worker's memory is bounded by the longest document, whatever a file decompresses to."""

import bz2
import gzip
import json
import lzma
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak of memory")

MB = 1 << 20
FRACTION = 0.02  # of the documents that are read: encoding them takes long
# what a worker does with one input, and then its peak
CODE = """
import re, sys
from pathlib import Path
from tinyllama import InputError
from tinyllama.prepare.inputs import ENDINGS, Fields, find_inputs
from tinyllama.prepare.prepare import Options, _packer, _recipe
source, tokenizer, output, fields = sys.argv[1:]
options = Options(Path(tokenizer), Path(output), encoder="sentencepiece")
try:
    info = _packer(_recipe(eval(fields), options))(*find_inputs(source, ENDINGS))
    print(info["documents"], info["dropped"])
except InputError as error:
    print(error)
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def packed(path: Path, tokenizer_file: Path, fields: str = "Fields()") -> str:
    """What packing this file says; it must take less than 400 MB."""
    path.with_name("out").mkdir()
    command = [sys.executable, "-c", CODE, path, tokenizer_file, path.with_name("out"), fields]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    said, peak = run.stdout.splitlines()
    assert int(peak) < 400
    return said


def kept(path: Path, documents: int) -> str:
    draws = random.Random(f"0 {path.name}")
    count = sum(draws.random() < FRACTION for _ in range(documents))
    return f"{count} {{'fraction': {documents - count}}}"


def zst(*parts: bytes) -> bytes:
    compress = zstandard.ZstdCompressor().compressobj()
    return b"".join(compress.compress(part) for part in parts) + compress.flush()


def test_one_line_of_zst(tmp_path, tokenizer_file):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zst(b'{"text": "', *[b"x" * MB] * 800))
    assert path.stat().st_size < 40_000
    assert packed(path, tokenizer_file).startswith(f"{path}: line 1: longer than 33,554,432 bytes: remove or split it")


def test_many_lines_of_zst(tmp_path, tokenizer_file):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zst(*[json.dumps({"text": " " * MB}).encode() + b"\n"] * 200))
    assert path.stat().st_size < 100_000
    assert packed(path, tokenizer_file, f"Fields(fraction={FRACTION})") == kept(path, 200)


def test_one_line_of_gz(tmp_path, tokenizer_file):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "fine"}\n{"text": "' + b"\\n" * (40 * MB), 1))
    assert path.stat().st_size < 500_000
    assert packed(path, tokenizer_file).startswith(f"{path}: line 2: longer than 33,554,432 bytes")


@pytest.mark.parametrize("kind", ["xz", "bz2"])
def test_one_line_of_many_streams(tmp_path, tokenizer_file, kind):
    path = tmp_path / f"a.jsonl.{kind}"
    compress = {"xz": lzma.compress, "bz2": bz2.compress}[kind]
    path.write_bytes(compress(b'{"text": "fine"}\n{"text": "') + compress(b"x" * (16 * MB)) * 50)
    assert path.stat().st_size < 150_000
    assert packed(path, tokenizer_file).startswith(f"{path}: line 2: longer than 33,554,432 bytes")


@pytest.mark.parametrize("kind", ["xz", "bz2"])
def test_many_lines_of_one_stream(tmp_path, tokenizer_file, kind):
    path = tmp_path / f"a.json.{kind}"
    compress = lzma.LZMACompressor(preset=0) if kind == "xz" else bz2.BZ2Compressor()
    line = json.dumps({"text": " " * MB}).encode() + b"\n"
    path.write_bytes(b"".join(compress.compress(line) for _ in range(50)) + compress.flush())
    assert packed(path, tokenizer_file, f"Fields(fraction={FRACTION})") == kept(path, 50)


def test_a_torn_line_of_escapes(tmp_path, tokenizer_file):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "' + b'x\\\\\\"' * (6 * MB))
    assert packed(path, tokenizer_file).startswith(f"{path}: line 2: not valid JSON")


def test_one_letter_of_four_bytes_in_the_longest_document(tmp_path, tokenizer_file):
    path = tmp_path / "a.jsonl"
    line = '{"meta": {"redpajama_set_name": "C4"}, "text": "🦙' + "x" * (32 * MB - 100) + '"}\n'
    path.write_text(line * 2)  # Python's string takes 128 MB
    assert packed(path, tokenizer_file, "Fields(subsets=True, leave_out=('C4',))") == "0 {'C4': 2}"


def test_a_row_many_times(tmp_path, tokenizer_file):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x " * (15 * MB)] * 25}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    assert packed(path, tokenizer_file, f"Fields(fraction={FRACTION})") == kept(path, 25)


def test_a_row_of_arrow_many_times(tmp_path, tokenizer_file):
    path = tmp_path / "a.arrow"
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 25, pa.int8()), pa.array(["x " * (15 * MB)]))
    with pa.ipc.new_stream(path, pa.schema({"text": text.type})) as stream:
        stream.write_batch(pa.record_batch({"text": text}))
    assert packed(path, tokenizer_file, f"Fields(fraction={FRACTION})") == kept(path, 25)


def test_a_page_of_blanks(tmp_path, tokenizer_file):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [" " * (16 * MB)] * 8})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    assert column.total_compressed_size < 10_000
    assert packed(path, tokenizer_file) == (
        f"{path}: row group 1: {column.total_uncompressed_size:,} bytes of text in {column.total_compressed_size:,} "
        "compressed ones, which no text can be: repair or remove it"
    )


def test_zeros_beside_the_text(tmp_path, tokenizer_file):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["a"] * (5 * MB), "score": np.zeros(5 * MB)})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    assert pq.ParquetFile(path).metadata.row_group(0).column(1).total_compressed_size < 10_000
    assert packed(path, tokenizer_file, "Fields(fraction=1e-5)").startswith("5")  # a column that is not read
