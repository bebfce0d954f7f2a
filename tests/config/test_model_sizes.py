import dataclasses

import pytest

from tinyllama import InputError
from tinyllama.config.model import NAMED_CONFIGS, ModelConfig, named_config


def test_parameters_of_the_named_sizes() -> None:
    assert named_config("tinyllama_1.1b").num_params() == 1_100_048_384
    assert named_config("tinyllama_1.1b").num_hidden == 22 * (2048 * 2560 + 2048 * 2048 + 3 * 2048 * 5632)
    assert named_config("tinyllama_1.1b").num_params(embedding=False) == 1_100_048_384 - 32000 * 2048
    assert set(NAMED_CONFIGS) == {"tinyllama_1.1b", "tinyllama_120m", "tinyllama_10m", "quickstart"}
    assert named_config("tinyllama_10m").num_hidden == 6 * (384 * 640 + 384 * 384 + 3 * 384 * 1024) == 9_437_184
    assert named_config("tinyllama_10m").num_params() == 12_587_904


@pytest.mark.parametrize(("vocab_size", "rows"), [(32000, 32000), (32001, 32064), (1, 64), (64, 64)])
def test_vocabulary_is_padded(vocab_size: int, rows: int) -> None:
    assert named_config("tinyllama_1.1b", vocab_size=vocab_size).padded_vocab_size == rows


def test_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'tinyllama_1b' is not known; did you mean tinyllama_1\.1b\?"):
        named_config("tinyllama_1b")


def test_all_errors_of_a_config_are_reported_together() -> None:
    with pytest.raises(InputError) as caught:
        ModelConfig(name="x", n_head=7, n_query_groups=4)
    assert caught.value.args == (
        "model.n_embd 2048 is not a multiple of model.n_head 7",
        "model.n_head 7 is not a multiple of n_query_groups 4",
    )
    with pytest.raises(InputError, match="model.n_layer is 0: it must be greater than 0"):
        ModelConfig(name="x", n_layer=0)
    with pytest.raises(InputError, match="model.n_layer is 2.5: it must be a whole number"):
        ModelConfig(name="x", n_layer=2.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="make 9,007,200,223,717,376 parameters: lower the one"):
        ModelConfig(name="x", vocab_size=2**41)
    with pytest.raises(InputError, match="is 5: RoPE needs an even head size"):
        ModelConfig(name="x", n_embd=20, n_head=4, n_query_groups=4)


def test_the_named_sizes() -> None:
    # arXiv:2401.02385, table 1; norm_eps and RoPE's base are Llama 2's
    published = {
        "name": "tinyllama_1.1b",
        "block_size": 2048,
        "vocab_size": 32000,
        "padding_multiple": 64,
        "n_layer": 22,
        "n_head": 32,
        "n_query_groups": 4,
        "n_embd": 2048,
        "intermediate_size": 5632,
        "norm_eps": 1e-5,
        "rope_base": 10000,
        "rope_condense_ratio": 1,
        "tie_embeddings": False,
    }
    small = {"n_layer": 12, "n_head": 12, "n_query_groups": 1, "n_embd": 768, "intermediate_size": 2048}
    tiny = {"block_size": 256, "vocab_size": 2048, "n_layer": 4, "n_head": 4, "n_query_groups": 2, "n_embd": 128}
    tiny["intermediate_size"] = 384
    for name, changes in (("tinyllama_1.1b", {}), ("tinyllama_120m", small), ("quickstart", tiny)):
        assert dataclasses.asdict(named_config(name)) == published | {"name": name} | changes


def test_sizes_that_follow_from_others() -> None:
    config = named_config("tinyllama_1.1b")
    assert config.head_size == 64
    assert config.qkv_size == 2048 + 2 * 256
    tied = named_config("tinyllama_1.1b", tie_embeddings=True)
    assert tied.num_params() == tied.num_params(embedding=False) == config.num_params(embedding=False)


@pytest.mark.parametrize(
    "field",
    [field.name for field in dataclasses.fields(ModelConfig) if field.name not in ("name", "tie_embeddings")],
)
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_sizes_that_are_none(field: str, value: float) -> None:
    with pytest.raises(InputError) as caught:
        named_config("tinyllama_1.1b", **{field: value})
    most = {"n_layer": 1000, "block_size": 2**24}.get(field, 10**15)
    assert caught.value.args[0] == f"model.{field} is {value}: it must be greater than 0, at most {most:,}"
    with pytest.raises(InputError, match=f"model.{field} is {most + 1}: it must be greater than 0, at most {most:,}"):
        named_config("tinyllama_1.1b", **{field: most + 1})


def test_one_head_a_group_and_unknown_names() -> None:
    assert named_config("tinyllama_1.1b", n_query_groups=32).qkv_size == 3 * 2048
    with pytest.raises(
        InputError, match="'zzz' is not known; known names: tinyllama_1.1b, tinyllama_120m, tinyllama_10m"
    ):
        named_config("zzz")


def test_a_name_of_ones_own_needs_sizes() -> None:
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 64, "intermediate_size": 96}
    assert named_config("mine", **sizes) == ModelConfig("mine", **sizes)
    assert named_config("mine", **sizes, n_query_groups=2, tie_embeddings=True).n_query_groups == 2
    del sizes["n_embd"]
    with pytest.raises(InputError, match=r"'quickstar' is not known; did you mean quickstart\?; .* model.n_embd, too$"):
        named_config("quickstar", **sizes)
    wide = {"vocab_size": 64, "n_layer": 1, "n_head": 1, "n_query_groups": 1, "n_embd": 2}
    # 2 x 6 and 2 x 2 of attention, 6 a unit of the MLP, 6 of norms and 256 of tables: as many as are allowed, and more
    most = (10**13 - 12 - 4 - 6 - 256) // 6
    assert ModelConfig("x", **wide, intermediate_size=most).num_params() <= 10**13
    with pytest.raises(InputError, match=f"{278 + 6 * (most + 1):,} parameters"):
        ModelConfig("x", **wide, intermediate_size=most + 1)
