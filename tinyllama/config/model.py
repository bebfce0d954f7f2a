"""Sizes of a model, by name, and the number of parameters they make."""

import difflib
from dataclasses import dataclass
from typing import Any

from tinyllama import InputError
from tinyllama.config.bounds import Context, Count, Layers, Positive, bound_errors

LOGITS_CHUNK = 8192  # tokens whose logits the chunked loss holds at once: 0.5 GB in bf16 with 32,000 pieces
MOST_PARAMETERS = 10**13  # more are a typing error


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of one Llama-architecture decoder. Field names are nanoGPT's and LitGPT's."""

    name: str
    """name of this size, free text"""
    block_size: Context = 2048
    """context length, tokens"""
    vocab_size: Count = 32000
    """pieces of the tokenizer"""
    padding_multiple: Count = 64
    """the embedding and output matrices have vocab_size rows, rounded up to a multiple of this"""
    n_layer: Layers = 22
    """transformer blocks"""
    n_head: Count = 32
    """query heads"""
    n_query_groups: Count = 4
    """key-value heads; each serves n_head / n_query_groups query heads (arXiv:2305.13245)"""
    n_embd: Count = 2048
    """width of the residual stream"""
    intermediate_size: Count = 5632
    """width of the SwiGLU MLP"""
    norm_eps: Positive = 1e-5
    """RMSNorm's epsilon"""
    rope_base: Count = 10000
    """RoPE's base (arXiv:2104.09864)"""
    rope_condense_ratio: Positive = 1
    """RoPE sees positions divided by this, so that a longer context keeps the angles of a shorter one"""
    tie_embeddings: bool = False
    """the output matrix is the embedding"""

    def __post_init__(self) -> None:
        errors = list(bound_errors(self, "model."))
        if not errors:
            if self.n_embd % self.n_head:
                errors.append(f"model.n_embd {self.n_embd} is not a multiple of model.n_head {self.n_head}")
            elif self.head_size % 2:
                errors.append(f"model.n_embd / model.n_head is {self.head_size}: RoPE needs an even head size")
            if self.n_head % self.n_query_groups:
                errors.append(f"model.n_head {self.n_head} is not a multiple of n_query_groups {self.n_query_groups}")
            if self.num_params() > MOST_PARAMETERS:
                errors.append(
                    f"the model's sizes make {self.num_params():,} parameters: lower the one that is too large"
                )
        if errors:
            raise InputError(*errors)

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and output matrices."""
        return -(-self.vocab_size // self.padding_multiple) * self.padding_multiple

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.n_head + 2 * self.n_query_groups) * self.head_size

    def num_params(self, embedding: bool = True) -> int:
        """Count the model's parameters; without ``embedding``, only those that take part in matmuls."""
        attention = self.n_embd * self.qkv_size + self.n_embd * self.n_embd
        mlp = 3 * self.n_embd * self.intermediate_size
        blocks = self.n_layer * (attention + mlp + 2 * self.n_embd)
        tables = (2 if embedding and not self.tie_embeddings else 1) * self.padded_vocab_size * self.n_embd
        return blocks + self.n_embd + tables

    @property
    def num_hidden(self) -> int:
        """Count the parameters of the blocks' matrices."""
        tables_and_norms = self.padded_vocab_size * self.n_embd + (2 * self.n_layer + 1) * self.n_embd
        return self.num_params(embedding=False) - tables_and_norms


NAMED_CONFIGS: dict[str, dict[str, Any]] = {
    # arXiv:2401.02385, table 1
    "tinyllama_1.1b": {},
    "tinyllama_120m": {
        "n_layer": 12,
        "n_head": 12,
        "n_query_groups": 1,
        "n_embd": 768,
        "intermediate_size": 2048,
    },
    # for a few megabytes of text, with a vocabulary that they can fill
    "tinyllama_10m": {
        "block_size": 512,
        "vocab_size": 4096,
        "n_layer": 6,
        "n_head": 6,
        "n_query_groups": 2,
        "n_embd": 384,
        "intermediate_size": 1024,
    },
    # small enough to learn something in minutes on two CPU cores
    "quickstart": {
        "block_size": 256,
        "vocab_size": 2048,
        "n_layer": 4,
        "n_head": 4,
        "n_query_groups": 2,
        "n_embd": 128,
        "intermediate_size": 384,
    },
}


OWN = ("n_layer", "n_head", "n_embd", "intermediate_size")  # sizes that a model of another name must give


def named_config(name: str, **changes: Any) -> ModelConfig:
    """Return the named size with ``changes`` to its fields, or a model of one's own, which gives all of ``OWN``.

    Raises InputError for an unknown name without them.
    """
    if name not in NAMED_CONFIGS and not changes.keys() >= set(OWN):
        close = difflib.get_close_matches(name, NAMED_CONFIGS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known names: {', '.join(NAMED_CONFIGS)}"
        own = ", ".join(f"model.{field}" for field in OWN if field not in changes)
        raise InputError(f"model.name {name!r} is not known; {hint}; for a model of your own give {own}, too")
    return ModelConfig(**{"name": name, **NAMED_CONFIGS.get(name, {}), **changes})
