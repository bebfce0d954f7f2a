"""Loss, perplexity and bits a byte, beside what transformers makes of the same texts."""

import json
import math

import numpy as np
import pytest
import torch
from models import CONFIG, given, weights
from packed import change

from tinyllama import InputError
from tinyllama.convert import hf_folder
from tinyllama.convert.weights import open_weights
from tinyllama.data.packed import open_packed
from tinyllama.eval import perplexity
from tinyllama.tokenizer import Tokenizer

TEXTS = [
    "The little llama walked along the river until the evening.",
    "  two blanks before, and one after ",
    "Ærøskøbing, 漢字かな, שלום, 🦙",
    "def read(path):\n\treturn path",
    "a",
    "漢",
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file):
    return Tokenizer(tokenizer_file)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("perplexity") / "hf"
    hf_folder.write(folder, given(), tokenizer)
    return folder


@pytest.fixture(scope="module")
def reference(hf_dir):
    """A function that gives transformers' mean loss over blocks of ``size`` + 1 tokens of a stream, in fp64."""
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(hf_dir).double()

    def mean_loss(stream, size):
        blocks = torch.tensor(stream[: len(stream) // (size + 1) * (size + 1)]).view(-1, size + 1)
        with torch.no_grad():
            logits = theirs(blocks[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).item()

    return mean_loss


def scores(*args):
    return {score.metric: score.value for score in perplexity.perplexity(*args)}


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_the_scores_are_those_of_transformers(batch_size, hf_dir, reference, tokenizer, packed_folder):
    documents = [[*tokenizer.encode(text), 2] for text in TEXTS * 4]
    folder = packed_folder([documents[:9], documents[9:]], tokenizer_sha256=tokenizer.sha256)
    stream = [token for document in documents for token in document]
    assert len(stream) // 97 % 2 == 1  # the last batch of two is half full
    loss = reference(stream, 96)
    num_bytes = sum(len(text.encode()) for text in TEXTS * 4)
    found = scores(open_weights(hf_dir), folder, tokenizer, batch_size)
    assert list(found) == ["loss", "perplexity", "bits_per_byte"]
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(loss * len(stream) / math.log(2) / num_bytes, rel=1e-6)
    # what is recorded is believed
    change(folder / "manifest.json", subsets={".": {"tokens": len(stream), "bytes": 2 * num_bytes}})
    recorded = scores(open_weights(hf_dir), folder, tokenizer, batch_size)["bits_per_byte"]
    assert recorded == pytest.approx(found["bits_per_byte"] / 2)


@pytest.mark.parametrize("piece", [1, 7, 50, 1 << 20])
@pytest.mark.parametrize("ended", [True, False])
def test_no_byte_is_lost_between_pieces(piece, ended, tokenizer, packed_folder, monkeypatch):
    monkeypatch.setattr(perplexity, "DECODE_CHUNK", piece)
    documents = [[*tokenizer.encode(text), 2] for text in TEXTS]
    if not ended:
        documents[-1].pop()
    folder = packed_folder([documents], tokenizer_sha256=tokenizer.sha256)
    assert perplexity.count_bytes(open_packed(folder), tokenizer) == sum(len(text.encode()) for text in TEXTS)


def test_a_text_shorter_than_a_block_is_one_block(hf_dir, reference, tokenizer, tmp_path):
    text = "The llama said: nothing is lost."
    stream = [*tokenizer.encode(text), 2]
    assert len(stream) < 96
    (tmp_path / "short.txt").write_text(text)
    found = perplexity.perplexity(open_weights(hf_dir), tmp_path / "short.txt", tokenizer)
    loss = reference(stream, len(stream) - 1)
    expected = {"loss": loss, "perplexity": math.exp(loss)}
    expected["bits_per_byte"] = loss * len(stream) / math.log(2) / len(text.encode())
    assert {score.metric: score.value for score in found} == pytest.approx(expected, rel=1e-5)
    assert {(score.step, score.tokens, score.task, score.shots) for score in found} == {(12, 3456, "short.txt", None)}


def test_texts_in_a_folder_are_prepared_for_the_while(hf_dir, reference, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    (folder / "below/a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 4))
    stream = [token for text in TEXTS * 4 for token in [*tokenizer.encode(text), 2]]
    found = scores(open_weights(hf_dir), folder, tokenizer)
    assert found["loss"] == pytest.approx(reference(stream, 96), rel=1e-6)
    assert list((tmp_path / "scratch").iterdir()) == []
    (folder / "below/a.jsonl").write_text("no json\n")
    with pytest.raises(InputError) as caught:
        perplexity.perplexity(open_weights(hf_dir), folder, tokenizer)
    assert str(tmp_path / "scratch") not in str(caught.value)


def test_a_loss_that_is_no_number_is_no_score(hf_dir, tokenizer, packed_folder, tmp_path):
    folder = packed_folder([[[5, 6, 7, 2]]], tokenizer_sha256=tokenizer.sha256)
    state = weights()
    state["transformer.ln_f.weight"][3] = torch.nan
    hf_folder.write(tmp_path / "hf", given(state))
    with pytest.raises(InputError, match=r"the loss of .*/hf is not a number: give another checkpoint$"):
        perplexity.perplexity(open_weights(tmp_path / "hf"), folder, tokenizer)
    state["transformer.ln_f.weight"][:] = 1e5
    hf_folder.write(tmp_path / "hf", given(state))
    found = scores(open_weights(tmp_path / "hf"), folder, tokenizer)
    assert found["loss"] > 700
    assert found["perplexity"] == math.exp(700)  # the next power is no float any more


def test_what_cannot_be_scored_is_told(hf_dir, tokenizer, packed_folder):
    for documents, facts, problem in [
        ([[7]], {"tokenizer_sha256": tokenizer.sha256}, "holds a single token: give more text"),
        ([[7, 8, 2]], {"tokenizer_sha256": "1" * 64}, f"was prepared with another tokenizer than {tokenizer.path}"),
    ]:
        folder = packed_folder([documents], name=f"packed {len(documents[0])}", **facts)
        with pytest.raises(InputError, match=problem):
            perplexity.perplexity(open_weights(hf_dir), folder, tokenizer)
    unknown = packed_folder([[[7, 8, 2]]], name="unknown", tokenizer_sha256=None)
    assert scores(open_weights(hf_dir), unknown, tokenizer)["loss"] > 0


def test_weights_in_bf16_are_evaluated_in_fp32(tokenizer, packed_folder, tmp_path):
    folder = packed_folder([[np.arange(3, 100).tolist()]], tokenizer_sha256=tokenizer.sha256)
    state = {name: tensor.bfloat16() for name, tensor in weights().items()}
    hf_folder.write(tmp_path / "half", given(state).cast("bfloat16"))
    hf_folder.write(tmp_path / "full", given({name: tensor.float() for name, tensor in state.items()}))
    half, full = (open_weights(tmp_path / name) for name in ("half", "full"))
    assert half.dtype == torch.bfloat16
    assert CONFIG.block_size == 96
    assert scores(half, folder, tokenizer) == scores(full, folder, tokenizer)
