"""Private names of other libraries that we use are in a table, and the installed versions have them.

A private name may go in any release. A version that lacks one fails here, with the API, our file and why we use it.
"""

import ast
import importlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    str(path.relative_to(ROOT)): path
    for folder in ("tinyllama", "pretrain", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
OURS = {"tinyllama", "pretrain", "scripts"}
# documented in spite of the underscore
PUBLIC = {"os._exit", "sys._current_frames"}


@dataclass(frozen=True)
class Private:
    """A name that its library does not promise to keep."""

    api: str
    files: tuple[str, ...]
    reason: str

    @property
    def private_parts(self) -> set[str]:
        return {part for part in self.api.split(".") if is_private(part)}


METADATA = ("tinyllama/checkpoint/metadata.py",)
FLASH_4 = "torch.compile needs forward and backward apart, and the public function is one autograd Function"
QUACK = "a custom operation needs forward and backward apart, and quack's public function is one autograd Function"
QUACK_GATED = "quack documents no matmul with the gate inside"
RECOMPUTATION = "selective activation checkpointing names the operations that it keeps, and the public one calls these"
UNPICKLE = "DCP pickles it into .metadata, and only names that we list are unpickled"
DCP = "torch.distributed.checkpoint"

TABLE = [
    Private(f"{DCP}.filesystem._StorageInfo", METADATA, UNPICKLE),
    Private(f"{DCP}.metadata._MEM_FORMAT_ENCODING", METADATA, UNPICKLE),
    Private("torch.serialization._get_layout", METADATA, UNPICKLE),
    Private(
        "torch.distributed.distributed_c10d._pg_map",
        ("tinyllama/train/collectives.py",),
        "no public function lists the process groups whose timeout must change",
    ),
    Private(
        "torch.distributed.distributed_c10d._set_pg_timeout",
        ("tinyllama/train/collectives.py",),
        "no public function changes the timeout of a process group",
    ),
    Private(
        "torch.distributed._coalescing_manager",
        ("tinyllama/train/collectives.py",),
        "no public function launches collectives in one group of NCCL's",
    ),
    Private(
        "torch._C._distributed_c10d._dump_nccl_trace",
        ("tinyllama/monitor/watchdog.py",),
        "no public function returns NCCL's flight recorder, which tells who did not come",
    ),
    *(
        Private(
            f"torch.cuda.memory.{name}",
            ("tinyllama/monitor/memory.py",),
            "documented for users, and no public function says which code has allocated what is in use",
        )
        for name in ("_record_memory_history", "_snapshot")
    ),
    Private(
        "torch._foreach_mul_",
        ("tinyllama/train/optim.py", "tinyllama/train/adamw.py"),
        "one kernel clips all gradients",
    ),
    Private("torch._foreach_add_", ("tinyllama/train/adamw.py",), "one kernel counts the steps of all parameters"),
    *(
        Private(f"torch._foreach_{name}_", files, "one kernel for all weights, gradients or scales")
        for name, files in {
            "copy": ("tinyllama/train/gathered.py", "tinyllama/train/delayed_scaling.py"),
            "zero": ("tinyllama/train/delayed_scaling.py",),
        }.items()
    ),
    Private(
        "torch._foreach_norm",
        ("tinyllama/train/anomaly.py", "tinyllama/train/muon.py"),
        "one kernel takes the norms of all gradients or matrices",
    ),
    *(
        Private(f"torch.ops.aten.{name}.default", ("tinyllama/ops/attention.py",), RECOMPUTATION)
        for name in (
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
        )
    ),
    Private(
        "lightning.fabric.wrappers._FabricOptimizer",
        ("pretrain/train.py", "tinyllama/train/step.py"),
        "Fabric.setup returns one, and its type has no public name",
    ),
    Private("flash_attn.cute.interface._flash_attn_fwd", ("tinyllama/ops/attention.py",), FLASH_4),
    Private("flash_attn.cute.interface._flash_attn_bwd", ("tinyllama/ops/attention.py",), FLASH_4),
    Private("flash_attn.flash_attn_interface._flash_attn_forward", ("tinyllama/ops/attention.py",), RECOMPUTATION),
    # without an underscore, but in no library's documentation
    Private("quack.gemm_interface.gemm_gated", ("tinyllama/ops/swiglu.py",), QUACK_GATED),
    Private("quack.gemm_interface.gemm_dgated", ("tinyllama/ops/swiglu.py",), QUACK_GATED),
    Private("quack.gemm_config.GemmConfig", ("tinyllama/ops/swiglu.py",), QUACK_GATED),
    Private(
        "quack.gemm_interface.gemm_symmetric",
        ("tinyllama/ops/symmetric_matmul.py",),
        "quack documents no symmetric matmul",
    ),
    Private("quack.rmsnorm.rmsnorm_fwd", ("tinyllama/ops/rms_norm.py",), QUACK),
    Private("quack.rmsnorm.rmsnorm_bwd", ("tinyllama/ops/rms_norm.py",), QUACK),
    Private(
        "gigatoken.gigatoken_rs.load_hf_json",
        ("tinyllama/prepare/encode.py",),
        "Tokenizer.from_json wraps it, at the price of a call of Python for each document",
    ),
]
# modules that two packages bring under one top module: flash-attn has no cute, and flash-attn-4 nothing else
PACKAGED_APART = ("flash_attn.cute", "flash_attn.flash_attn_interface")


def is_private(name: str) -> bool:
    return name.startswith("_") and name.strip("_") != "" and not (name.startswith("__") and name.endswith("__"))


def test_what_is_private() -> None:
    assert [is_private(name) for name in ("_x", "_X_", "__x")] == [True] * 3
    assert [is_private(name) for name in ("x", "x_", "_", "__version__")] == [False] * 4


# --- the installed versions have what the table names


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def lacks(api: str) -> str | None:
    """Return the part of ``api`` that the installed library lacks; None when it has all."""
    parts = api.split(".")
    found: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], 2):
        here = ".".join(parts[:number])
        if inspect.isclass(found) and part in found.__init__.__code__.co_names:  # an attribute of its instances
            return None
        if not hasattr(found, part):
            if not hasattr(found, "__path__") or not is_installed(here):
                return here
            importlib.import_module(here)
        found = getattr(found, part)
    return None


