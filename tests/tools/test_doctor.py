import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tinyllama.ops import float8
from tinyllama.tools import doctor, rates

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that installs a library of one line, ahead of any real one, here and in the processes started here."""

    def install(package: str, version: str, line: str = "", requires: str = "") -> None:
        (tmp_path / f"{package}.py").write_text(line + "\n")
        info = tmp_path / f"{package}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n{requires}"
        (info / "METADATA").write_text(metadata)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")

    return install


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("raise RuntimeError('built for another torch\\nand more')", "RuntimeError: built for another torch"),
        ("print('hello'); import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(3)", "exit code 3"),
        ("import os; os.abort()", "SIGABRT ended the process that called it"),
    ],
)
def test_a_broken_library_is_a_finding(stub: Any, monkeypatch: pytest.MonkeyPatch, line: str, problem: str) -> None:
    stub("broken", "0.3", line)
    monkeypatch.setattr(doctor, "LIBRARIES", (doctor.Library("broken", "a test", "import broken"),))
    (finding,) = doctor.libraries()
    assert (finding.state, finding.name) == ("wrong", "broken")
    assert finding.text == f"0.3 is installed and does not work: {problem}"
    assert finding.hint == "pip uninstall broken, or install it for this torch and CUDA"


def test_a_trial_that_takes_long_proves_nothing(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stub("slow", "0.3", "import threading; threading.Event().wait()")
    monkeypatch.setattr(doctor, "LIBRARIES", (doctor.Library("slow", "a test", "import slow"),))
    monkeypatch.setattr(doctor, "TRIAL_SECONDS", 0.1)
    monkeypatch.setattr(os, "getloadavg", lambda: (9.25, 8.0, 7.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    (finding,) = doctor.libraries()
    text = "0.3, not known whether it works: its trial was not over after 0.1 s, at a load of 9.2 on 2 cores"
    assert finding == doctor.Finding("note", "slow", text, "run this again when the machine has less to do")


def test_trials_run_one_after_another(stub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each fails if another is under way."""
    trial = f"import os; os.mkdir({str(tmp_path / 'busy')!r}); import json; os.rmdir({str(tmp_path / 'busy')!r})"
    for name in ("one", "two", "three"):
        stub(name, "1.0")
    libraries = tuple(doctor.Library(name, "a test", trial) for name in ("one", "two", "three"))
    monkeypatch.setattr(doctor, "LIBRARIES", libraries)
    running = doctor.libraries()
    assert [next(running).state for _ in libraries] == ["ok"] * 3


