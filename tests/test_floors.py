"""Imports between the rooms of the package only go down, in no circle, and some rooms run without torch."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# a room is a folder or a file of the package; it imports from lower floors only
FLOORS = [
    {"atomic", "sentencepiece_bpe", "stdio", "tokenizer_trial"},
    {"config", "folder_lock", "tokenizer"},
    {"checkpoint", "ops", "throughput"},
    {"data", "model"},
    {"prepare", "convert", "tools"},
    {"train"},
    {"eval", "monitor"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# what runs where torch is not installed: preparing data is done by one process a core
WITHOUT_TORCH = {
    "atomic",
    "config",
    "folder_lock",
    "sentencepiece_bpe",
    "stdio",
    "tokenizer",
    "tokenizer_trial",
    "throughput",
    "prepare",
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted((ROOT / "tinyllama").rglob("*.py"))}
RECIPES = sorted([*(ROOT / "pretrain").glob("*.py"), *(ROOT / "scripts").glob("*.py")])


def imports(path: Path) -> set[str]:
    """Modules that the file names in an import, wherever in the file it stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from tinyllama.config import cli` imports a module, `from tinyllama import InputError` does not
            found |= {name for name in names if name in MODULES} or {node.module}
    return found


def room(module: str) -> str:
    return module.split(".")[1]


INSIDE = [module for module in MODULES if module != "tinyllama"]


@pytest.mark.parametrize("module", INSIDE)
def test_imports_go_down(module: str) -> None:
    for name in imports(MODULES[module]):
        assert name.split(".")[0] not in {"pretrain", "scripts", "tests"}, f"{module} imports {name}"
        if name.startswith("tinyllama.") and room(name) != room(module):
            assert FLOOR[room(name)] < FLOOR[room(module)], f"{module} imports {name}, which is not below it"


def test_no_circles() -> None:
    below = {module: {name for name in imports(path) if name in MODULES} - {module} for module, path in MODULES.items()}
    while free := {module for module, names in below.items() if not names}:
        below = {module: names - free for module, names in below.items() if module not in free}
    assert below == {}


def test_preparation_and_settings_import_without_torch() -> None:
    names = ", ".join(module for module in INSIDE if room(module) in WITHOUT_TORCH)
    absent = ["torch", "lightning", "transformers", "datasets"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import {names}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_what_reads_a_run_imports_nothing_that_trains() -> None:
    """Lightning and Triton take three times as long to import as all that a report needs."""
    names = ", ".join(f"tinyllama.monitor.{name}" for name in ("report", "compare", "model_card", "run_files"))
    code = f"import sys; sys.modules.update(lightning=None, triton=None, transformers=None); import {names}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_no_script_hides_a_module(path: Path) -> None:
    # Python puts a script's own folder first on sys.path: a script named like a package would be imported in its place
    shadowed = importlib.util.find_spec(path.stem)
    assert shadowed is None or Path(shadowed.origin or "").parent == path.parent
