"""What a preparation says of itself, and what it refuses: each fact, setting and mark on its own."""

import contextlib
import hashlib
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from packed import SHORT, change
from tokenizers import pre_tokenizers

from tinyllama import InputError
from tinyllama.data.packed import open_packed
from tinyllama.prepare import encode, prepare
from tinyllama.prepare.inputs import ENDINGS, Fields, find_inputs
from tinyllama.prepare.prepare import CONTEXTS, Options
from tinyllama.prepare.workers import cores
from tinyllama.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_process")

LONG = " ".join(f"{i} llamas, 漢字" for i in range(60))
VERSION = f"sentencepiece {sentencepiece.__version__}"


def write(source: Path, files: dict[str, list]) -> Path:
    for name, rows in files.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row if isinstance(row, dict) else {"text": row} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return source


def pack(source: Path, tokenizer: Path, output: Path, fields: Fields | None = None, **options) -> str:
    settings = {"workers": 1, "encoder": "sentencepiece"} | options
    return prepare.prepare(find_inputs(source, ENDINGS), fields or Fields(), Options(tokenizer, output, **settings))


def refused(*args, **options) -> str:
    with pytest.raises(InputError) as info:
        pack(*args, **options)
    return str(info.value)


def facts(folder: Path, name: str) -> dict:
    """What it says, without the hash of that."""
    content = json.loads((folder / f"{name}.json").read_bytes())
    content.pop("metadata_blake2b", None)
    return content


def shards(folder: Path) -> set[str]:
    return {path.name.removesuffix(".bin") for path in folder.glob("*.bin")}


def row(text: str, subset: str) -> dict:
    return {"text": text, "meta": {"redpajama_set_name": subset}}


@pytest.mark.parametrize("flush", [1, 40, 1 << 16])
@pytest.mark.parametrize("cut", [16, 1 << 20])
def test_every_fact_of_a_shard(tmp_path, tokenizer_file, monkeypatch, flush, cut):
    monkeypatch.setattr(prepare, "_FLUSH", flush)
    monkeypatch.setattr(encode, "CUT", cut)  # a long document is encoded in parts, and is one document still
    rows = [
        row("The little llama", "RedPajamaC4"),
        row("code", "RedPajamaGithub"),
        row(LONG, "RedPajamaBook"),
        row("", "RedPajamaC4"),
        row("a\ud800", "RedPajamaC4"),
        row("more code", "RedPajamaGithub"),
        row(LONG[::-1], "RedPajamaC4"),
    ]
    source, output = write(tmp_path / "in", {"chunk1/a.jsonl": rows}), tmp_path / "out"
    fields = Fields(subsets=True, leave_out=("RedPajamaGithub",))
    pack(source, tokenizer_file, output, fields, bos=True)

    tokenizer = Tokenizer(tokenizer_file)
    kept = [one | {"text": one["text"].replace("\ud800", "\ufffd")} for one in rows]
    kept = [(one["meta"]["redpajama_set_name"], one["text"]) for one in kept if "code" not in one["text"]]
    documents = [[1, *tokenizer.encode(text), 2] for _, text in kept]
    tokens = [token for document in documents for token in document]
    raw = (source / "chunk1/a.jsonl").read_bytes()
    subsets = {}
    for subset in ("RedPajamaBook", "RedPajamaC4"):
        of_it = [(text, ids) for (name, text), ids in zip(kept, documents, strict=True) if name == subset]
        subsets[subset] = {
            "documents": len(of_it),
            "tokens": sum(len(ids) for _, ids in of_it),
            "bytes": sum(len(text.encode()) for text, _ in of_it),
        }
        for key, one in [(context, [len(ids) for _, ids in of_it if len(ids) > context]) for context in CONTEXTS]:
            subsets[subset] |= {f"documents_over_{key}": len(one), f"tokens_over_{key}": sum(one)}
    assert subsets["RedPajamaBook"]["bytes"] == len(LONG) + 2 * 2 * 60  # three bytes for each of two characters
    policy = {
        "tokenizer_sha256": hashlib.sha256(tokenizer_file.read_bytes()).hexdigest(),
        "encoder": "sentencepiece",
        "bos": True,
        "eos": True,
        "bos_id": 1,
        "eos_id": 2,
    }
    more = {"text_key": "text", "leave_out": ["RedPajamaGithub"], "fraction": 1.0, "seed": None}
    figures = {"subsets": subsets, "dropped": {"RedPajamaGithub": 2}, "repaired": 1}
    stored = np.array(tokens, dtype="<u2").tobytes()
    counts = {
        "tokens": len(tokens),
        "documents": 5,
        "max_token": max(tokens),
        "blake2b": hashlib.blake2b(stored, digest_size=32).hexdigest(),
    }
    of_all = {"format_version": 1, "dtype": "uint16", "vocab_size": 400} | policy | figures
    name = "chunk1--a.jsonl"
    index = (output / f"{name}.idx.npy").read_bytes()
    assert (output / f"{name}.bin").read_bytes() == stored
    assert np.load(output / f"{name}.idx.npy").tolist() == np.cumsum([len(ids) for ids in documents]).tolist()
    assert facts(output, name) == of_all | more | counts | {
        "name": name,
        "index_blake2b": hashlib.blake2b(index, digest_size=32).hexdigest(),
        "encoded_by": VERSION,
        "source": {
            "name": "chunk1/a.jsonl",
            "bytes": len(raw),
            "blake2b": hashlib.blake2b(raw, digest_size=32).hexdigest(),
        },
    }
    manifest = facts(output, "manifest")
    manifest.pop("fingerprint")
    assert manifest == of_all | {key: counts[key] for key in ("tokens", "documents", "max_token")} | {
        "shards": [{"name": name} | counts],
        "skipped": [],
    }


