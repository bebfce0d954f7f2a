"""The recipe's steps against a plain loop on another model, and what its settings make PyTorch do."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from models import from_hf, llama, to_hf
from runs import column, tensors

from tinyllama.checkpoint.names import step_dir
from tinyllama.config.model import named_config
from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import open_packed
from tinyllama.model import GPT, init_weights

STEPS, BATCH, LENGTH, EOS = 6, 8, 32, 2
OPTIM = {"lr": 1e-2, "min_lr": 2e-3, "warmup_steps": 2, "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9}


def samples(config: dict[str, Any]) -> torch.Tensor:
    """The run's samples in order, (STEPS, BATCH, LENGTH + 1), cut out of the files' bytes."""
    paths = [Path(source["path"]) for source in config["data"]["sources"]]
    streams = [np.concatenate([np.fromfile(file, "<u2") for file in sorted(path.glob("*.bin"))]) for path in paths]
    blocks = [stream[: len(stream) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1) for stream in streams]
    fingerprints = [open_packed(path).fingerprint for path in paths]
    mixture = Mixture([len(found) for found in blocks], [0.7, 0.3], 3407, fingerprints)
    source, _, block = mixture.locate(np.arange(STEPS * BATCH))
    rows = [blocks[k][i] for k, i in zip(source, block, strict=True)]
    return torch.from_numpy(np.stack(rows).astype(np.int64)).view(STEPS, BATCH, LENGTH + 1)


def lr_of(step: int) -> float:
    if step < 2:
        return 1e-2 * (step + 1) / 2
    return 2e-3 + (1e-2 - 2e-3) * (1 + math.cos(math.pi * (step - 2) / (STEPS - 1 - 2))) / 2


def plain_run(config: dict[str, Any], max_norm: float, apart: bool = False) -> dict[str, Any]:
    """Transformers' Llama in fp64 by PyTorch's own AdamW, a whole batch at a time; ``apart``: documents are."""
    sizes = named_config(**config["model"])
    gpt = GPT(sizes)
    init_weights(gpt, 3407)
    model = llama(sizes)
    model.load_state_dict(to_hf(gpt.state_dict(), sizes))
    model.double().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.8, 0.9), eps=1e-8, weight_decay=0.3, foreach=False, fused=False
    )
    losses, norms = [], []
    for step, rows in enumerate(samples(config)):
        ids, targets = rows[:, :-1], rows[:, 1:]
        extra: dict[str, torch.Tensor] = {}
        if apart:
            extra = documents_apart(ids)
        logits = model(ids, **extra).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        losses.append(loss.item())
        optimizer.param_groups[0]["lr"] = lr_of(step)
        optimizer.step()
    end = {"loss": losses, "grad_norm": norms, "start": gpt.state_dict(), "model": from_hf(model.state_dict(), sizes)}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for moment in ("exp_avg", "exp_avg_sq"):
        end[moment] = from_hf({name: optimizer.state[parameter][moment] for parameter, name in names.items()}, sizes)
    return end


def documents_apart(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Position in its document of each token, and what it must not see, token by token."""
    positions = torch.zeros_like(ids)
    hidden = torch.full((len(ids), 1, LENGTH, LENGTH), -math.inf, dtype=torch.float64)
    for row, tokens in enumerate(ids.tolist()):
        begin = 0
        for at, token in enumerate(tokens):
            positions[row, at] = at - begin
            hidden[row, 0, at, begin : at + 1] = 0
            if token == EOS:
                begin = at + 1
    return {"position_ids": positions, "attention_mask": hidden}


@pytest.fixture(scope="module")
def plain() -> Callable[..., dict[str, Any]]:
    """``plain_run``, once for the same settings: the data of every test are the same."""
    known: dict[tuple[float, bool], dict[str, Any]] = {}

    def get(config: dict[str, Any], *how: Any) -> dict[str, Any]:
        if how not in known:
            known[how] = plain_run(config, *how)
        return known[how]

    return get


def watched(world: Any, config: dict[str, Any], out: Path, *flags: object) -> dict[str, Any]:
    """What a rank sees of a run on two; see rank.py."""
    config["optim"] |= OPTIM
    config["train"]["max_steps"] = STEPS
    config["eval"] |= {"interval": 3, "max_samples": 4}
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    answers = world(2)("train_watched", "--config", file, "--out_dir", out, *flags)
    first, second = (answer["result"] for answer in answers)
    assert first["code"] == 0
    assert first == second
    return first


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


