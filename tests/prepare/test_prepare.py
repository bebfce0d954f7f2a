import functools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from packed import change

from tinyllama import InputError
from tinyllama.config import cli
from tinyllama.data.packed import open_packed
from tinyllama.prepare import prepare as prepare_module
from tinyllama.prepare.flags import add_arguments, options
from tinyllama.prepare.inputs import ENDINGS, Fields, Input, find_inputs
from tinyllama.prepare.prepare import Options, prepare
from tinyllama.prepare.workers import over_workers
from tinyllama.tokenizer import Tokenizer

TEXTS = [
    ["The little llama", "", "  two\n\tspaces </s> <s>"],
    ["漢字 🦙 1984\r\n"],
    [],
    ["x" * 5000, "def f(a=1):\n    return a"],
]
TEXT = Fields()


def write(source: Path, texts: list[list[str]] = TEXTS) -> Path:
    for number, documents in enumerate(texts):
        path = source / f"chunk{number % 2}" / f"{number}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return source


def pack(source: Path, tokenizer: Path, output: Path, fields: Fields = TEXT, **options) -> str:
    settings = {"workers": 1, "encoder": "sentencepiece"} | options
    return prepare(find_inputs(source, ENDINGS), fields, Options(tokenizer, output, **settings))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def problems(*args, **options) -> tuple[str, ...]:
    with pytest.raises(InputError) as info:
        pack(*args, **options)
    return info.value.args


def test_the_stream_decodes_to_the_documents(tmp_path, tokenizer_file, capsys):
    source, output = write(tmp_path / "in"), tmp_path / "out"
    summary = pack(source, tokenizer_file, output, workers=2)
    tokenizer = Tokenizer(tokenizer_file)
    dataset = open_packed(output)
    assert (dataset.documents, dataset.bos, dataset.eos, dataset.eos_id) == (6, False, True, 2)
    shards = [f"chunk{number % 2}--{number}.jsonl" for number in (0, 2, 1, 3)]
    ends = [np.load(output / f"{shard}.idx.npy") for shard in shards]
    assert [len(end) for end in ends] == [3, 0, 1, 2]
    decoded, start = [], 0
    for shard in ends:
        for length in np.diff(shard, prepend=np.uint64(0)):
            *ids, last = dataset.read(start, int(length)).tolist()
            assert last == 2
            assert not {1, 2} & set(ids)
            decoded.append(tokenizer.decode(ids))
            start += int(length)
    assert start == dataset.tokens
    assert decoded == TEXTS[0] + TEXTS[1] + TEXTS[3]
    assert f"{output}: 4 shards (4 new), 6 documents, {dataset.tokens:,} tokens" in summary
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert sum("chunk1/3.jsonl: 2 documents" in line for line in lines) == 1


def test_facts_of_a_shard(tmp_path, tokenizer_file):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    sets = ["RedPajamaGithub", "RedPajamaC4"]
    rows = [json.dumps({"body": "a\ud800", "meta": {"redpajama_set_name": name}}) + "\n" for name in sets]
    (source / "a.jsonl").write_text("".join(rows))
    summary = pack(source, tokenizer_file, output, Fields("body", True, ("RedPajamaGithub",)))
    assert "1 document (1 of RedPajamaGithub left out, 1 with lone surrogates replaced)" in summary
    info = json.loads((output / "a.jsonl.json").read_bytes())
    assert info["source"]["name"] == "a.jsonl"
    assert info["source"]["bytes"] == (source / "a.jsonl").stat().st_size
    assert (info["bos"], info["eos"], info["bos_id"], info["eos_id"]) == (False, True, 1, 2)
    assert (info["dropped"], info["repaired"]) == ({"RedPajamaGithub": 1}, 1)
    assert (info["text_key"], info["leave_out"]) == ("body", ["RedPajamaGithub"])
    assert info["tokenizer_sha256"] == Tokenizer(tokenizer_file).sha256


def test_the_bytes_do_not_depend_on_workers_or_tasks(tmp_path, tokenizer_file):
    rng = random.Random(0)
    texts = [[rng.choice("abc 1\n") * rng.randrange(200) for _ in range(rng.randrange(20))] for _ in range(7)]
    source = write(tmp_path / "in", texts)
    pack(source, tokenizer_file, tmp_path / "one")
    whole = files(tmp_path / "one")
    assert len(whole) == 7 * 3 + 1
    pack(source, tokenizer_file, tmp_path / "two", workers=2)
    assert files(tmp_path / "two") == whole
    output = tmp_path / "tasks"
    pack(source, tokenizer_file, output, task=(1, 2))
    assert len(files(output)) == 3 * 3
    (message,) = problems(source, tokenizer_file, output, finish=True)
    assert "4 of 7 shards are missing (chunk0--0.jsonl, chunk0--4.jsonl, chunk1--1.jsonl and 1 more)" in message
    pack(source, tokenizer_file, output, task=(0, 2))
    assert "manifest.json" not in files(output)
    assert "7 shards (0 new)" in pack(source, tokenizer_file, output, finish=True)
    assert files(output) == whole


