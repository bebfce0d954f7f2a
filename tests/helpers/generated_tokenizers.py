"""Small tokenizers of every kind, and texts that are hard for each, drawn from a seed."""

import io
import json
import random
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tinyllama import InputError
from tinyllama.prepare import encode
from tinyllama.prepare.readers import TextChunk
from tinyllama.tokenizer import Tokenizer

WORDS = [
    "the",
    "a",
    "llama",
    "walked",
    "along",
    "river",
    "1984",
    "3.14",
    "it's",
    "don't",
    "Straße",
    "naïve",
    "漢字",
    "かな",
]
WORDS += ["déjà", "\ufb01n", "x=", "==", "ab", "abab", "aaa", "<|im"]
WHOLES = [
    "<|im_start|>",
    "<|im_end|>",
    "walk",
    "th",
    "  ",
    "    ",
    "\n\n",
    "\t",
    "<b>",
    "</b>",
    "漢",
    "é",
    "[INST]",
    "aba",
    "ab",
]
CONTROLS = ["</s>", "<s>", "<pad>", "<|endoftext|>", "[MASK]", "<sep>"]
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = (
    "sentencepiece bpe",
    "sentencepiece unigram",
    "byte-level",
    "byte fallback",
    "unigram",
    "wordpiece",
    "wordlevel",
)


def corpus(rng: random.Random) -> list[str]:
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(60)]


def write(kind: str, rng: random.Random, folder: Path) -> Path:
    """Write a tokenizer of a kind into the folder; returns the file."""
    if kind.startswith("sentencepiece"):
        path = folder / "tokenizer.model"
        path.write_bytes(_model(kind.split()[1], rng))
        return path
    path = folder / "tokenizer.json"
    path.write_text(_json(kind, rng))
    return path


def _model(model_type: str, rng: random.Random) -> bytes:
    if model_type == "bpe" and rng.random() < 0.4:  # Llama's or Gemma's settings
        settings: dict[str, Any] = {"byte_fallback": True, "normalization_rule_name": "identity"}
        settings |= {"remove_extra_whitespaces": False, "add_dummy_prefix": rng.random() < 0.5}
        settings["user_defined_symbols"] = rng.sample(WHOLES, rng.choice([0, 1, 3]))
        return _trained(model_type, rng, settings)
    settings = {
        "byte_fallback": rng.random() < 0.6,
        "normalization_rule_name": rng.choice(["identity", "identity", "nmt_nfkc", "nfkc_cf"]),
        "add_dummy_prefix": rng.random() < 0.6,
        "remove_extra_whitespaces": rng.random() < 0.3,
        "treat_whitespace_as_suffix": rng.random() < 0.15,
        "split_digits": rng.random() < 0.5,
        "split_by_number": rng.random() < 0.7,
        "split_by_whitespace": rng.random() < 0.8,
        "split_by_unicode_script": rng.random() < 0.7,
        "allow_whitespace_only_pieces": rng.random() < 0.5,
        "user_defined_symbols": rng.sample(WHOLES, rng.choice([0, 0, 1, 3])),
        "control_symbols": rng.sample(["<pad>", "<sep>", "[MASK]"], rng.choice([0, 1])),
    }
    return _trained(model_type, rng, settings)


def _trained(model_type: str, rng: random.Random, settings: dict[str, Any]) -> bytes:
    vocab_size = rng.randint(70, 130) + 256 * settings["byte_fallback"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(rng)),
        model_writer=model,
        model_type=model_type,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        minloglevel=5,
        **settings,
    )
    return model.getvalue()


def _json(kind: str, rng: random.Random) -> str:
    lines = corpus(rng)
    fallback = rng.random() < 0.5
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    controls = rng.sample(CONTROLS, rng.randint(1, 3))
    if kind == "byte-level":
        whole = tokenizers.Tokenizer(models.BPE(ignore_merges=rng.random() < 0.3))
        prefix = rng.random() < 0.3
        split = pre_tokenizers.Split(Regex(CL100K), "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        whole.pre_tokenizer = rng.choice(
            [pre_tokenizers.ByteLevel(add_prefix_space=prefix), pre_tokenizers.Sequence([split, plain])]
        )
        whole.normalizer = rng.choice([None, None, normalizers.NFC(), normalizers.Lowercase()])
        whole.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=rng.randint(270, 340), special_tokens=controls, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "byte fallback":
        whole = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=fallback, fuse_unk=rng.random() < 0.5))
        blanks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        if rng.random() < 0.5:
            whole.normalizer = rng.choice([blanks, normalizers.Replace(" ", "▁")])
        else:
            scheme, split = rng.choice(["always", "first", "never"]), rng.random() < 0.5
            whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
        whole.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        specials = ["<unk>", *controls, *(byte_pieces if fallback else [])]
        trainer = trainers.BpeTrainer(vocab_size=120 + len(specials), special_tokens=specials, show_progress=False)
    elif kind == "unigram":
        whole = tokenizers.Tokenizer(models.Unigram())
        whole.normalizer = rng.choice(
            [None, normalizers.NFKC(), normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])]
        )
        whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=rng.choice(["always", "first", "never"]))
        whole.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=100, special_tokens=["<unk>", *controls], unk_token="<unk>", show_progress=False
        )
    elif kind == "wordpiece":
        whole = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        whole.normalizer = rng.choice(
            [None, normalizers.BertNormalizer(lowercase=rng.random() < 0.5), normalizers.NFKC()]
        )
        whole.pre_tokenizer = rng.choice([pre_tokenizers.BertPreTokenizer(), pre_tokenizers.WhitespaceSplit()])
        whole.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=110, special_tokens=["[UNK]", *controls], show_progress=False)
    else:
        whole = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
        whole.pre_tokenizer = rng.choice([pre_tokenizers.Whitespace(), pre_tokenizers.WhitespaceSplit()])
        trainer = trainers.WordLevelTrainer(vocab_size=60, special_tokens=["<unk>", *controls], show_progress=False)
    whole.train_from_iterator(lines, trainer)
    content = json.loads(whole.to_str())
    if kind == "byte fallback":  # bytes are pieces, not added tokens
        content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    whole = tokenizers.Tokenizer.from_str(json.dumps(content))
    flag = lambda share: rng.random() < share  # noqa: E731
    for piece in rng.sample(WHOLES, rng.choice([0, 0, 1, 3])):
        flags = {"single_word": flag(0.2), "lstrip": flag(0.2), "rstrip": flag(0.2), "normalized": flag(0.4)}
        whole.add_tokens([AddedToken(piece, **flags)])
    whole.add_special_tokens(rng.sample(["<|x|>", "<|y|>"], rng.randint(0, 2)))  # behind the others
    if flag(0.5):
        one = controls[0]
        whole.post_processor = processors.TemplateProcessing(
            f"{one} $A", special_tokens=[(one, whole.token_to_id(one))]
        )
    return whole.to_str()