GATHER, REDUCE = "c10d._allgather_base_.default over 2", "c10d._reduce_scatter_base_.default over 2"
GATHER_ALL, REDUCE_ALL = (
    "c10d.allgather_into_tensor_coalesced_.default",
    "c10d.reduce_scatter_tensor_coalesced_.default",
)
AGAIN, ATTENDS, PRODUCTS, ADDED = (
    "aten.silu.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten.mm.default",
    "tinyllama.add_matmul.default",
)
LAYERS, MICRO_BATCHES = 2, 2
UNITS = LAYERS + 1  # what FSDP gathers at once: each block, and the rest
ONCE = LAYERS * MICRO_BATCHES
# of a layer, the products of attention's two matrices and the MLP's three; of the model, the output matrix's
FORWARD = MICRO_BATCHES * (5 * LAYERS + 1)
USUAL = {
    GATHER: MICRO_BATCHES * (UNITS + LAYERS),  # the rest is not given back between the passes
    REDUCE: UNITS,
    GATHER_ALL: 0,
    REDUCE_ALL: 0,
    AGAIN: ONCE,
    ATTENDS: ONCE,
    PRODUCTS: 3 * FORWARD,  # a backward pass has two for each
    ADDED: 0,
    "aten.cummax.default": 0,
}
AGAIN_BUT_THE_LAST = FORWARD + 2 * FORWARD + ONCE * 4  # w3's result, which nothing behind it needs, is not made again
RUNS: dict[str, tuple[list[object], float, dict[str, int]]] = {
    "sharded": ([], 1e-3, {}),
    "replicated, clipped at a norm that none reaches": (
        ["--parallel.shard", "none"],
        100.0,  # the gradients of the matrices are added to sums
        {GATHER: 0, REDUCE: 0, PRODUCTS: 2 * FORWARD, ADDED: FORWARD},
    ),
    "gathered once": (
        ["--parallel.reshard_after_forward", "false"],
        1e-3,
        {GATHER: 0, REDUCE: 0, GATHER_ALL: 1, REDUCE_ALL: 1, PRODUCTS: 2 * FORWARD, ADDED: FORWARD},
    ),
    "reduced often": (["--parallel.sync_every_micro_batch", "true"], 1e-3, {REDUCE: MICRO_BATCHES * UNITS}),
    "full checkpointing": (
        ["--train.activation_checkpointing", "full"],
        1e-3,
        {AGAIN: 2 * ONCE, ATTENDS: 2 * ONCE, PRODUCTS: AGAIN_BUT_THE_LAST},
    ),
    "selective checkpointing": (["--train.activation_checkpointing", "selective"], 1e-3, {AGAIN: 2 * ONCE}),
    "documents apart": (
        ["--data.document_mask", "true", "--data.restart_positions", "true"],
        1e-3,
        {"aten.cummax.default": 2 * MICRO_BATCHES},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_steps_are_those_of_a_plain_loop(world, config, plain, tmp_path: Path, name: str) -> None:
    flags, max_norm, calls = RUNS[name]
    out = tmp_path / "run"
    seen = watched(world, config, out, "--optim.max_norm", max_norm, *flags)
    expected = plain(config, max_norm, name == "documents apart")
    assert column(out, "lr") == pytest.approx([lr_of(step) for step in range(STEPS)], rel=1e-9)
    for key in ("loss", "grad_norm"):
        assert column(out, key) == pytest.approx(expected[key], rel=1e-5), key
    saved = tensors(step_dir(out / "checkpoints", STEPS))
    # fp32's rounding makes them differ by 2e-6 to 2e-5. So small a max_norm that AdamW's eps has a say.
    for key, start in expected["start"].items():
        assert apart(saved[f"model.{key}"] - start, expected["model"][key] - start) < 1e-4, key
        for moment in ("exp_avg", "exp_avg_sq"):
            assert apart(saved[f"optimizer.{moment}.{key}"], expected[moment][key]) < 1e-4, (moment, key)
    for step in seen["steps"]:  # also those after a validation, which leaves nothing gathered
        assert {key: step.get(key, 0) for key in USUAL} == USUAL | calls

    # enabled, and something frozen: after the first step Python never collects when it likes
    assert seen["collector"] == [[True, False]] + [[False, True]] * (STEPS - 1)
    assert seen["collected_at"] == [0, 2, 4]
    assert seen["graphs"] == [False] * STEPS


@pytest.mark.parametrize("level", ["OFF", "DETAIL"])
def test_coalesced_collectives_are_those_one_by_one(world, level: str) -> None:
    answers = world(2)("coalesced", level)
    # the sums are [100, 102] and [100, 102, 104, 106], each rank has a half, and the greatest of both are gathered
    expected = [[102.0, 102.0], [104.0, 106.0, 104.0, 106.0]]
    assert [answer["result"] for answer in answers] == [expected, expected]
