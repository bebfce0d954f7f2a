"""What is vocabulary and what is a control token, in each kind of tokenizer.json and sentencepiece model."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from tinyllama import InputError
from tinyllama.tokenizer import Tokenizer

ALPHABET = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def byte_level(merges: list[tuple[str, str]] = [], more: tuple[str, ...] = (), **settings) -> tokenizers.Tokenizer:  # noqa: B006
    vocab = dict(ALPHABET)
    for piece in (*(left + right for left, right in merges), *more):
        vocab[piece] = len(vocab)
    whole = tokenizers.Tokenizer(models.BPE(vocab, merges, **settings))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    return whole


def saved(whole: tokenizers.Tokenizer, folder: Path, **changes) -> Tokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(whole.to_str()) | changes))
    return Tokenizer(folder)


def spelled(text: str) -> list[int]:
    return [ALPHABET[letter] for letter in text]


def test_runs_of_blanks_that_are_added_tokens_are_vocabulary(tmp_path):
    """GPT-NeoX's: two control tokens, and blanks that are added, not special."""
    whole = byte_level(more=("<|endoftext|>", "<|padding|>"))
    whole.add_special_tokens(["<|endoftext|>", "<|padding|>"])
    whole.add_tokens([AddedToken(" " * size, normalized=True) for size in (4, 3, 2)])
    tokenizer = saved(whole, tmp_path)
    four, three, two = 258, 259, 260
    assert tokenizer.encode("a    b") == [*spelled("a"), four, *spelled("b")]
    assert tokenizer.encode("a" + " " * 9 + "b  ") == [*spelled("a"), four, four, *spelled("Ġb"), two]
    assert tokenizer.encode("   a") == [three, *spelled("a")]
    assert tokenizer.encode("a<|endoftext|>") == spelled("a<|endoftext|>")
    assert tokenizer.decode(tokenizer.encode("a    b <|padding|>")) == "a    b <|padding|>"
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (261, 256)
    assert tokenizer.whole_pieces() == ["<|endoftext|>", "<|padding|>", "    ", "   ", "  "]


def test_added_tokens_behind_a_control_token_keep_their_ids(tmp_path):
    whole = byte_level()
    whole.add_special_tokens(["<x>"])  # in no model: the library numbers it, and what follows
    whole.add_tokens(["bb"])
    whole.add_special_tokens(["<y>"])
    whole.add_tokens(["cc"])
    tokenizer = saved(whole, tmp_path)
    assert tokenizer.encode("abb<x>cc<y>") == [*spelled("a"), 257, *spelled("<x>"), 259, *spelled("<y>")]
    assert tokenizer.decode([257, 256, 259, 258]) == "bbcc"
    content = json.loads((tmp_path / "tokenizer.json").read_bytes())
    for token in content["added_tokens"]:
        token["id"] = 2**32 - 1  # which the library does not read, but others do
    tokenizer = saved(whole, tmp_path, added_tokens=content["added_tokens"])
    assert tokenizer.encode("abb<x>cc<y>") == [*spelled("a"), 257, *spelled("<x>"), 259, *spelled("<y>")]
    assert [token["id"] for token in json.loads(tokenizer.json_for_text())["added_tokens"]] == [256, 257, 258, 259]


def test_added_tokens_that_are_one_text_once_normalized_are_refused(tmp_path):
    """The library finds the one or the other, as it happens, in each process that loads the file."""
    whole = byte_level()
    whole.normalizer = normalizers.Lowercase()
    whole.add_tokens([AddedToken("[B]", normalized=False), "[b]", "[A]", "[a]"])
    with pytest.raises(InputError, match=r"tokenizer.json: the added tokens '\[A\]' and '\[a\]' are the same once"):
        saved(whole, tmp_path)
    whole = byte_level()
    whole.normalizer = normalizers.Lowercase()
    whole.add_tokens([AddedToken("[B]", normalized=False), "[b]"])  # found one before the other
    assert saved(whole, tmp_path).encode("[b][B]") == [257, 256]
    # a control token is no text, whatever it becomes
    whole.add_special_tokens([AddedToken("[C]", normalized=True)])
    whole.add_tokens(["[c]"])
    assert saved(whole, tmp_path).encode("[c][C]") == [259, 259]


