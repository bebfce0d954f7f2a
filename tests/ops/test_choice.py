"""Which backend each operation gets, by auto and by name, and what is refused with its remedy."""

import dataclasses
import importlib.metadata

import pytest
import torch

from tinyllama import InputError
from tinyllama.config.model import named_config
from tinyllama.ops import attention, choice, float8, rms_norm
from tinyllama.ops.backend import Backend
from tinyllama.ops.rope import BACKENDS as ROPES

CPU = torch.device("cpu")
CONFIG = named_config("tinyllama_1.1b")


def test_auto_is_what_runs_anywhere_on_a_cpu():
    chosen = choice.resolve({}, CONFIG, CPU, precision="bf16")
    assert chosen == {"attention": "sdpa"} | dict.fromkeys(
        ("rope", "rms_norm", "swiglu", "cross_entropy", "symmetric_matmul"), "reference"
    )
    assert choice.describe(chosen).startswith("attention sdpa, rope reference, rms_norm reference")


def test_a_backend_that_cannot_run_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(choice.OPERATIONS["swiglu"], "own", Backend(call=print, float8=True))
    wanted = {"attention": "flash_attn_4", "rms_norm": "nope", "swiglu": "auto", "cross_entropy": "chunked"}
    with pytest.raises(InputError) as error:
        choice.resolve(wanted, CONFIG, CPU, precision="bf16")
    assert error.value.args == (
        "ops.attention flash_attn_4 cannot be used: it runs on a CUDA GPU only: choose another, or auto",
        "ops.rms_norm 'nope' is not known: choose auto, reference, torch, quack",
    )
    with pytest.raises(InputError, match="flash_attn takes no document mask: choose auto, flex, sdpa, reference"):
        choice.resolve({"attention": "flash_attn"}, CONFIG, CPU, precision="bf16", masked=True)
    assert choice.resolve({}, CONFIG, CPU, precision="bf16", masked=True)["attention"] == "sdpa"
    with pytest.raises(InputError, match="swiglu xformers does not multiply in float8: choose auto, float8, reference"):
        choice.resolve({"swiglu": "xformers"}, CONFIG, CPU, precision="float8")
    with pytest.raises(InputError, match="swiglu float8 needs train.precision float8: choose auto, reference, quack"):
        choice.resolve({"swiglu": "float8"}, CONFIG, CPU, precision="bf16")
    with pytest.raises(InputError, match="swiglu own needs train.precision float8: choose auto, reference, quack"):
        choice.resolve({"swiglu": "own"}, CONFIG, CPU, precision="bf16")
    half = Backend(call=print, half=True)
    assert half.problem(CPU, torch.bfloat16) is None
    assert half.problem(CPU, torch.float32) == "it computes in 16 bits: choose another, auto, or train.precision bf16"
    absent = Backend(call=print, module="no_such_module.inside", package="no-such")
    assert absent.problem(CPU) == "it needs no-such: pip install no-such, or choose another"


@pytest.mark.parametrize(
    ("backend", "command"),
    [
        (
            attention.BACKENDS["flash_attn"],
            "pip install wheel ninja packaging psutil && pip install --no-build-isolation flash-attn",
        ),  # it is built with our torch
        (attention.BACKENDS["flash_attn_4"], "pip install -e '.[hopper]'"),  # with what it needs of CUDA 13
        (rms_norm.BACKENDS["quack"], "pip install -e '.[hopper]'"),
        (ROPES["triton"], "pip install triton"),
    ],
)
def test_a_backend_names_the_command_that_installs_its_library(monkeypatch, backend, command):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("tinyllama.ops.backend.is_importable", lambda module: False)
    assert backend.problem(torch.device("cuda")) == f"it needs {backend.package}: {command}, or choose another"


def test_a_backend_is_left_to_models_of_its_sizes(monkeypatch):
    monkeypatch.setitem(choice.OPERATIONS["swiglu"], "eights", Backend(call=print, multiple=8))
    monkeypatch.setitem(choice.AUTO["cpu"], "swiglu", ("eights", "reference"))
    odd = dataclasses.replace(CONFIG, intermediate_size=5636)
    assert choice.resolve({}, CONFIG, CPU, precision="bf16")["swiglu"] == "eights"
    assert choice.resolve({}, odd, CPU, precision="bf16")["swiglu"] == "reference"
    with pytest.raises(
        InputError,
        match="eights cannot be used: it takes multiples of 8, the model's intermediate_size is 5636: choose another",
    ):
        choice.resolve({"swiglu": "eights"}, odd, CPU, precision="bf16")


