import dataclasses
import importlib.util
import math
from operator import attrgetter
from typing import Any

import pytest

from tinyllama import InputError
from tinyllama.config.args import (
    DataArgs,
    LogArgs,
    ModelArgs,
    OptimArgs,
    PretrainArgs,
    Source,
    TrainArgs,
    ValidationSource,
    check,
)
from tinyllama.config.bounds import bounds
from tinyllama.config.model import ModelConfig, named_config
from tinyllama.train.budget import gradient_accumulation, total_steps
from tinyllama.train.launch import World
from tinyllama.train.run import Run

DATA = DataArgs(sources=[Source("packed")])


def run(**train: Any) -> PretrainArgs:
    return PretrainArgs(data=DATA, train=TrainArgs(**train))


def test_model_args_have_every_field_of_the_config() -> None:
    assert [f.name for f in dataclasses.fields(ModelArgs)] == [f.name for f in dataclasses.fields(ModelConfig)]


def test_model_args_change_a_named_size() -> None:
    assert ModelArgs("tinyllama_120m", n_layer=3).resolve() == named_config("tinyllama_120m", n_layer=3)


def test_all_errors_are_reported_together() -> None:
    args = PretrainArgs(
        model=ModelArgs("nothing"),
        data=DataArgs(sources=[Source("a", weight=-1)]),
        train=TrainArgs(max_steps=1, max_tokens=1, micro_batch_size=0),
        optim=OptimArgs(lr=1e-4, min_lr=1e-3, beta2=1.0),
    )
    with pytest.raises(InputError) as caught:
        check(args)
    assert [problem.split(":")[0].split(" ")[0] for problem in caught.value.args] == [
        "model.name",
        "data.sources",
        "one",
        "optim.beta2",
        "train.micro_batch_size",
        "optim.min_lr",
    ]
    assert "optim.min_lr 0.001 is greater than optim.lr 0.0001: lower it" in caught.value.args


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        (
            {"max_steps": 2**63},
            "train.max_steps is 9223372036854775808: it must be greater than 0, at most 1,000,000,0",
        ),
        (
            {"max_steps": 3, "timeout": 1e30},
            r"train.timeout is 1e\+30: it must be greater than 0, at most 1,000,000,000",
        ),
    ],
)
def test_numbers_that_are_slips_of_the_hand(train: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        check(run(**train))


@pytest.mark.parametrize(
    ("train", "given"),
    [
        ({}, "none"),
        (
            {"max_steps": 1, "max_epochs": 1},
            "train.max_steps and train.max_epochs: unset one, as --train.max_epochs null does",
        ),
    ],
)
def test_one_length_must_be_given(train: dict[str, int], given: str) -> None:
    with pytest.raises(InputError) as error:
        check(run(**train))
    (problem,) = error.value.args
    assert problem == f"one of train.max_steps, train.max_tokens and train.max_epochs must be given; given: {given}"


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size", "accumulation"), [(1, 8, 128), (16, 8, 8), (16, 64, 1), (128, 8, 1)]
)
def test_accumulation_follows_the_world(world_size: int, micro_batch_size: int, accumulation: int) -> None:
    assert gradient_accumulation(TrainArgs(micro_batch_size=micro_batch_size), world_size) == accumulation


