"""Which implementation each operation uses: by name, chosen once for a run, printed, and never replaced in silence."""

from collections.abc import Mapping

import torch

from tinyllama import InputError
from tinyllama.ops import attention, cross_entropy, rms_norm, swiglu
from tinyllama.ops.backend import Backend

OPERATIONS: dict[str, dict[str, Backend]] = {
    "attention": attention.BACKENDS,
    "rms_norm": rms_norm.BACKENDS,
    "swiglu": swiglu.BACKENDS,
    "cross_entropy": cross_entropy.BACKENDS,
}
"""Every operation with a choice, and its backends by name, the reference first."""


# What auto takes: the first that can run there. The order is that of the measurements in scripts/README.md.
AUTO: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {
        "attention": ("sdpa",),
        "rms_norm": ("reference",),
        "swiglu": ("reference",),
        "cross_entropy": ("reference",),
    },
    "ampere": {
        "attention": ("flash_attn", "sdpa_flash"),
        "rms_norm": ("reference",),
        "swiglu": ("reference",),
        "cross_entropy": ("chunked",),
    },
    "hopper": {
        "attention": ("flash_attn_4", "sdpa_cudnn"),
        "rms_norm": ("reference",),
        "swiglu": ("reference",),
        "cross_entropy": ("chunked",),
    },
}


MASKED = ("flex", "sdpa", "reference")
"""Backends of attention that can keep documents apart, the fastest first."""


def family(device: torch.device) -> str:
    """The column of AUTO for ``device``: cpu, ampere (and Ada and older), hopper (and newer)."""
    if device.type != "cuda":
        return "cpu"
    return "hopper" if torch.cuda.get_device_capability(device) >= (9, 0) else "ampere"


def resolve(
    wanted: Mapping[str, str], device: torch.device, *, dtype: torch.dtype, masked: bool = False
) -> dict[str, str]:
    """The backend of each operation by name, for tensors of ``dtype`` on ``device``, with a document mask or without.

    ``wanted`` gives a name or ``auto`` for each. Raises InputError with every name that is not known or cannot run.
    """
    chosen: dict[str, str] = {}
    faults = []
    column = family(device) if dtype != torch.float32 else "cpu"  # the fast kernels compute in 16 bits
    for operation, backends in OPERATIONS.items():
        name = wanted.get(operation, "auto")
        maskable = MASKED if masked and operation == "attention" else tuple(backends)
        if name == "auto":
            order = MASKED if maskable is MASKED and column != "cpu" else AUTO[column][operation]
            usable = (n for n in order if backends[n].fault(device) is None)
            chosen[operation] = next(usable, next(iter(backends)))
        elif name in backends and name not in maskable:
            faults.append(f"ops.{operation} {name} takes no document mask: choose auto, {', '.join(maskable)}")
        elif name not in backends:
            faults.append(f"ops.{operation} {name!r} is not known: choose auto, {', '.join(backends)}")
        elif fault := backends[name].fault(device):
            faults.append(f"ops.{operation} {name} cannot be used: {fault}")
        else:
            chosen[operation] = name
    if faults:
        raise InputError(*faults)
    return chosen


def describe(chosen: Mapping[str, str]) -> str:
    """One line that names each operation's backend and library."""
    parts = []
    for operation, name in chosen.items():
        backend = OPERATIONS[operation][name]
        note = backend.notes()
        parts.append(f"{operation} {name}" + (f" ({backend.version()})" if backend.package else ""))
        parts[-1] += f" [{note}]" if note else ""
    return ", ".join(parts)
