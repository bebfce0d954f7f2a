"""Corpora that people train on today: a small file of each in its own format, prepared, decoded and compared.

Columns, types, nesting, compression and file names are those of the datasets' cards and file lists on the Hugging Face
Hub, as named beside each; texts and values are ours. Files that a download leaves beside them are there, too.
"""

import datetime
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from tinyllama.data.metadata import read_manifest
from tinyllama.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_process")

TEXTS = [
    "The little llama walked along the river.\n\nIt was late.",
    "  two blanks before, one after \r\nand a line end of two characters\t.",
    "Ærøskøbing, 漢字かな、שלום, e\u0301 🦙 \u00a0\u200b\ufeff",
    "",
    "def read(path):\n\treturn path  # </s> <s> [INST]\n",
    '"quoted" \\ and {"text": "nested"}',
]
WARC = {
    "Content-Length": "9876",
    "Content-Type": "application/http; msgtype=response",
    "WARC-Block-Digest": "sha1:AAAA",
    "WARC-Concurrent-To": "<urn:uuid:1>",
    "WARC-Date": "2019-03-22T21:11:05Z",
    "WARC-IP-Address": "192.0.2.7",
    "WARC-Identified-Payload-Type": None,
    "WARC-Payload-Digest": "sha1:BBBB",
    "WARC-Record-ID": "<urn:uuid:2>",
    "WARC-Target-URI": "https://example.org/a?b=c",
    "WARC-Truncated": "length",
    "WARC-Type": "response",
    "WARC-Warcinfo-ID": "<urn:uuid:3>",
}


def write_table(path: Path, columns: dict[str, Any], compression: str = "snappy") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path, compression=compression)


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    pack = {".zst": zstandard.compress, ".gz": gzip.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(lines))


def fineweb_edu(source: Path) -> dict[str, list[str]]:
    """HuggingFaceFW/fineweb-edu: the card's features; a folder for each crawl."""
    for crawl, texts in (("CC-MAIN-2013-20", TEXTS[:2]), ("CC-MAIN-2024-10", TEXTS)):
        columns = {
            "text": texts,
            "id": [f"<urn:uuid:{i}>" for i in range(len(texts))],
            "dump": [crawl] * len(texts),
            "url": ["https://example.org"] * len(texts),
            "file_path": [f"s3://commoncrawl/crawl-data/{crawl}/segments/1/warc/a.warc.gz"] * len(texts),
            "language": ["en"] * len(texts),
            "language_score": [0.98] * len(texts),
            "token_count": pa.array([17] * len(texts), pa.int64()),
            "score": [3.25] * len(texts),
            "int_score": pa.array([3] * len(texts), pa.int64()),
        }
        write_table(source / f"data/{crawl}/train-00000-of-00014.parquet", columns)
    return {
        "data--CC-MAIN-2013-20--train-00000-of-00014.parquet": TEXTS[:2],
        "data--CC-MAIN-2024-10--train-00000-of-00014.parquet": TEXTS,
    }


def fineweb_edu_sample(source: Path) -> dict[str, list[str]]:
    """HuggingFaceFW/fineweb-edu: a sample's folder, as sample/10BT; its file names repeat no folder."""
    for number, texts in enumerate((TEXTS[:3], TEXTS[3:])):
        columns = {"text": texts, "id": [""] * 3, "score": [3.5] * 3, "int_score": [4] * 3}
        write_table(source / f"{number:03d}_00000.parquet", columns)
    return {"000_00000.parquet": TEXTS[:3], "001_00000.parquet": TEXTS[3:]}


def dclm(source: Path) -> dict[str, list[str]]:
    """mlfoundations/dclm-baseline-1.0: the card's features, ten global shards of ten local ones, JSON in zstandard."""
    records = [
        {
            "bff_contained_ngram_count_before_dedupe": 40,
            "language_id_whole_page_fasttext": {"en": 0.93},
            "metadata": WARC,
            "previous_word_count": 321,
            "text": text,
            "url": "https://example.org/a?b=c",
            "warcinfo": "robots: classic\r\nhostname: ip-10-0-0-1\r\nformat: WARC File Format 1.0\r\n",
            "fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob": 0.025,
        }
        for text in TEXTS
    ]
    folder = source / "global-shard_01_of_10"
    write_records(folder / "local-shard_0_of_10/shard_00000000_processed.jsonl.zst", records)
    write_records(folder / "local-shard_1_of_10/shard_00000000_processed.jsonl.zst", records[::-1])
    shards = [f"global-shard_01_of_10--local-shard_{n}_of_10--shard_00000000_processed.jsonl.zst" for n in range(2)]
    return {shards[0]: TEXTS, shards[1]: TEXTS[::-1]}