@pytest.mark.parametrize(
    ("batch", "ranks", "micro_batch", "hint"),
    [
        (1024, 6, 8, "start 4 or 8 ranks, or give --train.global_batch_size 1008 or 1056"),
        (1024, 16, 24, "give --train.micro_batch_size 16, or give --train.global_batch_size 768 or 1152"),
        (84, 16, 2, "start 14 or 21 ranks, or give --train.global_batch_size 64 or 96"),
        (
            48,
            16,
            2,
            "start 12 or 24 ranks, or give --train.micro_batch_size 1, or give --train.global_batch_size 32 or 64",
        ),
        (96, 64, 8, "start 12 ranks, or give --train.global_batch_size 512"),
        (8, 3, 8, "start 1 rank, or give --train.global_batch_size 24"),
        (4, 2, 6, "give --train.micro_batch_size 2, or give --train.global_batch_size 12"),
        (10, 4, 4, "give --train.global_batch_size 16"),
        (10**15, 7, 10**14 + 1, "give --train.global_batch_size 700000000000007 or 1400000000000014"),  # in no time
    ],
)
def test_a_batch_that_does_not_divide_names_ranks_micro_batches_and_batches_that_do(
    batch: int, ranks: int, micro_batch: int, hint: str
) -> None:
    with pytest.raises(InputError) as error:
        gradient_accumulation(TrainArgs(global_batch_size=batch, micro_batch_size=micro_batch), ranks)
    what = f"train.global_batch_size {batch} is not a multiple of {ranks} ranks x train.micro_batch_size {micro_batch}"
    assert str(error.value).startswith(f"{what}: {hint}")


def test_length_in_steps_tokens_or_epochs() -> None:
    assert total_steps(run(max_steps=2001), 2048, 10) == 2001
    # 3T tokens at 2,097,152 a step: upstream's 1,430,512 steps
    assert total_steps(run(max_tokens=3 * 10**12), 2048, 10) == 1_430_512
    assert total_steps(run(max_epochs=2.5), 2048, 1024 * 1000 + 5) == 2500


def test_a_run_that_is_too_short() -> None:
    with pytest.raises(InputError, match="warmup_steps 2000 does not end within the run's 2000 steps"):
        total_steps(run(max_steps=2000), 2048, 10)
    with pytest.raises(InputError, match=r"max_epochs 1 of 1,023 blocks is less than one step"):
        total_steps(run(max_epochs=1), 2048, 1023)


# arXiv:2401.02385 and upstream's pretrain/tinyllama.py, where they speak: batch, rates, AdamW, clipping, document mask.
# A changed default changes every run that does not give the setting.
DEFAULTS: dict[str, Any] = {
    "out_dir": "out/run",
    "dry_run": False,
    "model": {"name": "tinyllama_1.1b"}
    | dict.fromkeys(("block_size", "vocab_size", "padding_multiple", "n_layer", "n_head", "n_query_groups", "n_embd"))
    | dict.fromkeys(("intermediate_size", "norm_eps", "rope_base", "rope_condense_ratio", "tie_embeddings")),
    "data": {
        "sources": [],
        "validation": [],
        "ramp_tokens": None,
        "seed": 3407,
        "document_mask": False,
        "restart_positions": False,
    },
    "optim": {
        "name": "adamw",
        "schedule": "cosine",
        "lr": 4e-4,
        "min_lr": 4e-5,
        "warmup_steps": 2000,
        "decay_steps": None,
        "decay_shape": "linear",
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "max_norm": 1.0,
    },
    "train": {
        "max_steps": None,
        "max_tokens": None,
        "max_epochs": None,
        "global_batch_size": 1024,
        "micro_batch_size": 8,
        "precision": "bf16",
        "compile": None,
        "seed": 3407,
        "activation_checkpointing": "none",
        "on_nonfinite": "stop",
        "skip_spikes": None,
        "max_skips": 10,
        "max_time": None,
        "start_timeout": 1800,
        "timeout": 300,
        "resume": "auto",
        "init_from": None,
    },
    "ops": {
        "attention": "auto",
        "rope": "auto",
        "rms_norm": "auto",
        "swiglu": "auto",
        "cross_entropy": "auto",
        "symmetric_matmul": "auto",
    },
    "parallel": {"devices": None, "shard": "full", "reshard_after_forward": True, "sync_every_micro_batch": False},
    "eval": {"interval": 1000, "max_samples": 2048, "samples": [], "tokenizer": None},
    "checkpoint": {
        "interval": 5000,
        "keep_last": 3,
        "keep_every": 50000,
        "asynchronous": True,
        "on_failure": "continue",
    },
    "log": {
        "interval": 10,
        "profile": [],
        "wandb": "off",
        "wandb_project": "tinyllama",
        "wandb_entity": None,
        "on_event": None,
    },
}


