"""Generate text for a batch of prompts with a pre-allocated KV cache, a token per prompt at a time."""

import math
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from tinyllama import InputError
from tinyllama.config.model import ModelConfig
from tinyllama.model import GPT
from tinyllama.ops.attention import sdpa
from tinyllama.tokenizer import Tokenizer

# B sequences, nh query heads, G key-value heads, T new tokens, S tokens in the cache, hs head size, V vocab_size

MOST_NEW_TOKENS = 1_000_000  # their memory is allocated at the start


class KVCache:
    """A cache for keys and values of up to ``length_limit`` tokens of ``batch_size`` sequences, allocated at once."""

    length: int
    """number of cached tokens of each sequence"""

    def __init__(self, model: GPT, batch_size: int, length_limit: int) -> None:
        config, weight = model.config, next(model.parameters())
        shape = (config.n_layer, batch_size, config.n_query_groups, length_limit, config.head_size)
        self._keys, self._values = (torch.empty(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        self._number: dict[nn.Module, int] = {block.attn: i for i, block in enumerate(model.layers)}
        self.length = 0

    def attend(self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Cache k and v (B, G, T, hs) of ``layer``, attend with q (B, nh, T, hs) over the cache -> (B, nh, T, hs).

        T is 1, or the cache is empty. The call for the last layer increases ``length``.
        """
        number, end = self._number[layer], self.length + q.size(2)
        keys, values = self._keys[number], self._values[number]  # (B, G, length_limit, hs)
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        was_empty = self.length == 0
        if number == len(self._number) - 1:
            self.length = end
        return sdpa(q, keys[:, :, :end], values[:, :, :end], is_causal=was_empty)


@torch.inference_mode()
def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    eos_ids: Collection[int] = (),
    seed: int = 0,
) -> Iterator[list[int | None]]:
    """Yield for each step the new token of each prompt, or None for a sequence that has ended or not yet started.

    A sequence gets up to ``max_new_tokens`` and ends early with one of ``eos_ids``. Temperature 0 takes the likeliest
    token; above 0, tokens are sampled from softmax(logits / temperature), restricted to the ``top_k`` likeliest and to
    the fewest whose probabilities reach ``top_p``. All sequences are at the same position in a step: a longer prompt is
    still being read while a shorter one is continued. So nothing is padded, and each sequence gets the tokens that it
    would get alone. Of a prompt longer than block_size the model reads the last block_size tokens; past that, it
    continues from the last half of the context. Raises InputError for logits that are not finite.
    """
    config, device = model.config, next(model.parameters()).device
    prompts = [prompt[-config.block_size :] for prompt in prompts]
    draw = [torch.Generator().manual_seed(seed) for _ in prompts]
    lengths = [len(prompt) for prompt in prompts]
    last = max(lengths) + max_new_tokens
    tokens = torch.zeros((len(prompts), last), dtype=torch.long)  # (B, prompts and what follows)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    going = [max_new_tokens > 0] * len(prompts)
    cache = KVCache(model, len(prompts), min(last, config.block_size))
    begin = end = 0  # columns of tokens that the cache holds
    for position in range(min(lengths), last):
        if not any(going):
            return
        if position - begin > config.block_size:
            begin = end = position - max(config.block_size // 2, 1)
            cache.length = 0
        logits = model(tokens[:, end:position].to(device), cache=cache)[:, 0, : config.vocab_size]  # (B, V)
        if not logits.isfinite().all():
            raise InputError("the model's logits are not finite: give another checkpoint")
        end = position
        chosen: list[int | None] = []
        for i, row in enumerate(logits.float().cpu()):
            token = None
            if going[i] and position >= lengths[i]:
                token = choose(row, temperature, top_k, top_p, draw[i])
                tokens[i, position] = token
                going[i] = token not in eos_ids and position + 1 < lengths[i] + max_new_tokens
            chosen.append(token)
        yield chosen


def choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float, draw: torch.Generator) -> int:
    """Choose a token by its logits (V,) fp32, which must exclude the rows that pad the vocabulary."""
    if temperature == 0:
        return int(logits.argmax())
    # in fp64 and at most 0, so that the likeliest token remains for a temperature or top_p near 0
    logits, ids = ((logits - logits.max()).double() / temperature).sort(descending=True, stable=True)
    probabilities = logits[:top_k].softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # sum over the likelier ones; it is 0 for the likeliest
    return int(ids[torch.multinomial(probabilities * (before < top_p), 1, generator=draw)])


def check(
    config: ModelConfig, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float, seed: int
) -> None:
    """Raise InputError with all problems for flags out of range."""
    checks = {
        f"--max_new_tokens is {max_new_tokens}: give 1 to {MOST_NEW_TOKENS}": 1 <= max_new_tokens <= MOST_NEW_TOKENS,
        f"--temperature is {temperature}: give 0 for the likeliest token, or more to draw": 0 <= temperature < math.inf,
        f"--top_k is {top_k}: give 1 to the vocabulary's {config.vocab_size}": top_k is None or top_k >= 1,
        f"--top_p is {top_p}: give a share above 0, up to 1": 0 < top_p <= 1,
        f"--seed is {seed}: give a whole number from 0, below 2^63": 0 <= seed < 2**63,
    }
    if problems := [problem for problem, fine in checks.items() if not fine]:
        raise InputError(*problems)


class Text:
    """Decodes a prompt and its continuation piece by piece as the tokens arrive."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self.text = ""
        """what has been returned so far"""

    def add(self, token: int) -> str:
        """Return the new part of the text with ``token``, without an incomplete character at its end."""
        self._ids.append(token)
        return self._longer(self._tokenizer.decode(self._ids).rstrip("\ufffd"))  # the first bytes of a character

    def rest(self) -> str:
        """Return the rest of the text after the last token."""
        return self._longer(self._tokenizer.decode(self._ids))

    def _longer(self, text: str) -> str:
        shown, self.text = self.text, max(self.text, text, key=len)
        return self.text[len(shown) :]
