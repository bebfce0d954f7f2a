"""The whole model: Llama 2's architecture (arXiv:2307.09288) under the parameter names of the original TinyLlama.

Shapes: B sequences, T tokens, C = n_embd, V = padded_vocab_size, nh = n_head, G = n_query_groups, hs = head_size.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tinyllama.config import ModelConfig
from tinyllama.ops.attention import attention
from tinyllama.ops.cross_entropy import cross_entropy
from tinyllama.ops.rms_norm import rms_norm
from tinyllama.ops.rope import rope, rope_tables
from tinyllama.ops.swiglu import swiglu


class GPT(nn.Module):
    """Embedding, ``n_layer`` blocks, a norm, and the output matrix (not tied to the embedding)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": RMSNorm(config.n_embd, config.norm_eps),
            }
        )
        # activation checkpointing puts itself here
        self.run_block: Callable[..., Tensor] = lambda block, *inputs: block(*inputs)
        # neither parameters nor buffers: model.to(torch.bfloat16) would cast a buffer, and these must stay fp32
        self._rope_tables: tuple[Tensor, Tensor] | None = None

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of input_ids (B, T), T <= block_size; with targets (B, T) their summed loss, an fp32 scalar.

        The sum runs over the targets that are not IGNORE_INDEX. It is taken here, inside the wrapped forward, so that
        the logits of a training step need not leave it.
        """
        T = input_ids.size(1)
        cos, sin = (table[:T] for table in self.rope_tables(input_ids.device))  # (T, hs/2)
        x = self.transformer["wte"](input_ids)  # (B, T, C)
        for block in self.transformer["h"].children():
            x = self.run_block(block, x, cos, sin)
        logits = self.lm_head(self.transformer["ln_f"](x))  # (B, T, V)
        return logits if targets is None else cross_entropy(logits, targets)

    def rope_tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """RoPE's cosines and sines, (block_size, hs/2) each, fp32; built at the first call on a device."""
        if self._rope_tables is None or self._rope_tables[0].device != device:
            # a table made in inference mode could not be used in training after it
            with torch.inference_mode(False):
                config = self.config
                self._rope_tables = rope_tables(config.block_size, config.head_size, config.rope_base, device)
        return self._rope_tables


class Block(nn.Module):
    """One layer: attention, then the MLP, each on the normalised stream and added to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = CausalSelfAttention(config)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = LLaMAMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, C), cos and sin (T, hs/2) fp32 -> (B, T, C)."""
        x = x + self.attn(self.norm_1(x), cos, sin)
        return x + self.mlp(self.norm_2(x))


class CausalSelfAttention(nn.Module):
    """Attention of nh query heads over G key-value heads; ``attn`` is the fused projection to all of them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.n_query_groups, self.head_size = config.n_head, config.n_query_groups, config.head_size
        # rows: for each group, its nh/G query heads, then its key head, then its value head
        self.attn = nn.Linear(config.n_embd, config.qkv_size, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, C), cos and sin (T, hs/2) fp32 -> (B, T, C)."""
        B, T, C = x.shape
        queries = self.n_head // self.n_query_groups
        qkv = self.attn(x).view(B, T, self.n_query_groups, queries + 2, self.head_size)
        q, k, v = qkv.split((queries, 1, 1), dim=3)  # (B, T, G, nh/G or 1, hs)
        q, k, v = (heads.flatten(2, 3).transpose(1, 2) for heads in (q, k, v))  # (B, nh or G, T, hs)
        y = attention(rope(q, cos, sin), rope(k, cos, sin), v)  # (B, nh, T, hs)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class LLaMAMLP(nn.Module):
    """The MLP. It only holds ``swiglu``, for upstream's parameter names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.swiglu = SwiGLU(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.swiglu(x)


class SwiGLU(nn.Module):
    """``w3(silu(w1 x) * w2 x)``: w1 gates, w2 goes up to intermediate_size, w3 comes down again."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.w3(swiglu(self.w1(x), self.w2(x)))


class RMSNorm(nn.Module):
    """Root mean square normalisation with a weight per channel."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return rms_norm(x, self.weight, self.eps)


def from_weights(config: ModelConfig, weights: dict[str, Tensor]) -> GPT:
    """A GPT made of the given tensors, by parameter name; it shares their memory."""
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(weights, assign=True)
    return model


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> None:
    """Give a GPT, wrapped, sharded or neither, its start weights; they depend on nothing but sizes and seed.

    Every parameter has its own generator, seeded by seed and name, and is drawn in full on the CPU in fp32; a DTensor
    takes its shard of that without communication. So the start is the same for every device, world size and wrapping.
    Standard deviations as upstream's (lit_gpt/model.py, GPT._init_weights).
    """
    n_embd, n_layer = model.config.n_embd, model.config.n_layer
    for name, parameter in model.named_parameters():
        name = name.replace("_orig_mod.", "")  # torch.compile's
        if parameter.ndim == 1:  # a norm's
            full = torch.ones(parameter.shape)
        else:
            residual = name.endswith(("attn.proj.weight", "mlp.swiglu.w3.weight"))
            std = 1 / (math.sqrt(n_embd) * n_layer) if residual else math.sqrt(2 / (5 * n_embd))
            digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
            full = torch.empty(parameter.shape).normal_(0, std, generator=generator)
        if isinstance(parameter, DTensor):
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(full)
