"""Multiply matrices in 8-bit floating point (arXiv:2209.05433): activations and weights in e4m3, gradients in e5m2.

Each tensor that is cast has one scale, a power of two, which follows from its largest magnitude in the step before
(delayed scaling, train/delayed_scaling.py), so that a cast is one pass over memory. Every cast is done in the layout
that its matmul reads, (rows, contracted): a transposed one is written beside the straight one or instead of it.

Shapes: N tokens, I inputs and O outputs of a weight (O, I); of an MLP C channels and I hidden ones, w1 and w2 (I, C),
w3 (C, I).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from tinyllama.ops import backend, float8_casts
from tinyllama.ops.float8_casts import AMAX, ROW, SCALE, SCALE_INV
from tinyllama.ops.linear import GradientSum

CAPABILITY = (8, 9)
"""least compute capability of a GPU with float8 matmuls"""
MULTIPLE = 16
"""number that must divide the sizes of a matmul"""

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

HEADROOM = {E4M3: 2.0, E5M2: 16.0}
"""Headroom of a scale, by dtype: a number may be this many times the last step's AMAX before it is clamped.

A factor of two costs one value of the exponent. Gradients change most, and e5m2 has values to spare.
"""

X, WEIGHT = range(2)
"""rows of the scales of a matmul's inputs"""


class Scales(NamedTuple):
    """The scales of a matmul ``x weight^T``.

    Each pass changes a tensor of its own, so that nothing depends on whether a compiled backward pass is given what the
    forward pass has changed or a copy of it.
    """

    inputs: Tensor
    """(2, ROW) fp32: X and WEIGHT by SCALE_INV, SCALE, AMAX"""
    gradient: Tensor
    """(1, ROW) fp32: that of the result's gradient"""
    known: Tensor
    """() bool on the CPU: whether there was a step before; if not, each cast looks at its tensor first"""


