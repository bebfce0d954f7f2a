import hashlib
import io
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from tinyllama import InputError
from tinyllama.tokenizer import Tokenizer

ADVERSARIAL = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "\r\n",
    "line one\r\nline two\r\n",
    "\t\tdef f(x):\n\t\treturn x  # tab",
    " leading and trailing ",
    "two  blanks   three",
    "<s>",
    "</s>",
    "a</s>b <s> <unk> <0x0A> [INST]",
    "\U0001f642\U0001f1eb\U0001f1f7 \U0001f468‍\U0001f469‍\U0001f467",
    "漢字かな交じり文、한국어",
    "e\u0301 is not \u00e9, \u212b, \ufb01, \u00a0, \u3000, \u200b, \ufeff",
    "\x00",
    "a\x00b\x01\x7f\x1b[0m",
    "0123456789 3.14159 1,234,567 ١٢٣ ²",
    "\u2581",
    "a\u2581b \u2581\u2581 c\u2581",
    "\ufffd",
    "x" * 3000,
    "word " * 500,
]

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps in the sun",
    "def add(a, b): return a + b  # the sum of two numbers, and nothing else",
    "pretraining reads tokens; tokens come from text; text comes from 1234 files in 5678 folders",
] * 20


def train(path: Path, corpus: list[str] = CORPUS, **settings) -> Path:
    model = io.BytesIO()
    options = {
        "vocab_size": 330,
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus), model_writer=model, **options | settings)
    path.write_bytes(model.getvalue())
    return path


def write_hf_json(model: Path, path: Path, **changes) -> Path:
    """The tokenizer.json that Hugging Face ships for a Llama sentencepiece model: added tokens, bos post-processor."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    ranked = []
    for piece, rank in vocab.items():
        if pieces.is_control(rank) or pieces.is_byte(rank) or pieces.is_unknown(rank):
            continue
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        # by score, not by id: Llama 2 gave its runs of blanks low ids and the lowest scores
        score = pieces.get_score(rank)
        ranked += [(-score, rank, vocab[a], vocab[b], (a, b)) for a, b in halves if a in vocab and b in vocab]
    merges = [pair for *_, pair in sorted(ranked)]
    hf = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    hf.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    hf.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    hf.add_special_tokens(["<unk>", "<s>", "</s>"])
    hf.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    path.write_text(json.dumps(json.loads(hf.to_str()) | changes))
    return path


@pytest.fixture(scope="module", params=["tiny", "llama2"])
def model(request, tmp_path_factory) -> Path:
    if request.param == "tiny":
        return train(tmp_path_factory.mktemp("tiny") / "tokenizer.model")
    if not os.environ.get("LLAMA_TOKENIZER"):
        pytest.skip("LLAMA_TOKENIZER does not name the Llama 2 tokenizer.model")
    return Path(os.environ["LLAMA_TOKENIZER"])


@pytest.fixture(scope="module")
def hf_json(model, tmp_path_factory) -> Path:
    return write_hf_json(model, tmp_path_factory.mktemp("hf") / "tokenizer.json")


@pytest.fixture(scope="module", params=["sentencepiece", "tokenizers"])
def tokenizer(request, model) -> Tokenizer:
    return Tokenizer(model if request.param == "sentencepiece" else request.getfixturevalue("hf_json"))


def test_facts_of_both_backends(model, hf_json):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for path, encoder, version in (
        (model, "sentencepiece", sentencepiece.__version__),
        (hf_json, "tokenizers", tokenizers.__version__),
    ):
        tokenizer = Tokenizer(str(path))
        assert tokenizer.path == path
        assert tokenizer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert tokenizer.vocab_size == reference.vocab_size()
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
        assert (tokenizer.encoder, tokenizer.encoder_version) == (encoder, version)


@pytest.mark.parametrize("text", ADVERSARIAL, ids=lambda text: repr(text[:24]))
def test_ids_are_sentencepieces_and_decode_back(tokenizer, model, text):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")  # the one character Llama's tokenizers give up


def test_ids_of_utf8_are_those_of_the_text(tokenizer, model):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in ADVERSARIAL:
        ids = tokenizer.encode_utf8(text.encode())
        assert ids.dtype in (np.int32, np.uint32)  # those of no text too
        assert ids.tolist() == reference.encode(text), text


def test_pieces_are_those_that_text_becomes(model, hf_json):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    every = [reference.id_to_piece(i) for i in range(reference.vocab_size())]
    assert every[:3] == ["<unk>", "<s>", "</s>"]
    assert every[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert Tokenizer(model).pieces() == every[259:]
    assert Tokenizer(hf_json).pieces() is None


def test_json_for_text_encodes_alike(tokenizer, model):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    bare = tokenizers.Tokenizer.from_str(tokenizer.json_for_text())
    assert bare.get_vocab() == {reference.id_to_piece(i): i for i in range(reference.vocab_size())}
    for text in ADVERSARIAL:
        assert bare.encode(text).ids == reference.encode(text), text


def test_json_of_a_model_without_bytes_has_one_unknown_for_many(tmp_path):
    tokenizer = Tokenizer(train(tmp_path / "other.model", byte_fallback=False, vocab_size=120))
    bare = tokenizers.Tokenizer.from_str(tokenizer.json_for_text())
    text = "the 漢字かな交じり文 dog"
    assert tokenizer.encode(text).count(0) == 1
    assert bare.encode(text).ids == tokenizer.encode(text)


def test_merges_go_by_score(tmp_path):
    """Llama 2's runs of blanks have low ids and the lowest scores."""
    pytest.importorskip("google.protobuf")
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(train(tmp_path / "plain.model", vocab_size=420).read_bytes())
    normal = [piece for piece in proto.pieces if piece.type == piece.NORMAL and len(piece.piece) > 1]
    for piece, score in zip(normal, [piece.score for piece in reversed(normal)], strict=True):
        piece.score = score
    (tmp_path / "turned.model").write_bytes(proto.SerializeToString())
    tokenizer = Tokenizer(tmp_path / "turned.model")
    bare = tokenizers.Tokenizer.from_str(tokenizer.json_for_text())
    plain = Tokenizer(tmp_path / "plain.model")
    assert any(tokenizer.encode(text) != plain.encode(text) for text in CORPUS[:3])
    for text in (*CORPUS[:3], *ADVERSARIAL):
        assert bare.encode(text).ids == tokenizer.encode(text), text


