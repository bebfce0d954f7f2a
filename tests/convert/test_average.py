"""The mean of several steps of a run, beside torch's own."""

import json
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import CONFIG, METADATA, difference, generate, to_hf, weights
from safetensors import safe_open
from safetensors.torch import load_file

from tinyllama.checkpoint import names
from tinyllama.checkpoint.state import TrainState
from tinyllama.checkpoint.writer import Checkpointer
from tinyllama.config import cli
from tinyllama.convert import average, layout
from tinyllama.convert.average import open_average
from tinyllama.convert.weights import open_weights
from tinyllama.eval import perplexity
from tinyllama.eval.harness import read_scores
from tinyllama.model import from_weights
from tinyllama.tokenizer import Tokenizer

STEPS = (10, 20, 30, 40)


def save(folder: Path, step: int, state: dict[str, torch.Tensor], config: Any = CONFIG) -> Path:
    model = from_weights(config, state)
    metadata = {key: value for key, value in METADATA.items() if key not in ("step", "tokens")}
    keep = {"keep_last": None, "keep_every": None, "asynchronous": False}
    checkpointer = Checkpointer(folder, config=cli.dump({"model": asdict(config)}), metadata=metadata, **keep)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    return checkpointer.save(TrainState(step=step, samples=step, tokens=96 * step), model, optimizer)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, group: None) -> Path:
    """A run of four steps, each of other weights."""
    out_dir = tmp_path_factory.mktemp("run")
    for step in STEPS:
        save(out_dir / "checkpoints", step, weights(seed=step))
    return out_dir


def mean_of(*steps: int) -> dict[str, torch.Tensor]:
    states = [weights(seed=step) for step in steps]
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


@pytest.mark.parametrize("of_step", [False, True])
def test_the_mean_is_that_of_torch(run: Path, of_step: bool) -> None:
    path, steps = (names.step_dir(run / "checkpoints", 30), (10, 20, 30)) if of_step else (run, (20, 30, 40))
    found = open_average(path, 3)
    assert (found.dtype, found.config) == (torch.float32, CONFIG)
    assert found.metadata["averaged_steps"] == list(steps)
    assert (found.metadata["step"], found.metadata["tokens"]) == (steps[-1], 96 * steps[-1])
    expected = mean_of(*steps)
    assert found.load().keys() == expected.keys()
    for name, tensor in expected.items():
        mean = found.read(name)
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean, tensor, rtol=2e-7, atol=2e-8)
        assert (mean - weights(seed=steps[-1])[name]).abs().max() > 1e-2
    exact = torch.stack([weights(seed=step)["lm_head.weight"].double() for step in steps]).mean(0)
    assert torch.equal(found.read("lm_head.weight"), exact.float())


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_the_mean_of_equal_steps_is_bit_for_bit_one_of_them(group: None, tmp_path: Path, count: int) -> None:
    state = weights()
    state["lm_head.weight"][0, :4] = torch.tensor([-0.0, 0.1, 1e-45, 3.4e38])
    for step in range(count):
        last = save(tmp_path / "checkpoints", step, state)
    found = open_average(tmp_path, count)
    for name, tensor in open_weights(last).load().items():
        assert torch.equal(found.read(name).view(torch.int32), tensor.view(torch.int32)), name


