import dataclasses
from typing import Any

import pytest

from tinyllama import InputError
from tinyllama.config.args import DataArgs, ModelArgs, OptimArgs, PretrainArgs, Source, TrainArgs, check
from tinyllama.config.model import ModelConfig, named_config
from tinyllama.train.run import gradient_accumulation, total_steps

DATA = DataArgs(sources=[Source("packed")])


def run(**train: Any) -> PretrainArgs:
    return PretrainArgs(data=DATA, train=TrainArgs(**train))


def test_model_args_have_every_field_of_the_config() -> None:
    assert [f.name for f in dataclasses.fields(ModelArgs)] == [f.name for f in dataclasses.fields(ModelConfig)]


def test_model_args_change_a_named_size() -> None:
    assert ModelArgs("tinyllama_120m", n_layer=3).resolve() == named_config("tinyllama_120m", n_layer=3)


def test_all_faults_are_reported_together() -> None:
    args = PretrainArgs(
        model=ModelArgs("nothing"),
        data=DataArgs(sources=[Source("a", weight=-1)]),
        train=TrainArgs(max_steps=1, max_tokens=1, micro_batch_size=0),
        optim=OptimArgs(lr=1e-4, min_lr=1e-3, beta2=1.0),
    )
    with pytest.raises(InputError) as caught:
        check(args)
    assert [fault.split(":")[0].split(" ")[0] for fault in caught.value.args] == [
        "model.name",
        "data.sources",
        "one",
        "train.micro_batch_size",
        "optim.min_lr",
        "optim.beta2",
    ]
    assert "optim.min_lr 0.001 is greater than optim.lr 0.0001: lower it" in caught.value.args


@pytest.mark.parametrize(
    ("train", "fault"),
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
def test_numbers_that_are_slips_of_the_hand(train: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        check(run(**train))


@pytest.mark.parametrize("train", [{}, {"max_steps": 1, "max_epochs": 1}])
def test_one_length_must_be_given(train: dict[str, int]) -> None:
    with pytest.raises(InputError, match="one of train.max_steps, train.max_tokens and train.max_epochs must be given"):
        check(run(**train))


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size", "accumulation"), [(1, 8, 128), (16, 8, 8), (16, 64, 1), (128, 8, 1)]
)
def test_accumulation_follows_the_world(world_size: int, micro_batch_size: int, accumulation: int) -> None:
    assert gradient_accumulation(TrainArgs(micro_batch_size=micro_batch_size), world_size) == accumulation


def test_a_batch_that_does_not_divide_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"1024 is not a multiple of 6 ranks x .* 8; nearest valid: 1008 or 1056"):
        gradient_accumulation(TrainArgs(), 6)
    with pytest.raises(InputError, match=r"nearest valid: 12$"):
        gradient_accumulation(TrainArgs(global_batch_size=4, micro_batch_size=6), 2)


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
