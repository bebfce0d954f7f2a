"""Text from a model, one token at a time, by running the whole context again for each."""

from collections.abc import Sequence
from pathlib import Path

import torch

from tinyllama import InputError, checkpoint
from tinyllama.convert import matching_tokenizer
from tinyllama.model import GPT, from_weights


@torch.inference_mode()
def generate(
    model: GPT,
    ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    eos_id: int | None = None,
    seed: int = 0,
) -> list[int]:
    """The tokens that follow ``ids``, at most ``max_new_tokens``, up to and with ``eos_id``.

    Temperature 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature). The model sees
    the last block_size tokens.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(ids)
    while len(tokens) < len(ids) + max_new_tokens:
        context = torch.tensor([tokens[-model.config.block_size :]], device=device)  # (1, T)
        # the rows that pad the vocabulary are no tokens
        logits = model(context)[0, -1, : model.config.vocab_size].float().cpu()
        if temperature > 0:
            token = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)
        else:
            token = logits.argmax()
        tokens.append(int(token))
        if tokens[-1] == eos_id:
            break
    return tokens[len(ids) :]


def complete(
    path: str | Path, tokenizer_path: str | Path, prompt: str, max_new_tokens: int, temperature: float, seed: int
) -> str:
    """What the model of a step directory or run folder writes after ``prompt``, without it.

    Raises InputError for a checkpoint or tokenizer that is not there or not the model's, an empty prompt and a negative
    temperature.
    """
    if not temperature >= 0:
        raise InputError(f"--temperature is {temperature}: give 0 for the likeliest token, or more to draw")
    step_dir = checkpoint.resolve(path)
    config = checkpoint.read_model_config(step_dir)
    tokenizer = matching_tokenizer(tokenizer_path, checkpoint.read_state(step_dir)["tokenizer_sha256"], config)
    ids = tokenizer.encode(prompt)
    if not ids:
        raise InputError("--prompt is empty: give the beginning of a text")
    model = from_weights(config, checkpoint.load_weights(step_dir))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    new = generate(model, ids, max_new_tokens, temperature, tokenizer.eos_id, seed)
    return tokenizer.decode(ids + new)[len(tokenizer.decode(ids)) :]
