"""Compute causal attention with grouped queries (arXiv:1706.03762, arXiv:2305.13245), across or within documents.

Shapes: B sequences, nh query heads, G key-value heads, T tokens, hs head size; group g serves query heads g * nh/G
onward. Every backend takes q (B, nh, T, hs), k and v (B, G, T, hs) and its mask from ``document_mask``, and returns
(B, nh, T, hs) in q's dtype.
"""

import functools
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyllama.ops.backend import Backend


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute attention step by step, softmax in fp32; ``mask`` (B, 1, T, T) is true where a query may attend."""
    k, v = _expanded(q, k, v)
    scores = (q @ k.mT).float() / math.sqrt(q.size(-1))  # (B, nh, T, T)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()  # (T, T)
    return scores.masked_fill(~mask, -math.inf).softmax(-1).to(v.dtype) @ v


# cuDNN's is left out: on Blackwell its output is wrong with few key heads (pytorch#193893), on Hopper its gradients are
# not finite at times, with a mask (pytorch#196678) or a large batch (kyutai-labs/pocket-tts#264)
TRUSTED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = True,
    kernels: SDPBackend | list[SDPBackend] = TRUSTED,
) -> Tensor:
    """Call PyTorch's fused attention, which chooses one of ``kernels``; not ``is_causal``: all queries see all keys."""
    if q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # no fused CUDA kernel takes fewer key heads and a mask or fp32: without expansion, PyTorch 2.11 falls back to
        # materializing all scores (H200, 16 x 2048 tokens in fp32: 74 ms and 34 GiB; expanded: 29 ms and 3 GiB)
        k, v = _expanded(q, k, v)
    grouped = k.size(1) != q.size(1)
    causal = is_causal and mask is None
    with sdpa_kernel(kernels):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, mask: None = None) -> Tensor:
    """Call FlashAttention-2 (arXiv:2307.08691) of the package flash-attn."""
    from flash_attn import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, T, nh or G, hs)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return flash_attn_func(q, k, v, causal=True, deterministic=deterministic).transpose(1, 2)


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor, mask: None = None) -> Tensor:
    """Call FlashAttention-4 of the package flash-attn-4, as an operation that torch.compile treats as opaque."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, T, nh or G, hs)
    out, _ = _flash_attn_4(q, k, v)
    return out.transpose(1, 2)


@functools.cache
def _interface() -> Any:
    from flash_attn.cute import interface

    warnings.filterwarnings("ignore", "Argument aux_data ", UserWarning)  # it concerns masks, which we do not pass
    return interface


@torch.library.custom_op("tinyllama::flash_attn_4", mutates_args=())
def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention (B, T, nh, hs) and the log of each row's softmax sum (B, nh, T) fp32."""
    out, lse, *_ = _interface()._flash_attn_fwd(q, k, v, causal=True, return_lse=True)
    return out, lse


@_flash_attn_4.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, T, nh, _ = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty((B, nh, T), dtype=torch.float32)


@torch.library.custom_op("tinyllama::flash_attn_4_backward", mutates_args=())
def _flash_attn_4_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # allocated here: by default they get the strides of q, k and v, whose layout torch.compile may change
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    deterministic = torch.are_deterministic_algorithms_enabled()
    _interface()._flash_attn_bwd(
        q, k, v, out, gradient, lse, causal=True, dq=dq, dk=dk, dv=dv, deterministic=deterministic
    )
    return dq, dk, dv


@_flash_attn_4_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _flash_attn_4_backward(*ctx.saved_tensors, gradient.contiguous())


_flash_attn_4.register_autograd(_gradients, setup_context=_keep)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
    """Call PyTorch's FlexAttention (arXiv:2412.05496), which skips masked blocks; it is fast only if compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    if mask is None:
        mask = _causal_blocks(q.size(2), q.device)
    out = flex_attention(q, k, v, block_mask=mask, enable_gqa=k.size(1) != q.size(1))
    assert isinstance(out, Tensor)
    return out


def _causal_blocks(T: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(_causal, None, None, T, T, device=device)


def _causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


_fused = functools.partial(Backend, cuda=True, half=True, capability=(8, 0), multiple=8)

BACKENDS = {
    "reference": Backend(reference),
    "sdpa": Backend(sdpa),
    "sdpa_cudnn": _fused(
        functools.partial(sdpa, kernels=SDPBackend.CUDNN_ATTENTION),
        deterministic=False,
        note="gradients that are not finite have been reported: auto passes it over",
    ),
    "sdpa_flash": _fused(functools.partial(sdpa, kernels=SDPBackend.FLASH_ATTENTION)),
    "flex": Backend(flex, cuda=True, capability=(8, 0)),
    "flash_attn": _fused(flash_attn, module="flash_attn.flash_attn_interface", package="flash-attn"),
    "flash_attn_4": _fused(flash_attn_4, capability=(9, 0), module="flash_attn.cute", package="flash-attn-4"),
}


def saved() -> list[Any]:
    """Return the operations that selective activation checkpointing must not recompute.

    That of flash-attn exists once the package is imported, as it is where this backend is chosen.
    """
    flash_attn = getattr(torch.ops.flash_attn, "_flash_attn_forward", None)
    return [
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.tinyllama.flash_attn_4.default,
        torch.ops.higher_order.flex_attention,
        *([flash_attn.default] if flash_attn is not None else []),
    ]


def documents(input_ids: Tensor, eos_id: int) -> Tensor:
    """Number the document of each token of input_ids (B, T) within its row; documents end with ``eos_id``."""
    return F.pad((input_ids[:, :-1] == eos_id).cumsum(1), (1, 0))


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # training cannot use what was made in inference mode
def causal_mask(T: int, device: torch.device, backend: str) -> Any:
    """Build the mask that ``backend`` takes for T tokens without a document mask; None if it needs none.

    torch.compile cannot build it within a block that the backward pass recomputes.
    """
    return _causal_blocks(T, device) if backend == "flex" else None


def document_mask(documents: Tensor, backend: str) -> Any:
    """Build the mask that ``backend`` takes from ``documents`` (B, T), the number of each token's document.

    A query attends to the tokens of its own document up to itself.
    """
    if backend == "flex":
        from torch.nn.attention.flex_attention import create_block_mask

        def own(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (documents[b, query] == documents[b, key])

        B, T = documents.shape
        return create_block_mask(own, B, None, T, T, device=documents.device)
    same = documents[:, None, :, None] == documents[:, None, None, :]  # (B, 1, T, T)
    return same & torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril()


def positions(documents: Tensor) -> Tensor:
    """Return the position of each token in its document, (B, T) int64, counted from the start of row or document."""
    place = torch.arange(documents.size(1), device=documents.device).expand_as(documents)  # (B, T)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))  # (B, T), false in the first column
    return place - torch.where(begins, place, 0).cummax(dim=1).values


def _expanded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat each head of k and v for the query heads that share it -> (B, nh, T, hs) each."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    return k, v
