"""A model that was changed is never exported, nor imported, as the Llama that it is no more."""

import dataclasses
from pathlib import Path

import pytest
import torch
from models import CONFIG, difference, given, llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tinyllama import InputError, model
from tinyllama.convert import hf_folder, layout, native, verify
from tinyllama.convert.weights import open_weights
from tinyllama.model import GPT, CausalSelfAttention, RMSNorm, SwiGLU, init_weights


class Normed(CausalSelfAttention):
    """Attention whose queries have a norm with a weight."""

    def __init__(self, config, ops=model.OPS):
        super().__init__(config, ops)
        self.norm_q = RMSNorm(config, ops)

    def forward(self, x, *rest):
        return super().forward(self.norm_q(x)[0], *rest)


class Wide(SwiGLU):
    """An MLP of twice the width."""

    def __init__(self, config, ops=model.OPS):
        super().__init__(config, ops)
        self.w1, self.w2 = (torch.nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=False) for _ in "12")
        self.w3 = torch.nn.Linear(2 * config.intermediate_size, config.n_embd, bias=False)


class Biased(CausalSelfAttention):
    """Attention whose output has a bias."""

    def __init__(self, config, ops=model.OPS):
        super().__init__(config, ops)
        self.proj = torch.nn.Linear(config.n_embd, config.n_embd, bias=True)


class Bare(CausalSelfAttention):
    """Attention that does not project what it has gathered."""

    def __init__(self, config, ops=model.OPS):
        super().__init__(config, ops)
        self.proj = torch.nn.Identity()


class Scaled(CausalSelfAttention):
    """Attention whose result is halved: other values, and the same parameters."""

    def forward(self, *args):
        return super().forward(*args) / 2


CHANGES = {
    "QK-norm": (Normed, "it has transformer.h.0.attn.norm_q.weight, which a Llama has not; "),
    "width": (Wide, "its transformer.h.0.mlp.swiglu.w1.weight has shape [192, 64], a Llama's [96, 64]; "),
    "bias": (Biased, "it has transformer.h.0.attn.proj.bias, which a Llama has not; "),
    "no projection": (Bare, "it lacks transformer.h.0.attn.proj.weight; "),
}


def changed_checkpoint(change: type, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of model.py as it is after ``change``, which stays until the test ends."""
    monkeypatch.setattr(model, change.__mro__[1].__name__, change)
    changed = GPT(CONFIG)
    init_weights(changed, 1)
    return native.write(folder, given(changed.state_dict()))


@pytest.mark.parametrize(("change", "problem"), CHANGES.values(), ids=CHANGES)
def test_a_model_with_other_parameters_is_not_exported(change, problem, script, tmp_path, monkeypatch):
    hf_folder.write(tmp_path / "llama", given())
    step_dir = changed_checkpoint(change, tmp_path / "changed", monkeypatch)
    for flags in ((), ("--verify",), ("--no-verify",)):
        code, out, err = script("convert_lit_checkpoint", step_dir, tmp_path / "hf", *flags)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith(f"error: the model of tinyllama/model.py is not transformers' Llama: {problem}")
        assert "change the table in tinyllama/convert/layout.py too" in err
    code, out, err = script("convert_hf_checkpoint", tmp_path / "llama", tmp_path / "ours", "--no-verify")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert problem in err
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "changed"}  # nothing was written

    code, _, err = script("export_checkpoint", step_dir, tmp_path / "model.safetensors")
    assert code == 0, err
    with torch.device("meta"):
        names = GPT(CONFIG).state_dict().keys()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == names


def test_a_model_that_computes_something_else_is_not_exported(script, tmp_path, monkeypatch):
    hf_folder.write(tmp_path / "hf", given())
    before = (tmp_path / "hf/model.safetensors").read_bytes()
    step_dir = changed_checkpoint(Scaled, tmp_path / "changed", monkeypatch)
    code, out, err = script("convert_lit_checkpoint", step_dir, tmp_path / "hf")
    assert (code, err) == (1, f"{tmp_path / 'hf'} is not written: the conversion is wrong\n")
    assert out.startswith("verify: max |logit difference| to transformers ")
    assert (tmp_path / "hf/model.safetensors").read_bytes() == before
    code, _, err = script("convert_hf_checkpoint", tmp_path / "hf", tmp_path / "ours")
    assert (code, err) == (1, f"{tmp_path / 'ours'} is not written: the conversion is wrong\n")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "changed"}
    code, out, _ = script("convert_lit_checkpoint", step_dir, tmp_path / "hf", "--no-verify")  # who says so
    assert (code, out) == (0, f"{step_dir} -> {tmp_path / 'hf'}\n")


def test_a_setting_that_a_llama_has_not_is_not_exported(monkeypatch, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Capped(layout.ModelConfig):
        softcap: float = 0.0

    sizes = dataclasses.asdict(CONFIG)
    layout.check_model(Capped(**sizes))
    with pytest.raises(InputError, match=r"it has model\.softcap 30\.0, which a Llama has not: "):
        layout.check_model(Capped(**sizes, softcap=30.0))


@pytest.mark.parametrize("tie", [False, True])
def test_the_shapes_of_a_llama_are_those_of_transformers(tie):
    config = dataclasses.replace(CONFIG, tie_embeddings=tie)
    theirs = {name: tuple(tensor.shape) for name, tensor in llama(config).state_dict().items()}
    if tie:
        assert theirs.pop("lm_head.weight") == theirs["model.embed_tokens.weight"]
    assert layout.hf_shapes(config) == theirs


def test_verification_names_parameters_that_transformers_does_not_find(tmp_path):
    hf_folder.write(tmp_path / "hf", given())
    file = tmp_path / "hf/model.safetensors"
    whole = load_file(file)
    norm = "model.layers.0.input_layernorm.weight"
    for kind, changed in {
        "missing_keys": {name: tensor for name, tensor in whole.items() if name != norm},
        "unexpected_keys": whole | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)},
        "mismatched_keys": whole | {norm: torch.ones(8)},
    }.items():
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(verify.VerificationError, match=f"transformers reports {kind} in .*model.layers.0"):
            verify.verify(tmp_path / "hf", given(), torch.float32)
    save_file(whole, file, {"format": "pt"})
    assert difference(tmp_path / "hf") <= 1e-5
    assert open_weights(tmp_path / "hf").config == CONFIG