def test_finish_makes_no_folder(tmp_path, tokenizer_file):
    (message,) = problems(write(tmp_path / "in"), tokenizer_file, tmp_path / "out", finish=True)
    assert "4 of 4 shards are missing" in message
    assert not (tmp_path / "out").exists()


def test_a_second_run_does_what_is_missing_or_changed(tmp_path, tokenizer_file):
    source, output = write(tmp_path / "in"), tmp_path / "out"
    pack(source, tokenizer_file, output)
    whole = files(output)
    written = {path.name: path.stat().st_ctime_ns for path in output.iterdir()}
    assert "4 shards (0 new)" in pack(source, tokenizer_file, output)
    (output / "chunk1--3.jsonl.json").unlink()
    assert "4 shards (1 new)" in pack(source, tokenizer_file, output)
    assert files(output) == whole
    again = {path.name for path in output.iterdir() if path.stat().st_ctime_ns != written[path.name]}
    assert again == {f"chunk1--3.jsonl.{ending}" for ending in ("bin", "idx.npy", "json")} | {"manifest.json"}

    with (source / "chunk0/0.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    fingerprint = open_packed(output).fingerprint
    assert "4 shards (1 new), 7 documents" in pack(source, tokenizer_file, output)
    assert open_packed(output).fingerprint != fingerprint
    pack(source, tokenizer_file, tmp_path / "fresh")
    assert files(output) == files(tmp_path / "fresh")


def test_a_changed_input_takes_the_manifest_away_until_it_is_packed(tmp_path, tokenizer_file):
    source, output = write(tmp_path / "in"), tmp_path / "out"
    pack(source, tokenizer_file, output)
    (source / "chunk0/0.jsonl").write_text("{")
    (message,) = problems(source, tokenizer_file, output)
    assert f"{source}/chunk0/0.jsonl: line 1: not valid JSON" in message
    with pytest.raises(InputError, match=r"manifest\.json is missing"):
        open_packed(output)


def test_stale_files_go_but_not_those_of_another_task(tmp_path, tokenizer_file):
    source, output = write(tmp_path / "in"), tmp_path / "out"
    output.mkdir()
    mine, other = output / "chunk0--0.jsonl.bin.0a1b2c3d.tmp", output / "chunk0--2.jsonl.idx.npy.00000000.tmp"
    manifest, strange = output / "manifest.json.ffffffff.tmp", output / "notes.tmp"
    touched = [mine, other, manifest, strange]
    for path in touched:
        path.write_bytes(b"x")
    pack(source, tokenizer_file, output, task=(0, 2))  # chunk0--0 and chunk1--1
    assert [path.exists() for path in touched] == [False, True, True, True]
    pack(source, tokenizer_file, output)
    assert [path.exists() for path in touched] == [False, False, False, True]


def test_bad_inputs_are_collected_and_the_good_ones_stay_done(tmp_path, tokenizer_file):
    source, output = write(tmp_path / "in"), tmp_path / "out"
    (source / "a.jsonl.zst").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n")
    (source / "b.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    (source / "c.parquet").write_bytes(b"PAR1")
    messages = problems(source, tokenizer_file, output, workers=2)
    names = ["a.jsonl.zst: is a git-lfs", "b.jsonl: line 2:", "c.parquet: not a readable"]
    assert len(messages) == len(names)
    assert all(f"{source}/{name}" in message for name, message in zip(names, messages, strict=True))
    good = {f"chunk{n % 2}--{n}.jsonl.{ending}" for n in range(4) for ending in ("bin", "idx.npy", "json")}
    assert set(files(output)) == good | {"a.jsonl.zst.bad", "b.jsonl.bad", "c.parquet.bad"}
    assert f"skipped: {source}/a.jsonl.zst: is a git-lfs" in pack(source, tokenizer_file, output, skip_bad_files=3)
    manifest = json.loads((output / "manifest.json").read_bytes())
    assert manifest["skipped"] == ["a.jsonl.zst", "b.jsonl", "c.parquet"]
    assert len(manifest["shards"]) == 4
    assert len(problems(source, tokenizer_file, output, skip_bad_files=2)) == 3
    written = {name: (output / name).stat().st_mtime_ns for name in good}
    for name in ("a.jsonl.zst", "b.jsonl", "c.parquet"):
        (source / name).unlink()
    assert "4 shards (0 new)" in pack(source, tokenizer_file, output)
    assert written == {name: (output / name).stat().st_mtime_ns for name in good}
    pack(source, tokenizer_file, tmp_path / "fresh")
    assert files(output) == files(tmp_path / "fresh")


@pytest.mark.parametrize("change", ["another", "gone", "another eos"])
def test_a_tokenizer_that_changes_under_a_run_ends_it(tmp_path, monkeypatch, capsys, change):
    """Its workers read the file again, one that replaces another perhaps hours later."""
    whole = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    whole.add_special_tokens(["</s>", "<x>"])
    source, output, file = tmp_path / "in", tmp_path / "out", tmp_path / "tokenizer.json"
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"eos_token": "</s>"}')
    whole.save(str(file))
    before = file.read_bytes()
    write(source, [["ab"], ["ba"]])

    def changed(*args):
        match change:
            case "another":
                file.write_bytes(before + b"\n")
            case "gone":
                file.unlink()
            case "another eos":
                config.write_text('{"eos_token": "<x>"}')
        yield from over_workers(*args)

    monkeypatch.setattr(prepare_module, "over_workers", changed)
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: pack(source, file, output))
    assert ended.value.code == 2
    said = {
        "another": f"{file} has changed since this run began: put the first one back and run again (what is done is ",
        "gone": f"no tokenizer at {file}: give a sentencepiece .model, a tokenizer.json or their folder",
        "another eos": f"{config} has changed since this run began: put the first one back",
    }
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "error" in one.lower()]
    assert line.startswith(f"error: {said[change]}")
    assert files(output) == {}
    file.write_bytes(before)
    config.write_text('{"eos_token": "</s>"}')
    monkeypatch.undo()
    pack(source, file, output)
    assert open_packed(output).read(0, 6).tolist() == [0, 1, 2, 1, 0, 2]