def dolma(source: Path) -> dict[str, list[str]]:
    """allenai/dolma: JSON in gzip, the fields of its toolkit's document format; ``metadata`` differs by source."""
    fields = {"source": "common-crawl", "added": "2023-04-11T09:57:03.044571+00:00", "created": "2020-01-17T12:48:23Z"}
    records = [
        {"id": f"doc {i}", "text": text} | fields | {"metadata": {"url": "https://example.org", "length": len(text)}}
        for i, text in enumerate(TEXTS)
    ]
    write_records(source / "cc_en_head/cc_en_head-0000.json.gz", records)
    return {"cc_en_head--cc_en_head-0000.json.gz": TEXTS}


def c4(source: Path) -> dict[str, list[str]]:
    """allenai/c4: JSON in gzip, a folder for each variant, text, timestamp and url; its shards say the split."""
    records = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org"} for text in TEXTS]
    write_records(source / "en/c4-train.00000-of-01024.json.gz", records)
    write_records(source / "en/c4-train.00001-of-01024.json.gz", records[:2])
    write_records(source / "en/c4-validation.00000-of-00008.json.gz", records[2:3])
    return {"en--c4-train.00000-of-01024.json.gz": TEXTS, "en--c4-train.00001-of-01024.json.gz": TEXTS[:2]}


def climbmix_text(source: Path) -> dict[str, list[str]]:
    """OptimalScale/ClimbMix: the text of Nemotron-ClimbMix, whose cluster each record keeps; a hundred parts."""
    write_records(source / "part_0.jsonl", [{"text": text, "cluster_id": 7} for text in TEXTS])
    return {"part_0.jsonl": TEXTS}


def climbmix_shuffled(source: Path) -> dict[str, list[str]]:
    """karpathy/climbmix-400b-shuffle: the same text in parquet, row groups of 1,024 documents, one column."""
    write_table(source / "shard_00000.parquet", {"text": TEXTS}, "zstd")
    return {"shard_00000.parquet": TEXTS}


def wikipedia(source: Path) -> dict[str, list[str]]:
    """wikimedia/wikipedia: a folder for each language and date; id, url, title and text, all strings."""
    columns = {
        "id": [str(i) for i in range(len(TEXTS))],
        "url": ["https://en.wikipedia.org/wiki/Llama"] * len(TEXTS),
        "title": ["Llama"] * len(TEXTS),
        "text": TEXTS,
    }
    write_table(source / "20231101.en/train-00000-of-00041.parquet", columns)
    return {"20231101.en--train-00000-of-00041.parquet": TEXTS}


def starcoderdata(source: Path) -> dict[str, list[str]]:
    """bigcode/starcoderdata: a folder for each language; the text is ``content``."""
    columns = {
        "max_stars_repo_path": ["src/a.py"] * len(TEXTS),
        "max_stars_repo_name": ["owner/name"] * len(TEXTS),
        "max_stars_count": pa.array([0] * len(TEXTS), pa.int64()),
        "id": [str(i) for i in range(len(TEXTS))],
        "content": TEXTS,
    }
    write_table(source / "python/train-00000-of-00059.parquet", columns)
    write_table(source / "git-commits-cleaned/train-00000-of-00051.parquet", {"content": TEXTS[:1]})
    return {
        "git-commits-cleaned--train-00000-of-00051.parquet": TEXTS[:1],
        "python--train-00000-of-00059.parquet": TEXTS,
    }