def test_every_default() -> None:
    assert dataclasses.asdict(PretrainArgs()) == DEFAULTS
    assert dataclasses.asdict(Source("x")) == {"path": "x", "weight": 1.0, "final_weight": None}


GROUPS = [name for name, value in DEFAULTS.items() if isinstance(value, dict)]
BOUNDED = (
    *("train.max_steps", "train.max_tokens", "train.max_epochs", "train.global_batch_size", "train.micro_batch_size"),
    *("train.skip_spikes", "train.max_skips", "train.max_time", "train.timeout"),
    *("optim.lr", "optim.max_norm", "parallel.devices", "parallel.shard", "eval.interval", "eval.max_samples"),
    *("checkpoint.interval", "checkpoint.keep_last", "checkpoint.keep_every", "log.interval", "data.ramp_tokens"),
    "optim.decay_steps",
)


def with_value(key: str, value: Any) -> PretrainArgs:
    """A valid run but for one setting."""
    group, name = key.split(".")
    length = {} if key.startswith("train.max_") and key.rpartition("_")[2] in ("tokens", "epochs") else {"max_steps": 9}
    args = dataclasses.replace(run(**length), optim=OptimArgs(min_lr=0.0))
    if key == "optim.decay_steps":
        args = dataclasses.replace(args, optim=OptimArgs(schedule="wsd", decay_steps=1))
    if key == "data.ramp_tokens":
        args = dataclasses.replace(args, data=DataArgs(sources=[Source("packed", 1.0, 2.0)], ramp_tokens=1))
    return dataclasses.replace(args, **{group: dataclasses.replace(attrgetter(group)(args), **{name: value})})


def problems(args: PretrainArgs) -> tuple[str, ...]:
    try:
        check(args)
    except InputError as error:
        return error.args
    return ()


@pytest.mark.parametrize("cls", [ModelConfig, Source, *(type(getattr(PretrainArgs(), key)) for key in GROUPS)])
def test_every_number_has_a_bound(cls: type) -> None:
    assert [name for name, _, bound in bounds(cls) if bound is None] == []


@pytest.mark.parametrize("key", BOUNDED)
def test_numbers_that_must_be_greater_than_0(key: str) -> None:
    most = 10**9 if key in ("train.max_time", "train.timeout") else 10**15
    for good in (1, most):
        assert problems(with_value(key, good)) == (), good
    for bad in (0, -1, math.nan, most + 1):
        assert f"{key} is {bad}: it must be greater than 0, at most {most:,}" in problems(with_value(key, bad))


def test_ranks_have_a_second_to_meet() -> None:
    for good in (1, 10**9):
        assert problems(with_value("train.start_timeout", good)) == ()
    for bad in (0.999, 0, -1, 1e-300, math.nan, 10**9 + 1):
        said = f"train.start_timeout is {bad}: it must be at least 1, at most 1,000,000,000"
        assert said in problems(with_value("train.start_timeout", bad))


@pytest.mark.parametrize("key", ["checkpoint.keep_last", "checkpoint.keep_every", "eval.max_samples", "train.max_time"])
def test_numbers_that_may_be_left_out(key: str) -> None:
    assert problems(with_value(key, None)) == ()


@pytest.mark.parametrize("key", ["optim.min_lr", "optim.weight_decay", "optim.warmup_steps"])
def test_numbers_that_must_not_be_negative(key: str) -> None:
    assert problems(with_value(key, 0)) == ()
    for bad in (-1, math.nan):
        said = f"{key} is {bad}: it must not be negative, at most 1,000,000,000,000,000"
        assert problems(with_value(key, bad)) == (said,)