def test_pieces_that_are_made_in_several_ways(model, tmp_path):
    """Runs of few characters: most pieces have several pairs of halves, which share one score."""
    generator = random.Random(0)
    corpus = ["".join(generator.choices("ab ", k=20)) for _ in range(100)] + ["a" * 30, "b" * 17] * 5
    runs = train(tmp_path / "runs.model", corpus, vocab_size=320, allow_whitespace_only_pieces=True)
    for path, characters in ((runs, "ab "), (runs, "aab"), (model, "=- "), (model, "#*=/.0\n "), (model, "the an")):
        tokenizer = Tokenizer(path)
        bare = tokenizers.Tokenizer.from_str(tokenizer.json_for_text())
        texts = ["".join(generator.choices(characters, k=generator.randint(1, 60))) for _ in range(500)]
        texts += [one * count for one in characters for count in range(1, 100)]
        for text in texts:
            assert bare.encode(text).ids == tokenizer.encode(text), text
    pieces = set(Tokenizer(runs).pieces())
    halves = [sum(piece[:i] in pieces and piece[i:] in pieces for i in range(1, len(piece))) for piece in pieces]
    assert max(halves) > 2
    merges = json.loads(Tokenizer(runs).json_for_text())["model"]["merges"]
    made = [left + right for left, right in merges]
    assert len(made) == len(set(made)) > 50


def test_a_piece_that_never_comes_about_has_no_merge(tmp_path):
    """In "abca" the first merge is into "ab", after which there is no "bca"."""
    pytest.importorskip("google.protobuf")
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(train(tmp_path / "plain.model").read_bytes())
    del proto.pieces[259:]
    for score, piece in enumerate(("▁", "a", "b", "c", "ab", "bc", "bca", "abca", "▁a")):
        proto.pieces.add(piece=piece, score=-score, type=1)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    (tmp_path / "small.model").write_bytes(proto.SerializeToString())
    tokenizer = Tokenizer(tmp_path / "small.model")
    merges = json.loads(tokenizer.json_for_text())["model"]["merges"]
    assert merges == [["a", "b"], ["b", "c"], ["bc", "a"], ["▁", "a"]]
    bare = tokenizers.Tokenizer.from_str(tokenizer.json_for_text())
    for length in range(1, 8):
        for text in map("".join, itertools.product("abc", repeat=length)):
            assert bare.encode(text).ids == tokenizer.encode(text), text


