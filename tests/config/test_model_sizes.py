import pytest

from tinyllama import InputError
from tinyllama.config.model import NAMED_CONFIGS, ModelConfig, named_config


def test_parameters_of_the_named_sizes() -> None:
    assert named_config("tinyllama_1.1b").num_params() == 1_100_048_384
    assert named_config("tinyllama_1.1b").num_params(embedding=False) == 1_100_048_384 - 32000 * 2048
    assert set(NAMED_CONFIGS) == {"tinyllama_1.1b", "tinyllama_120m", "quickstart"}


@pytest.mark.parametrize(("vocab_size", "rows"), [(32000, 32000), (32001, 32064), (1, 64), (64, 64)])
def test_vocabulary_is_padded(vocab_size: int, rows: int) -> None:
    assert named_config("tinyllama_1.1b", vocab_size=vocab_size).padded_vocab_size == rows


def test_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'tinyllama_1b' is not known; did you mean tinyllama_1\.1b\?"):
        named_config("tinyllama_1b")


def test_all_faults_of_a_config_are_reported_together() -> None:
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