def problem(device: torch.device, sizes: dict[str, int]) -> str | None:
    """Return why a matmul of ``sizes``, by key, cannot be in float8 on ``device``, with a hint; None when it can."""
    if device.type != "cuda":
        return "it needs a CUDA GPU of compute capability 8.9 or more: use bf16 or fp32"
    if (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        return f"it needs compute capability {CAPABILITY}, this GPU has {found}: use bf16"
    if not backend.is_importable("triton"):
        return "it needs triton: pip install triton, or use bf16"
    for key, size in sizes.items():
        if size % MULTIPLE:
            return f"{key} is {size}, not a multiple of {MULTIPLE}: change it, or use bf16"
    return None


def new_scales(known: Tensor, device: torch.device | str) -> Scales:
    """Return scales of 1, which nothing has been cast with."""
    inputs, gradient = (torch.zeros(rows, ROW, device=device) for rows in (2, 1))
    for rows in (inputs, gradient):
        set_scales(rows, torch.ones(len(rows), device=device))
    return Scales(inputs, gradient, known)


def rescale(rows: Tensor, dtype: torch.dtype) -> None:
    """Set the scales in rows (..., ROW) of casts to ``dtype`` from their AMAX.

    Rows whose AMAX is 0 or not finite keep their scales.
    """
    amax = rows[..., AMAX]
    most = (torch.finfo(dtype).max / HEADROOM[dtype] / amax).clamp(2.0**-100, 2.0**100)
    usable = amax.isfinite() & (amax > 0)
    set_scales(rows, torch.where(usable, powers_of_two(torch.frexp(most)[1] - 1), rows[..., SCALE]))


def set_scales(rows: Tensor, scales: Tensor) -> None:
    """Set the scales that rows (..., ROW) cast by to ``scales`` (...), and their inverses."""
    rows[..., SCALE] = scales
    rows[..., SCALE_INV] = 1 / scales


def powers_of_two(exponents: Tensor) -> Tensor:
    """Return 2 to the power of ``exponents``, int32 from -126 to 127, in fp32, exact on any device."""
    return ((exponents + 127) << 23).view(torch.float32)


def linear(
    x: Tensor, weight: Tensor, scales: Scales, weight_gradient: GradientSum | None = None, x_is_kept: bool = False
) -> Tensor:
    """Multiply x (..., I) by weight (O, I) -> (..., O), all in bf16, as ``ops.linear.linear`` does.

    The backward pass needs x cast and transposed, which is kept for it, or made again from an x that is kept anyway.
    """
    out = _Linear.apply(x.flatten(0, -2), weight, *scales, x_is_kept, *(weight_gradient or ()))
    assert isinstance(out, Tensor)
    return out.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        inputs, gradient_row, known, x_is_kept, *sums = rest
        out, x_t = _linear(x, weight, inputs, known, x_is_kept)
        ctx.x_is_kept = x_is_kept
        ctx.save_for_backward(x if x_is_kept else x_t, weight, inputs, gradient_row, known, *sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inputs, gradient_row, known, *sums = ctx.saved_tensors
        dx, gradient_t = _linear_backward(gradients[0], weight, inputs, gradient_row, known)
        x_t = _cast_again(x, inputs) if ctx.x_is_kept else x
        return dx, _weight_gradient(gradient_t, x_t, gradient_row, inputs, sums), *[None] * (4 + len(sums))


def swiglu(x: Tensor, w1: Any, w2: Any, w3: Any, w12: Any = None) -> Tensor:
    """Compute ``w3(silu(w1 x) * w2 x)`` for ``Linear`` modules with scales; those of w1 are used for w1 and w2 as one.

    The backward pass keeps x and the product before the gate, and computes the gate again.
    """
    weight12 = w12.weight if w12 else torch.stack((w1.weight, w2.weight), dim=1).flatten(0, 1)
    sums = (*w12.gradient, *w3.weight_gradient) if w12 else ()
    out = _SwiGLU.apply(x.flatten(0, -2), weight12, w3.weight, *w1.scales[:2], *w3.scales, *sums)
    assert isinstance(out, Tensor)
    return out.view(x.shape)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w12: Tensor, w3: Tensor, *rest: Tensor) -> Tensor:
        inputs12, gradient12, inputs3, gradient3, known, *sums = rest
        out, x_t, ab = _swiglu(x, w12, w3, inputs12, inputs3, known)
        ctx.save_for_backward(x_t, w12, w3, ab, inputs12, gradient12, inputs3, gradient3, known, *sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_t, w12, w3, ab, inputs12, gradient12, inputs3, gradient3, known, *sums = ctx.saved_tensors
        dx, gradient_t, h_t, d_ab_t = _swiglu_backward(
            gradients[0], ab, w12, w3, inputs12, gradient12, inputs3, gradient3, known
        )
        dw12 = _weight_gradient(d_ab_t, x_t, gradient12, inputs12, sums[:2])
        dw3 = _weight_gradient(gradient_t, h_t, gradient3, inputs3, sums[2:])
        return dx, dw12, dw3, *[None] * (5 + len(sums))


# Each pass, and each gradient of a weight, is one operation, which torch.compile treats as opaque: torch 2.11 cannot
# trace a matmul in float8. A weight is cast again in the backward pass: the copies of all layers would take as much
# memory as a quarter of the master weights.


@torch.library.custom_op("tinyllama::float8_linear", mutates_args=("inputs",))
def _linear(x: Tensor, weight: Tensor, inputs: Tensor, known: Tensor, x_is_kept: bool) -> tuple[Tensor, Tensor]:
    """Return x weight^T (N, O) bf16, and x cast and transposed, (I, N), or an empty tensor (0,) if x is kept."""
    x8, x_t = _like(x, E4M3), None if x_is_kept else _like(x.T, E4M3)
    _cast(x, inputs[X], known, x8, x_t)
    out = _matmul(x8, _weight(weight, inputs, known), inputs[X], inputs[WEIGHT], fast=True)
    return out, x.new_empty(0, dtype=E4M3) if x_t is None else x_t


@_linear.register_fake
def _(x: Tensor, weight: Tensor, inputs: Tensor, known: Tensor, x_is_kept: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(weight)), x.new_empty(0, dtype=E4M3) if x_is_kept else _like(x.T, E4M3)


@torch.library.custom_op("tinyllama::float8_cast_again", mutates_args=())
def _cast_again(x: Tensor, inputs: Tensor) -> Tensor:
    """Return x (N, I) cast and transposed, (I, N)."""
    x_t = _like(x.T, E4M3)
    _casts(x).cast(x.contiguous(), inputs[X], None, x_t, record_amax=False)
    return x_t


@_cast_again.register_fake
def _(x: Tensor, inputs: Tensor) -> Tensor:
    return _like(x.T, E4M3)


@torch.library.custom_op("tinyllama::float8_linear_backward", mutates_args=("gradient_row",))
def _linear_backward(
    gradient: Tensor, weight: Tensor, inputs: Tensor, gradient_row: Tensor, known: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, (N, I) bf16, and ``gradient`` (N, O) cast and transposed, (O, N)."""
    gradient8, gradient_t = _like(gradient, E5M2), _like(gradient.T, E5M2)
    _cast(gradient, gradient_row[0], known, gradient8, gradient_t)
    return _matmul(gradient8, _weight_t(weight, inputs), gradient_row[0], inputs[WEIGHT]), gradient_t


@_linear_backward.register_fake
def _(gradient: Tensor, weight: Tensor, inputs: Tensor, gradient_row: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    return gradient.new_empty(len(gradient), weight.size(1)), _like(gradient.T, E5M2)


@torch.library.custom_op("tinyllama::float8_swiglu", mutates_args=("inputs12", "inputs3"))
def _swiglu(
    x: Tensor, w12: Tensor, w3: Tensor, inputs12: Tensor, inputs3: Tensor, known: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the MLP's output (N, C), x cast and transposed, (C, N), and ab, the product before the gate, (N, 2 I)."""
    x8, x_t = _like(x, E4M3), _like(x.T, E4M3)
    _cast(x, inputs12[X], known, x8, x_t)
    ab = _matmul(x8, _weight(w12, inputs12, known), inputs12[X], inputs12[WEIGHT], fast=True)
    h = x.new_empty(len(x), w3.size(1), dtype=E4M3)
    _known_first(functools.partial(_casts(x).gate, ab, inputs3[X], h), inputs3[X], E4M3, known)
    return _matmul(h, _weight(w3, inputs3, known), inputs3[X], inputs3[WEIGHT], fast=True), x_t, ab


@_swiglu.register_fake
def _(
    x: Tensor, w12: Tensor, w3: Tensor, inputs12: Tensor, inputs3: Tensor, known: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _like(x.T, E4M3), x.new_empty(len(x), len(w12))


@torch.library.custom_op("tinyllama::float8_swiglu_backward", mutates_args=("gradient12", "gradient3"))
def _swiglu_backward(
    gradient: Tensor,
    ab: Tensor,
    w12: Tensor,
    w3: Tensor,
    inputs12: Tensor,
    gradient12: Tensor,
    inputs3: Tensor,
    gradient3: Tensor,
    known: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradient of x, (N, C) bf16, and what the weights' gradients are computed from, in float8:

    ``gradient`` (N, C) as (C, N), the gate's output as (I, N), and the gradient of ab as (2 I, N).
    """
    gradient8, gradient_t = _like(gradient, E5M2), _like(gradient.T, E5M2)
    _cast(gradient, gradient3[0], known, gradient8, gradient_t)
    dh = _matmul(gradient8, _weight_t(w3, inputs3), gradient3[0], inputs3[WEIGHT])
    d_ab, d_ab_t, h_t = _like(ab, E5M2), _like(ab.T, E5M2), _like(dh.T, E4M3)
    casts = (dh, ab, gradient12[0], inputs3[X], d_ab, d_ab_t, h_t)
    _known_first(functools.partial(_casts(dh).gate_backward, *casts), gradient12[0], E5M2, known)
    del dh, gradient8, casts  # nearly half a gigabyte, when most is allocated
    dx = _matmul(d_ab, _weight_t(w12, inputs12), gradient12[0], inputs12[WEIGHT])
    return dx, gradient_t, h_t, d_ab_t


@_swiglu_backward.register_fake
def _(gradient: Tensor, ab: Tensor, w12: Tensor, w3: Tensor, *scales: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h_t = ab.new_empty(w3.size(1), len(ab), dtype=E4M3)
    return torch.empty_like(gradient), _like(gradient.T, E5M2), h_t, _like(ab.T, E5M2)


def _weight_gradient(
    gradient_t: Tensor, x_t: Tensor, gradient_row: Tensor, inputs: Tensor, sums: list[Tensor]
) -> Tensor | None:
    """Return the gradient of a weight (O, I) from gradient_t (O, N) and x_t (I, N), or add it to a ``GradientSum``."""
    if not sums:
        return _weight_matmul(gradient_t, x_t, gradient_row, inputs)
    _add_matmul(*sums, gradient_t, x_t, gradient_row, inputs)
    return None


@torch.library.custom_op("tinyllama::float8_weight_matmul", mutates_args=())
def _weight_matmul(gradient_t: Tensor, x_t: Tensor, gradient_row: Tensor, inputs: Tensor) -> Tensor:
    return _matmul(gradient_t, x_t, gradient_row[0], inputs[X])


@_weight_matmul.register_fake
def _(gradient_t: Tensor, x_t: Tensor, gradient_row: Tensor, inputs: Tensor) -> Tensor:
    return gradient_t.new_empty(len(gradient_t), len(x_t), dtype=torch.bfloat16)


@torch.library.custom_op("tinyllama::float8_add_matmul", mutates_args=("total", "empty"))
def _add_matmul(
    total: Tensor, empty: Tensor, gradient_t: Tensor, x_t: Tensor, gradient_row: Tensor, inputs: Tensor
) -> None:
    product = _matmul(gradient_t, x_t, gradient_row[0], inputs[X], dtype=total.dtype)
    GradientSum(total, empty).add(product)


@_add_matmul.register_fake
def _(total: Tensor, empty: Tensor, gradient_t: Tensor, x_t: Tensor, gradient_row: Tensor, inputs: Tensor) -> None:
    pass


def _matmul(
    a: Tensor, b: Tensor, a_row: Tensor, b_row: Tensor, dtype: torch.dtype = torch.bfloat16, fast: bool = False
) -> Tensor:
    """Return a b^T of a (n, k) and b (m, k), both in float8; ``fast`` sums with fewer bits, enough for activations."""
    per_tensor = ScalingType.TensorWise
    inverses = (a_row[SCALE_INV], per_tensor, b_row[SCALE_INV], per_tensor)
    return scaled_mm(a, b.T, *inverses, output_dtype=dtype, use_fast_accum=fast)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return memory of x's shape, row by row."""
    return x.new_empty(x.shape, dtype=dtype)


def _weight(weight: Tensor, inputs: Tensor, known: Tensor) -> Tensor:
    """Return weight (O, I) cast."""
    out = _like(weight, E4M3)
    _cast(weight, inputs[WEIGHT], known, out, None)
    return out


def _weight_t(weight: Tensor, inputs: Tensor) -> Tensor:
    """Return weight (O, I) cast and transposed, (I, O), by the scale that the forward pass had."""
    out = _like(weight.T, E4M3)
    _casts(weight).cast(weight.contiguous(), inputs[WEIGHT], None, out, record_amax=False)
    return out


def _cast(x: Tensor, row: Tensor, known: Tensor, straight: Tensor, transposed: Tensor | None) -> None:
    """Cast x (N, K) into ``straight`` (N, K) and perhaps ``transposed`` (K, N)."""
    cast = functools.partial(_casts(x).cast, x.contiguous(), row, straight, transposed)
    _known_first(cast, row, straight.dtype, known)


def _known_first(cast: Callable[[], None], row: Tensor, dtype: torch.dtype, known: Tensor) -> None:
    """Call ``cast``; in a run's first step twice, the first time only to find AMAX."""
    cast()
    if not known:
        rescale(row, dtype)
        cast()


def _casts(x: Tensor) -> Any:
    if not x.is_cuda:
        return float8_casts
    from tinyllama.ops import float8_kernels

    return float8_kernels


SAVED = [torch.ops.tinyllama.float8_linear.default, torch.ops.tinyllama.float8_swiglu.default]
"""operations that selective activation checkpointing must not recompute"""
