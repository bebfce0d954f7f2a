"""Define the whole model: Llama 2's architecture (arXiv:2307.09288) with upstream TinyLlama's parameter names.

Shapes: B sequences, T tokens, C = n_embd, V = padded_vocab_size, nh = n_head, G = n_query_groups, hs = head_size.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tinyllama.config.model import ModelConfig
from tinyllama.ops import attention, cross_entropy, float8, rms_norm, rope, swiglu
from tinyllama.ops.linear import GradientSum, linear

# backends that run anywhere; ops/choice.py chooses those of a run
OPS = {
    "attention": "sdpa",
    "rope": "reference",
    "rms_norm": "reference",
    "swiglu": "reference",
    "cross_entropy": "reference",
    "symmetric_matmul": "reference",
}


class Cache(Protocol):
    """Interface of a cache for the keys and values of earlier tokens; eval/generate.py implements it."""

    length: int
    """number of tokens in the cache"""

    def attend(self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Cache k and v (B, G, T, hs) of ``layer``, attend with q (B, nh, T, hs) over the cache -> (B, nh, T, hs)."""


class GPT(nn.Module):
    """The Llama model: an embedding, ``n_layer`` blocks, a norm and an output matrix, which may be the embedding.

    ``ops`` names the backend of each operation.
    """

    def __init__(self, config: ModelConfig, ops: Mapping[str, str] = OPS) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        self.gathered: Any = None  # how a pass gets its weights, if not by FSDP (train/gathered.py)
        self.scaling: Any = None  # sets the scales of the float8 matmuls from step to step (train/delayed_scaling.py)
        self.cross_entropy = cross_entropy.BACKENDS[ops["cross_entropy"]].call
        if not config.tie_embeddings:
            self.lm_head = Linear(config.n_embd, config.padded_vocab_size)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
                "h": nn.ModuleList(Block(config, ops) for _ in range(config.n_layer)),
                "ln_f": RMSNorm(config, ops),
            }
        )

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        restart: bool = False,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the logits (B, T, V) of input_ids (B, T), or with targets (B, T) their summed loss, an fp32 scalar.

        T is at most block_size. The loss sums over the targets that are not IGNORE_INDEX. It is computed here, inside
        the wrapped forward, so that a training step never needs all logits at once. ``documents`` (B, T) numbers the
        document of each token: tokens attend within their own document, and with ``restart`` positions count from its
        first token. With a ``cache``, input_ids continue the cached tokens, and only the last position's logits are
        returned, (B, 1, V).
        """
        T = input_ids.size(1)
        start = cache.length if cache is not None else 0
        cos, sin = (table[start : start + T] for table in self.rope_tables(input_ids.device))  # (T, hs/2)
        mask = None
        if documents is not None:
            mask = attention.document_mask(documents, self.ops["attention"])
            if restart:
                cos, sin = (table[attention.positions(documents)][:, None] for table in (cos, sin))  # (B, 1, T, hs/2)
        elif cache is None:
            mask = attention.causal_mask(T, input_ids.device, self.ops["attention"])
        x = self.transformer["wte"](input_ids)  # (B, T, C)
        added: Any = None  # what the next norm adds to the residual stream x
        for block in self.layers:
            x, added = block(x, added, cos, sin, mask, cache)  # (B, T, C) each
        if cache is not None:
            x, added = x[:, -1:], added[:, -1:]
        x, _ = self.transformer["ln_f"](x, added)  # (B, T or 1, C)
        tied = self.config.tie_embeddings
        weight = cast(Tensor, self.transformer["wte"].weight if tied else self.lm_head.weight)  # (V, C)
        if targets is not None:
            return self.cross_entropy(x, weight, targets, None if tied else self.lm_head.weight_gradient)
        return F.linear(x, weight) if tied else self.lm_head(x)  # (B, T or 1, V)

    @property
    def layers(self) -> list["Block"]:
        """Return the blocks in order."""
        return cast(list[Block], list(self.transformer["h"].children()))

    def rope_tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return RoPE's cosines and sines, (block_size, hs/2) each.

        They are not buffers: model.to(torch.bfloat16) would cast those, and the tables must stay fp32.
        """
        c = self.config
        return rope.rope_tables(c.block_size, c.head_size, c.rope_base, device, c.rope_condense_ratio)