def test_without_a_gpu_the_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "getloadavg", lambda: (9.25, 8.0, 7.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    busy, cpu = doctor.speed()
    assert busy.state == "note"
    assert busy.text == "the machine is busy (a load of 9.2 on 2 cores): what is measured now may be too slow"
    assert (cpu.state, cpu.name) == ("ok", "speed cpu")
    assert re.fullmatch(r"matmul [\d,]+ GFLOP/s \(fp32, \d+ threads\), memory [\d.]+ GB/s \(copy\)", cpu.text)


@pytest.mark.parametrize(
    ("gpu", "flops", "copied", "state", "text"),
    [
        ("NVIDIA H100 80GB HBM3", 776e12, 3.0e12, "ok", "matmul 776 TFLOP/s (bf16), memory 3,000 GB/s (copy); usual"),
        ("NVIDIA H200", 788e12, 4.2e12, "ok", "matmul 788 TFLOP/s"),
        ("NVIDIA H200", 650e12, 4.2e12, "note", "slow matmul: matmul 650 TFLOP/s"),
        ("NVIDIA H100 80GB HBM3", 300e12, 1.5e12, "note", "slow matmul and memory: matmul 300 TFLOP/s"),
        ("NVIDIA H100 80GB HBM3", 780e12, 1.5e12, "note", "slow memory: matmul 780 TFLOP/s"),
        ("NVIDIA GH200 480GB", 100e12, 1e12, "ok", "matmul 100 TFLOP/s"),  # a card whose rates nobody measured
    ],
)
def test_a_gpu_is_compared_with_its_kind(gpu: str, flops: float, copied: float, state: str, text: str) -> None:
    finding = doctor.compared("speed 3", gpu, flops, copied)
    assert (finding.state, finding.name) == (state, "speed 3")
    assert finding.text.startswith(text)
    assert ("nvidia-smi" in finding.hint) == (state == "note")
    assert ("is not known here" in finding.text) == ("GH200" in gpu)


@pytest.mark.parametrize(
    ("gpus", "measured", "state", "text"),
    [
        (8, 361e9, "ok", "all-reduce of 1 GiB over 8 GPUs: 361 GB/s (bus); usual: 355 GB/s"),
        (4, 40e9, "note", "slow: all-reduce of 1 GiB over 4 GPUs: 40 GB/s (bus); usual: 355 GB/s"),
        (2, 40e9, "ok", "all-reduce of 1 GiB over 2 GPUs: 40 GB/s (bus)"),
        (4, None, "note", "an all-reduce over 4 GPUs was not over after 180 s, at a load of "),
    ],
)
def test_nccl_is_compared_with_what_is_usual(
    monkeypatch: pytest.MonkeyPatch, gpus: int, measured: float | None, state: str, text: str
) -> None:
    monkeypatch.setattr(rates, "all_reduce_bytes", lambda *how: measured)
    finding = doctor.all_reduce(["NVIDIA H100 80GB HBM3"] * gpus)
    assert (finding.state, finding.name) == (state, "speed nccl")
    assert finding.text.startswith(text)


def test_an_all_reduce_between_two_processes() -> None:
    measured = rates.all_reduce_bytes("gloo", ranks=2, megabytes=1, timeout=300)
    assert measured is not None
    assert measured > 0
    assert rates.all_reduce_bytes("gloo", ranks=1, megabytes=1, timeout=-1) is None  # nothing is done in no time


def test_a_gpu_is_named_to_the_process_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def init(*_: object, **given: Any) -> None:
        raise Enough(given["device_id"])

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", init)
    for backend, device in (("nccl", torch.device("cuda", 1)), ("gloo", None)):  # else barrier() warns: it has to guess
        with pytest.raises(Enough) as caught:
            rates._all_reduce(1, backend, 2, 1, 300, str(tmp_path))
        assert caught.value.args == (device,)


def test_nccl_that_fails_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*how: Any) -> None:
        raise RuntimeError(
            "\n\n-- Process 1 terminated with the following error:\nDistBackendError: NCCL error: busy\n"
        )

    monkeypatch.setattr(rates, "all_reduce_bytes", fail)
    finding = doctor.all_reduce(["NVIDIA H100 80GB HBM3"] * 8)
    assert (finding.state, finding.text) == (
        "wrong",
        "an all-reduce over 8 GPUs fails: DistBackendError: NCCL error: busy",
    )