def test_a_folder_begun_when_added_tokens_were_text_is_not_continued(tmp_path):
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.add_special_tokens(["</s>"])
    library.add_tokens(["  "])
    library.save(str(tmp_path / "tokenizer.json"))
    source, output = write(tmp_path / "in", {"a.jsonl": ["x  y"], "b.jsonl": ["z"]}), tmp_path / "out"
    pack(source, tmp_path / "tokenizer.json", output)
    assert (facts(output, "a.jsonl")["added_tokens"], facts(output, "a.jsonl")["tokens"]) == (1, 4)
    earlier = facts(output, "a.jsonl")
    del earlier["added_tokens"]
    (output / "a.jsonl.json").write_text(json.dumps(earlier))
    assert refused(source, tmp_path / "tokenizer.json", output) == (
        f"{output}: added_tokens was None for shard a.jsonl and is 1 now: use another --output"
    )


def test_a_manifest_sums_up_its_shards_and_a_folder_is_a_subset(tmp_path, tokenizer_file):
    one = "a\udfff"  # a lone surrogate in each, of which "one" has two
    files = {"go/a.jsonl": ["go", one], "go/deep/b.jsonl": ["gopher"], "python/a.jsonl": [one], "c.jsonl": ["c" * 99]}
    output = tmp_path / "out"
    summary = pack(write(tmp_path / "in", files), tokenizer_file, output, eos=False)
    count = {text: len(Tokenizer(tokenizer_file).encode(text)) for text in ("go", "gopher", "a\ufffd", "c" * 99)}
    manifest = facts(output, "manifest")
    assert manifest["subsets"] == {
        ".": {"documents": 1, "tokens": count["c" * 99], "bytes": 99} | SHORT,
        "go": {"documents": 3, "tokens": count["go"] + count["a\ufffd"] + count["gopher"], "bytes": 2 + 4 + 6} | SHORT,
        "python": {"documents": 1, "tokens": count["a\ufffd"], "bytes": 4} | SHORT,
    }
    assert (manifest["repaired"], manifest["dropped"], manifest["skipped"]) == (2, {}, [])
    assert list(facts(output, "go--deep--b.jsonl")["subsets"]) == ["go"]
    lines = summary.splitlines()
    assert lines[0].split() == ["subset", "documents", "tokens", "bytes"]
    assert [line.split()[0] for line in lines[1:5]] == [".", "go", "python", "all"]
    assert f"{output}: 4 shards (4 new), 5 documents (2 with lone surrogates replaced), " in lines[-1]