def texts(rng: random.Random, count: int, length: int, glues: tuple[str, ...] = (" ", " ", "", "  ")) -> list[str]:
    """Prose with pieces, control tokens, blanks and rare letters where they hurt."""
    rare = [
        *WHOLES,
        *CONTROLS,
        "<|x|>",
        "<unk>",
        "[UNK]",
        "<0x41>",
        "▁",
        "e\u0301",
        "\u0301\u08d3",
        "walk\u0301",
        "ab\u00e9",
        "\u00a0",
        "\U0001f642",
        "²",
        "\x00",
    ]
    parts = [*WORDS, *rare, "\r\n", "\n", " "]
    return [rng.choice(glues).join(rng.choices(parts, k=rng.randint(1, length))) for _ in range(count)]


class Reference:
    """The ids of a file by its library itself, None for a text on which that panics."""

    def __init__(self, path: Path) -> None:
        self.controls: set[int] = set()  # which no text may become
        if path.suffix == ".model":
            processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self._encode = processor.encode
            self.controls = {i for i in range(processor.vocab_size()) if processor.is_control(i)}
            self._literals: list[str] = []
            return
        whole = tokenizers.Tokenizer.from_file(str(path))
        whole.post_processor = None
        whole.encode_special_tokens = True
        self._encode = lambda text: whole.encode(text).ids
        special = {token.content: i for i, token in whole.get_added_tokens_decoder().items() if token.special}
        # models that look a whole word up make control tokens of text, which this project does not
        self._literals = [] if isinstance(whole.model, models.BPE) else [*special]
        self.controls = set(special.values()) - {special.get("<unk>"), special.get("[UNK]")}

    def ids(self, text: str) -> list[int] | None:
        try:
            return self._encode(text)
        except BaseException as error:  # added tokens that take the blanks around them, where two would take one
            if type(error).__name__ != "PanicException":
                raise
            return None

    def accepts(self, text: str, ids: list[int]) -> bool:
        """Whether these are the ids that the text must have."""
        if self.controls.intersection(ids):
            return False
        return ids == self.ids(text) or any(literal in text for literal in self._literals)


def wrong_documents(path: Path, encoder: encode.Encoder, documents: list[str]) -> list[str]:
    """Return the documents to which the encoder does not give the ids of the file's own library."""
    reference, wrong = Reference(path), []
    for text in documents:
        try:
            ((ids, *_),) = encoder.stream([TextChunk(text.encode(), "", True)])
        except InputError:
            if reference.ids(text) is not None:
                wrong.append(text)
            continue
        if not reference.accepts(text, ids.tolist()):
            wrong.append(text)
    return wrong


def wrong_at_cuts(tokenizer: Tokenizer, encoder: encode.Encoder, rng: random.Random) -> list[str]:
    """Return the long documents whose ids are not those of the whole when encode.CUT and encode.WINDOW are small."""
    # without a blank there is no exact cut for what puts one behind each text
    is_suffixed = _ends_in_blank(tokenizer)
    wrong = []
    for text in texts(rng, 4, 160, (" ",) if is_suffixed else (" ", "", "  ")):
        payload, third = text.encode(), len(text.encode()) // 3
        try:
            expected = tokenizer.encode(text)
        except InputError:
            continue
        chunks = [TextChunk(payload[:third], "", False), TextChunk(payload[third:], "", True)]
        if [one for ids, *_ in encoder.stream(chunks) for one in ids.tolist()] != expected:
            wrong.append(text)
    return wrong


def _ends_in_blank(tokenizer: Tokenizer) -> bool:
    if tokenizer.path.suffix == ".json":
        return False
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    return processor.encode("a", out_type=str)[-1].endswith("▁")
