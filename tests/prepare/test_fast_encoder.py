"""The fast encoder beside the reference, and what is done where they differ; a small library stands for gigatoken."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinyllama import InputError
from tinyllama.data.packed import open_packed
from tinyllama.prepare import encode
from tinyllama.prepare import prepare as prepare_module
from tinyllama.prepare.encode import Encoder, Mismatch
from tinyllama.prepare.inputs import ENDINGS, Fields, find_inputs
from tinyllama.prepare.prepare import Options, prepare
from tinyllama.prepare.readers import TextChunk
from tinyllama.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
# a real encoder, right but for the texts that tell it to be wrong
LIBRARY = """
import os

import numpy as np
import tokenizers

made = []


class Fast:
    def __init__(self, payload):
        self.tokenizer = tokenizers.Tokenizer.from_str(payload)
        self.texts = []
        made.append(self)

    def encode(self, text):
        self.texts.append(text)
        ids = np.array(self.tokenizer.encode(text.decode()).ids, dtype=np.uint32)
        return ids[1:] if os.environ["FAST_IS_WRONG_FOR"].encode() in text else ids


def load_hf_json(payload):
    return Fast(payload)
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The folder that stands in for gigatoken 9.9."""
    folder = tmp_path / "library"
    (folder / "gigatoken").mkdir(parents=True)
    (folder / "gigatoken" / "__init__.py").touch()
    (folder / "gigatoken" / "gigatoken_rs.py").write_text(LIBRARY)
    (folder / "gigatoken-9.9.dist-info").mkdir()
    (folder / "gigatoken-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: gigatoken\nVersion: 9.9\n"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "gigatoken"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("FAST_IS_WRONG_FOR", "zebra")
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "gigatoken"]:
        del sys.modules[name]


def documents(texts: list[str]) -> list[TextChunk]:
    return [TextChunk(text.encode(), "", True) for text in texts]


def used(tokenizer: Path) -> list[list[bytes]]:
    """What each fast encoder was given, after the texts it is tried on."""
    guards = [text.encode() for text in encode.guards(Tokenizer(tokenizer))]
    return [one.texts[len(guards) :] if one.texts[: len(guards)] == guards else one.texts for one in made()]


def made() -> list:
    import gigatoken.gigatoken_rs

    return gigatoken.gigatoken_rs.made


def test_the_fast_one_is_taken_and_gives_the_reference_s_ids(library, tokenizer_file):
    tokenizer = Tokenizer(tokenizer_file)
    texts = ["The little llama", "", "漢字 1984\n"]
    for choice in ("auto", "fast"):
        encoder = Encoder(tokenizer, choice)
        assert (encoder.name, encoder.fell_back) == ("gigatoken 9.9", "")
        found = [(ids.tolist(), size, last) for ids, size, _, last in encoder.stream(documents(texts))]
        assert found == [(tokenizer.encode(text), len(text.encode()), True) for text in texts]
    assert used(tokenizer_file)[1] == [text.encode() for text in texts]
    assert Encoder(tokenizer, "sentencepiece").name.startswith("sentencepiece ")
    assert len(made()) == 2


@pytest.mark.parametrize("spelling", ["<|im_start|>", "<0x0A>", "</s>"])
def test_a_piece_of_the_tokenizer_s_own_tells_a_wrong_one(library, tokenizer_file, monkeypatch, spelling):
    """Guards are made of user-defined, control and byte pieces."""
    import sentencepiece

    path = library / "own.model"
    corpus = iter(["the little llama walked along the river in the evening"] * 20)
    settings = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 310}
    settings |= {"remove_extra_whitespaces": False, "add_dummy_prefix": False, "user_defined_symbols": ["<|im_start|>"]}
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=corpus, model_writer=file, minloglevel=2, **settings)
    tokenizer = Tokenizer(path)
    assert Encoder(tokenizer, "auto").fell_back == ""
    assert any(spelling in text for text in encode.guards(tokenizer))
    monkeypatch.setenv("FAST_IS_WRONG_FOR", spelling)
    assert "gigatoken gives other ids than" in Encoder(tokenizer, "auto").fell_back
    with pytest.raises(InputError, match="gigatoken gives other ids than .*: use --encoder sentencepiece"):
        Encoder(tokenizer, "fast")


def test_millions_of_ids_and_endless_tokens_are_not_given_to_the_fast_one(library, tmp_path):
    import tokenizers

    model = tokenizers.models.BPE({"a": 0, "b": 1 << 22}, [])
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    encoder = Encoder(Tokenizer(tmp_path), "auto")
    assert encoder.fell_back == "gigatoken is not used with 4,194,305 ids: use --encoder sentencepiece"
    whole = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    whole.add_tokens(["a" * 1001])
    whole.save(str(tmp_path / "tokenizer.json"))
    encoder = Encoder(Tokenizer(tmp_path), "auto")
    assert encoder.fell_back.startswith("gigatoken is not used with an added token of 1,001 characters: use")
    assert made() == []


def test_what_no_tokenizer_json_equals_is_never_given_to_the_fast_one(library):
    import sentencepiece

    path = library / "own.model"
    corpus = iter(["the little llama walked along the river in the evening"] * 20)
    settings = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 310}
    settings |= {"remove_extra_whitespaces": False, "user_defined_symbols": ["walk"]}
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=corpus, model_writer=file, minloglevel=2, **settings)
    encoder = Encoder(Tokenizer(path), "auto")
    assert encoder.name.startswith("sentencepiece ")
    assert "it has user-defined pieces and puts a blank before a text" in encoder.fell_back
    with pytest.raises(InputError, match=r"gigatoken cannot read .*own.model \(no tokenizer.json can have the ids"):
        Encoder(Tokenizer(path), "fast")
    assert "gigatoken" not in sys.modules or made() == []


BLANK = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
PREFIX = {"type": "Prepend", "prepend": "\u2581"}


def with_added(folder: Path, normalizer: dict | None, special: bool = False, **flags: bool) -> Tokenizer:
    """A tokenizer.json of letters and the added tokens "cafe" and "<|x|>", the flags being those of one of them."""
    import json

    import tokenizers

    letters = {letter: number for number, letter in enumerate("abcef \u2581\u00e9\u0301<|x>")}
    whole = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    whole.add_tokens([tokenizers.AddedToken("cafe", **{} if special else flags)])
    whole.add_special_tokens([tokenizers.AddedToken("<|x|>", **flags if special else {})])
    folder.joinpath("tokenizer.json").write_text(json.dumps(json.loads(whole.to_str()) | {"normalizer": normalizer}))
    return Tokenizer(folder)


@pytest.mark.parametrize(
    ("normalizer", "name"),
    [
        *(({"type": name}, name) for name in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents")),
        ({"type": "Sequence", "normalizers": [BLANK, {"type": "NFC"}]}, "NFC"),
        (BLANK | {"pattern": {"Regex": "\\s"}}, "Replace"),
        (BLANK | {"content": "_"}, "Replace"),
        ({"type": "Prepend", "prepend": "a"}, "Prepend"),
    ],
)
def test_a_normalizer_of_more_than_blanks_is_never_given_to_the_fast_one(library, normalizer, name):
    """Unicode's tables are of another version in it, and it looks for added tokens before it normalizes."""
    tokenizer = with_added(library, normalizer)
    encoder = Encoder(tokenizer, "auto")
    said = f"gigatoken is not used with the normalizer {name} of {tokenizer.path}: use --encoder sentencepiece"
    assert (encoder.name, encoder.fell_back) == (f"tokenizers {tokenizer.encoder_version}", said)
    with pytest.raises(InputError) as refused:
        Encoder(tokenizer, "fast")
    assert refused.value.args == (said,)
    assert made() == []


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip"])
def test_an_added_token_that_looks_at_what_is_beside_it_is_never_given_to_the_fast_one(library, flag):
    tokenizer = with_added(library, None, **{flag: True})
    encoder = Encoder(tokenizer, "auto")
    said = f"gigatoken is not used with {flag} for the added token 'cafe' of {tokenizer.path}: use --encoder sentence"
    assert encoder.fell_back == f"{said}piece"
    with pytest.raises(InputError, match=f"is not used with {flag} for the added token 'cafe'"):
        Encoder(tokenizer, "fast")
    assert made() == []
    control = Encoder(with_added(library, None, special=True, **{flag: True}), "auto")  # which no text becomes
    assert (control.name, control.fell_back) == ("gigatoken 9.9", "")