class Block(nn.Module):
    """Adds attention and then the MLP, each of the normalized residual stream, to the residual stream."""

    def __init__(self, config: ModelConfig, ops: Mapping[str, str] = OPS) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(config, ops)
        self.attn = CausalSelfAttention(config, ops)
        self.norm_2 = RMSNorm(config, ops)
        self.mlp = LLaMAMLP(config, ops)

    def forward(
        self,
        x: Tensor,
        added: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        mask: Any = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Apply the layer: x (B, T, C), cos and sin (T, hs/2) fp32, the attention backend's mask -> (B, T, C) twice.

        The residual stream is the sum of x and ``added``, what the MLP of the layer before has computed, and so is the
        result.
        """
        # This is x = x + attn(norm_1(x)), then x = x + mlp(norm_2(x)), arranged so that one kernel adds to the residual
        # stream and normalizes the sum. What the MLP returns is added by the norm after it: the next norm_1, or ln_f.
        h, x = self.norm_1(x, added)
        h, x = self.norm_2(x, self.attn(h, cos, sin, mask, cache))
        return x, self.mlp(h)


class Linear(nn.Linear):
    """Multiplies by a weight (out_features, in_features), without a bias."""

    weight_gradient: GradientSum | None = None
    """where a backward pass adds the weight's gradient; None: autograd keeps it (ops/linear.py)"""
    scales: float8.Scales | None = None
    """scales of the matmul in float8; None: the matmul is in the weight's dtype"""

    def __init__(self, in_features: int, out_features: int, x_is_kept: bool = False) -> None:
        """``x_is_kept``: another operation keeps the input for its own backward pass (ops/float8.py)."""
        super().__init__(in_features, out_features, bias=False)
        self.x_is_kept = x_is_kept

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.scales is not None:
            return float8.linear(x, self.weight, self.scales, self.weight_gradient, self.x_is_kept)
        return linear(x, self.weight, self.weight_gradient)


class CausalSelfAttention(nn.Module):
    """Attends with nh query heads over G key-value heads; ``attn`` is the fused projection to all of them."""

    def __init__(self, config: ModelConfig, ops: Mapping[str, str] = OPS) -> None:
        super().__init__()
        self.attention = attention.BACKENDS[ops["attention"]].call
        self.rope = rope.BACKENDS[ops["rope"]].call
        self.n_head, self.n_query_groups, self.head_size = config.n_head, config.n_query_groups, config.head_size
        # rows: for each group, its nh/G query heads, then its key head, then its value head
        self.attn = Linear(config.n_embd, config.qkv_size)
        self.proj = Linear(config.n_embd, config.n_embd, x_is_kept=True)  # attention keeps its output

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Any = None, cache: Cache | None = None) -> Tensor:
        """Apply the attention: x (B, T, C), cos and sin (T, hs/2) fp32 -> (B, T, C)."""
        B, T, C = x.shape
        queries = self.n_head // self.n_query_groups
        qkv = self.attn(x).view(B, T, self.n_query_groups, queries + 2, self.head_size)
        q, k, v = self.rope(qkv, cos, sin)  # (B, nh, T, hs), (B, G, T, hs) twice
        y = self.attention(q, k, v, mask) if cache is None else cache.attend(self, q, k, v)  # (B, nh, T, hs)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class LLaMAMLP(nn.Module):
    """Wraps ``swiglu``, as upstream's parameter names require."""

    def __init__(self, config: ModelConfig, ops: Mapping[str, str] = OPS) -> None:
        super().__init__()
        self.swiglu = SwiGLU(config, ops)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.swiglu(x)


class SwiGLU(nn.Module):
    """Computes ``w3(silu(w1 x) * w2 x)``: w1 gates, w2 projects up to intermediate_size and w3 down again."""

    w12: swiglu.Interleaved | None = None
    """w1 and w2 in one tensor, if they lie in memory like that (train/gathered.py)"""

    def __init__(self, config: ModelConfig, ops: Mapping[str, str] = OPS) -> None:
        super().__init__()
        self.gated_mlp = swiglu.BACKENDS[ops["swiglu"]].call
        self.w1 = Linear(config.n_embd, config.intermediate_size)
        self.w2 = Linear(config.n_embd, config.intermediate_size)
        self.w3 = Linear(config.intermediate_size, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.gated_mlp(x, self.w1, self.w2, self.w3, self.w12)


class RMSNorm(nn.Module):
    """Normalizes by the root mean square, with a weight per channel."""

    def __init__(self, config: ModelConfig, ops: Mapping[str, str] = OPS) -> None:
        super().__init__()
        self.normalize = rms_norm.BACKENDS[ops["rms_norm"]].call
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.n_embd))

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add ``added`` to the residual stream x (..., C) -> the norm of the sum and the sum, (..., C) each."""
        return self.normalize(x, self.weight, self.eps, added)


def from_weights(config: ModelConfig, weights: dict[str, Tensor]) -> GPT:
    """Build a GPT from tensors by parameter name; it shares their memory."""
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(weights, assign=True)
    return model


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> None:
    """Set the initial weights of a GPT, wrapped, sharded or neither; they depend on the sizes and the seed only.

    Every parameter has its own generator, seeded by seed and name, and is drawn in full on the CPU in fp32, so that
    the initial weights are the same for every device, world size and wrapping. The standard deviations are upstream's
    (lit_gpt/model.py, GPT._init_weights).
    """
    n_embd, n_layer = model.config.n_embd, model.config.n_layer
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # the weight of a norm
            full = torch.ones(parameter.shape)
        else:
            residual = name.endswith(("attn.proj.weight", "mlp.swiglu.w3.weight"))
            std = 1 / (math.sqrt(n_embd) * n_layer) if residual else math.sqrt(2 / (5 * n_embd))
            digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
            full = torch.empty(parameter.shape).normal_(0, std, generator=generator)
        assign_full(parameter, full)


@torch.no_grad()
def assign_full(parameter: Tensor, full: Tensor) -> None:
    """Copy a full tensor into a parameter; a rank keeps its shard of a DTensor, without communication."""
    full = full.to(parameter.dtype)
    if isinstance(parameter, DTensor):
        device, mesh = parameter.device, parameter.device_mesh
        full = distribute_tensor(full.to(device), mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(full)