@pytest.mark.parametrize("key", ["optim.beta1", "optim.beta2"])
def test_decays_of_running_means(key: str) -> None:
    for good in (0, 0.999):
        assert problems(with_value(key, good)) == ()
    for bad in (-0.1, 1, math.nan):
        assert problems(with_value(key, bad)) == (f"{key} is {bad}: it must be in [0, 1)",)


def test_a_rate_may_stay_the_same_but_not_rise() -> None:
    assert problems(with_value("optim.min_lr", 4e-4)) == ()
    assert problems(with_value("optim.min_lr", 5e-4)) == (
        "optim.min_lr 0.0005 is greater than optim.lr 0.0004: lower it",
    )
    for lr in (0.0, -1.0, math.nan):  # which is the only error
        (problem,) = problems(with_value("optim.lr", lr))
        assert problem.startswith(f"optim.lr is {lr}: ")


def test_a_decay_and_its_steps_belong_together() -> None:
    said = ("optim.schedule wsd and optim.decay_steps belong together: give both or neither",)
    assert problems(with_value("optim.schedule", "wsd")) == said
    for schedule in ("cosine", "linear", "constant"):
        assert problems(with_value("optim.schedule", schedule)) == ()
        args = dataclasses.replace(run(max_steps=9), optim=OptimArgs(schedule=schedule, decay_steps=3))
        assert problems(args) == said


def test_a_decay_must_fit_between_the_warm_up_and_the_last_step() -> None:
    def steps(decay_steps: int) -> int:
        optim = OptimArgs(schedule="wsd", warmup_steps=4, decay_steps=decay_steps)
        return total_steps(dataclasses.replace(run(max_steps=10), optim=optim), 2048, 10)

    assert steps(5) == 10
    with pytest.raises(InputError, match="optim.decay_steps 6 is more than the 5 steps between the run's warm-up and"):
        steps(6)


def test_muon_has_one_moment_of_a_hidden_matrix_and_adamw_two() -> None:
    config = named_config("tinyllama_1.1b")
    adamw, muon = OptimArgs(), OptimArgs(name="muon")
    assert (adamw.state_bytes(config), adamw.checkpoint_bytes(config)) == (8 * 1_100_048_384, 12 * 1_100_048_384)
    assert adamw.state_bytes(config) - muon.state_bytes(config) == 4 * 968_884_224
    assert adamw.checkpoint_bytes(config) - muon.checkpoint_bytes(config) == 4 * 968_884_224


def test_an_out_dir_is_no_place_in_a_home_that_nothing_looks_up() -> None:
    for out_dir in ("~", "~/runs/a", "~someone/a"):
        (problem,) = problems(dataclasses.replace(run(max_steps=9), out_dir=out_dir))
        assert problem == f"out_dir {out_dir} would be a folder of that name here: write the home folder's path out"
    assert problems(dataclasses.replace(run(max_steps=9), out_dir="runs/~a")) == ()


def data(**settings: Any) -> tuple[str, ...]:
    return problems(dataclasses.replace(run(max_steps=9), data=DataArgs(**settings)))


@pytest.mark.parametrize("weights", [(-1, None), (0, None), (0, 0), (math.inf, None), (math.nan, None), (1, -1)])
def test_a_weight_that_is_none(weights: tuple[float, float | None]) -> None:
    ramp = None if weights[1] is None else 1
    (problem,) = data(sources=[Source("packed", *weights)], ramp_tokens=ramp)
    last = weights[0] if weights[1] is None else weights[1]
    rule = "both must be finite, none negative and one above 0"
    assert problem == f"data.sources: packed has weight {weights[0]}, final_weight {last}: {rule}"