def test_a_library_that_works_and_some_that_are_not_there(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stub("working", "1.2", "answer = 42")
    trials = [("working", "import working; assert working.answer == 42", False), ("one", "", False), ("two", "", True)]
    libraries = tuple(doctor.Library(package, "a test", trial, gpu) for package, trial, gpu in trials)
    monkeypatch.setattr(doctor, "LIBRARIES", libraries)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(doctor.libraries()) == [
        doctor.Finding("ok", "working", "1.2, works; for a test"),
        doctor.Finding("note", "one", "not installed; for a test", "pip install one"),
        doctor.Finding("note", "two", "not installed, and no GPU to use it; for a test"),
    ]


def test_libraries_are_recommended_for_the_gpus_that_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(doctor.importlib.metadata, "version", absent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    hints: dict[tuple[int, int], dict[str, str]] = {}
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        hints[capability] = {finding.name: finding.hint for finding in doctor.libraries() if finding.hint}
    common = {
        "lightning": "pip install lightning",
        "transformers": "pip install transformers",
        "triton": "pip install triton",
        "gigatoken": "pip install gigatoken",
        "wandb": "pip install wandb",
        "lm-eval": "pip install lm-eval",
    }
    hopper = {"flash-attn-4": "pip install -e '.[hopper]'", "quack-kernels": "pip install -e '.[hopper]'"}
    ampere = {"flash-attn": "pip install wheel ninja packaging psutil && pip install --no-build-isolation flash-attn"}
    assert hints == {(8, 0): common | ampere, (9, 0): common | hopper}
    found = {finding.name: finding.text for finding in doctor.libraries()}
    why = "flash-attn-4 is faster on this GPU; for ops.attention flash_attn"
    assert found["flash-attn"] == f"not installed, and not needed: {why}"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    found = {finding.name: finding.text for finding in doctor.libraries()}
    assert found["quack-kernels"] == (
        "not installed, and only for GPUs of compute capability 9.0 or higher; for ops quack"
    )
    why = "its versions for this torch have no fused SwiGLU; for ops.swiglu xformers"
    assert found["xformers"] == f"not installed, and not needed: {why}"


@pytest.mark.parametrize(("version", "notes"), [("0.0.33.post1", 0), ("0.0.35", 1)])
def test_xformers_without_its_fused_swiglu_is_named(stub: Any, monkeypatch: Any, version: str, notes: int) -> None:
    stub("xformers", version, "")
    monkeypatch.setattr(doctor, "LIBRARIES", (doctor.Library("xformers", "a test", ""),))
    _, *found = doctor.libraries()
    assert ["no fused SwiGLU" in finding.text for finding in found] == [True] * notes
    for finding in found:  # no wheel that has it installs beside the torch that is asked for
        assert "pip install" not in str(finding.hint)
        assert str(finding.hint).startswith(
            "leave ops.swiglu at auto: the wheels of older versions need torch 2.9.1 or older"
        )


def test_versions_that_are_not_asked_for(stub: Any) -> None:
    stub("lightning", "2.6.1")
    stub("transformers", "5.1+local.1")
    wanted = ["lightning<3,>=2.6.4", "transformers<6,>=5", "no-such-thing", "xformers>=0.0.30; extra == 'gpu'"]
    stub("tinyllama", "9", requires="".join(f"Requires-Dist: {one}\n" for one in wanted))
    wrong = [finding for finding in doctor.packages() if finding.state == "wrong"]
    assert [(finding.text, finding.hint) for finding in wrong] == [
        (
            "2.6.1 is installed, <3,>=2.6.4 is asked for: "
            "2.6.0 and 2.6.1 build FSDP parameters without fp32 master weights",
            "pip install 'lightning<3,>=2.6.4'",
        ),
        ("not installed", "pip install -e ."),
    ]


def test_a_gpu_that_torch_has_no_kernel_for(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(name="NVIDIA B300", total_memory=2**38, major=10, minor=3)
    for name, value in {"is_available": True, "device_count": 1, "get_device_properties": facts}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)

    def ones(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors")

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    shown, broken, nccl = (finding for finding in doctor.gpus() if finding.name != "driver")
    assert (shown.state, shown.text) == (
        "ok",
        "NVIDIA B300, 256 GiB, capability 10.3, peak not known: no MFU will be shown",
    )
    assert broken.text == "RuntimeError: CUDA error: no kernel image is available for execution on the device"
    assert (broken.state, nccl.state) == ("wrong", "wrong")


@pytest.mark.parametrize(
    ("env", "wrong"),
    [
        ({}, []),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "8"}, []),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_TASKS_PER_NODE": "8(x2)"}, []),
        (
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "5,3"},
            ["give --nodes and --ntasks-per-node, one task a GPU"],
        ),
    ],
)
def test_what_slurm_says(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], wrong: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert [finding.hint for finding in doctor.slurm(env) if finding.state == "wrong"] == wrong


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


def test_no_folder_can_be_made_in_place_of_or_below_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nothing")
    for name in ("file", "link"):
        for out_dir in (tmp_path / name, tmp_path / name / "out" / "run"):
            text = f"{tmp_path / name} is not a folder"
            assert list(doctor.disk(out_dir)) == [doctor.Finding("wrong", "disk", text, "give another out_dir")]
    (finding,) = doctor.disk(Path("/dev/null/x"))
    assert (finding.state, finding.text) == ("wrong", "/dev/null is not a folder")