@pytest.mark.parametrize("normalizer", [None, BLANK, {"type": "Sequence", "normalizers": [PREFIX, BLANK]}])
def test_blanks_and_other_added_tokens_are_given_to_the_fast_one(library, normalizer):
    encoder = Encoder(with_added(library, normalizer, normalized=True), "fast")
    assert (encoder.name, encoder.fell_back) == ("gigatoken 9.9", "")


@pytest.mark.parametrize(
    ("place", "found"), [(0, True), (1, False), (999, False), (1000, True), (1001, False), (2000, True)]
)
def test_every_thousandth_document_is_encoded_by_both(library, tokenizer_file, place, found):
    encoder = Encoder(Tokenizer(tokenizer_file), "fast")
    texts = ["a"] * 2500
    texts[place] = "a zebra"
    stream = encoder.stream(documents(texts))
    if not found:
        assert len(list(stream)) == 2500
        return
    with pytest.raises(Mismatch, match="gigatoken 9.9 gives other ids .* for the text b'a zebra'"):
        list(stream)


def test_a_shard_begins_with_a_check(library, tokenizer_file):
    encoder = Encoder(Tokenizer(tokenizer_file), "fast")
    list(encoder.stream(documents(["a", "b"])))
    with pytest.raises(Mismatch):
        list(encoder.stream(documents(["zebra"])))
    assert used(tokenizer_file) == [[b"a", b"b", b"zebra"]]