def test_an_added_token_that_is_nothing_once_normalized_is_refused(tmp_path):
    """The library finds it everywhere, and panics or takes all memory."""
    whole = byte_level()
    whole.normalizer = normalizers.Strip()
    whole.add_tokens(["    "])
    with pytest.raises(InputError, match=r"tokenizer.json: the added token '    ' is nothing once normalized: remove"):
        saved(whole, tmp_path)


@pytest.mark.parametrize("name", ["single_word", "lstrip", "rstrip", "normalized"])
def test_flags_of_added_tokens_are_the_library_s(name, tmp_path):
    whole = byte_level()
    whole.add_special_tokens(["</s>"])
    whole.add_tokens([AddedToken("cat", **{name: True})])
    whole.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    for text in ("cat", "concatenate", "cat cat  cat\n cat", "catcat", " cat ", "a cat.", "</s>cat</s>"):
        if "</s>" not in text:
            assert tokenizer.encode(text) == whole.encode(text).ids
    assert tokenizer.encode("</s>cat") == [*spelled("</s>"), 257] if name != "single_word" else True
    assert 256 not in tokenizer.encode("</s>cat</s>")


def test_what_ends_a_document_is_no_text_even_if_it_is_not_marked_special(tmp_path):
    whole = byte_level()
    whole.add_tokens(["<|im_end|>", "<|im_start|>"])
    whole.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_id == 256
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [257, *spelled("a<|im_end|>")]


def test_merges_that_make_a_control_token_are_left_out(tmp_path):
    whole = byte_level([("<", "/"), ("s", ">"), ("</", "s>"), ("</s>", "<")])
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole.add_special_tokens(["</s>"])
    tokenizer = saved(whole, tmp_path)
    eos = whole.token_to_id("</s>")
    assert tokenizer.eos_id == eos
    assert whole.encode("</s>").ids == [eos]
    assert tokenizer.encode("a</s><") == [*spelled("a"), *map(whole.token_to_id, ("</", "s>", "<"))]
    assert tokenizer.encode("</") == [whole.token_to_id("</")]


def test_a_word_that_is_looked_up_whole_is_no_control_token(tmp_path):
    """Llama 3's ignore_merges: what the pre-tokenizer leaves whole is looked up in the vocabulary."""
    whole = byte_level(more=("eos", "cat"), ignore_merges=True)
    whole.add_special_tokens(["eos"])
    tokenizer = saved(whole, tmp_path)
    assert tokenizer.encode("eos") == spelled("eos")
    assert tokenizer.encode("cat") == [257]


@pytest.mark.parametrize("kind", ["unigram", "wordpiece", "wordlevel"])
def test_a_literal_control_token_is_text_for_models_that_know_it(kind, tmp_path):
    pieces = ["<unk>", "</s>", "a", "<", "/", "s", ">", "##a"]
    ids = {piece: number for number, piece in enumerate(pieces)}
    if kind == "unigram":
        model = models.Unigram([(piece, -float(number)) for piece, number in ids.items()], 0, False)
        expected = [ids[piece] for piece in "a</s>a"]
    elif kind == "wordpiece":
        model, expected = models.WordPiece(ids, unk_token="<unk>"), [0]
    else:
        model, expected = models.WordLevel(ids, unk_token="<unk>"), [0]
    whole = tokenizers.Tokenizer(model)
    whole.add_special_tokens(["<unk>", "</s>"])
    whole.add_tokens(["[b]"])
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = saved(whole, tmp_path)
    assert (tokenizer.unk_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.encode("a</s>a") == expected
    assert 1 not in tokenizer.encode("</s> </s></s> a </s>")
    assert tokenizer.encode("a [b]") == [2, 8]
    assert tokenizer.encode("ü") == [0]
    assert tokenizer.decode([2, 1]) == "a"


def test_dropout_which_is_for_training_is_left_out(tmp_path):
    whole = byte_level([("a", "b")], dropout=0.9)
    tokenizer = saved(whole, tmp_path)
    assert tokenizer.encode("ab" * 50) == [256] * 50
    assert json.loads(tokenizer.json_with_controls())["model"]["dropout"] is None


def sentencepiece_model(path: Path, **settings) -> Tokenizer:
    corpus = ["the little llama walked along the river", "a day in the mountains 1984"] * 20
    options = {"model_type": "bpe", "vocab_size": 340, "byte_fallback": True, "normalization_rule_name": "identity"}
    options |= {"remove_extra_whitespaces": False, "minloglevel": 2}
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_writer=file, **options | settings
        )
    return Tokenizer(path)