def test_an_output_of_other_settings_is_refused(tmp_path, tokenizer_file):
    source, output = write(tmp_path / "in"), tmp_path / "out"
    pack(source, tokenizer_file, output)
    before = files(output)
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer_file.read_bytes() + b"\x9a\x3f\x00")  # an unknown empty field: another file, same model
    (message,) = problems(source, other, output)
    assert "tokenizer_sha256 was" in message
    assert "another --output" in message
    (message,) = problems(source, tokenizer_file, output, Fields("content"))
    assert "text_key was 'text' for shard chunk0--0.jsonl and is 'content' now" in message
    (message,) = problems(source, tokenizer_file, output, Fields(subsets=True, leave_out=("RedPajamaGithub",)))
    assert "leave_out was []" in message
    os.remove(source / "chunk0/0.jsonl")
    (message,) = problems(source, tokenizer_file, output)
    assert "1 shards belong to no input (chunk0--0.jsonl)" in message
    assert files(output) == before


def test_no_document_at_all(tmp_path, tokenizer_file):
    source, output = write(tmp_path / "in", [[], []]), tmp_path / "out"
    (message,) = problems(source, tokenizer_file, output)
    assert "not one document in 2 input files" in message
    assert "manifest.json" not in files(output)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, r"damaged \(tokens is missing or of a wrong type or value\)"),
        ({"source": None}, r"damaged \(source is missing or of a wrong type or value\)"),
        ({"subsets": {"a": 1}}, r"damaged \(subsets.a is missing or of a wrong type or value\)"),
        ({"dropped": {"a": "1"}}, r"damaged \(dropped.a is missing or of a wrong type or value\)"),
        ({"dtype": []}, r"format version 1 with \[\] tokens is not known"),
        (None, "was not written by a prepare command: move it away"),
    ],
)
def test_facts_of_a_shard_that_are_damaged(tmp_path, tokenizer_file, changes, message):
    source, output = write(tmp_path / "in"), tmp_path / "out"
    pack(source, tokenizer_file, output)
    path = output / "chunk0--0.jsonl.json"
    if changes is None:
        path.unlink()
        path.mkdir()
    else:
        change(path, **changes)
    (problem,) = problems(source, tokenizer_file, output)
    assert re.search(message, problem)