def stack_v2_smol(source: Path) -> dict[str, list[str]]:
    """Copies of The Stack v2 with its files' text (Reset23/the-stack-v2-python and others): ``content`` is last."""
    columns = {
        "blob_id": ["0a" * 20] * len(TEXTS),
        "detected_licenses": [["MIT"]] * len(TEXTS),
        "visit_date": [datetime.datetime(2023, 9, 6, 1, 2, 3, 456)] * len(TEXTS),
        "github_id": pa.array([None, *range(1, len(TEXTS))], pa.int64()),
        "src_encoding": ["UTF-8"] * len(TEXTS),
        "is_vendor": [False] * len(TEXTS),
        "content": TEXTS,
    }
    write_table(source / "data/train-00000-of-00002.parquet", columns)
    return {"data--train-00000-of-00002.parquet": TEXTS}


def slimpajama(source: Path) -> dict[str, list[str]]:
    """cerebras/SlimPajama-627B, as it was: a folder for each split, ten chunks, JSON in zstandard."""
    records = [{"text": text, "meta": {"redpajama_set_name": "RedPajamaC4"}} for text in TEXTS]
    records.insert(2, {"text": "left out", "meta": {"redpajama_set_name": "RedPajamaGithub"}})
    write_records(source / "train/chunk1/example_train_0.jsonl.zst", records)
    write_records(source / "validation/chunk1/example_holdout_0.jsonl.zst", records[:1])
    return {"chunk1--example_train_0.jsonl.zst": TEXTS}


def slimpajama_dc(source: Path) -> dict[str, list[str]]:
    """MBZUAI-LLM/SlimPajama-627B-DC: SlimPajama's records, sorted into a folder for each subset."""
    for subset in ("RedPajamaBook", "RedPajamaGithub"):
        records = [{"text": text, "meta": {"redpajama_set_name": subset}} for text in TEXTS]
        write_records(source / f"train/{subset}/chunk_0.jsonl.zst", records)
    return {"RedPajamaBook--chunk_0.jsonl.zst": TEXTS, "RedPajamaGithub--chunk_0.jsonl.zst": []}


def slimpajama_reupload(source: Path) -> dict[str, list[str]]:
    """gmongaras/SlimPajama-627B_Reupload: 250 parquet files, ``meta`` a struct; Github is left out."""
    columns = {
        "text": [*TEXTS, "left out"],
        "meta": [{"redpajama_set_name": "RedPajamaC4"}] * len(TEXTS) + [{"redpajama_set_name": "RedPajamaGithub"}],
    }
    write_table(source / "data/train-00000-of-00250.parquet", columns)
    return {"data--train-00000-of-00250.parquet": TEXTS}


def slimpajama_6b(source: Path) -> dict[str, list[str]]:
    """DKYoon/SlimPajama-6B: parquet, a hash in each name, three splits in one folder, an index that pandas has left."""
    columns = {
        "text": TEXTS,
        "meta": [{"redpajama_set_name": "RedPajamaBook"}] * len(TEXTS),
        "__index_level_0__": pa.array(range(len(TEXTS)), pa.int64()),
    }
    for name in ("train-00000-of-00048-ab2b35705f029d94", "validation-00000-of-00001-1", "test-00000-of-00001-2"):
        write_table(source / f"data/{name}.parquet", columns)
    return {"data--train-00000-of-00048-ab2b35705f029d94.parquet": TEXTS}


CORPORA: list[tuple[str, Callable[[Path], dict[str, list[str]]], *tuple[str, ...]]] = [
    ("prepare_text", fineweb_edu),
    ("prepare_text", fineweb_edu_sample),
    ("prepare_text", dclm),
    ("prepare_text", dolma),
    ("prepare_text", c4, "--split", "train"),
    ("prepare_text", climbmix_text),
    ("prepare_text", climbmix_shuffled),
    ("prepare_text", wikipedia),
    ("prepare_starcoder", starcoderdata),
    ("prepare_starcoder", stack_v2_smol),
    ("prepare_slimpajama", slimpajama),
    ("prepare_slimpajama", slimpajama_dc),
    ("prepare_slimpajama", slimpajama_reupload),
    ("prepare_slimpajama", slimpajama_6b),
]


def stack_v2(source: Path) -> None:
    """bigcode/the-stack-v2: the features of its card, ids of Software Heritage in place of the files' text."""
    columns = {
        "blob_id": ["0a" * 20],
        "directory_id": ["0b" * 20],
        "path": ["/src/a.py"],
        "content_id": ["0c" * 20],
        "detected_licenses": [["MIT"]],
        "license_type": ["permissive"],
        "repo_name": ["owner/name"],
        "src_encoding": ["UTF-8"],
        "length_bytes": pa.array([123], pa.int64()),
    }
    write_table(source / "data/Python/train-00000-of-00214.parquet", columns)