@pytest.mark.parametrize(
    ("key", "was", "now"),
    [
        ("tokenizer_sha256", "ab", None),
        ("encoder", "tokenizers", "sentencepiece"),
        ("bos", True, False),
        ("eos", False, True),
        ("bos_id", 5, 1),
        ("eos_id", 5, 2),
        ("text_key", "content", "text"),
        ("leave_out", ["RedPajamaGithub"], []),
        ("fraction", 0.5, 1.0),
        ("seed", 3, None),
    ],
)
def test_a_shard_of_any_other_setting_is_refused(tmp_path, tokenizer_file, key, was, now):
    source, output = write(tmp_path / "in", {"a.jsonl": ["a"], "b.jsonl": ["b"]}), tmp_path / "out"
    pack(source, tokenizer_file, output)
    path = output / "b.jsonl.json"
    change(path, **{key: was})
    now = Tokenizer(tokenizer_file).sha256 if key == "tokenizer_sha256" else now
    message = f"{output}: {key} was {was!r} for shard b.jsonl and is {now!r} now: use another --output"
    assert refused(source, tokenizer_file, output) == message
    assert refused(source, tokenizer_file, output, finish=True) == message
    assert (output / "manifest.json").exists()
    if now is not None:  # one that does not say is of another setting too
        path.write_text(json.dumps({name: value for name, value in facts(output, "b.jsonl").items() if name != key}))
        message = f"{key} was None for shard b.jsonl and is {now!r} now"
        message = "eos_id is null, and documents have eos" if key == "eos_id" else message
        assert message in refused(source, tokenizer_file, output)


def test_the_seed_counts_only_where_a_fraction_is_drawn(tmp_path, tokenizer_file):
    source = write(tmp_path / "in", {"a.jsonl": ["a"] * 20})
    pack(source, tokenizer_file, tmp_path / "all", Fields(seed=1))
    assert "1 shard (0 new)" in pack(source, tokenizer_file, tmp_path / "all", Fields(seed=2))
    pack(source, tokenizer_file, tmp_path / "some", Fields(fraction=0.5, seed=1))
    assert facts(tmp_path / "some", "a.jsonl")["seed"] == 1
    message = refused(source, tokenizer_file, tmp_path / "some", Fields(fraction=0.6, seed=1))
    assert "fraction was 0.5 for shard a.jsonl and is 0.6 now" in message


def test_a_fraction_is_drawn_by_the_seed_and_the_name_of_the_input(tmp_path, tokenizer_file):
    texts = [f"document {i}" for i in range(50)]
    source, output = write(tmp_path / "in", {"x/a.jsonl": texts, "y/a.jsonl": texts}), tmp_path / "out"
    pack(source, tokenizer_file, output, Fields(fraction=0.4, seed=7))
    encode_one = Tokenizer(tokenizer_file).encode
    for name in ("x/a.jsonl", "y/a.jsonl"):
        draws = random.Random(f"7 {name}")
        kept = [text for text in texts if draws.random() < 0.4]
        info = facts(output, name.replace("/", "--"))
        assert info["documents"] == len(kept)
        assert info["dropped"] == {"fraction": 50 - len(kept)}
        stored = np.fromfile(output / f"{name.replace('/', '--')}.bin", "<u2").tolist()
        assert stored == [i for text in kept for i in [*encode_one(text), 2]]
    assert facts(output, "x--a.jsonl")["blake2b"] != facts(output, "y--a.jsonl")["blake2b"]


