"""Generated tokenizers of every kind: the ids are those of their own library, in both encoders and at every cut."""

import random
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from generated_tokenizers import KINDS, WHOLES, texts, write, wrong_at_cuts, wrong_documents

from tinyllama.prepare import encode
from tinyllama.prepare.encode import Encoder
from tinyllama.tokenizer import Tokenizer


def try_one(kind: str, seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return how often the fast encoder was taken or refused, and the texts that were compared; asserts the ids."""
    rng = random.Random(f"{kind} {seed}")
    path = write(kind, rng, folder)
    tokenizer = Tokenizer(path)
    counts = Counter(tokenizers=1)
    for choice in ("sentencepiece", "auto"):
        encoder = Encoder(tokenizer, choice)
        is_fast = encoder.name.startswith("gigatoken")
        counts["accepted by the fast one"] += is_fast
        counts["refused"] += choice == "auto" and not is_fast
        documents = [*texts(rng, 25, 12), *WHOLES, "</s>", "", " ", "\n"]
        counts["documents"] += len(documents)
        assert wrong_documents(path, encoder, documents) == [], (kind, seed, encoder.name)
        with monkeypatch.context() as small:
            small.setattr(encode, "CUT", 60)
            small.setattr(encode, "WINDOW", 60)
            assert wrong_at_cuts(tokenizer, encoder, rng) == [], (kind, seed, encoder.name)
        counts["long documents"] += 4
    return counts


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_library(kind, seed, tmp_path, monkeypatch):
    counts = try_one(kind, seed, tmp_path, monkeypatch)
    assert counts["accepted by the fast one"] + counts["refused"] == 1


@pytest.mark.slow
def test_ids_are_those_of_the_library_in_hundreds(tmp_path, monkeypatch, capsys):
    counts: Counter[str] = Counter()
    for kind in KINDS:
        for seed in range(100, 145):
            counts += try_one(kind, seed, tmp_path, monkeypatch)
    with capsys.disabled():
        print(f"\n{dict(counts)}")
    assert counts["tokenizers"] == 315
    assert counts["accepted by the fast one"] > 40 * bool(find_spec("gigatoken"))