def test_an_output_that_cannot_be_made(tmp_path, tokenizer_file):
    (message,) = problems(write(tmp_path / "in"), tokenizer_file, Path("/proc/x"))
    assert message.startswith("cannot write /proc/x (No such file or directory): give another --output")


def test_an_output_that_is_a_file(tmp_path, tokenizer_file):
    (tmp_path / "out").write_text("")
    (message,) = problems(write(tmp_path / "in"), tokenizer_file, tmp_path / "out")
    assert "give another --output" in message


def test_a_tokenizer_without_eos(tmp_path):
    import tokenizers

    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    bare.save(str(tmp_path / "tokenizer.json"))
    (message,) = problems(write(tmp_path / "in"), tmp_path, tmp_path / "out")
    hint = "give --no-eos, or name its eos_token in tokenizer_config.json"
    assert message == f"{tmp_path}/tokenizer.json: has no eos token: {hint}"
    assert not (tmp_path / "out").exists()


def test_a_sentencepiece_model_without_eos_is_told_of_no_other_file(tmp_path):
    import sentencepiece

    where = {"sentence_iterator": iter(["a b"]), "model_prefix": str(tmp_path / "tokenizer"), "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(**where, model_type="char", vocab_size=4, eos_id=-1)
    (message,) = problems(write(tmp_path / "in"), tmp_path, tmp_path / "out")
    assert message == f"{tmp_path}/tokenizer.model: has no eos token: give --no-eos"


def test_the_tiny_fixture_packs_what_it_is_given(packed_folder):
    dataset = open_packed(packed_folder([[[5, 6, 2], [2]], [], [[7, 2]]]))
    assert dataset.read(0, dataset.tokens).tolist() == [5, 6, 2, 2, 7, 2]


def test_flags():
    parser = cli.arguments("Prepare.")
    add_arguments(parser)
    required = ["--source", "a", "--tokenizer", "b", "--output", "c"]
    args = parser.parse_args([*required, "--task", "3/4", "--workers", "2"])
    assert (args.source, args.tokenizer, args.output) == ("a", Path("b"), Path("c"))
    assert (args.task, args.workers, args.finish) == ((3, 4), 2, False)
    bad = ("--task 4/4", "--task 1", "--workers 0", "--workers x", "--task 0/2 --finish", "--skip_bad_files -1")
    for flags in (*bad, "--skip_bad_files=x", "--output="):
        with pytest.raises(InputError, match=re.split("[ =]", flags)[0]):
            parser.parse_args([*required, *flags.split()])
    with pytest.raises(InputError, match="--output a is the --source: give a folder of its own"):
        options(parser.parse_args(["--source", "a", "--tokenizer", "b", "--output", "./a"]))


def test_bad_files_of_tasks_are_counted_at_the_end(tmp_path, tokenizer_file):
    source, output = write(tmp_path / "in"), tmp_path / "out"
    (source / "a.jsonl").write_text("{")
    for task in range(2):
        pack(source, tokenizer_file, output, task=(task, 2), skip_bad_files=1)
    (message,) = problems(source, tokenizer_file, output, finish=True)
    assert f"{source}/a.jsonl: line 1: not valid JSON" in message
    assert "4 shards (0 new)" in pack(source, tokenizer_file, output, finish=True, skip_bad_files=1)
    assert json.loads((output / "manifest.json").read_bytes())["skipped"] == ["a.jsonl"]


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, False)])
def test_bos_and_eos_are_as_chosen_and_recorded(tmp_path, tokenizer_file, bos, eos):
    source, output = write(tmp_path / "in"), tmp_path / "out"
    pack(source, tokenizer_file, output, bos=bos, eos=eos)
    tokenizer, dataset = Tokenizer(tokenizer_file), open_packed(output)
    texts = TEXTS[0] + TEXTS[1] + TEXTS[3]
    expected = [i for text in texts for i in [1] * bos + tokenizer.encode(text) + [2] * eos]
    assert dataset.read(0, dataset.tokens).tolist() == expected
    assert (dataset.bos, dataset.eos, dataset.documents) == (bos, eos, 6)
    (message,) = problems(source, tokenizer_file, output)
    assert f"{'bos' if bos else 'eos'} was" in message