def climbmix_tokens(source: Path) -> None:
    """nvidia/Nemotron-ClimbMix: GPT-2's tokens, as its card says, which offers OptimalScale/ClimbMix for the text."""
    write_records(source / "part_0.jsonl", [{"tokens": [464, 1310, 32660, 2611], "token_count": 4, "cluster_id": 7}])


REFUSED = [
    (
        *(
            "prepare_starcoder",
            stack_v2,
            "data/Python/train-00000-of-00214.parquet: no column 'content', only ['blob_id', ",
        ),
        "The Stack v2 names files at Software Heritage; fetch their text first, as its dataset card explains",
    ),
    (
        *("prepare_text", stack_v2, "data/Python/train-00000-of-00214.parquet: no column 'text', only ['blob_id', "),
        "The Stack v2 names files at Software Heritage; fetch their text first, as its dataset card explains",
    ),
    (
        *("prepare_text", climbmix_tokens, "part_0.jsonl: line 1: no key 'text', only ['tokens', 'token_count', "),
        "decode them, or take the text (of Nemotron-ClimbMix: OptimalScale/ClimbMix)",
    ),
]


@pytest.mark.parametrize(("name", "write", "what", "hint"), REFUSED)
def test_a_corpus_without_text_is_refused_with_what_to_do(
    script: Any, tokenizer_file: Path, tmp_path: Path, name: str, write: Any, what: str, hint: str
) -> None:
    write(tmp_path / "raw")
    code, said, err = prepared(script, name, tmp_path / "raw", tokenizer_file, tmp_path / "packed")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, said) == (2, "")
    assert line.startswith(f"error: {tmp_path}/raw/{what}")
    assert line.endswith(hint)
    assert not (tmp_path / "packed" / "manifest.json").exists()


def documents(folder: Path, tokenizer: Tokenizer) -> dict[str, list[str]]:
    """The decoded documents of each shard, without the eos that ends each."""
    found: dict[str, list[str]] = {}
    for shard in read_manifest(folder)["shards"]:
        tokens = np.fromfile(folder / f"{shard['name']}.bin", "<u2")
        ends = np.load(folder / f"{shard['name']}.idx.npy").astype(int)
        parts = np.split(tokens, ends)[:-1]
        assert all(part[-1] == tokenizer.eos_id for part in parts)
        found[shard["name"]] = [tokenizer.decode(part[:-1].tolist()) for part in parts]
    return found


def prepared(script: Any, name: str, source: Path, tokenizer: Path, output: Path, *flags: str) -> tuple[int, str, str]:
    paths = ["--source", source, "--tokenizer", tokenizer, "--output", output]
    return script(name, *paths, "--encoder", "sentencepiece", *flags)


@pytest.mark.parametrize(
    ("name", "write", "flags"),
    [pytest.param(name, write, flags, id=write.__name__) for name, write, *flags in CORPORA],
)
def test_what_is_prepared_is_the_text_of_the_corpus(
    script: Any, tokenizer_file: Path, tmp_path: Path, name: str, write: Any, flags: list[str]
) -> None:
    source, output = tmp_path / "raw", tmp_path / "packed"
    expected = write(source)
    (source / "README.md").write_text("---\nlicense: odc-by\n---\n")
    (source / ".gitattributes").write_text("*.parquet filter=lfs diff=lfs merge=lfs -text\n")
    cache = source / ".cache/huggingface/download/data"  # what `hf download --local-dir` keeps
    cache.mkdir(parents=True)
    (cache / "a.parquet.metadata").write_text("87f09149ef4734204d70ed1d046ddc9ca3f2b8f9\n")
    (cache / "a.parquet.lock").touch()
    code, said, err = prepared(script, name, source, tokenizer_file, output, *flags)
    assert code == 0, err
    assert documents(output, Tokenizer(tokenizer_file)) == expected
    texts = [text for shard in expected.values() for text in shard]
    manifest = read_manifest(output)
    assert sum(figures["bytes"] for figures in manifest["subsets"].values()) == sum(len(t.encode()) for t in texts)
    assert f"{len(texts)} documents" in said.splitlines()[-1]
