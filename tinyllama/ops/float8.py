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
from tinyllama.ops.float8_casts import FACTOR, INVERSE, LARGEST, ROW
from tinyllama.ops.linear import GradientSum

CAPABILITY = (8, 9)
"""least compute capability of a GPU with float8 matmuls"""
MULTIPLE = 16
"""number that must divide the sizes of a matmul"""

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

X, WEIGHT, GRADIENT = range(3)
"""the tensors of a matmul ``x weight^T``, in the order of their scales; GRADIENT is that of its result"""
DTYPES = (E4M3, E4M3, E5M2)
ROOM = (2.0, 2.0, 16.0)
"""How much more than in the step before a magnitude may be; what is more yet is cut.

A factor of two costs one value of the exponent. Gradients change most, and e5m2 has values to spare.
"""


class Scales(NamedTuple):
    """The scales of a matmul."""

    rows: Tensor
    """(3, ROW) fp32: X, WEIGHT, GRADIENT by INVERSE, FACTOR, LARGEST"""
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
    rows = torch.zeros(3, ROW, device=device)
    rows[:, [FACTOR, INVERSE]] = 1.0
    return Scales(rows, known)


def rescale(rows: Tensor) -> None:
    """Set the factors in rows (..., 3, ROW) from the largest magnitudes; those of nothing and of no finite one stay."""
    for which, (dtype, room) in enumerate(zip(DTYPES, ROOM, strict=True)):
        largest, factor = rows[..., which, LARGEST], rows[..., which, FACTOR]
        most = (torch.finfo(dtype).max / room / largest).clamp(2.0**-100, 2.0**100)
        power = torch.ldexp(torch.ones_like(most), torch.frexp(most)[1] - 1)  # the power of two that is not more
        factor.copy_(torch.where(largest.isfinite() & (largest > 0), power, factor))
    rows[..., INVERSE] = 1 / rows[..., FACTOR]


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
        rows, known, x_is_kept, *sums = rest
        out, x_t = _linear(x, weight, rows, known, x_is_kept)
        ctx.x_is_kept = x_is_kept
        ctx.save_for_backward(x if x_is_kept else x_t, weight, rows, known, *sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rows, known, *sums = ctx.saved_tensors
        dx, gradient_t = _linear_backward(gradients[0], weight, rows, known)
        x_t = _cast_again(x, rows, known) if ctx.x_is_kept else x
        return dx, _weight_gradient(gradient_t, x_t, rows, sums), *[None] * (3 + len(sums))


def swiglu(x: Tensor, w1: Any, w2: Any, w3: Any, w12: Any = None) -> Tensor:
    """Compute ``w3(silu(w1 x) * w2 x)`` for ``Linear`` modules with scales; those of w1 are used for w1 and w2 as one.

    The backward pass keeps x and the product before the gate, and computes the gate again.
    """
    weight12 = w12.weight if w12 else torch.stack((w1.weight, w2.weight), dim=1).flatten(0, 1)
    sums = (*w12.gradient, *w3.weight_gradient) if w12 else ()
    scales = (w1.scales.rows, w3.scales.rows, w3.scales.known)
    out = _SwiGLU.apply(x.flatten(0, -2), weight12, w3.weight, *scales, *sums)
    assert isinstance(out, Tensor)
    return out.view(x.shape)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w12: Tensor, w3: Tensor, *rest: Tensor) -> Tensor:
        rows12, rows3, known, *sums = rest
        out, x_t, ab = _swiglu(x, w12, w3, rows12, rows3, known)
        ctx.save_for_backward(x_t, w12, w3, ab, rows12, rows3, known, *sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_t, w12, w3, ab, rows12, rows3, known, *sums = ctx.saved_tensors
        dx, gradient_t, h_t, d_ab_t = _swiglu_backward(gradients[0], ab, w12, w3, rows12, rows3, known)
        dw3 = _weight_gradient(gradient_t, h_t, rows3, sums[2:])
        return dx, _weight_gradient(d_ab_t, x_t, rows12, sums[:2]), dw3, *[None] * (3 + len(sums))


# Each pass is one operation, which torch.compile treats as opaque. A weight is cast again in the backward pass: the
# copies of all layers would take as much memory as a quarter of the master weights.


@torch.library.custom_op("tinyllama::float8_linear", mutates_args=("rows",))
def _linear(x: Tensor, weight: Tensor, rows: Tensor, known: Tensor, x_is_kept: bool) -> tuple[Tensor, Tensor]:
    """Return x weight^T (N, O) bf16, and x cast and transposed, (I, N), or an empty tensor (0,) if x is kept."""
    if x_is_kept:
        x8, x_t = _straight(x, rows, X, known), x.new_empty(0, dtype=E4M3)
    else:
        x8, x_t = _both(x, rows, X, known)
    return _matmul(x8, _straight(weight, rows, WEIGHT, known), rows[X], rows[WEIGHT], fast=True), x_t


@_linear.register_fake
def _(x: Tensor, weight: Tensor, rows: Tensor, known: Tensor, x_is_kept: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(weight)), x.new_empty(0 if x_is_kept else x.shape[::-1], dtype=E4M3)


@torch.library.custom_op("tinyllama::float8_cast_again", mutates_args=("rows",))
def _cast_again(x: Tensor, rows: Tensor, known: Tensor) -> Tensor:
    """Return x (N, I) cast and transposed, (I, N)."""
    return _transposed(x, rows, X, known)


@_cast_again.register_fake
def _(x: Tensor, rows: Tensor, known: Tensor) -> Tensor:
    return x.new_empty(x.shape[::-1], dtype=E4M3)


@torch.library.custom_op("tinyllama::float8_linear_backward", mutates_args=("rows",))
def _linear_backward(gradient: Tensor, weight: Tensor, rows: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, (N, I) bf16, and ``gradient`` (N, O) cast and transposed, (O, N)."""
    gradient8, gradient_t = _both(gradient, rows, GRADIENT, known)
    return _matmul(gradient8, _transposed(weight, rows, WEIGHT, known), rows[GRADIENT], rows[WEIGHT]), gradient_t


@_linear_backward.register_fake
def _(gradient: Tensor, weight: Tensor, rows: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    return gradient.new_empty(len(gradient), weight.size(1)), gradient.new_empty(gradient.shape[::-1], dtype=E5M2)


@torch.library.custom_op("tinyllama::float8_swiglu", mutates_args=("rows12", "rows3"))
def _swiglu(
    x: Tensor, w12: Tensor, w3: Tensor, rows12: Tensor, rows3: Tensor, known: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the MLP's output (N, C), x cast and transposed, (C, N), and ab, the product before the gate, (N, 2 I)."""
    x8, x_t = _both(x, rows12, X, known)
    ab = _matmul(x8, _straight(w12, rows12, WEIGHT, known), rows12[X], rows12[WEIGHT], fast=True)
    h = x.new_empty(len(x), w3.size(1), dtype=E4M3)
    _known_first(functools.partial(_casts(x).gate, ab, rows3[X], h), rows3, known)
    return _matmul(h, _straight(w3, rows3, WEIGHT, known), rows3[X], rows3[WEIGHT], fast=True), x_t, ab


@_swiglu.register_fake
def _(
    x: Tensor, w12: Tensor, w3: Tensor, rows12: Tensor, rows3: Tensor, known: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[::-1], dtype=E4M3), x.new_empty(len(x), len(w12))


@torch.library.custom_op("tinyllama::float8_swiglu_backward", mutates_args=("rows12", "rows3"))
def _swiglu_backward(
    gradient: Tensor, ab: Tensor, w12: Tensor, w3: Tensor, rows12: Tensor, rows3: Tensor, known: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradient of x, (N, C) bf16, and what the weights' gradients are computed from, in float8:

    ``gradient`` (N, C) as (C, N), the gate's output as (I, N), and the gradient of ab as (2 I, N).
    """
    gradient8, gradient_t = _both(gradient, rows3, GRADIENT, known)
    dh = _matmul(gradient8, _transposed(w3, rows3, WEIGHT, known), rows3[GRADIENT], rows3[WEIGHT])
    d_ab, d_ab_t = (ab.new_empty(shape, dtype=E5M2) for shape in (ab.shape, ab.shape[::-1]))
    h_t = ab.new_empty(dh.shape[::-1], dtype=E4M3)
    casts = (dh, ab, rows12[GRADIENT], rows3[X], d_ab, d_ab_t, h_t)
    _known_first(functools.partial(_casts(dh).gate_backward, *casts), rows12, known)
    del dh, gradient8, casts  # nearly half a gigabyte, when most is allocated
    dx = _matmul(d_ab, _transposed(w12, rows12, WEIGHT, known), rows12[GRADIENT], rows12[WEIGHT])
    return dx, gradient_t, h_t, d_ab_t


@_swiglu_backward.register_fake
def _(
    gradient: Tensor, ab: Tensor, w12: Tensor, w3: Tensor, rows12: Tensor, rows3: Tensor, known: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (N, C), hidden = gradient.shape, w3.size(1)
    shapes = (((C, N), E5M2), ((hidden, N), E4M3), ((2 * hidden, N), E5M2))
    gradient_t, h_t, d_ab_t = (gradient.new_empty(shape, dtype=dtype) for shape, dtype in shapes)
    return torch.empty_like(gradient), gradient_t, h_t, d_ab_t


def _weight_gradient(gradient_t: Tensor, x_t: Tensor, rows: Tensor, sums: list[Tensor]) -> Tensor | None:
    """Return the gradient of a weight (O, I) from gradient_t (O, N) and x_t (I, N), or add it to a ``GradientSum``."""
    if not sums:
        return _matmul(gradient_t, x_t, rows[GRADIENT], rows[X])
    _add_matmul(*sums, gradient_t, x_t, rows)
    return None


@torch.library.custom_op("tinyllama::float8_add_matmul", mutates_args=("total", "empty"))
def _add_matmul(total: Tensor, empty: Tensor, gradient_t: Tensor, x_t: Tensor, rows: Tensor) -> None:
    GradientSum(total, empty).add(_matmul(gradient_t, x_t, rows[GRADIENT], rows[X], dtype=total.dtype))


@_add_matmul.register_fake
def _(total: Tensor, empty: Tensor, gradient_t: Tensor, x_t: Tensor, rows: Tensor) -> None:
    pass


def _matmul(
    a: Tensor, b: Tensor, a_row: Tensor, b_row: Tensor, dtype: torch.dtype = torch.bfloat16, fast: bool = False
) -> Tensor:
    """Return a b^T of a (n, k) and b (m, k), both in float8; ``fast`` sums with fewer bits, enough for activations."""
    per_tensor = ScalingType.TensorWise
    inverses = (a_row[INVERSE], per_tensor, b_row[INVERSE], per_tensor)
    return scaled_mm(a, b.T, *inverses, output_dtype=dtype, use_fast_accum=fast)


def _both(x: Tensor, rows: Tensor, which: int, known: Tensor) -> tuple[Tensor, Tensor]:
    x8, x_t = (x.new_empty(shape, dtype=DTYPES[which]) for shape in (x.shape, x.shape[::-1]))
    _cast(x, rows, which, known, x8, x_t)
    return x8, x_t


def _straight(x: Tensor, rows: Tensor, which: int, known: Tensor) -> Tensor:
    x8 = x.new_empty(x.shape, dtype=DTYPES[which])
    _cast(x, rows, which, known, x8, None)
    return x8


def _transposed(x: Tensor, rows: Tensor, which: int, known: Tensor) -> Tensor:
    x_t = x.new_empty(x.shape[::-1], dtype=DTYPES[which])
    _cast(x, rows, which, known, None, x_t)
    return x_t


def _cast(
    x: Tensor, rows: Tensor, which: int, known: Tensor, straight: Tensor | None, transposed: Tensor | None
) -> None:
    x = x.contiguous()
    _known_first(functools.partial(_casts(x).cast, x, rows[which], straight, transposed), rows, known)


def _known_first(cast: Callable[[], None], rows: Tensor, known: Tensor) -> None:
    """Call ``cast``; in a run's first step twice, the first time for the largest magnitude."""
    cast()
    if not known:
        rescale(rows)
        cast()


def _casts(x: Tensor) -> Any:
    if not x.is_cuda:
        return float8_casts
    from tinyllama.ops import float8_kernels

    return float8_kernels


SAVED = [torch.ops.tinyllama.float8_linear.default, torch.ops.tinyllama.float8_swiglu.default]
"""operations that selective activation checkpointing must not recompute"""