def test_a_fraction_is_the_same_documents_every_time(tmp_path, tokenizer_file):
    source = write(tmp_path / "in", [[f"{shard} {i}" for i in range(500)] for shard in range(2)])
    some = Fields(fraction=0.3, seed=1)
    for name, workers in (("a", 1), ("b", 2)):
        pack(source, tokenizer_file, tmp_path / name, some, workers=workers)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    manifest = json.loads((tmp_path / "a/manifest.json").read_bytes())
    assert 240 < manifest["documents"] < 360
    assert manifest["dropped"] == {"fraction": 1000 - manifest["documents"]}
    pack(source, tokenizer_file, tmp_path / "c", Fields(fraction=0.3, seed=2))
    assert open_packed(tmp_path / "c").fingerprint != open_packed(tmp_path / "a").fingerprint
    (message,) = problems(source, tokenizer_file, tmp_path / "a", Fields(fraction=0.3, seed=2))
    assert "seed was 1" in message


def test_a_url_is_a_source_and_a_saved_dataset_too(tmp_path, tokenizer_file):
    import datasets

    source = write(tmp_path / "in")
    pack(source, tokenizer_file, tmp_path / "local")
    remote = prepare(
        find_inputs(f"file://{source}", ENDINGS), TEXT, Options(tokenizer_file, tmp_path / "url", workers=2)
    )
    assert "4 shards (4 new), 6 documents" in remote
    assert (tmp_path / "url/manifest.json").read_bytes() == (tmp_path / "local/manifest.json").read_bytes()
    texts = TEXTS[0] + TEXTS[3]
    datasets.Dataset.from_dict({"text": texts, "id": list(range(5))}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved/cache-0123.arrow").write_bytes(b"left by a map")
    pack(tmp_path / "saved", tokenizer_file, tmp_path / "arrow")
    assert open_packed(tmp_path / "arrow").documents == 5


def test_what_killed_workers_had_fetched_is_removed(tmp_path, tokenizer_file, monkeypatch):
    source, temporary = write(tmp_path / "in"), tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    code = "import sys; from tinyllama.prepare.inputs import *; one, = find_inputs(sys.argv[1], ENDINGS)\n"
    code += "with one.fetched() as path: print(path, flush=True); sys.stdin.read()"
    url = f"file://{source}/chunk0/0.jsonl"
    start = lambda: subprocess.Popen(  # noqa: E731
        [sys.executable, "-c", code, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with start() as killed, start() as alive:
        left, used = (Path(process.stdout.readline().strip()) for process in (killed, alive))
        killed.kill()
        killed.wait()
        assert left.read_text() == used.read_text() == (source / "chunk0/0.jsonl").read_text()
        prepare(find_inputs(f"file://{source}", ENDINGS), TEXT, Options(tokenizer_file, tmp_path / "out", workers=2))
        assert list(temporary.rglob("*.jsonl")) == [used]
        alive.stdin.close()
    assert list(temporary.iterdir()) == []


def test_memory_filesystem(tokenizer_file):
    import fsspec

    from tinyllama.prepare.readers import DocumentReader

    fs = fsspec.filesystem("memory")
    fs.pipe("/corpus/python/a.jsonl", b'{"text": "one"}\n')
    fs.pipe("/corpus/go/b.jsonl", b'{"text": "two"}\n')
    inputs = find_inputs("memory://corpus", ENDINGS)
    assert [one.name for one in inputs] == ["go/b.jsonl", "python/a.jsonl"]
    assert [one.name for one in find_inputs("memory://corpus", ENDINGS, ["go"])] == ["go/b.jsonl"]
    with inputs[0].fetched() as path:
        assert list(DocumentReader(path, TEXT)) == ["two"]
    fs.rm("/corpus/go/b.jsonl")
    with pytest.raises(InputError, match="memory://.*b.jsonl: cannot be fetched"), inputs[0].fetched():
        pass
    with pytest.raises(InputError, match="no file ending in"):
        find_inputs("memory://nowhere", ENDINGS)
    with pytest.raises(InputError, match="nosuch://x: cannot be reached"):
        find_inputs("nosuch://x", ENDINGS)


@pytest.mark.parametrize("before", [None, "glibc.malloc.check=1"])
def test_workers_ask_for_huge_pages_and_leave_the_environment_alone(monkeypatch, before):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if before:
        monkeypatch.setenv("GLIBC_TUNABLES", before)
    one = Input("a", "a", 1)
    asks = functools.partial(functools.partial, os.getenv)  # a worker of it answers with the variable it is set up with
    ((_, found),) = over_workers([one], asks, "GLIBC_TUNABLES", 1)
    assert found == ":".join(filter(None, ("glibc.malloc.hugetlb=1", before)))
    assert os.environ.get("GLIBC_TUNABLES") == before