def problem(row: Private) -> str | None:
    """One line about what the installed version lacks of ``row``."""
    library = row.api.partition(".")[0]
    if (lacking := lacks(row.api)) is None:
        return None
    missing = f"{library} {getattr(sys.modules[library], '__version__', '')}".rstrip() + f" has no {lacking}"
    return f"{missing}, which {' and '.join(row.files)} use{'s' * (len(row.files) == 1)}: {row.reason}"


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.api)
def test_installed_versions_have_it(row: Private) -> None:
    library = row.api.partition(".")[0]
    if not is_installed(next((module for module in PACKAGED_APART if row.api.startswith(module)), library)):
        pytest.skip(f"{library} is not installed")
    if "_dump_nccl_trace" in row.private_parts and not importlib.import_module("torch.distributed").is_nccl_available():
        pytest.skip("this build of torch has no NCCL")
    if missing := problem(row):
        pytest.fail(missing, pytrace=False)


def test_a_missing_name_is_one_line() -> None:
    row = Private("torch.distributed._gone.x", ("a.py", "b.py"), "it is quick")
    version = importlib.import_module("torch").__version__
    assert problem(row) == f"torch {version} has no torch.distributed._gone, which a.py and b.py use: it is quick"
    assert lacks(f"{DCP}.staging.DefaultStager._gone") == f"{DCP}.staging.DefaultStager._gone"
    assert lacks("torch.ops.aten._gone.default") == "torch.ops.aten._gone"


def test_the_table_has_all_that_checkpoints_name() -> None:
    from tinyllama.checkpoint.metadata import METADATA_CLASSES

    private = {f"{module}.{name}" for module, names in METADATA_CLASSES.items() for name in names if is_private(name)}
    assert private == {row.api for row in TABLE if row.reason == UNPICKLE}


# --- the table has all that our files use


def defined(tree: ast.Module) -> set[str]:
    """The private names that a file makes itself: its functions, classes, variables, fields and attributes of self."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in names if is_private(name)}


def private_uses(text: str) -> dict[str, str]:
    """The private names of others in ``text``, by the expressions or imports that name them."""
    tree = ast.parse(text)
    own = defined(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += imported([alias.name for alias in node.names])
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += imported([f"{node.module}.{alias.name}" for alias in node.names])
        elif isinstance(node, ast.Attribute):
            found.append((ast.unparse(node), node.attr))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            instance, name = node.args[:2]
            if isinstance(name, ast.Constant):
                found.append((f"{ast.unparse(instance)}.{name.value}", name.value))
    return {use: name for use, name in found if is_private(name) and name not in own and use not in PUBLIC}


def imported(paths: list[str]) -> list[tuple[str, str]]:
    """Each part of ``paths`` of others' modules, with its path."""
    return [(path, part) for path in paths if path.split(".")[0] not in OURS for part in path.split(".")]


def test_private_uses_are_found() -> None:
    foreign = ["torch._foreach_norm(x)", "f()._x.y", "self.base._state", "self._inherited", "getattr(x, '_hidden')"]
    foreign += ["import torch._dynamo", "from torch import _prims", "from torch._C import x"]
    fine = ["class A:\n def _f(self):\n  self._own: int = 1\n  return a._own or self._f()", "x.__class__"]
    fine += ["from tinyllama.prepare.prepare import _recipe", "_y = _z", "getattr(x, name)", "os._exit(1)"]
    assert private_uses("\n".join(foreign + fine)) == {
        "torch._foreach_norm": "_foreach_norm",
        "f()._x": "_x",
        "self.base._state": "_state",
        "self._inherited": "_inherited",
        "x._hidden": "_hidden",
        "torch._dynamo": "_dynamo",
        "torch._prims": "_prims",
        "torch._C.x": "_C",
    }


@pytest.mark.parametrize("file", SOURCES)
def test_the_table_has_all_uses(file: str) -> None:
    known = {part for row in TABLE if file in row.files for part in row.private_parts}
    unknown = [use for use, name in private_uses(SOURCES[file].read_text("utf-8")).items() if name not in known]
    if unknown:
        pytest.fail(f"{file} uses {', '.join(unknown)}: use something public, or add it to TABLE", pytrace=False)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.api)
def test_the_table_has_nothing_else(row: Private) -> None:
    names = row.private_parts or {row.api.rpartition(".")[2]}
    for file in row.files:
        text = SOURCES[file].read_text("utf-8")
        assert all(name in text for name in names), f"{file} no longer uses {row.api}: take it from TABLE"