def test_an_encoder_is_renewed_within_a_long_shard(library, tokenizer_file, monkeypatch):
    assert encode._RENEWED == 16 * 2**20
    monkeypatch.setattr(encode, "_RENEWED", 10)
    encoder = Encoder(Tokenizer(tokenizer_file), "fast")
    list(encoder.stream(documents(["1234", "5678", "9", "0", "1" * 11, "2"])))  # a blank and the digits: 5, 5, 2...
    assert used(tokenizer_file) == [[b"1234", b"5678", b"9"], [b"0", b"1" * 11], [b"2"]]


@pytest.mark.usefixtures("one_process")
def test_shards_share_an_encoder_and_do_not_depend_on_it(library, tokenizer_file, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_RENEWED", 10)
    source = write(tmp_path / "in", {"a.txt": "1234", "b.txt": "5678", "c.txt": "9", "d.txt": "0"})
    prepare(find_inputs(source, (".txt",)), Fields(), Options(tokenizer_file, tmp_path / "out"))
    # the first one only tells whether it can
    assert used(tokenizer_file) == [[], [b"1234", b"5678", b"9"], [b"0"]]
    assert b'"encoded_by": "gigatoken 9.9"' in (tmp_path / "out" / "c.txt.json").read_bytes()
    for name in "abcd":
        alone = Options(tokenizer_file, tmp_path / name)
        prepare(find_inputs(source / f"{name}.txt", (".txt",)), Fields(), alone)
        shard = {path.name: path.read_bytes() for path in alone.output.glob(f"{name}.*")}
        assert shard == {path.name: path.read_bytes() for path in (tmp_path / "out").glob(f"{name}.*")}
        assert shard.keys() == {f"{name}.txt.bin", f"{name}.txt.idx.npy", f"{name}.txt.json"}


def write(source: Path, texts: dict[str, str]) -> Path:
    source.mkdir()
    for name, text in texts.items():
        (source / name).write_text(text)
    return source


@pytest.mark.usefixtures("one_process")
def test_a_slow_encoder_is_said_at_the_start_where_there_is_much_to_encode(
    tokenizer_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    monkeypatch.setattr(prepare_module, "_LONG", 1)
    inputs = find_inputs(write(tmp_path / "in", {"a.txt": "a", "b.txt": "b"}), ENDINGS)
    name = f"sentencepiece {Tokenizer(tokenizer_file).encoder_version}"
    said = f"encoding with {name} at a tenth of the speed: gigatoken is not installed: pip install gigatoken"
    auto = Options(tokenizer_file, tmp_path / "out")
    last = prepare(inputs, Fields(), auto).splitlines()[-1]
    first, *progress = capsys.readouterr().err.splitlines()
    assert (first, len(progress)) == (said, 2)
    assert last.startswith(f"{tmp_path / 'out'}: 2 shards (2 new)")
    assert b'"encoded_by": "sentencepiece' in (tmp_path / "out" / "b.txt.json").read_bytes()
    chosen = Options(tokenizer_file, tmp_path / "chosen", encoder="sentencepiece")
    finish = Options(tokenizer_file, tmp_path / "out", finish=True)
    for options in (auto, finish, chosen):  # nothing to encode, nothing ever, and as it was asked for
        prepare(inputs, Fields(), options)
    assert said not in capsys.readouterr().err
    prepare(inputs, Fields(), Options(tokenizer_file, tmp_path / "task", task=(1, 2)))
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[0], len(err.splitlines())) == ("", said, 1 + 1)
    monkeypatch.setattr(prepare_module, "_LONG", 3)
    prepare(inputs, Fields(), Options(tokenizer_file, tmp_path / "few"))  # two bytes
    assert said not in capsys.readouterr().err


@pytest.mark.usefixtures("one_process")
def test_the_note_tells_another_reason(library, tokenizer_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_module, "_LONG", 1)
    monkeypatch.setenv("FAST_IS_WRONG_FOR", "line one")
    inputs = find_inputs(write(tmp_path / "in", {"a.txt": "a"}), ENDINGS)
    prepare(inputs, Fields(), Options(tokenizer_file, tmp_path / "out"))
    reason = (
        f"gigatoken gives other ids than {tokenizer_file} for b'line one\\r\\nline two\\r\\n': use --encoder sentence"
    )
    assert f" at a tenth of the speed: {reason}piece\n" in capsys.readouterr().err
    assert open_packed(tmp_path / "out").read(0, 2).tolist() == [*Tokenizer(tokenizer_file).encode("a"), 2]


def test_a_difference_found_stops_that_shard_alone(library, tokenizer_file, tmp_path):
    texts = {"a.txt": "fine", "b.txt": "a zebra", "c.jsonl": "{", "d.txt": "fine too"}
    source, output = write(tmp_path / "in", texts), tmp_path / "out"
    command = [sys.executable, ROOT / "scripts/prepare_text.py", "--source", source, "--output", output]
    command += ["--tokenizer", tokenizer_file, "--workers", "1"]
    env = os.environ | {"PYTHONPATH": f"{library}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (1, "")
    *_, first, second = done.stderr.splitlines()
    assert first.startswith(
        f"RuntimeError: {source / 'b.txt'}: gigatoken 9.9 gives other ids than the tokenizer's own library "
        "for the text b'a zebra'...: run with --encoder sentencepiece"
    )
    assert second.startswith(f"{source / 'c.jsonl'}: line 1: not valid JSON")  # a bad input is told of too
    packed = {f"{name}.txt.{ending}" for name in "ad" for ending in ("bin", "idx.npy", "json")}
    assert {path.name for path in output.iterdir()} == packed | {"c.jsonl.bad"}
    again = subprocess.run(
        [*command, "--encoder", "sentencepiece", "--skip_bad_files", "1"], env=env, capture_output=True, text=True
    )
    assert (again.returncode, "3 shards (1 new), 3 documents" in again.stdout) == (0, True), again.stderr
    tokenizer = Tokenizer(tokenizer_file)
    expected = [i for text in ("fine", "a zebra", "fine too") for i in [*tokenizer.encode(text), 2]]
    dataset = open_packed(output)
    assert np.array_equal(dataset.read(0, dataset.tokens), expected)
