"""Text from a model: prompts through a pre-allocated cache of keys and values, one token for each of them at a time."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyllama import InputError
from tinyllama.config.model import ModelConfig
from tinyllama.model import GPT
from tinyllama.ops.attention import sdpa
from tinyllama.tokenizer import Tokenizer

# B sequences, nh query heads, G key-value heads, T new tokens, S tokens in the cache, hs head size, V vocab_size

MOST_NEW_TOKENS = 1_000_000  # memory for them is taken at the start


class KVCache:
    """Keys and values of up to ``length_limit`` tokens of ``batch_size`` sequences, in memory that is taken once."""

    length: int
    """tokens that every sequence has in the cache"""

    def __init__(self, model: GPT, batch_size: int, length_limit: int) -> None:
        config, weight = model.config, model.transformer["wte"].weight
        assert isinstance(weight, Tensor)
        shape = (config.n_layer, batch_size, config.n_query_groups, length_limit, config.head_size)
        self._keys, self._values = (torch.empty(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        self._number = {block.attn: i for i, block in enumerate(model.transformer["h"].children())}
        self.length = 0

    def attend(self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep k and v (B, G, T, hs); q (B, nh, T, hs) over all that is kept -> (B, nh, T, hs).

        T is 1, or the cache is empty. The last layer moves ``length`` on.
        """
        number, end = self._number[layer], self.length + q.size(2)
        keys, values = self._keys[number], self._values[number]  # (B, G, length_limit, hs)
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        empty = self.length == 0
        if number == len(self._number) - 1:
            self.length = end
        if empty:
            return sdpa(q, k, v)
        gqa = k.size(1) != q.size(1)
        return F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], enable_gqa=gqa)


@torch.inference_mode()
def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    eos_id: int | None = None,
    seed: int = 0,
) -> Iterator[list[int | None]]:
    """For each step the token that each of ``prompts`` got, None for one that got none: it has ended or not begun.

    A sequence gets up to ``max_new_tokens``, the last being ``eos_id`` where that comes first. Temperature 0 takes the
    likeliest token; above, tokens are drawn from softmax(logits / temperature), of the ``top_k`` likeliest, of the
    fewest whose probabilities make ``top_p``. Every sequence is at the same position in a step, a longer prompt still
    being read while a shorter one is continued: so nothing is padded, and each gets what it would get alone. Past
    block_size the model goes on from the last half of the context. Raises InputError for logits that are no numbers.
    """
    config, device = model.config, next(model.parameters()).device
    draw = [torch.Generator().manual_seed(seed) for _ in prompts]
    lengths = [len(prompt) for prompt in prompts]
    last = max(lengths) + max_new_tokens
    tokens = torch.zeros((len(prompts), last), dtype=torch.long)  # (B, prompts and what follows)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    going = [max_new_tokens > 0] * len(prompts)
    cache = KVCache(model, len(prompts), min(last, config.block_size))
    begin = end = 0  # of what the cache holds, as columns of tokens
    for position in range(min(lengths), last):
        if not any(going):
            return
        if position - begin > config.block_size:
            begin = end = position - config.block_size // 2
            cache.length = 0
        logits = model(tokens[:, end:position].to(device), cache=cache)[:, 0, : config.vocab_size]  # (B, V)
        if logits.isnan().any():
            raise InputError("the model's logits are not numbers, nor then are some of its weights: give another one")
        end = position
        chosen: list[int | None] = []
        for i, row in enumerate(logits.float().cpu()):
            token = None
            if going[i] and position >= lengths[i]:
                token = choose(row, temperature, top_k, top_p, draw[i])
                tokens[i, position] = token
                going[i] = token != eos_id and position + 1 < lengths[i] + max_new_tokens
            chosen.append(token)
        yield chosen


def choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float, draw: torch.Generator) -> int:
    """A token by its logits (V,) fp32; the rows that pad the vocabulary must have been cut off, they are no tokens."""
    if temperature == 0:
        return int(logits.argmax())
    # in fp64, and 0 at most, for a temperature or top_p near 0 must leave the likeliest one
    logits, ids = ((logits - logits.max()).double() / temperature).sort(descending=True, stable=True)
    probabilities = logits[:top_k].softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # of the likelier ones; the likeliest always stays
    return int(ids[torch.multinomial(probabilities * (before < top_p), 1, generator=draw)])


def generate(model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int, **how: float | None) -> list[list[int]]:
    """The tokens that follow each of ``prompts``; ``how`` is as in ``stream``."""
    new: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, max_new_tokens, **how):  # type: ignore[arg-type]
        for tokens, token in zip(new, step, strict=True):
            if token is not None:
                tokens.append(token)
    return new


def check(
    config: ModelConfig, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float, seed: int
) -> None:
    """Raise InputError, with every problem, for numbers that cannot be."""
    problems = []
    if not 1 <= max_new_tokens <= MOST_NEW_TOKENS:
        problems.append(f"--max_new_tokens is {max_new_tokens}: give 1 to {MOST_NEW_TOKENS}")
    if not 0 <= temperature < float("inf"):
        problems.append(f"--temperature is {temperature}: give 0 for the likeliest token, or more to draw")
    if top_k is not None and top_k < 1:
        problems.append(f"--top_k is {top_k}: give 1 to the vocabulary's {config.vocab_size}")
    if not 0 < top_p <= 1:
        problems.append(f"--top_p is {top_p}: give a share above 0, up to 1")
    if not 0 <= seed < 2**63:
        problems.append(f"--seed is {seed}: give a whole number from 0, below 2^63")
    if problems:
        raise InputError(*problems)


class Texts:
    """The texts of prompts and what follows them, piece by piece as the tokens come."""

    texts: list[str]
    """what has been given out of each"""
    ids: list[list[int]]
    """the new tokens of each"""

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self.texts = ["" for _ in prompts]
        self.ids = [[] for _ in prompts]

    def add(self, step: Sequence[int | None]) -> list[str]:
        """Take what ``stream`` gave; what each text is longer by, without a character that is not whole yet."""
        for ids, token in zip(self.ids, step, strict=True):
            if token is not None:
                ids.append(token)
        return self._longer(whole=False)

    def rest(self) -> list[str]:
        """What is left of each text when no token follows."""
        return self._longer(whole=True)

    def _longer(self, whole: bool) -> list[str]:
        pieces = []
        for i, (prompt, ids, given) in enumerate(zip(self._prompts, self.ids, self.texts, strict=True)):
            text = self._tokenizer.decode([*prompt, *ids])
            if not whole:
                text = text.rstrip("\ufffd")  # the first bytes of a character
            self.texts[i] = max(text, given, key=len)
            pieces.append(self.texts[i][len(given) :])
        return pieces
