"""The floors of the house: imports only go down, in no circle, and floor 0 runs without torch."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = {
    0: "tinyllama args cli config durable plan run schedule throughput tokenizer data data.encode data.facts "
    "data.flags data.inspection data.lit_chunks data.mixture data.packed data.prepare data.readers data.sources "
    "data.streams data.summary data.vocabulary data.workers",
    1: "ops ops.attention ops.backend ops.choice ops.cross_entropy ops.float8 ops.rms_norm ops.rope ops.swiglu",
    2: "data.ahead data.loader distributed guard model optim state",
    3: "checkpoint checkpointer console convert convert.folder convert.hf_folder convert.layout convert.native "
    "convert.start convert.tensor_file convert.tokenizer_files convert.verify convert.weights doctor evaluate "
    "generate harness logger owner perplexity report tracker watchdog",
}
FLOOR = {
    "tinyllama" if name == "tinyllama" else f"tinyllama.{name}": floor
    for floor, names in FLOORS.items()
    for name in names.split()
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
            # `from tinyllama import cli` imports a module, `from tinyllama import InputError` does not
            found |= {name for name in names if name in MODULES} or {node.module}
    return found


def test_every_module_has_a_floor() -> None:
    assert set(MODULES) == set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    for name in imports(MODULES[module]):
        if name.startswith("tinyllama"):
            assert FLOOR[name] <= FLOOR[module], f"{module} imports {name} from a higher floor"
        assert name.split(".")[0] not in {"pretrain", "scripts", "tests"}, f"{module} imports {name}"
        if FLOOR[module] == 0:
            assert name.split(".")[0] not in {"torch", "lightning", "transformers", "datasets"}, f"{module}: {name}"


def test_no_circles() -> None:
    below = {module: {name for name in imports(path) if name in MODULES} - {module} for module, path in MODULES.items()}
    while free := {module for module, names in below.items() if not names}:
        below = {module: names - free for module, names in below.items() if module not in free}
    assert below == {}


def test_floor_0_imports_without_torch() -> None:
    names = ", ".join(name for name, floor in FLOOR.items() if floor == 0)
    code = f"import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'datasets'])); import {names}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_no_script_hides_a_module(path: Path) -> None:
    # Python puts a script's own folder first on sys.path: a script named like a package would be imported in its place
    shadowed = importlib.util.find_spec(path.stem)
    assert shadowed is None or Path(shadowed.origin or "").parent == path.parent
