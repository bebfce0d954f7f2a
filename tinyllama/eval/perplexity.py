"""Measure a checkpoint on a dataset: perplexity per token, and bits per byte, which compare across tokenizers."""

import math
import tempfile
from pathlib import Path

import numpy as np
import torch

from tinyllama import InputError
from tinyllama.convert.weights import Weights
from tinyllama.data.loader import validation_batches
from tinyllama.data.packed import PackedDataset, open_packed
from tinyllama.eval.harness import Score
from tinyllama.model import from_weights
from tinyllama.prepare.inputs import ENDINGS, Fields, find_inputs
from tinyllama.prepare.prepare import Options, prepare
from tinyllama.tokenizer import Tokenizer
from tinyllama.train.evaluate import bits_per_byte, loss_sum

DECODE_CHUNK = 1 << 20  # tokens that are decoded at once


def perplexity(weights: Weights, path: Path, tokenizer: Tokenizer, batch_size: int = 8) -> list[Score]:
    """Return loss, perplexity and bits per byte over all blocks of a packed folder, or of a folder or file of texts.

    Bits per byte are the bits of all tokens of the dataset, at the mean loss, divided by the bytes of its text.
    Raises InputError for a folder that is neither, and for tokens of another tokenizer.
    """
    if path.is_dir() and ((path / "manifest.json").exists() or not _texts(path)):
        return _packed(weights, path, path.name, tokenizer, batch_size)
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "packed"
        inputs = find_inputs(path, ENDINGS)
        try:
            prepare(inputs, Fields(), Options(tokenizer.path, packed, workers=1))
            return _packed(weights, packed, path.name, tokenizer, batch_size)
        except InputError as error:  # with the flag and path that the user gave
            problems = [problem.replace(str(packed), str(path)) for problem in error.args]
            raise InputError(*(problem.replace("--source", "--perplexity") for problem in problems)) from None


def _texts(path: Path) -> bool:
    endings = tuple(ending for ending in ENDINGS if ending != ".json")  # packed shards have one, too
    return any(file.name.lower().endswith(endings) for file in path.rglob("*"))


def _packed(weights: Weights, path: Path, name: str, tokenizer: Tokenizer, batch_size: int) -> list[Score]:
    config = weights.config
    dataset = open_packed(path)
    if dataset.tokenizer_sha256 not in (None, tokenizer.sha256):
        raise InputError(f"{path} was prepared with another tokenizer than {tokenizer.path}: prepare it again")
    size = min(config.block_size, dataset.tokens - 1)  # a text shorter than a block is one block
    if size < 1:
        raise InputError(f"{path} holds a single token: give more text")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = from_weights(config, weights.cast(torch.float32).load()).to(device)
    batches = validation_batches(
        [dataset],
        block_size=size,
        vocab_size=config.vocab_size,
        micro_batch_size=batch_size,
        rank=0,
        world_size=1,
        max_samples=None,
    )
    total = loss_sum(model, batches, device)
    assert total is not None  # no signal stops it
    loss = total[0].item() / total[1].item()
    if math.isnan(loss):
        raise InputError(f"the loss of {weights.path} is not a number: give another checkpoint")
    values = {"loss": loss, "perplexity": math.exp(min(loss, 700))}
    dataset.num_bytes = dataset.num_bytes or count_bytes(dataset, tokenizer)
    if (bits := bits_per_byte(loss, [dataset])) is not None:
        values["bits_per_byte"] = bits
    step, tokens = weights.metadata["step"], weights.metadata["tokens"]
    return [Score(step, tokens, name, metric, value, None) for metric, value in values.items()]


def count_bytes(dataset: PackedDataset, tokenizer: Tokenizer) -> int:
    """Count the UTF-8 bytes of the documents' texts, decoded one document at a time."""
    num_bytes, rest = 0, np.empty(0, dataset.dtype)
    for start in range(0, dataset.tokens, DECODE_CHUNK):
        tokens = np.concatenate([rest, dataset.read(start, min(DECODE_CHUNK, dataset.tokens - start))])
        ends = np.flatnonzero(tokens == tokenizer.eos_id) + 1
        documents = np.split(tokens, ends)
        rest = documents.pop()
        num_bytes += sum(len(tokenizer.decode(document.tolist()).encode()) for document in documents)
    return num_bytes + len(tokenizer.decode(rest.tolist()).encode())
