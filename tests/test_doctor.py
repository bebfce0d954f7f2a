import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tinyllama import doctor

ROOT = Path(__file__).parents[1]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that installs a library of one line, ahead of any real one."""

    def install(module: str, version: str, line: str) -> None:
        (tmp_path / f"{module}.py").write_text(line + "\n")
        info = tmp_path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)
        for name in [name for name in sys.modules if name.split(".")[0] == module]:
            monkeypatch.delitem(sys.modules, name)

    return install


@pytest.mark.parametrize(
    "line", ["raise RuntimeError('built for another torch\\nand more')", "import sys; sys.exit(3)"]
)
def test_a_broken_library_is_a_finding(stub: Any, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    stub("xformers", "0.0.33", line)
    monkeypatch.setattr(doctor, "OPTIONAL", {"xformers": doctor.OPTIONAL["xformers"]})
    (finding,) = doctor.libraries()
    assert (finding.state, finding.name) == ("wrong", "xformers")
    assert finding.text.startswith("0.0.33 is installed and does not work: ")
    assert finding.remedy == "pip uninstall xformers, or install it for this torch and CUDA"


def test_a_library_that_works_and_one_that_is_not_there(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stub("working", "1.2", "answer = 42")
    calls = {
        "working": ("a test", lambda module: 1 / (module.answer == 42)),
        "absent_one": ("a test", lambda module: 1),
    }
    monkeypatch.setattr(doctor, "OPTIONAL", calls)
    works, absent = doctor.libraries()
    assert works.state == "ok"
    assert works.text.startswith("1.2, works (")
    assert (absent.state, absent.remedy) == ("note", "pip install absent-one")


def test_xformers_without_its_fused_swiglu_is_named(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stub("xformers", "0.0.35", "")
    monkeypatch.setattr(doctor, "OPTIONAL", {})
    (finding,) = doctor.libraries()
    assert "no fused SwiGLU" in finding.text


@pytest.mark.parametrize(("version", "states"), [("2.13.0+cpu", ["ok"]), ("2.10.1", ["ok", "wrong"])])
def test_a_torch_that_is_not_tested(version: str, states: list[str]) -> None:
    found = [finding for finding in doctor.software(version) if finding.name == "torch"]
    assert [finding.state for finding in found] == states


@pytest.mark.parametrize(
    ("env", "wrong"),
    [
        ({}, []),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "8"}, []),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, ["give --nodes and --ntasks-per-node, one task a GPU"]),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "bash"}, ["give another --job-name, or use torchrun inside"]),
    ],
)
def test_what_slurm_says(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], wrong: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert [finding.remedy for finding in doctor.slurm(env) if finding.state == "wrong"] == wrong


def test_tasks_that_are_not_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    found = list(doctor.slurm({"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "4(x2)"}))
    assert found[-1].text == "4 tasks a node and 8 GPUs on this one"


def test_the_disk_is_left_as_it_was(tmp_path: Path) -> None:
    findings = list(doctor.disk(tmp_path / "not" / "there", megabytes=1))
    assert findings[0].state == "ok"
    assert f"{tmp_path}: " in findings[0].text
    assert list(tmp_path.iterdir()) == []
    assert next(doctor.disk(Path("/proc/1"))).state == "wrong"


def test_what_fails_while_looking_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def machine() -> Any:
        raise OSError("no such sysconf")

    monkeypatch.setattr(doctor, "machine", machine)
    monkeypatch.setattr(doctor, "OPTIONAL", {})
    findings = list(doctor.examine(tmp_path, {}))
    assert findings[0].text == "could not be examined: OSError: no such sysconf"
    assert len(findings) > 5


def test_the_script_ends_with_what_it_found(tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text("raise ImportError('half installed')")
    command = [sys.executable, "scripts/doctor.py", "--out_dir", tmp_path]
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == int("is installed and does not work" in done.stdout)
    assert done.stdout.splitlines()[-1] == ("1 wrong" if done.returncode else "nothing is wrong")
