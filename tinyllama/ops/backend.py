"""Describe an implementation of an operation: what it needs, and why it cannot run on a device."""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from tinyllama import InputError, printable

INSTALL = {
    # its build imports torch and what else it needs
    "flash-attn": "pip install wheel ninja packaging psutil && pip install --no-build-isolation flash-attn",
    "flash-attn-4": "pip install -e '.[hopper]'",
    "quack-kernels": "pip install -e '.[hopper]'",
}
"""commands that install a package, where it takes more than its name"""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation."""

    call: Callable[..., Any]
    cuda: bool = False
    """whether it runs on a GPU only"""
    half: bool = False
    """whether it takes 16-bit numbers only"""
    capability: tuple[int, int] = (0, 0)
    """least compute capability of that GPU"""
    multiple: int = 1
    """number that must divide the model's sizes"""
    float8: bool = False
    """whether it multiplies in float8, by the scales that only a model of train.precision float8 has"""
    deterministic: bool = True
    """whether its gradients repeat bit for bit under torch.use_deterministic_algorithms"""
    module: str | None = None
    """module it imports"""
    package: str | None = None
    """name of its package for pip"""
    note: str = ""
    """what to know about its versions"""

    def problem(
        self, device: torch.device, dtype: torch.dtype = torch.bfloat16, sizes: Mapping[str, int] = MappingProxyType({})
    ) -> str | None:
        """Return why it cannot run on ``device`` with tensors of ``dtype``, with a hint; None when it can.

        ``sizes`` holds the sizes of the model that concern it, by key.
        """
        if self.cuda and device.type != "cuda":
            return "it runs on a CUDA GPU only: choose another, or auto"
        if self.cuda and (found := torch.cuda.get_device_capability(device)) < self.capability:
            return f"it needs compute capability {self.capability}, this GPU has {found}: choose another, or auto"
        if self.half and dtype.itemsize > 2:
            return "it computes in 16 bits: choose another, auto, or train.precision bf16"
        if not self.deterministic and torch.get_deterministic_debug_mode() == 2:  # 2 is error, 1 only warns
            return "it has no deterministic backward pass (torch.use_deterministic_algorithms): choose another, or auto"
        for key, size in sizes.items():
            if size % self.multiple:
                return f"it takes multiples of {self.multiple}, the model's {key} is {size}: choose another, or auto"
        if self.module is not None and not is_importable(self.module):
            return f"it needs {self.package}: {install_command(str(self.package))}, or choose another"
        return None

    def load(self) -> None:
        """Import its module; raises InputError where that is installed and fails, as one built for another torch."""
        if self.module is None:
            return
        try:
            importlib.import_module(self.module)
        except Exception as error:
            reason = printable(next(iter(str(error).splitlines()), ""), 200)
            raise InputError(
                f"{self.version()} is installed and cannot be imported ({type(error).__name__}: {reason}): install it "
                f"again, for this torch and CUDA ({install_command(str(self.package))}), or choose another"
            ) from None

    def version(self) -> str:
        """Return the library it calls, with its version."""
        if self.package is None:
            return f"torch {torch.__version__}"
        try:
            return f"{self.package} {importlib.metadata.version(self.package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{self.package}, not installed"


quack_backend = functools.partial(Backend, cuda=True, capability=(9, 0), multiple=8, package="quack-kernels")
"""An implementation that calls quack's kernels."""


def install_command(package: str) -> str:
    """Return the command that installs ``package``."""
    return INSTALL.get(package, f"pip install {package}")


def is_importable(module: str) -> bool:
    """Return whether ``module`` is installed; to find one in a package imports that, which may fail."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        return not f"{module}.".startswith(f"{error.name}.")  # else the package is there, and lacks what it imports
    except Exception:
        return True  # Backend.load says what is wrong