def test_an_input_of_another_name_or_size_is_packed_again(tmp_path, tokenizer_file):
    output = tmp_path / "out"
    pack(write(tmp_path / "one", {"a/b.jsonl": ["one"], "c.jsonl": ["c"]}), tokenizer_file, output)
    two = write(tmp_path / "two", {"a--b.jsonl": ["two"], "c.jsonl": ["c"]})  # as many bytes, and a shard of that name
    assert "2 shards (1 new)" in pack(two, tokenizer_file, output)
    assert facts(output, "a--b.jsonl")["source"]["name"] == "a--b.jsonl"
    for text in ("cc", "c"):  # longer, and shorter again
        write(two, {"c.jsonl": [text]})
        assert "2 shards (1 new)" in pack(two, tokenizer_file, output)
    pack(two, tokenizer_file, tmp_path / "fresh")
    for path in (tmp_path / "fresh").iterdir():
        assert path.read_bytes() == (output / path.name).read_bytes()


def test_tasks_share_the_inputs_out_one_by_one(tmp_path, tokenizer_file):
    source, output = write(tmp_path / "in", {f"{i}.jsonl": [str(i)] for i in range(7)}), tmp_path / "out"
    for task, numbers in ((2, "25"), (0, "036"), (1, "14")):
        before = shards(output)
        summary = pack(source, tokenizer_file, output, task=(task, 3))
        assert shards(output) - before == {f"{i}.jsonl" for i in numbers}
        assert (
            f"{output}: {len(numbers)} shard{'s' * (len(numbers) > 1)} ({len(numbers)} new), {len(numbers)} documents"
            in summary
        )
        assert not (output / "manifest.json").exists()
    assert "7 shards (0 new), 7 documents" in pack(source, tokenizer_file, output, finish=True)
    assert open_packed(output).documents == 7


def test_a_task_of_which_all_is_done_leaves_the_manifest(tmp_path, tokenizer_file):
    source, output = write(tmp_path / "in", {"a.jsonl": ["a"], "b.jsonl": ["b"]}), tmp_path / "out"
    pack(source, tokenizer_file, output)
    assert "1 shard (0 new)" in pack(source, tokenizer_file, output, task=(1, 2))
    assert open_packed(output).documents == 2


def test_finish_names_three_of_the_missing_and_counts_the_rest(tmp_path, tokenizer_file):
    output = tmp_path / "out"
    for count, said in ((1, "0.jsonl"), (3, "0.jsonl, 1.jsonl, 2.jsonl"), (5, "0.jsonl, 1.jsonl, 2.jsonl and 2 more")):
        source = write(tmp_path / f"in{count}", {f"{i}.jsonl": ["a"] for i in range(count)})
        expected = f"{output}: {count} of {count} shards are missing ({said}): run the tasks that make them first"
        assert refused(source, tokenizer_file, output, finish=True) == expected


def test_the_mark_of_a_bad_input(tmp_path, tokenizer_file):
    files = {"a.jsonl": ["a"], "b.jsonl": ["b"], "c.jsonl": ["c"], "d.jsonl": ["d"]}
    source, output = write(tmp_path / "in", files), tmp_path / "out"
    for name in ("b.jsonl", "c.jsonl"):
        (source / name).write_text("{")
    problem = {name: f"{source / name}: line 1: not valid JSON" for name in ("b.jsonl", "c.jsonl")}
    refused(source, tokenizer_file, output, task=(0, 1))
    marks = {path.name: path.read_text() for path in sorted(output.glob("*.bad"))}
    assert marks.keys() == {"b.jsonl.bad", "c.jsonl.bad"}
    assert all(marks[f"{name}.bad"].startswith(said) for name, said in problem.items())
    assert refused(source, tokenizer_file, output, finish=True, skip_bad_files=1).splitlines() == list(marks.values())
    for _ in range(2):  # the marks stay, for one may finish again
        summary = pack(source, tokenizer_file, output, finish=True, skip_bad_files=2)
        assert [line for line in summary.splitlines() if "skipped" in line] == [f"skipped: {m}" for m in marks.values()]
        assert facts(output, "manifest")["skipped"] == ["b.jsonl", "c.jsonl"]
        assert {path.name for path in output.glob("*.bad")} == marks.keys()
    write(source, {"b.jsonl": ["b"]})
    assert "skipped: " + marks["b.jsonl.bad"] in pack(  # --finish packs nothing
        source, tokenizer_file, output, finish=True, skip_bad_files=2
    )
    assert "b.jsonl" not in shards(output)
    summary = pack(source, tokenizer_file, output, skip_bad_files=1)  # tries both again
    assert f"{output}: 3 shards (1 new), 3 documents" in summary
    assert [path.name for path in output.glob("*.bad")] == ["c.jsonl.bad"]
    assert facts(output, "manifest")["skipped"] == ["c.jsonl"]
    write(source, {"c.jsonl": ["c"]})
    pack(source, tokenizer_file, output, task=(0, 1))
    assert list(output.glob("*.bad")) == []  # by the task that packed it
    assert "4 shards (0 new)" in pack(source, tokenizer_file, output, finish=True)
    assert facts(output, "manifest")["skipped"] == []


