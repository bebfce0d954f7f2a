"""SlimPajama as it is to be had: the layouts and the schemas of its copies."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tinyllama import InputError
from tinyllama.data.packed import open_packed
from tinyllama.prepare.inputs import Fields
from tinyllama.prepare.readers import DocumentReader
from tinyllama.tokenizer import Tokenizer

SETS = ["RedPajamaC4", "RedPajamaGithub", "RedPajamaWikipedia"]
TEXTS = [f"a text of {name}" for name in SETS]
METAS = [{"redpajama_set_name": name} for name in SETS]
SCHEMAS = {
    "struct": {"text": TEXTS, "meta": METAS, "__index_level_0__": [1, 2, 3]},
    "struct of more": {"meta": [{"url": "u", **meta, "z": 1} for meta in METAS], "text": TEXTS},
    "json": {"text": TEXTS, "meta": [json.dumps(meta) for meta in METAS]},
    "column": {"text": TEXTS, "redpajama_set_name": SETS},
    "both": {"text": TEXTS, "meta": [{"url": "u"}] * 3, "redpajama_set_name": SETS},
    "dictionary": {"text": TEXTS, "redpajama_set_name": pa.array(SETS).dictionary_encode()},
}


def write(path: Path, columns: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".arrow":
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    else:
        path.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()))
    return path


def chunks(path: Path, name: str = "", **fields) -> list[tuple[str, str]]:
    reader = DocumentReader(path, Fields(subsets=True, **fields), name)
    found = [(chunk.text.decode(), chunk.subset) for chunk in reader.chunks()]
    assert reader.dropped == dict.fromkeys(fields.get("leave_out", ()), 1)
    return found


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".jsonl.zst"])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_subset_wherever_it_stands(tmp_path, schema, ending):
    path = write(tmp_path / f"a{ending}", SCHEMAS[schema])
    expected = list(zip(TEXTS, SETS, strict=True))
    assert chunks(path) == expected
    assert chunks(path, leave_out=("RedPajamaGithub",)) == [expected[0], expected[2]]


UNNAMED = {
    "none": {"text": TEXTS},
    "null": {"text": TEXTS, "meta": pa.nulls(3)},
    "other struct": {"text": TEXTS, "meta": [{"url": "u"}] * 3},
    "other json": {"text": TEXTS, "meta": ["{}", "[", "7"]},
    "empty": {"text": TEXTS, "redpajama_set_name": [""] * 3},
    "number": {"text": TEXTS, "redpajama_set_name": [1, 2, 3]},
    "torn": {"text": TEXTS, "meta": ["[" * 9999] * 3},
}


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".jsonl.zst"])
@pytest.mark.parametrize("schema", UNNAMED)
def test_where_no_subset_is_named(tmp_path, schema, ending):
    path = write(tmp_path / f"a{ending}", UNNAMED[schema])
    with pytest.raises(InputError, match=r"(row|line) 1: no meta.redpajama_set_name, .*give --keep_all_subsets"):
        chunks(path, leave_out=("RedPajamaGithub",))
    assert chunks(path, unnamed=True) == [(text, "") for text in TEXTS]
    # a copy has a folder for each subset
    name = "RedPajamaC4/chunk_1/a.parquet"
    assert chunks(path, name) == [(text, "RedPajamaC4") for text in TEXTS]


LAYOUTS = {
    "train/chunk1/example_train_0.jsonl.zst": "chunk1--example_train_0.jsonl.zst",
    "train/RedPajamaC4/chunk_117.jsonl.zst": "RedPajamaC4--chunk_117.jsonl.zst",
    "data/train-00000-of-00001.parquet": "data--train-00000-of-00001.parquet",
    "train-00000-of-00001.parquet": "train-00000-of-00001.parquet",
    "default/train/0000.parquet": "default--train--0000.parquet",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_of_the_copies(tmp_path, tokenizer_file, script, one_process, layout):
    source, output = tmp_path / "in", tmp_path / "out"
    for split in ("train", "validation"):
        write(source / layout.replace("train", split), {"text": [f"{split}: {text}" for text in TEXTS], "meta": METAS})
    (source / "README.md").touch()
    for split in ("train", "validation"):
        folder = output / split
        flags = [] if split == "train" else ["--split", split]
        code, out, err = script(
            "prepare_slimpajama", "--source", source, "--tokenizer", tokenizer_file, "--output", folder, *flags
        )
        assert code == 0, err
        packed = open_packed(folder)
        assert packed.files == [LAYOUTS[layout].replace("train", split) + ".bin"]
        decoded = Tokenizer(tokenizer_file).decode(packed.read(0, packed.tokens).tolist())
        assert [text in decoded for text in (f"{split}: {TEXTS[0]}", TEXTS[1], f"{split}: {TEXTS[2]}")] == [
            True,
            False,
            True,
        ]
        assert "(1 of RedPajamaGithub left out)" in out


def command(folder, tokenizer_file):
    """The call that prepares what is in ``folder``/in."""
    source, output = folder / "in", folder / "out"
    return ["prepare_slimpajama", "--source", source, "--tokenizer", tokenizer_file, "--output", output]


def test_a_copy_that_names_no_subset_is_refused(tmp_path, tokenizer_file, script, one_process):
    write(tmp_path / "in/data/train-0.parquet", {"text": TEXTS})
    call = command(tmp_path, tokenizer_file)
    code, out, err = script(*call)
    assert (code, out) == (2, "")
    assert (
        "row 1: no meta.redpajama_set_name, and none beside meta, so no subset can be left out: give --keep_all" in err
    )
    code, out, err = script(*call, "--keep_all_subsets", "--exclude", "RedPajamaC4")
    assert code == 2
    assert "not allowed with" in err
    code, out, err = script(*call, "--keep_all_subsets")
    assert (code, "3 documents, " in out) == (0, True)


def test_packed_documents_are_of_their_subsets(tmp_path, tokenizer_file, script, one_process):
    write(tmp_path / "in/data/train-0.parquet", SCHEMAS["column"])
    script(*command(tmp_path, tokenizer_file))
    subsets = json.loads((tmp_path / "out/manifest.json").read_bytes())["subsets"]
    assert {name: figures["documents"] for name, figures in subsets.items()} == {
        "RedPajamaC4": 1,
        "RedPajamaWikipedia": 1,
    }


def test_a_copy_of_many_files_is_refused_before_all_are_read(tmp_path, tokenizer_file, script, one_process):
    for number in range(30):
        write(tmp_path / f"in/data/train-{number:02}.parquet", {"text": TEXTS})
    call = command(tmp_path, tokenizer_file)
    code, out, err = script(*call)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(errors)) == (2, "", 11)
    assert "20 more inputs were not tried, as these 10 were all bad: check the flags and the source" in errors[-1]
    code, out, err = script(*call, "--skip_bad_files", "40")  # the user means it
    assert "not one document in 30 input files" in err
    code, out, err = script(*call, "--keep_all_subsets", "--output", tmp_path / "all")
    assert (code, "90 documents" in out) == (0, True)