def test_unused_pieces_are_none_that_text_becomes(tmp_path):
    pytest.importorskip("google.protobuf")
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(train(tmp_path / "plain.model").read_bytes())
    piece = next(piece for piece in proto.pieces if piece.piece == "he")
    piece.type = piece.UNUSED
    (tmp_path / "other.model").write_bytes(proto.SerializeToString())
    assert set(Tokenizer(tmp_path / "plain.model").pieces()) - set(Tokenizer(tmp_path / "other.model").pieces()) == {
        "he"
    }


def test_empty_text_gives_no_ids(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("literal", ["<s>", "</s>", "<unk>"])
def test_literal_control_tokens_stay_text(tokenizer, literal):
    ids = tokenizer.encode(f"a {literal}{literal} b")
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == f"a {literal}{literal} b"


def test_decode_takes_numpy_and_drops_control_tokens(tokenizer):
    ids = tokenizer.encode("the dog")
    assert tokenizer.decode(np.array([1, *ids, 2], dtype=np.uint16)) == "the dog"


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff ok"])
def test_lone_surrogate_is_named(tokenizer, text):
    with pytest.raises(InputError, match=r"lone surrogate '\\ud.{3}' at character [03]: repair"):
        tokenizer.encode(text)


def test_folder_prefers_the_model(model, hf_json, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(hf_json.read_bytes())
    assert Tokenizer(tmp_path).path == tmp_path / "tokenizer.json"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    assert Tokenizer(tmp_path).path == tmp_path / "tokenizer.model"


def test_missing_names_the_paths_tried(tmp_path):
    with pytest.raises(InputError) as error:
        Tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.model") in str(error.value)
    assert str(tmp_path / "tokenizer.json") in str(error.value)
    with pytest.raises(InputError, match="no tokenizer at .*absent.model: give a sentencepiece"):
        Tokenizer(tmp_path / "absent.model")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"null", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"])
def test_unreadable_is_one_line_with_the_remedy(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} is not a .*git lfs pull") as error:
        Tokenizer(tmp_path / name)
    assert len(error.value.args) == 1
    assert "\n" not in str(error.value)


def test_a_tiktoken_file_is_named_as_such(tmp_path):
    path = tmp_path / "tokenizer.model"  # what Llama 3's is called
    path.write_bytes(b"IQ== 0\nIg== 1\nIHRoZQ== 279\n")
    with pytest.raises(InputError) as error:
        Tokenizer(path)
    assert str(error.value) == f"{path} is a tiktoken file: give the tokenizer.json of the same model"


@pytest.mark.parametrize("name", ["TOKENIZER.JSON", "tokenizer"])
def test_a_tokenizer_json_by_another_name_is_to_be_renamed(hf_json, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(Path(hf_json).read_bytes())
    with pytest.raises(InputError) as error:
        Tokenizer(path)
    hint = "rename a tokenizer.json to end in .json, or fetch the sentencepiece model again"
    assert str(error.value) == f"{path} is JSON: {hint}"


def test_json_truncation_and_padding_are_ignored(tmp_path):
    model = train(tmp_path / "tokenizer.model")
    path = write_hf_json(
        model,
        tmp_path / "tokenizer.json",
        truncation={"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
    )
    text = "the quick brown fox jumps over the lazy dog"
    assert Tokenizer(path).encode(text) == Tokenizer(model).encode(text)
    fixed = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    path = write_hf_json(model, path, padding=fixed | {"pad_type_id": 0, "pad_token": "<unk>"})
    assert Tokenizer(path).encode(text) == Tokenizer(model).encode(text)


def test_specials_come_from_tokenizer_config(tmp_path):
    path = write_hf_json(train(tmp_path / "other.model"), tmp_path / "tokenizer.json")
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": None, "eos_token": {"content": "<unk>"}}))
    assert (Tokenizer(path).bos_id, Tokenizer(path).eos_id) == (None, 0)
    config.write_text(json.dumps({"eos_token": "<|nowhere|>"}))
    with pytest.raises(InputError, match="eos_token '<|nowhere|>' is not in tokenizer.json"):
        Tokenizer(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (None, r"is not JSON \(.*Is a directory"),
        ("null", "is not a JSON object: repair or remove"),
        ('"text"', "is not a JSON object: repair or remove"),
        ('{"eos_token": {"x": 1}}', r"eos_token {'x': 1} is not in tokenizer.json"),
        ('{"eos_token": ["a"]}', r"eos_token \['a'\] is not in tokenizer.json"),
    ],
)
def test_a_tokenizer_config_that_is_none(tmp_path, content, message):
    path = write_hf_json(train(tmp_path / "other.model"), tmp_path / "tokenizer.json")
    config = tmp_path / "tokenizer_config.json"
    config.mkdir() if content is None else config.write_text(content)
    with pytest.raises(InputError, match=rf"tokenizer_config.json:? {message}"):
        Tokenizer(path)


def test_a_vocabulary_without_pieces(tmp_path):
    tokenizers.Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"tokenizer.json is not a tokenizer.json with a vocabulary: fetch it whole"):
        Tokenizer(tmp_path)


def test_added_tokens_beyond_the_model_count_in_the_vocabulary(tmp_path):
    # as in Llama 3: the specials are no pieces of the BPE model
    bpe = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    bpe.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (5, 3, 4)
    assert tokenizer.encode("abb") == [2, 1]
    assert tokenizer.decode([3, 2, 4]) == "ab"


def test_the_vocabulary_ends_behind_the_largest_id(tmp_path):
    vocab = {"a": 0, "b": 1, "ab": 70_000, "</s>": 4}  # ids in between are nobody's
    tokenizers.Tokenizer(models.BPE(vocab, [("a", "b")])).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (70_001, None, 4)
    assert tokenizer.encode_utf8(b"aab").tolist() == [0, 70_000]


@pytest.mark.parametrize(
    ("tokens", "bos_id", "eos_id"),
    [
        (["<s>", "</s>"], 1, 2),
        (["<|begin_of_text|>", "<|end_of_text|>"], 1, 2),
        (["<bos>", "<eos>"], 1, 2),
        (["<|startoftext|>", "<|endoftext|>"], 1, 2),
        (["<|endoftext|>", "<eos>", "<|end_of_text|>", "</s>"], None, 4),  # the first in the order of their fame
        (["<|startoftext|>", "<bos>", "<|begin_of_text|>", "<s>"], 4, None),
        (["<|endoftext|>", "<eos>", "<|startoftext|>", "<bos>"], 4, 2),
    ],
)
def test_usual_names_of_bos_and_eos(tmp_path, tokens, bos_id, eos_id):
    vocab = {"a": 0} | {token: i for i, token in enumerate(tokens, 1)}
    tokenizers.Tokenizer(models.BPE(vocab, [])).save(str(tmp_path / "tokenizer.json"))
    assert (Tokenizer(tmp_path).bos_id, Tokenizer(tmp_path).eos_id) == (bos_id, eos_id)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "a"}')
    assert (Tokenizer(tmp_path).bos_id, Tokenizer(tmp_path).eos_id) == (0, eos_id)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "a", "bos_token": null}')
    assert (Tokenizer(tmp_path).bos_id, Tokenizer(tmp_path).eos_id) == (None, 0)


@pytest.mark.parametrize(("unk_id", "bos_id", "eos_id"), [(2, 0, 1), (1, -1, 0), (0, 1, -1)])
def test_bos_and_eos_wherever_the_model_has_them(tmp_path, unk_id, bos_id, eos_id):
    tokenizer = Tokenizer(train(tmp_path / "other.model", unk_id=unk_id, bos_id=bos_id, eos_id=eos_id))
    assert tokenizer.bos_id == (None if bos_id == -1 else bos_id)
    assert tokenizer.eos_id == (None if eos_id == -1 else eos_id)


def test_model_without_bos_and_eos(tmp_path):
    tokenizer = Tokenizer(train(tmp_path / "bare.model", bos_id=-1, eos_id=-1))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)


def test_neither_backend_imports_torch(tmp_path):
    write_hf_json(train(tmp_path / "tokenizer.model"), tmp_path / "tokenizer.json")
    code = (
        "import sys; from tinyllama.tokenizer import Tokenizer\n"
        "for path in sys.argv[1:]: Tokenizer(path).encode('text')\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    paths = [str(tmp_path / "tokenizer.model"), str(tmp_path / "tokenizer.json")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