def test_the_mark_of_an_input_that_is_gone_goes_too(tmp_path, tokenizer_file):
    source, output = write(tmp_path / "in", {"a.jsonl": ["a"], "b.jsonl": ["b"]}), tmp_path / "out"
    (source / "b.jsonl").write_text("{")
    refused(source, tokenizer_file, output)
    (source / "b.jsonl").unlink()
    pack(source, tokenizer_file, output, task=(0, 1))
    assert (output / "b.jsonl.bad").exists()  # another task's, for all that this one knows
    pack(source, tokenizer_file, output, finish=True)
    assert not (output / "b.jsonl.bad").exists()


def test_files_of_other_programs_are_left_where_they_are(tmp_path, tokenizer_file):
    source, output = write(tmp_path / "in", {"a.jsonl": ["a"]}), tmp_path / "out"
    output.mkdir()
    others = {"blocks.bad": "17\n", "lines.jsonl.bad": '{"text"', ".lock": "held by another program"}
    for name, text in others.items():
        (output / name).write_text(text)
    for ending in (".json", ".txt"):
        (output / f"dir{ending}.bad").mkdir()
    pack(source, tokenizer_file, output)
    assert {name: (output / name).read_text() for name in others} == others


@pytest.mark.parametrize("ending", ["bin", "idx.npy", "json", "bad"])
def test_what_the_killed_left_of_each_kind_of_file_is_removed(tmp_path, tokenizer_file, ending):
    source, output = write(tmp_path / "in", {"a.jsonl": ["a"], "b.jsonl": ["b"]}), tmp_path / "out"
    output.mkdir()
    left = [output / f"{name}.jsonl.{ending}.0123abcd.tmp" for name in "ab"]
    for path in left:
        path.touch()
    pack(source, tokenizer_file, output, task=(0, 2))
    assert [path.exists() for path in left] == [False, True]
    pack(source, tokenizer_file, output, task=(1, 2))
    assert [path.exists() for path in left] == [False, False]


def test_shards_of_no_input_are_refused_though_they_are_not_done(tmp_path, tokenizer_file):
    source, output = write(tmp_path / "in", {"a.jsonl": ["a"]}), tmp_path / "out"
    pack(source, tokenizer_file, output)
    for name in ("z.idx.npy", "y.idx.npy"):  # what a shard begins with
        (output / name).touch()
    expected = (
        f"{output}: 2 shards belong to no input (y, z): remove their files (NAME.bin, NAME.idx.npy and NAME.json), "
        "or use another --output"
    )
    assert refused(source, tokenizer_file, output) == expected
    (output / "z.idx.npy").rename(output / "z.bin")
    (output / "y.idx.npy").rename(output / "y.json")
    assert "1 shard (0 new)" in pack(source, tokenizer_file, output)  # other files are none of ours