def test_the_command_exports_the_mean_and_says_of_what(run: Path, script: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    code, out, err = script("export_checkpoint", run, file, "--average", 3)
    assert (code, err) == (0, "")
    assert out == f"mean of steps 20, 30, 40 in {run}/checkpoints -> {file}: 462 kB\n"
    found, expected = load_file(file), open_average(run, 3).load()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert {key: metadata[key] for key in ("step", "tokens", "averaged_steps")} == {
        **{"step": "40", "tokens": "3840", "averaged_steps": "[20, 30, 40]"},
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_converts_the_mean_which_others_load(run: Path, script: Any, tmp_path: Path, dtype: str) -> None:
    hf = tmp_path / "hf"
    code, out, err = script("convert_lit_checkpoint", run, hf, "--average", 4, "--dtype", dtype, "--verify")
    first, second = out.splitlines()
    assert (code, first) == (0, f"mean of steps 10, 20, 30, 40 in {run}/checkpoints -> {hf}"), err
    assert second.startswith("verify: max |logit difference| to transformers ")
    mark = json.loads((hf / "export.json").read_text())
    assert (mark["step"], mark["averaged_steps"]) == (40, [10, 20, 30, 40])
    mean = open_average(run, 4).load()
    found = load_file(hf / "model.safetensors")
    for key, tensor in to_hf(mean, CONFIG).items():
        assert torch.equal(found[key], tensor.to(getattr(torch, dtype))), key  # rounded once, after the mean
    if dtype == "float32":
        assert difference(hf, mean) <= 1e-5
    prompts = [[5, 17, 80]]
    of_file, ours = (from_weights(CONFIG, open_weights(hf).cast(torch.float32).load()), from_weights(CONFIG, mean))
    if dtype == "float32":
        assert generate(of_file, prompts, 5) == generate(ours, prompts, 5)


def test_the_mean_is_evaluated_beside_the_last(
    run: Path, script: Any, tmp_path: Path, tokenizer_file: Path, packed_folder: Any
) -> None:
    tokenizer = Tokenizer(tokenizer_file)
    data = packed_folder([[[5 + i % 300 for i in range(500)]]], tokenizer_sha256=tokenizer.sha256)
    found = {}
    for name, flags in (("mean", ["--average", 3]), ("last", [])):
        hf = tmp_path / name / "hf"
        assert script("convert_lit_checkpoint", run, hf, "--tokenizer", tokenizer_file, *flags)[0] == 0
        code, _, err = script("evaluate_harness", hf, "--tokenizer", tokenizer_file, "--perplexity", data)
        assert (code, err) == (0, "")
        found[name] = {row["metric"]: float(row["value"]) for row in read_scores(tmp_path / name / "eval.csv")}
    for name, of in (("mean", open_average(run, 3)), ("last", open_weights(run))):
        expected = {score.metric: score.value for score in perplexity.perplexity(of, data, tokenizer)}
        assert found[name] == pytest.approx(expected, rel=1e-6)
    assert found["mean"]["loss"] < found["last"]["loss"]  # of weights that are noise, the mean is less sure


def test_a_step_that_is_not_finite_is_refused(group: None, run: Path, tmp_path: Path, script: Any) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    state = weights(seed=9)
    state["transformer.h.1.mlp.swiglu.w2.weight"][3, 4] = torch.nan
    bad = save(copy / "checkpoints", 35, state)
    for name, output in (("export_checkpoint", "m.safetensors"), ("convert_lit_checkpoint", "hf")):
        code, out, err = script(name, copy, tmp_path / "out" / output, "--average", 3)
        assert (code, out) == (2, "")
        assert err == (
            f"error: {bad} has values in transformer.h.1.mlp.swiglu.w2.weight that are not finite: average steps "
            "before it\n"
        )
        assert list((tmp_path / "out").iterdir()) == []
    assert script("export_checkpoint", copy, tmp_path / "out" / "m.safetensors", "--average", 1)[0] == 0


def test_what_cannot_be_averaged_is_refused_in_a_line(
    group: None, run: Path, tmp_path: Path, script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(path: Path, count: object, name: str = "convert_lit_checkpoint", said: str = "") -> str:
        code, out, err = script(name, path, tmp_path / "out", "--average", count)
        assert (code, out, (tmp_path / "out").exists()) == (2, "", False)
        (line,) = err.removeprefix(said).splitlines()
        return line.removeprefix("error: ")

    folder = run / "checkpoints"
    for name in ("export_checkpoint", "convert_lit_checkpoint"):
        assert refused(run, 5, name) == (
            f"{folder} has 4 complete steps up to step-00000040, not 5: lower --average, or give a later step (there "
            "is step-00000010, step-00000020, step-00000030, step-00000040)"
        )
    assert refused(folder / "step-00000020", 3).startswith(f"{folder} has 2 complete steps up to step-00000020, not 3")
    assert refused(run, 0) == "--average 0 is not a number of checkpoints: give 1 or more"
    assert refused(run, -3) == "--average -3 is not a number of checkpoints: give 1 or more"
    assert "invalid int value" in refused(run, "x")
    assert refused(tmp_path / "nowhere", 2) == (
        f"{tmp_path / 'nowhere'} holds no complete checkpoint: give a step directory (step-00005000) or a run's out_dir"
    )
    (tmp_path / "lit_model.pth").touch()
    assert refused(tmp_path / "lit_model.pth", 2).endswith(
        "is not a checkpoint of a run, and --average needs several: leave the flag out"
    )

    copy = Path(shutil.copytree(run, tmp_path / "run"))
    narrow = replace(CONFIG, intermediate_size=64)
    other = save(copy / "checkpoints", 35, weights(narrow), narrow)
    assert refused(copy, 2) == (
        f"{other} and {copy}/checkpoints/step-00000040 are of different models: average steps of one run"
    )
    shutil.rmtree(other)
    (copy / "checkpoints" / "step-00000030" / ".metadata").unlink()  # such a step does not count
    capsys.readouterr()
    assert open_average(copy, 3).metadata["averaged_steps"] == [10, 20, 40]
    broken = f"{copy}/checkpoints/step-00000030 is not a complete checkpoint (.metadata is missing)"
    assert tuple(capsys.readouterr()) == ("", said := f"passed over: {broken}\n")
    problem = f"{copy}/checkpoints has 3 complete steps up to step-00000040, not 4"
    assert refused(copy, 4, said=said).startswith(problem)


def test_a_damaged_step_is_refused_before_anything_is_written(run: Path, tmp_path: Path, script: Any) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    file = copy / "checkpoints" / "step-00000020" / "__0_0.distcp"
    payload = bytearray(file.read_bytes())
    payload[len(payload) // 2] ^= 1
    file.write_bytes(payload)
    code, out, err = script("export_checkpoint", copy, tmp_path / "out.safetensors", "--average", 4)
    assert (code, out) == (2, "")
    assert err == (
        f"error: {file.parent} is damaged (__0_0.distcp does not match its hash): give another step of its run\n"
    )
    assert not (tmp_path / "out.safetensors").exists()
    assert script("export_checkpoint", copy, tmp_path / "out.safetensors", "--average", 2)[0] == 0


def test_one_tensor_of_one_step_is_in_memory_at_a_time(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[Any] = []

    def watched(path: Path) -> Any:
        opened = open_weights(path)

        def read(name: str) -> torch.Tensor:
            assert not [tensor for tensor in alive if tensor() is not None]
            tensor = opened.read(name)
            alive.append(weakref.ref(tensor))
            return tensor

        return replace(opened, read=read)

    monkeypatch.setattr(average, "open_weights", watched)
    mean = open_average(run, 4)
    for name in layout.shapes(CONFIG):
        mean.read(name)
    assert len(alive) == 4 * len(layout.shapes(CONFIG))