PUBLIC = {
    "attention": ["reference", "sdpa", "sdpa_cudnn", "sdpa_flash", "flex", "flash_attn", "flash_attn_4"],
    "rope": ["reference", "triton"],
    "rms_norm": ["reference", "torch", "quack"],
    "swiglu": ["reference", "quack", "xformers", "float8"],
    "cross_entropy": ["reference", "chunked"],
    "symmetric_matmul": ["reference", "quack"],
}
# what each needs of a GPU: only there, 16 bits, at least this capability, sizes that are multiples of this
NEEDS = {
    ("attention", "sdpa_cudnn"): (True, True, (8, 0), 8),
    ("attention", "sdpa_flash"): (True, True, (8, 0), 8),
    ("attention", "flex"): (True, False, (8, 0), 1),
    ("attention", "flash_attn"): (True, True, (8, 0), 8),
    ("attention", "flash_attn_4"): (True, True, (9, 0), 8),
    ("rope", "triton"): (True, False, (8, 0), 1),
    ("rms_norm", "quack"): (True, False, (9, 0), 8),
    ("swiglu", "quack"): (True, True, (9, 0), 8),
    ("swiglu", "xformers"): (True, False, (0, 0), 1),
    ("symmetric_matmul", "quack"): (True, True, (9, 0), 8),
}


def test_what_every_backend_needs():
    assert {operation: list(backends) for operation, backends in choice.OPERATIONS.items()} == PUBLIC
    for operation, backends in choice.OPERATIONS.items():
        for name, backend in backends.items():
            found = backend.cuda, backend.half, backend.capability, backend.multiple
            assert found == NEEDS.get((operation, name), (False, False, (0, 0), 1)), (operation, name)
            assert backend.float8 == (name == "float8")


@pytest.mark.parametrize(
    ("capability", "precision", "masked", "expected"),
    [
        ((8, 0), "bf16", False, ("flash_attn", "triton", "reference", "reference", "chunked", "reference")),
        ((8, 9), "bf16", False, ("flash_attn", "triton", "reference", "reference", "chunked", "reference")),
        ((9, 0), "bf16", False, ("flash_attn_4", "triton", "quack", "quack", "chunked", "quack")),
        ((10, 0), "bf16", False, ("flash_attn_4", "triton", "quack", "quack", "chunked", "quack")),
        ((9, 0), "float8", False, ("flash_attn_4", "triton", "quack", "float8", "chunked", "quack")),
        ((8, 9), "float8", False, ("flash_attn", "triton", "reference", "float8", "chunked", "reference")),
        ((9, 0), "bf16", True, ("flex", "triton", "quack", "quack", "chunked", "quack")),
        ((9, 0), "fp32", False, ("sdpa", "reference", "reference", "reference", "reference", "reference")),
        ((9, 0), "fp32", True, ("sdpa", "reference", "reference", "reference", "reference", "reference")),
        ((7, 5), "bf16", False, ("sdpa", "reference", "reference", "reference", "chunked", "reference")),
    ],
)
def test_auto_on_a_gpu_that_has_everything(capability, precision, masked, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr("tinyllama.ops.backend.is_importable", lambda module: True)
    chosen = choice.resolve({}, CONFIG, torch.device("cuda"), precision=precision, masked=masked)
    assert tuple(chosen.values()) == expected


def test_auto_on_a_gpu_without_the_packages(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("tinyllama.ops.backend.is_importable", lambda module: False)
    chosen = choice.resolve({}, CONFIG, torch.device("cuda"), precision="bf16")
    assert tuple(chosen.values()) == ("sdpa_flash", "reference", "reference", "reference", "chunked", "reference")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert choice.resolve({}, CONFIG, torch.device("cuda"), precision="bf16")["attention"] == "sdpa_flash"
    old = Backend(call=print, cuda=True, capability=(9, 0))
    assert old.problem(torch.device("cuda")) == (
        "it needs compute capability (9, 0), this GPU has (8, 0): choose another, or auto"
    )
    cuda, fits = torch.device("cuda"), {"model.n_embd": 2048}
    assert float8.problem(cuda, fits) == "it needs compute capability (8, 9), this GPU has (8, 0): use bf16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert float8.problem(cuda, fits) == "it needs triton: pip install triton, or use bf16"
    monkeypatch.setattr("tinyllama.ops.backend.is_importable", lambda module: True)
    assert float8.problem(cuda, fits) is None
    odd = {"model.n_embd": 2048, "train.micro_batch_size x model.block_size": 1000}
    assert float8.problem(cuda, odd) == (
        "train.micro_batch_size x model.block_size is 1000, not a multiple of 16: change it, or use bf16"
    )
    assert float8.problem(CPU, fits) == "it needs a CUDA GPU of compute capability 8.9 or more: use bf16 or fp32"


def test_a_backend_says_which_library_it_is(monkeypatch):
    noted = Backend(call=print, package="numpy", note="slow")
    assert noted.version() == f"numpy {importlib.metadata.version('numpy')}"
    assert Backend(call=print).version() == f"torch {torch.__version__}"
    assert Backend(call=print, package="no-such").version() == "no-such, not installed"
    chosen = {"attention": "sdpa", "swiglu": "reference"}
    assert choice.describe(chosen) == "attention sdpa, swiglu reference"
    monkeypatch.setitem(choice.OPERATIONS["attention"], "noted", noted)
    numpy = importlib.metadata.version("numpy")
    assert choice.describe(chosen | {"attention": "noted"}) == (
        f"attention noted (numpy {numpy}) [slow], swiglu reference"
    )


def test_every_choice_of_auto_is_a_backend():
    for column in choice.AUTO.values():
        for operation, names in column.items():
            assert set(names) <= choice.OPERATIONS[operation].keys()