def test_raw_data_in_the_output_folder_is_no_shard(tmp_path, tokenizer_file):
    (tmp_path / "a.json").write_text('{"text": "a"}\n')
    (tmp_path / "b.json").write_text('{"text": "b"}\n')
    for new in (1, 0):
        assert f"1 shard ({new} new)" in pack(tmp_path / "a.json", tokenizer_file, tmp_path)
    assert shards(tmp_path) == {"a.json"}
    assert (tmp_path / "b.json").read_text() == '{"text": "b"}\n'


def test_the_manifest_is_gone_before_a_shard_changes(tmp_path, tokenizer_file, monkeypatch):
    source, output = write(tmp_path / "in", {"a.jsonl": ["a"], "b.jsonl": ["b"]}), tmp_path / "out"
    pack(source, tokenizer_file, output)
    write(source, {"a.jsonl": ["longer"]})
    there = []
    for task in ((1, 2), (0, 2)):
        packer = prepare._packer

        def watched(recipe, packer=packer):
            there.append((output / "manifest.json").exists())
            return packer(recipe)

        monkeypatch.setattr(prepare, "_packer", watched)
        pack(source, tokenizer_file, output, task=task)
        monkeypatch.setattr(prepare, "_packer", packer)
    assert there == [False]  # the first task had nothing to do
    assert not (output / "manifest.json").exists()


def test_what_cannot_be_written_is_named(tmp_path, tokenizer_file):
    source, output = write(tmp_path / "in", {"a.jsonl": ["a"]}), tmp_path / "out"
    (output / "a.jsonl.bin").mkdir(parents=True)
    said = f"cannot write {output / 'a.jsonl.bin'} (it is there and is not a file): give another"
    assert refused(source, tokenizer_file, output).startswith(said)
    assert list(output.glob("*.tmp")) == []


def test_a_pipe_that_breaks_is_no_error_of_the_output(tmp_path, tokenizer_file, monkeypatch):
    source = write(tmp_path / "in", {"a.jsonl": ["a"]})
    read, end = os.pipe()
    os.close(read)
    stderr = os.fdopen(end, "w")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        with pytest.raises(BrokenPipeError):
            pack(source, tokenizer_file, tmp_path / "out")
    with contextlib.suppress(BrokenPipeError):  # of what is in its buffer
        stderr.close()


def test_no_document_in_some_of_the_inputs_is_no_error(tmp_path, tokenizer_file):
    source, output = write(tmp_path / "in", {"a.jsonl": [], "b.jsonl": ["b"]}), tmp_path / "out"
    assert "1 shard (1 new), 0 documents, 0 tokens" in pack(source, tokenizer_file, output, task=(0, 2))
    assert "2 shards (1 new), 1 document" in pack(source, tokenizer_file, output)


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_a_tokenizer_without_the_token_that_is_asked_for(tmp_path, name):
    import tokenizers

    other = {"bos": "</s>", "eos": "<s>"}[name]
    model = tokenizers.models.WordLevel({"a": 0, "[UNK]": 1, other: 2}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens([other])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = write(tmp_path / "in", {"a.jsonl": ["a"]})
    asked = {"bos": True, "eos": True} | {("eos" if name == "bos" else "bos"): False}
    message = refused(source, tmp_path / "tokenizer.json", tmp_path / "out", **asked)
    path = tmp_path / "tokenizer.json"
    assert (
        message == f"{path}: has no {name} token: give --no-{name}, or name its {name}_token in tokenizer_config.json"
    )
    pack(source, path, tmp_path / "out", **{name: False, ("eos" if name == "bos" else "bos"): True})
    expected = [2, 0] if name == "eos" else [0, 2]
    assert open_packed(tmp_path / "out").read(0, 2).tolist() == expected


def test_defaults(tmp_path, tokenizer_file):
    options = Options(tokenizer_file, tmp_path / "out")
    assert (options.bos, options.eos, options.encoder, options.workers) == (False, True, "auto", cores())
    assert (options.task, options.finish, options.skip_bad_files) == (None, False, 0)
    (write(tmp_path / "in", {"a.jsonl": ["a"], "b.jsonl": []}) / "b.jsonl").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        prepare.prepare(find_inputs(tmp_path / "in", ENDINGS), Fields(), options)