def test_no_room_for_scratch_files(tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    last = list(doctor.disk(tmp_path, megabytes=1))[-1]
    assert last.text == f"{small_disk}: 0.0 GB free, and torch.compile and others write there"
    assert last.hint == "free some, or set TMPDIR to a larger disk"


def test_what_fails_while_looking_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def machine() -> Any:
        raise OSError("no such sysconf")

    monkeypatch.setattr(doctor, "machine", machine)
    monkeypatch.setattr(doctor, "LIBRARIES", ())
    findings = list(doctor.examine(tmp_path, {}))
    assert findings[0].text == "could not be examined: OSError: no such sysconf"
    assert len(findings) > 5


def test_a_torch_that_cannot_be_imported_is_said_in_a_line(stub: Any) -> None:
    stub("torch", "2.12", "raise OSError('libcudart.so.13: cannot open shared object file\\nand more')")
    done = subprocess.run([sys.executable, "scripts/doctor.py"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    first, hint = done.stdout.splitlines()
    assert first == "wrong  torch cannot be imported: OSError: libcudart.so.13: cannot open shared object file"
    assert hint.startswith("       -> pip install -e .")


@pytest.mark.parametrize(
    ("problem", "state", "text", "swiglu"),
    [
        (None, "ok", "float8 can run here, too", "reference, float8"),
        ("it needs triton", "note", "float8 cannot be used: it needs triton", "reference"),
    ],
)
def test_float8_is_offered_where_it_can_run(
    problem: str | None, state: str, text: str, swiglu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(float8, "problem", lambda device, sizes: problem)
    found = {finding.name: finding for finding in doctor.operations()}
    assert found["train.precision"] == doctor.Finding(state, "train.precision", text)
    assert found["ops.swiglu"].text == f"reference (auto); can run here: {swiglu}"


@pytest.mark.parametrize(
    ("capability", "operation", "text", "hint"),
    [
        (
            (8, 0),
            "attention",
            "flash_attn (auto) cannot run, as flash-attn does not work; can run here: reference, sdpa, sdpa_cudnn, "
            "sdpa_flash, flex",
            "see flash-attn above, or give --ops.attention another",
        ),
        (
            (9, 0),
            "rms_norm",
            "quack (auto) cannot run, as quack-kernels does not work; can run here: reference, torch",
            "see quack-kernels above, or give --ops.rms_norm another",
        ),
    ],
)
def test_a_kernel_library_that_is_broken_can_run_nowhere(
    stub: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capability: tuple[int, int],
    operation: str,
    text: str,
    hint: str,
) -> None:
    for module in ("flash_attn", "quack"):
        stub(module, "2.8", "raise ImportError('undefined symbol')")
    stub("quack_kernels", "2.8")
    # a GPU that does not answer, as the other layers of the examination find
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    kernels = [library for library in doctor.LIBRARIES if library.package in ("flash-attn", "quack-kernels")]
    monkeypatch.setattr(doctor, "LIBRARIES", kernels)
    found = {finding.name: finding for finding in doctor.examine(tmp_path, {})}
    broken = "2.8 is installed and does not work: ImportError: undefined symbol"
    assert [found[library.package].text for library in kernels] == [broken, broken]
    assert found[f"ops.{operation}"] == doctor.Finding("wrong", f"ops.{operation}", text, hint)
    assert found["ops.rope"].state == "ok"


def test_float8_needs_a_triton_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(float8, "problem", lambda device, sizes: None)
    found = {finding.name: finding for finding in doctor.operations({"triton"})}
    assert found["train.precision"].text == "float8 cannot be used: triton does not work"
    assert "float8" not in found["ops.swiglu"].text


@pytest.mark.slow
def test_the_script_ends_with_what_it_found(stub: Any, tmp_path: Path) -> None:
    stub("wandb", "0.99", "raise ImportError('half installed')")
    command = [sys.executable, "scripts/doctor.py", "--out_dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stdout + done.stderr
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "1 wrong")
    finding = "wrong  wandb                0.99 is installed and does not work: ImportError: half installed"
    assert finding in done.stdout.splitlines()
