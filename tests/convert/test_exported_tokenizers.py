"""An exported tokenizer has our ids through transformers, whatever tokenizer it was, or is not exported at all."""

import random

import pytest
from generated_tokenizers import CONTROLS, KINDS, WHOLES, Reference, texts, write
from transformers import AutoTokenizer

from tinyllama import InputError
from tinyllama.convert.tokenizer_files import write_tokenizer
from tinyllama.tokenizer import Tokenizer


def try_one(kind, seed, folder) -> bool:
    """Return whether the tokenizer was exported; asserts its ids."""
    rng = random.Random(f"{kind} {seed}")
    path = write(kind, rng, folder)
    ours, output = Tokenizer(path), folder / f"{kind} {seed}"
    output.mkdir()
    reason = ""
    try:
        write_tokenizer(output, ours, 96)
    except InputError as error:
        reason = str(error)
    if reason:
        assert "cannot be written as a tokenizer.json (" in reason
        assert list(output.iterdir()) == []
        return False
    theirs, reference = AutoTokenizer.from_pretrained(output), Reference(path)
    for text in [*texts(rng, 40, 12), *WHOLES, "", " "]:
        if reference.ids(text) is not None and not any(literal in text for literal in reference._literals):
            assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text), (kind, seed, text)
            if not any(control in text for control in (*CONTROLS, "<|x|>", "<unk>", "[UNK]")):
                assert theirs(text)["input_ids"] == ours.encode(text), (kind, seed, text)
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_exported_ids_are_ours(kind, tmp_path):
    exported = [try_one(kind, seed, tmp_path) for seed in range(4)]
    assert all(exported) if not kind.startswith("sentencepiece") else not all(exported)


@pytest.mark.slow
def test_exported_ids_are_ours_in_hundreds(tmp_path):
    exported = {kind: sum(try_one(kind, seed, tmp_path) for seed in range(100, 150)) for kind in KINDS}
    assert exported.pop("sentencepiece unigram") == 0
    assert exported.pop("sentencepiece bpe") > 8
    assert set(exported.values()) == {50}