USER_DEFINED = ["<|im_start|>", "<|im|>", "walk", "\u2581\u2581", "al", "\n"]


def test_user_defined_pieces_are_one_id_and_control_pieces_are_text(tmp_path):
    tokenizer = sentencepiece_model(tmp_path / "a.model", user_defined_symbols=USER_DEFINED, control_symbols=["<pad>"])
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "a.model"))
    ids = tokenizer.encode("<|im_start|>a<|im|>walked</s><pad>")
    assert [pieces.piece_to_id(piece) for piece in ("<|im_start|>", "<|im|>", "walk")] == [ids[1], ids[3], ids[4]]
    assert not {pieces.piece_to_id(piece) for piece in ("<s>", "</s>", "<pad>")}.intersection(ids)
    assert tokenizer.whole_pieces()[:6] == USER_DEFINED
    assert tokenizer.whole_pieces()[6:-256] == ["<unk>", "<s>", "</s>", "<pad>"]


def test_a_tokenizer_json_has_user_defined_pieces_only_without_a_prefix(tmp_path):
    prefixed = sentencepiece_model(tmp_path / "a.model", user_defined_symbols=USER_DEFINED)
    for make in (prefixed.json_for_text, prefixed.json_with_controls):
        with pytest.raises(InputError, match=r"it has user-defined pieces and puts a blank before a text"):
            make()
    tokenizer = sentencepiece_model(tmp_path / "b.model", user_defined_symbols=USER_DEFINED, add_dummy_prefix=False)
    bare = tokenizers.Tokenizer.from_str(tokenizer.json_for_text())
    rng = random.Random(0)
    parts = [*USER_DEFINED, *["the", "llama", "walked"], "<|", "im", "|>", " ", "wal", "k", "\u2581", "</s>", "漢"]
    for text in ["".join(rng.choices(parts, k=12)) for _ in range(500)]:
        assert bare.encode(text).ids == tokenizer.encode(text), text


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 285}, "it is not a BPE model"),
        ({"model_type": "char", "vocab_size": 300, "hard_vocab_limit": False}, "it is not a BPE model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalizes text, removes blanks or has unused pieces"),
        ({"remove_extra_whitespaces": True}, "it normalizes text, removes blanks or has unused pieces"),
        ({"treat_whitespace_as_suffix": True}, "it puts blanks behind words"),
        ({"user_defined_symbols": ["a  b"], "add_dummy_prefix": False}, "a user-defined piece has a blank"),
    ],
)
def test_a_model_whose_ids_no_tokenizer_json_has_is_refused(settings, reason, tmp_path):
    tokenizer = sentencepiece_model(tmp_path / "a.model", **settings)
    with pytest.raises(InputError, match=f"no tokenizer.json can have the ids of this sentencepiece model: {reason}"):
        tokenizer.json_for_text()


@pytest.mark.parametrize("change", ["unused", "scores"])
def test_pieces_that_are_not_used_or_share_a_score_are_refused(change, tmp_path):
    pytest.importorskip("google.protobuf")
    from sentencepiece import sentencepiece_model_pb2

    sentencepiece_model(tmp_path / "a.model")
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((tmp_path / "a.model").read_bytes())
    made = [piece for piece in proto.pieces if piece.type == piece.NORMAL and len(piece.piece) == 2]
    if change == "unused":
        made[0].type = made[0].UNUSED
    else:
        made[0].score = made[1].score
    (tmp_path / "b.model").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match="unused pieces|share a score"):
        Tokenizer(tmp_path / "b.model").json_for_text()


def test_thousands_of_added_tokens_make_few_hard_texts(tmp_path):
    whole = byte_level()
    whole.add_tokens([f"<extra_{number}>" for number in range(5000)])
    texts = list(saved(whole, tmp_path).hard_texts())
    assert len(texts) < 6000
    assert sum(map(len, texts)) < 1_000_000
    assert all(any(f"<extra_{number}>" in text for text in texts) for number in (0, 2500, 4999))