def test_sources_and_what_belongs_together() -> None:
    (problem,) = data()
    assert problem.startswith("data.sources is empty: give a recipe, --config FILE, or ")
    together = "data.ramp_tokens and a final_weight of a source belong together: give both or neither"
    assert data(sources=[Source("a", 1), Source("b", 0, 1)], ramp_tokens=1) == ()
    assert data(sources=[Source("a", 1), Source("b", 1, 0)], ramp_tokens=1) == ()
    assert data(sources=[Source("a", 1), Source("b", 0, 1)]) == (together,)
    assert data(sources=[Source("a", 1)], ramp_tokens=1) == (together,)
    for other in ("a", "a/", "./a", "b/../a"):
        (fault,) = data(sources=[Source("a"), Source("b"), Source(other)])
        assert fault == f"data.sources: {other} and a are one folder: give it once, with both weights' sum"
        validation = [ValidationSource("a"), ValidationSource("b"), ValidationSource(other)]
        (fault,) = data(sources=[Source("a")], validation=validation)
        assert fault == f"data.validation: {other} and a are one folder: give it once"
    assert data(sources=[Source("a")], document_mask=True, restart_positions=True) == ()
    assert data(sources=[Source("a")], document_mask=True) == ()
    (problem,) = data(sources=[Source("a")], restart_positions=True)
    assert problem.startswith("data.restart_positions is true and data.document_mask is not")
    for resume in ("auto", "never"):
        assert problems(run(max_steps=9, init_from="x", resume=resume)) == ()
    assert problems(run(max_steps=9, resume="some/path")) == ()
    (problem,) = problems(run(max_steps=9, init_from="x", resume="some/path"))
    assert problem.startswith("train.init_from and a path in train.resume are both given")


def test_wandb_must_be_there_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert problems(run(max_steps=9)) == ()
    for how in ("online", "offline"):
        args = dataclasses.replace(run(max_steps=9), log=LogArgs(wandb=how))  # type: ignore[arg-type]
        assert problems(args) == ("log.wandb needs wandb: pip install wandb, or give --log.wandb off",)


def test_blocks_are_compiled_on_a_gpu_unless_told() -> None:
    assert [TrainArgs().compiles(device) for device in ("cuda", "cpu")] == [True, False]
    assert [TrainArgs(compile=True).compiles(device) for device in ("cuda", "cpu")] == [True, True]
    assert [TrainArgs(compile=False).compiles(device) for device in ("cuda", "cpu")] == [False, False]


def test_lengths_that_are_whole_and_a_warm_up_that_just_ends() -> None:
    step = 1024 * 2048
    assert total_steps(run(max_tokens=3000 * step), 2048, 10) == 3000
    assert total_steps(run(max_tokens=3000 * step + 1), 2048, 10) == 3001
    assert total_steps(run(max_epochs=3), 2048, 1024 * 1000 - 1) == 2999
    assert total_steps(run(max_epochs=3), 2048, 1024 * 1000) == 3000
    assert total_steps(run(max_steps=2001), 2048, 10) == 2001


def test_what_a_run_says_of_itself(tmp_path: Any) -> None:
    args = PretrainArgs(data=DATA, optim=OptimArgs(lr=1.0, min_lr=0.5, warmup_steps=2), train=TrainArgs(max_steps=6))
    one = Run(args, args.model.resolve(), World(1, 1, 1), [], [], None, 1, {}, None)  # type: ignore[arg-type]
    assert one.tokens_per_step == 2_097_152
    assert one.origin == "a new run"
    assert one.resolved()["model"] == dataclasses.asdict(named_config("tinyllama_1.1b"))
    cosine = [0.5 + 0.25 * (1 + math.cos(math.pi * part / 3)) for part in range(4)]
    assert [one.lr_at(step) for step in range(6)] == pytest.approx([0.5, 1.0, *cosine])
    started = dataclasses.replace(args, train=dataclasses.replace(args.train, init_from="weights"))
    assert dataclasses.replace(one, args=started).origin == "a new run from the weights of weights"
    assert dataclasses.replace(one, args=started, resume=tmp_path).origin == f"resumed from {tmp_path}"
