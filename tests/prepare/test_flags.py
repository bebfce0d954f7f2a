"""The flags of the three prepare commands: what each gives, alone and through a whole script."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tinyllama import InputError
from tinyllama.config import cli
from tinyllama.data.packed import open_packed
from tinyllama.prepare import workers
from tinyllama.prepare.flags import add_arguments, add_held_out, fields, options, parts
from tinyllama.prepare.inputs import Fields
from tinyllama.prepare.prepare import Options
from tinyllama.tokenizer import Tokenizer

REQUIRED = ["--source", "in", "--tokenizer", "tokenizer.model", "--output", "out"]


def parsed(*flags: str) -> Options:
    parser = cli.arguments("Prepare.")
    add_arguments(parser)
    return options(parser.parse_args([*REQUIRED, *flags]))


def test_what_no_flag_gives():
    expected = Options(
        tokenizer=Path("tokenizer.model"),
        output=Path("out"),
        bos=False,
        eos=True,
        encoder="auto",
        workers=workers.cores(),
        task=None,
        finish=False,
        skip_bad_files=0,
    )
    assert parsed() == expected
    parser = cli.arguments("Prepare.")
    add_arguments(parser)
    args = parser.parse_args(REQUIRED)
    assert (args.fraction, args.seed, args.source) == (1.0, 0, "in")
    assert fields(args) == Fields()


def test_fields():
    parser = cli.arguments("Prepare.")
    add_arguments(parser)
    args = parser.parse_args([*REQUIRED, "--fraction", "0.5", "--seed", "7", "--longest_document", "3"])
    assert fields(args, text_key="content") == Fields("content", fraction=0.5, seed=7, longest=3 * 2**20)


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        ("--bos", "bos", True),
        ("--no-bos", "bos", False),
        ("--eos", "eos", True),
        ("--no-eos", "eos", False),
        ("--encoder fast", "encoder", "fast"),
        ("--encoder sentencepiece", "encoder", "sentencepiece"),
        ("--workers 1", "workers", 1),
        ("--task 0/1", "task", (0, 1)),
        ("--task 10/12", "task", (10, 12)),
        ("--task 999999/1000000", "task", (999999, 1000000)),
        ("--finish", "finish", True),
        ("--skip_bad_files 0", "skip_bad_files", 0),
        ("--skip_bad_files 12", "skip_bad_files", 12),
    ],
)
def test_a_flag_sets_its_option_and_no_other(flags, name, value):
    assert vars(parsed(*flags.split())) == vars(parsed()) | {name: value}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--fraction 0", "'0' is not a share of the documents: give a number above 0, up to 1"),
        ("--fraction -0.1", "is not a share"),
        ("--fraction 1.01", "'1.01' is not a share"),
        ("--fraction nan", "is not a share"),
        ("--fraction half", "'half' is not a share"),
        ("--workers 0", "'0' is not a number of processes: give 1 or more"),
        ("--workers -1", "is not a number of processes"),
        ("--workers 1.5", "is not a number of processes"),
        ("--skip_bad_files -1", "'-1' is not a number of files: give 0 or more"),
        ("--task 2/2", "'2/2' is not I/N with I from 0 to N - 1: give 0/4 to 3/4 for four tasks"),
        ("--task 3/2", "is not I/N"),
        ("--task 0/0", "is not I/N"),
        ("--task 1/2x", "is not I/N"),
        ("--task x1/2", "is not I/N"),
        ("--task ²/4", "is not I/N"),
        ("--task 0/1000001", "argument --task: '0/1000001' asks for too many tasks: give an N up to 1,000,000"),
        ("--task 99999999999999999999/999999999999999999999", "asks for too many tasks"),
        ("--longest_document 0", "'0' is not a number of megabytes: give 1 to 1,000,000"),
        ("--longest_document 1000001", "'1000001' is not a number of megabytes: give 1 to 1,000,000"),
        ("--seed x", "--seed"),
        ("--encoder slow", "--encoder"),
        ("--frac 0.5", "--frac"),
    ],
)
def test_a_value_that_cannot_be_is_refused(flags, said):
    name, value = flags.split()
    with pytest.raises(InputError) as error:
        parsed(f"{name}={value}")
    assert said in str(error.value)


@pytest.mark.parametrize(("text", "value"), [("1", 1.0), ("0.25", 0.25), ("1e-9", 1e-9)])
def test_a_fraction_is_a_share_of_the_documents(text, value):
    parser = cli.arguments("Prepare.")
    add_arguments(parser)
    assert parser.parse_args([*REQUIRED, "--fraction", text]).fraction == value


@pytest.mark.parametrize("flag", ["--source", "--tokenizer", "--output"])
def test_what_must_be_given(flag):
    parser = cli.arguments("Prepare.")
    add_arguments(parser)
    place = REQUIRED.index(flag)
    with pytest.raises(InputError, match=f"required: {flag}"):
        parser.parse_args(REQUIRED[:place] + REQUIRED[place + 2 :])


def test_the_source_by_another_name_is_no_output(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    parser = cli.arguments("Prepare.")
    add_arguments(parser)
    for source, output in ((tmp_path / "link", tmp_path), (tmp_path, tmp_path / "link")):
        args = parser.parse_args(["--source", str(source), "--tokenizer", "b", "--output", str(output)])
        with pytest.raises(InputError, match=f"--output {output} is the --source: give a folder of its own"):
            options(args)
    args = parser.parse_args(["--source", str(tmp_path), "--tokenizer", "b", "--output", str(tmp_path / "out")])
    assert options(args).output == tmp_path / "out"


# through the scripts

SUBSETS = ["ArXiv", "Book", "C4", "CommonCrawl", "Github", "StackExchange", "Wikipedia"]


@pytest.fixture
def raw(tmp_path) -> Path:
    """The same forty texts as SlimPajama (in two splits), StarCoder and a user have them."""
    texts = [f"The little llama {i}" for i in range(35)]
    lines = [
        json.dumps({"text": text, "meta": {"redpajama_set_name": f"RedPajama{SUBSETS[i % 7]}"}})
        for i, text in enumerate(texts)
    ]
    for split, some in (("train", lines), ("validation", lines[:7])):
        folder = tmp_path / "slimpajama" / split / "chunk1"
        folder.mkdir(parents=True)
        (folder / "a.jsonl.zst").write_bytes(zstandard.compress("\n".join(some).encode()))
        (folder / "b.jsonl").write_text("not one of SlimPajama's")
    (tmp_path / "starcoder" / "go").mkdir(parents=True)
    pq.write_table(pa.table({"content": texts, "text": [""] * 35}), tmp_path / "starcoder" / "go" / "a.parquet")
    (tmp_path / "starcoder" / "go" / "b.jsonl").write_text("not one of StarCoder's")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "text" / "readme.md").write_text("not one")
    return tmp_path


@pytest.fixture
def preparing(raw, tokenizer_file, script, one_process):
    """A function that runs a prepare script on its part of ``raw`` and gives its one NAME.json and what it said."""

    def run(name: str, *flags: str, source: str = "") -> tuple[dict, str]:
        output = raw / "out" / f"{name} {' '.join(flags)}".replace("/", "-")
        required = ["--source", source or raw / name, "--tokenizer", tokenizer_file, "--output", output]
        code, out, err = script(f"prepare_{name}", *required, "--encoder", "sentencepiece", *flags)
        assert code == 0, err
        (path,) = [path for path in output.glob("*.json") if path.name != "manifest.json"]
        return json.loads(path.read_bytes()), out

    return run


NAMES = {"slimpajama": "chunk1--a.jsonl.zst", "starcoder": "go--a.parquet", "text": "a.jsonl"}


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_reaches_the_shards(preparing, raw, tokenizer_file, name):
    info, said = preparing(name)
    documents = 30 if name == "slimpajama" else 35
    assert (info["name"], info["documents"]) == (NAMES[name], documents)
    assert (info["text_key"], info["fraction"], info["seed"]) == (
        "content" if name == "starcoder" else "text",
        1.0,
        None,
    )
    assert (info["bos"], info["eos"]) == (False, True)
    output = raw / "out" / f"{name} "
    assert said.splitlines()[-1].startswith(f"{output}: 1 shard (1 new), {documents} documents")
    info, _ = preparing(name, "--fraction", "0.5", "--seed", "3", "--bos", "--no-eos")
    assert (info["fraction"], info["seed"], info["bos"], info["eos"]) == (0.5, 3, True, False)
    assert 0 < info["dropped"]["fraction"] < 35
    other, _ = preparing(name, "--fraction", "0.5", "--seed", "4", "--bos", "--no-eos")
    assert info["blake2b"] != other["blake2b"]


def test_the_tokens_of_the_script_are_the_texts(preparing, raw, tokenizer_file):
    preparing("starcoder")
    encode = Tokenizer(tokenizer_file).encode
    stored = np.fromfile(raw / "out" / "starcoder " / "go--a.parquet.bin", "<u2").tolist()
    assert stored == [i for n in range(35) for i in [*encode(f"The little llama {n}"), 2]]


def test_the_subsets_of_slimpajama(preparing, raw):
    info, said = preparing("slimpajama", source=f"{raw / 'slimpajama'}/")
    names = {f"RedPajama{name}" for name in SUBSETS}
    assert info["subsets"].keys() == names - {"RedPajamaGithub"}
    assert (info["dropped"], info["leave_out"]) == ({"RedPajamaGithub": 5}, ["RedPajamaGithub"])
    assert info["source"]["name"] == "chunk1/a.jsonl.zst"
    info, _ = preparing("slimpajama", "--exclude", "")
    assert (info["subsets"].keys(), info["leave_out"]) == (names, [])
    info, _ = preparing("slimpajama", "--exclude", "RedPajamaC4,RedPajamaBook,,RedPajamaC4")
    assert info["leave_out"] == ["RedPajamaBook", "RedPajamaC4"]  # the order in which they are given is no setting
    assert info["subsets"].keys() == names - {"RedPajamaBook", "RedPajamaC4"}
    info, _ = preparing("slimpajama", "--split", "validation")
    assert (info["documents"], info["dropped"]) == (6, {"RedPajamaGithub": 1})


@pytest.mark.parametrize("name", NAMES)
def test_what_is_wrong_is_exit_code_2(raw, tokenizer_file, script, one_process, name):
    required = ["--source", raw / name, "--tokenizer", tokenizer_file, "--output"]
    assert script(f"prepare_{name}", *required, raw / name) == (
        2,
        "",
        f"error: --output {raw / name} is the --source: give a folder of its own\n",
    )
    code, out, err = script(f"prepare_{name}", *required, raw / "out", "--finish")
    assert (code, out) == (2, "")
    assert err == (
        f"error: {raw / 'out'}: 1 of 1 shards are missing ({NAMES[name]}): run the tasks that make them first\n"
    )
    code, _, err = script(f"prepare_{name}", *required, raw / "out", "--fraction", "2")
    assert (code, err.startswith("error: argument --fraction: '2' is not a share")) == (2, True)
    code, _, err = script(f"prepare_{name}", "--source", raw / name, "--tokenizer", raw / "no.model", "--output", "x")
    assert (code, err.startswith("error: ")) == (2, True)
    assert str(raw / "no.model") in err


@pytest.mark.parametrize(
    ("name", "flag", "said"),
    [
        ("slimpajama", "--split=", "'' is not a split: give its name, or leave the flag out"),
        ("text", "--split=", "'' is not a split: give its name, or leave the flag out"),
        ("starcoder", "--languages=", "'' names no folder: give some, or leave the flag out"),
        ("starcoder", "--languages=,", "',' names no folder: give some, or leave the flag out"),
    ],
)
def test_a_choice_of_nothing_is_refused(raw, tokenizer_file, script, name, flag, said):
    required = ["--source", raw / name, "--tokenizer", tokenizer_file, "--output", raw / "out"]
    line = f"error: argument {flag.partition('=')[0]}: {said}; prepare_{name}.py --help lists the flags\n"
    assert script(f"prepare_{name}", *required, flag) == (2, "", line)
    assert not (raw / "out").exists()


def test_a_subset_that_slimpajama_does_not_have(raw, tokenizer_file, script):
    required = ["--source", raw / "slimpajama", "--tokenizer", tokenizer_file, "--output", raw / "out"]
    done = script("prepare_slimpajama", *required, "--exclude", "RedPajamaC4,RedPajamaGitHub")
    remedy = "SlimPajama has no such subset; did you mean RedPajamaGithub?"
    assert done == (2, "", f"error: --exclude RedPajamaGitHub: {remedy}\n")
    assert not (raw / "out").exists()


def test_a_share_of_the_documents_is_held_out_in_a_folder_of_its_own(script, tokenizer_file, tmp_path: Path) -> None:
    texts = [f"document {number} of a small corpus" for number in range(200)]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "all.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    paths = ("--source", tmp_path / "texts", "--tokenizer", tokenizer_file, "--workers", 1)
    script("prepare_text", *paths, "--output", tmp_path / "mine", "--held_out", 0.2)
    tokenizer = Tokenizer(tokenizer_file)

    def documents(name: str) -> list[str]:
        dataset = open_packed(tmp_path / name)
        ids = dataset.read(0, dataset.tokens).tolist()
        ends = [at for at, token in enumerate(ids) if token == dataset.eos_id]
        return [
            tokenizer.decode(ids[start:end]) for start, end in zip([0, *(at + 1 for at in ends)], ends, strict=False)
        ]

    trained, held_out = documents("mine"), documents("mine_held_out")
    assert sorted(trained + held_out) == sorted(texts)
    assert 20 < len(held_out) < 60
    script("prepare_text", *paths, "--output", tmp_path / "fraction", "--fraction", 0.2)
    assert documents("fraction") == held_out  # the same draws
    code, _, err = script("prepare_text", *paths, "--output", tmp_path / "mine")
    assert code == 2
    assert "mine: fraction was [0.2, 1.0] for shard all.jsonl and is 1.0 now" in err


@pytest.fixture
def corpus(tmp_path: Path, tokenizer_file: Path) -> list[object]:
    """The flags that prepare 200 documents; the folder of the data is mine."""
    lines = [json.dumps({"text": f"document {number} of a small corpus"}) for number in range(200)]
    (tmp_path / "texts" / "en").mkdir(parents=True)
    (tmp_path / "texts" / "en" / "all.jsonl").write_text("\n".join(lines))
    flags = {"source": tmp_path / "texts", "tokenizer": tokenizer_file, "output": tmp_path / "mine", "workers": 1}
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("more", [[], ["--task", "0/1"]])
def test_nothing_is_held_out_of_a_dataset_that_has_all(script, corpus, tmp_path: Path, more: list[str]) -> None:
    assert script("prepare_text", *corpus)[0] == 0
    code, out, err = script("prepare_text", *corpus, "--held_out", 0.1, *more)
    said = f"{tmp_path / 'mine'}: fraction was 1.0 for shard en--all.jsonl and is [0.1, 1.0] now: use another --output"
    assert (code, out, err) == (2, "", f"error: {said}\n")
    assert not (tmp_path / "mine_held_out").exists()


@pytest.mark.usefixtures("one_process")
def test_a_file_in_the_place_of_the_data_is_found_before_any_is_held_out(script, corpus, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    code, out, err = script("prepare_text", *corpus, "--held_out", 0.1)
    assert (code, out, err) == (2, "", f"error: {tmp_path / 'mine'}: Not a directory: give another --output\n")
    assert not (tmp_path / "mine_held_out").exists()


@pytest.mark.usefixtures("one_process")
def test_what_was_held_out_is_not_trained_on(script, corpus, tmp_path: Path) -> None:
    mine, held_out = tmp_path / "mine", tmp_path / "mine_held_out"
    assert script("prepare_text", *corpus, "--held_out", 0.1)[0] == 0
    shutil.rmtree(mine)  # as if killed between the two
    said = f"{held_out} holds documents for validation that {mine} would hold, too (en--all.jsonl): "
    remedy = "give the same --held_out, or move that folder away"
    for flags in ([], ["--fraction", 0.5], ["--seed", 1], ["--source", tmp_path / "texts" / "en"]):
        assert script("prepare_text", *corpus, *flags) == (2, "", f"error: {said}{remedy}\n")
        assert not mine.exists()
    assert script("prepare_text", *corpus, "--held_out", 0.1)[0] == 0
    assert open_packed(mine).documents + open_packed(held_out).documents == 200


@pytest.mark.usefixtures("one_process")
def test_validation_data_of_other_files_do_not_stand_in_the_way(script, corpus, tmp_path: Path) -> None:
    held_out = ["--output", tmp_path / "mine_held_out"]
    (tmp_path / "validation").mkdir()
    shutil.copy(tmp_path / "texts" / "en" / "all.jsonl", tmp_path / "validation" / "some.jsonl")
    assert script("prepare_text", *corpus, "--source", tmp_path / "validation", *held_out, "--fraction", 0.5)[0] == 0
    assert script("prepare_text", *corpus)[0] == 0
    for name in ("mine", "mine_held_out"):
        shutil.rmtree(tmp_path / name)
    (tmp_path / "validation" / "some.jsonl").rename(tmp_path / "validation" / "all.jsonl")
    assert script("prepare_text", *corpus, "--source", tmp_path / "validation", *held_out)[0] == 0  # no share of them
    assert script("prepare_text", *corpus)[0] == 0


@pytest.mark.parametrize("output", [".", "below/.."])
def test_what_is_held_out_of_the_current_folder_lies_beside_it(monkeypatch, tmp_path: Path, output: str) -> None:
    (tmp_path / "mine" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    parser = cli.arguments("Prepare.")
    add_arguments(parser)
    add_held_out(parser)
    args = parser.parse_args(["--source", "in", "--tokenizer", "b", "--output", output, "--held_out", "0.5"])
    folders = [options.output for _, options in parts(args)]
    assert folders == [tmp_path / "mine_held_out", Path(output)]


def test_nothing_is_left_of_a_split_that_held_nothing_out(script, tokenizer_file, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("A single text.")
    paths = ("--source", tmp_path / "texts", "--tokenizer", tokenizer_file, "--output", tmp_path / "mine")
    code, _, err = script("prepare_text", *paths, "--workers", 1, "--held_out", 0.001)
    assert code == 2
    assert "mine_held_out: none of 1 documents was drawn: give a larger share or another --seed" in err
    assert [path.name for path in (tmp_path / "mine_held_out").iterdir()] == []
    assert not (tmp_path / "mine").exists()
    code, _, err = script("prepare_text", *paths, "--held_out", 1)
    assert (code, err) == (2, "error: --held_out 1 leaves nothing to train on: give a smaller share, such as 0.05\n")
