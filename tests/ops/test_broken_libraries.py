"""Libraries of kernels that are installed and cannot be imported, as when they were built for another torch."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tinyllama import InputError
from tinyllama.config.model import named_config
from tinyllama.ops import choice
from tinyllama.ops.backend import Backend, is_importable

GPU = torch.device("cuda")
CONFIG = named_config("tinyllama_1.1b")
SYMBOL = "flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], None]:
    """A function that installs a package of one module, by their dotted name, whose __init__.py is the given code."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, code: str) -> None:
        package, module = name.split(".")
        for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, loaded)
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(code)
        (tmp_path / package / f"{module}.py").write_text("")
        importlib.invalidate_caches()

    return write


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (f"raise ImportError({SYMBOL!r})", f"ImportError: {SYMBOL}"),
        ("raise RuntimeError('No CTK flavor installed:\\nexpected one')", "RuntimeError: No CTK flavor installed:"),
        ("import needed_and_not_installed", "ModuleNotFoundError: No module named 'needed_and_not_installed'"),
        ("import kernels_of_tests.no_such", "ModuleNotFoundError: No module named 'kernels_of_tests.no_such'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_the_error_quotes_why_the_import_fails(install, code, reason):
    install("kernels_of_tests.fused", code)
    backend = Backend(call=print, module="kernels_of_tests.fused", package="pytest")
    assert is_importable("kernels_of_tests.fused")
    assert backend.problem(torch.device("cpu")) is None
    with pytest.raises(InputError) as error:
        backend.load()
    assert str(error.value) == (
        f"pytest {pytest.__version__} is installed and cannot be imported ({reason}): install it again, for this torch "
        "and CUDA (pip install pytest), or choose another"
    )


def test_one_that_works_is_imported_and_one_that_is_absent_is_not_found(install):
    install("kernels_of_tests.fused", "")
    Backend(call=print, module="kernels_of_tests.fused", package="pytest").load()
    assert "kernels_of_tests.fused" in sys.modules
    for absent in ("kernels_of_tests.other", "absent_kernels", "absent_kernels.fused"):
        assert not is_importable(absent)
    Backend(call=print).load()


def test_auto_takes_no_slower_backend_in_place_of_a_broken_one(install, hopper):
    install("flash_attn.cute", f"raise ImportError({SYMBOL!r})")
    install("quack.rmsnorm", "raise RuntimeError('no toolkit')")
    chosen = choice.resolve({"swiglu": "reference", "rope": "reference"}, CONFIG, GPU, precision="bf16")
    assert chosen["attention"] == "flash_attn_4"
    assert chosen["rms_norm"] == "quack"
    with pytest.raises(InputError) as error:
        choice.load(chosen)
    attention, rms_norm = error.value.args
    assert attention.startswith("ops.attention flash_attn_4 cannot be used: flash-attn-4")
    assert f"(ImportError: {SYMBOL}): install it again" in attention
    names = "ops.rms_norm quack, ops.symmetric_matmul quack"
    assert rms_norm.startswith(f"{names} cannot be used: quack-kernels")
    assert (
        "(RuntimeError: no toolkit): install it again, for this torch and CUDA (pip install -e '.[hopper]')" in rms_norm
    )
    others = {"attention": "sdpa", "rms_norm": "torch", "symmetric_matmul": "reference"}
    choice.load(chosen | others)
