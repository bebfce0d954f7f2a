"""What we import is declared in pyproject.toml, and what every install brings is imported."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("tinyllama", "pretrain", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

# modules that are named otherwise than what pip installs
PACKAGES = {
    "flash_attn": {"flash-attn", "flash-attn-4"},
    "lm_eval": {"lm-eval"},
    "quack": {"quack-kernels"},
    "yaml": {"pyyaml"},
}
# not declared: scripts/benchmark_*.py measure these beside ours where somebody has installed them
PEERS = {"datatrove", "liger_kernel", "litdata", "litgpt"}
# not declared: PyTorch for CUDA, whose GPUs are the only place for it, brings the version that it works with
BROUGHT = {"triton"}


def declared(requirements: list[str]) -> set[str]:
    """The names of the packages in ``requirements``."""
    return {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in requirements}


BASE = declared(PROJECT["dependencies"])
EXTRAS = {
    name
    for extra, requirements in PROJECT["optional-dependencies"].items()
    if extra != "dev"
    for name in declared(requirements)
}


def third_party(text: str) -> Iterator[tuple[str, bool]]:
    """Each module of another project that ``text`` imports, and whether only a function does."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for name in names:
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and not (ROOT / top).is_dir():
                yield top, inside
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    return walk(ast.parse(text), False)


def undeclared(text: str) -> list[str]:
    """One line about each import in ``text`` that an install may lack."""
    found = []
    for module, inside in third_party(text):
        packages = PACKAGES.get(module, {module.replace("_", "-")})
        if packages <= BASE or module in BROUGHT or (inside and (packages <= EXTRAS or module in PEERS)):
            continue
        where = "dependencies or, with the import in a function, in an extra"
        found.append(f"{module} is imported, but {', '.join(sorted(packages - BASE))} is not in {where}")
    return found


def test_undeclared_imports_are_found() -> None:
    fine = (
        "import os, torch.distributed\nfrom yaml import x\nfrom tinyllama import y\ndef f():\n import wandb, litgpt.x"
    )
    assert undeclared(fine) == []
    bad = "import wandb\nif True:\n from litgpt import x\ndef f():\n import nowhere"
    assert [line.split()[0] for line in undeclared(bad)] == ["wandb", "litgpt", "nowhere"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_are_declared(path: Path) -> None:
    if found := undeclared(path.read_text("utf-8")):
        pytest.fail(f"{path.relative_to(ROOT)}: {'; '.join(found)}", pytrace=False)


def test_dependencies_are_imported() -> None:
    modules = {module for path in SOURCES for module, _ in third_party(path.read_text("utf-8"))}
    imported = {name for module in modules for name in PACKAGES.get(module, {module.replace("_", "-")})}
    assert imported >= BASE | BROUGHT
    assert modules >= PEERS, "a library that nothing measures any more"
