"""What must not come in: each in one line, with nothing executed and nothing written."""

import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from limits import files_up_to
from models import CONFIG, given, weights

from tinyllama import InputError
from tinyllama.checkpoint import reader
from tinyllama.convert import hf_folder
from tinyllama.convert.verify import verify
from tinyllama.tokenizer import Tokenizer


class Evil:
    """Makes a folder where it is unpickled: beside the inputs, where every test looks."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder / "executed"),))


def hf(path, **changes):
    hf_folder.write(path, given())
    (path / "export.json").unlink()  # as if another wrote it
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


def without(key):
    def change(path):
        from safetensors.torch import load_file, save_file

        state = load_file(hf(path) / "model.safetensors")
        save_file({k: v for k, v in state.items() if k != key}, path / "model.safetensors")

    return change


def narrower(path):
    from safetensors.torch import load_file, save_file

    state = load_file(hf(path) / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"][:-1].clone()
    save_file(state, path / "model.safetensors")


def truncated(path):
    file = hf(path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(path):
    (hf(path) / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil(path.parent)}, path / "pytorch_model.bin")


def no_state_dict(path):
    (hf(path) / "model.safetensors").unlink()
    torch.save([torch.ones(1)], path / "pytorch_model.bin")


def binned(content):
    def change(path):
        (hf(path) / "model.safetensors").unlink()
        torch.save(content, path / "pytorch_model.bin")

    return change


def int8_norm(path):
    from safetensors.torch import load_file, save_file

    state = load_file(hf(path) / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.int8)
    save_file(state, path / "model.safetensors")


def infinite_norm(path):
    from safetensors.torch import load_file, save_file

    state = load_file(hf(path) / "model.safetensors")
    state["model.norm.weight"][3] = torch.inf
    save_file(state, path / "model.safetensors")


def absent_shard(path):
    names = {"model.norm.weight": "model-00001-of-00002.safetensors", "lm_head.weight": "../../etc/passwd"}
    (hf(path) / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def small_vocabulary(path):
    hf(path, vocab_size=448)
    shutil.copy(path.parent / "big.model", path / "tokenizer.model")


REFUSED = {
    "no checkpoint": (lambda path: path.mkdir(), "no config.json"),
    "a missing tensor": (without("model.norm.weight"), "model.norm.weight is missing"),
    "another shape": (narrower, "model.norm.weight has shape [63], the model's sizes make [64]"),
    "cut short": (truncated, "model.safetensors cannot be read"),
    "no weights": (lambda path: (hf(path) / "model.safetensors").unlink(), "has no model.safetensors"),
    "a pickle with code": (pickled, "is not executed"),
    "no state dict": (no_state_dict, "is not a state dict"),
    "a number for a name": (binned({1: torch.ones(1)}), "is not a state dict"),
    "a tensor without data": (binned({"model.norm.weight": torch.ones(64, device="meta")}), "is not a state dict"),
    "a sparse tensor": (binned({"model.norm.weight": torch.ones(64).to_sparse()}), "is not a state dict"),
    "whole numbers": (int8_norm, "has model.norm.weight in torch.int8: give float32, bfloat16 or float16"),
    "an infinite weight": (
        infinite_norm,
        "hf in float32 are not finite: give other weights, or another --dtype",
    ),
    "a shard that is not there": (absent_shard, "hf/passwd is missing, which model.safetensors.index.json names"),
    "a broken mark": (
        lambda path: (hf(path) / "export.json").write_text('{"files": [], "model": 5}'),
        "export.json is",
    ),
    "a million layers": (
        lambda path: hf(path, num_hidden_layers=10**6),
        "config.json: model.n_layer is 1000000: it must be",
    ),
    "too many layers": (lambda path: hf(path, num_hidden_layers=999), "has 2 layers, the model's sizes 999"),
    "half a layer": (lambda path: hf(path, num_hidden_layers=2.5), "num_hidden_layers is 2.5: give a whole number"),
    "a negative size": (lambda path: hf(path, num_attention_heads=-8), "num_attention_heads is -8"),
    "an endless base": (lambda path: hf(path, rope_theta=float("inf"), rope_parameters=None), "rope_theta inf is not"),
    "no base": (lambda path: hf(path, rope_theta="big", rope_parameters=None), "rope_theta big is not a whole number"),
    "no epsilon": (lambda path: hf(path, rms_norm_eps=float("nan")), "model.norm_eps is nan"),
    "no JSON": (lambda path: (hf(path) / "config.json").write_text("{"), "cannot be read as JSON"),
    "no sizes": (lambda path: (hf(path) / "config.json").write_text('{"model_type": "llama"}'), "num_attention_heads"),
    "Mistral": (
        lambda path: hf(path, architectures=["MistralForCausalLM"], model_type="mistral"),
        "architecture MistralForCausalLM (model_type mistral) is not supported",
    ),
    "llama3 RoPE": (
        lambda path: hf(path, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}),
        "RoPE type llama3 is not supported",
    ),
    "old yarn RoPE": (
        lambda path: hf(path, rope_parameters=None, rope_scaling={"type": "yarn", "factor": 8.0}),
        "RoPE type yarn is not supported",
    ),
    "biases": (lambda path: hf(path, attention_bias=True), "attention_bias is not supported"),
    "quantized": (lambda path: hf(path, quantization_config={"bits": 4}), "quantization_config is not supported"),
    "wide heads": (lambda path: hf(path, head_dim=16), "head_dim 16 x 8 heads is not hidden_size 64"),
    "biases of the MLP": (lambda path: hf(path, mlp_bias=True), "mlp_bias is not supported"),
    "half rotated heads": (lambda path: hf(path, partial_rotary_factor=0.5), "partial_rotary_factor is not supported"),
    "half rotated heads, newer": (
        lambda path: hf(path, rope_parameters={"rope_theta": 5000, "partial_rotary_factor": 0.5}),
        "partial_rotary_factor is not supported",
    ),
    "GELU": (lambda path: hf(path, hidden_act="gelu"), "hidden_act gelu is not supported"),
    "another type": (lambda path: hf(path, model_type="mistral"), "(model_type mistral) is not supported"),
    "another head": (
        lambda path: hf(path, architectures=["LlamaForSequenceClassification"]),
        "architecture LlamaForSequenceClassification (model_type llama) is not supported",
    ),
    "no layer": (lambda path: hf(path, num_hidden_layers=0), "num_hidden_layers is 0: give a whole number above 0"),
    "true layers": (lambda path: hf(path, num_hidden_layers=True), "num_hidden_layers is True"),
    **{
        f"a text for {key}": (lambda path, key=key: hf(path, **{key: "96"}), f"{key} is '96': give a whole number")
        for key in ("hidden_size", "intermediate_size", "num_key_value_heads", "max_position_embeddings")
    },
    "no activation": (lambda path: hf(path, hidden_act=None), "hf/config.json: hidden_act is None: give silu"),
    "a null epsilon": (lambda path: hf(path, rms_norm_eps=None), "hf/config.json: rms_norm_eps is None: give a number"),
    "a whole epsilon": (lambda path: hf(path, rms_norm_eps=1), "rms_norm_eps is 1: give a number with a point"),
    "no context": (
        lambda path: hf(path, max_position_embeddings=None),
        "hf/config.json: max_position_embeddings is None: give a whole number above 0",
    ),
    "0 for no biases": (lambda path: hf(path, attention_bias=0), "attention_bias is 0: give false"),
    "null for no biases": (lambda path: hf(path, mlp_bias=None), "mlp_bias is None: give false"),
    "heads of 0": (lambda path: hf(path, head_dim=0), "head_dim 0 x 8 heads is not hidden_size 64"),
    "heads of 8.0": (lambda path: hf(path, head_dim=8.0), "head_dim is 8.0: give a whole number or null"),
    "a text for eos": (lambda path: hf(path, eos_token_id="2"), "eos_token_id is '2': give a whole number, a list of"),
    "texts for eos": (lambda path: hf(path, eos_token_id=[2, "3"]), "eos_token_id is [2, '3']: give a whole number"),
    "a text for bos": (lambda path: hf(path, bos_token_id="x"), "bos_token_id is 'x': give a whole number or null"),
    "an unknown dtype": (lambda path: hf(path, dtype="junk"), "dtype is 'junk': give float32, bfloat16 or float16"),
    "no dtype of torch's": (lambda path: hf(path, torch_dtype="zeros", dtype=None), "torch_dtype is 'zeros': give"),
    "nothing to quantize": (lambda path: hf(path, quantization_config={}), "quantization_config is not supported"),
    "a list for RoPE": (lambda path: hf(path, rope_parameters=[]), "rope_parameters is []: give an object or null"),
    # what we do not read, transformers does
    "a text for a cache": (
        lambda path: hf(path, use_cache="x"),
        "hf: transformers cannot use it (Validation error for",
    ),
    "a tuple of logits": (lambda path: hf(path, return_dict=False), "hf: transformers cannot use it ("),
    "too large a tokenizer": (small_vocabulary, "the tokenizer beside it has 600 pieces, the model 448"),
}


@pytest.fixture(scope="module")
def big_tokenizer(tmp_path_factory):
    import sentencepiece

    path = tmp_path_factory.mktemp("big") / "big.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(Path(__file__).read_text().splitlines()),
            model_writer=file,
            model_type="bpe",
            vocab_size=600,
            byte_fallback=True,
            minloglevel=2,
        )
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_cannot_come_in_is_refused_in_one_line(case, tmp_path, script, big_tokenizer):
    make, problem = REFUSED[case]
    shutil.copy(big_tokenizer, tmp_path / "big.model")
    make(tmp_path / "hf")
    code, out, err = script("convert_hf_checkpoint", tmp_path / "hf", tmp_path / "ours")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ")
    assert problem in err
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "big.model"}


def test_what_transformers_refuses_of_our_own_making_keeps_its_traceback(tmp_path):
    folder = hf(tmp_path / "hf", use_cache="x")
    with pytest.raises(InputError, match="transformers cannot use it"):
        verify(folder, given(), torch.float32, is_foreign=True)
    with pytest.raises(StrictDataclassFieldValidationError):
        verify(folder, given(), torch.float32)


def test_an_upstream_file_that_cannot_be_is_refused_in_one_line(tmp_path, script, step_dir):
    state = weights()
    torch.save({"model": state, "hook": Evil(tmp_path)}, tmp_path / "evil.pth")
    torch.save({k: v for k, v in state.items() if "w2" not in k}, tmp_path / "missing.pth")
    torch.save(state, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    (tmp_path / "text.pth").write_text("no pickle")
    torch.save([1], tmp_path / "list.pth")
    torch.save({1: torch.ones(1), "transformer.wte.weight": torch.ones(2).to("meta")}, tmp_path / "numbers.pth")
    ln_f = "transformer.ln_f.weight"
    torch.save(state | {ln_f: state[ln_f].to(torch.int8)}, tmp_path / "int8.pth")
    broken = tmp_path / "run/checkpoints/step-00000012"
    shutil.copytree(step_dir, broken)
    (broken / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path)))
    (broken / "state.json").write_text(json.dumps(reader.read_state(step_dir)))  # without hashes, which would say so
    sizes = [f"--model.{k}={v}" for k, v in dataclasses.asdict(CONFIG).items() if k not in ("name", "tie_embeddings")]
    before = {path.name for path in tmp_path.iterdir()}
    for name, flags, problem in [
        ("evil.pth", sizes, "evil.pth cannot be loaded"),
        ("missing.pth", sizes, "transformer.h.0.mlp.swiglu.w2.weight is missing"),
        ("cut.pth", sizes, "cut.pth cannot be loaded"),
        ("text.pth", sizes, "text.pth cannot be loaded"),
        ("list.pth", sizes, "transformer.wte.weight is missing"),
        ("whole.pth", [], "does not say its model's sizes"),
        ("whole.pth", ["--model.name", "tinyllama_1.1b"], "whole.pth has 2 layers, the model's sizes 22"),
        ("whole.pth", [*sizes, "--model.n_layer", str(10**6)], "model.n_layer is 1000000: it must be"),
        ("whole.pth", [*sizes, "--model.n_layer", "999"], "has 2 layers, the model's sizes 999"),
        ("whole.pth", [*sizes, "--model.n_embd", str(10**12)], "parameters: lower the one that is too large"),
        ("whole.pth", [*sizes, "--model.norm_eps", "nan"], "model.norm_eps is nan"),
        ("numbers.pth", sizes, "transformer.wte.weight is missing"),
        ("int8.pth", sizes, "int8.pth has transformer.ln_f.weight in torch.int8"),
        ("whole.pth", ["--model.name", "tinyllama_2b"], "is not known"),
        (
            "whole.pth",
            [*sizes, "--model.tie_embeddings", "perhaps"],
            "model.tie_embeddings cannot be 'perhaps': expected bool",
        ),
        ("run", ["--model.n_layer", "3"], "says its model's sizes itself"),
        ("nothing.pth", sizes, "holds no complete checkpoint"),
        ("run", [], "holds no complete checkpoint"),
        ("run/checkpoints/step-00000012", [], "is not the metadata of a checkpoint of ours: it names"),
    ]:
        code, out, err = script("convert_lit_checkpoint", tmp_path / name, tmp_path / "hf", *flags)
        assert (code, out, err.count("\n")) == (2, "", 1), (name, err)
        assert err.startswith("error: ")
        assert problem in err
        assert {path.name for path in tmp_path.iterdir()} == before


def test_an_output_that_cannot_be_is_refused_in_one_line(tmp_path, script, step_dir):
    copied = shutil.copytree(step_dir, tmp_path / "run/checkpoints/step-00000012")
    (tmp_path / "file").write_text("mine")
    hf_folder.write(tmp_path / "hf", given())

    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = files()
    for name, source in [("convert_lit_checkpoint", copied), ("convert_hf_checkpoint", tmp_path / "hf")]:
        for output in (tmp_path / "file", tmp_path / "file/x", "/proc/x", tmp_path / ("x" * 300), "/", source):
            code, out, err = script(name, source, output)
            assert (code, out, err.count("\n"), err[:7]) == (2, "", 1, "error: "), (output, err)
    for output in (tmp_path, tmp_path / "file/x", "/proc/x", tmp_path / ("x" * 300), "/", "", copied / "state.json"):
        code, out, err = script("export_checkpoint", copied, output)
        assert (code, out, err.count("\n"), err[:7]) == (2, "", 1, "error: "), (output, err)
    assert files() == before


def test_a_name_that_safetensors_cannot_open_is_refused_in_one_line(tmp_path, script, step_dir):
    hf(tmp_path / "hf").rename(tmp_path / "hf\udcff")  # a byte that is no UTF-8
    for name, source, output, where, hint in [
        ("convert_lit_checkpoint", step_dir, "out\udcff", "out\\udcff", "give another folder"),
        ("convert_lit_checkpoint", step_dir, "\udcff/out", "\\udcff/out", "give another folder"),
        ("export_checkpoint", step_dir, "out\udcff", "out\\udcff", "give another file"),
        ("convert_hf_checkpoint", tmp_path / "hf\udcff", "out", "hf\\udcff/model.safetensors", "rename it"),
    ]:
        problem = f"{tmp_path}/{where}: its name is not UTF-8, and safetensors cannot open it: {hint}"
        assert script(name, source, tmp_path / output) == (2, "", f"error: {problem}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["hf\udcff"]


def test_a_disk_that_fills_up_leaves_nothing(small_disk, tmp_path, script, step_dir):
    if small_disk.resolve() != small_disk:
        pytest.skip("needs root: conversions resolve their paths, and that leads out of another namespace")
    hf_folder.write(tmp_path / "hf", given())
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(4_000_000))
    for name, source in [("convert_lit_checkpoint", step_dir), ("convert_hf_checkpoint", tmp_path / "hf")]:
        code, out, err = script(name, source, small_disk / "out")
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith(f"error: cannot write {small_disk}/out: No space left on device: ")
    code, out, err = script("export_checkpoint", step_dir, small_disk / "out.safetensors")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_a_disk_that_fills_up_at_any_file_leaves_the_earlier_conversion(tmp_path, script, step_dir, tokenizer_file):
    hf_folder.write(tmp_path / "hf", given(), Tokenizer(tokenizer_file))
    commands = [
        ("convert_lit_checkpoint", step_dir, tmp_path / "to_hf", "--tokenizer", tokenizer_file, "--no-verify"),
        ("convert_hf_checkpoint", tmp_path / "hf", tmp_path / "to_ours", "--no-verify"),
    ]

    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    for command in commands:
        assert script(*command)[0] == 0
        before = files()
        sizes = {path.name: len(content) for path, content in before.items() if command[2] in path.parents}
        for size in sorted(set(sizes.values())):
            with files_up_to(size - 1):
                code, out, err = script(*command)
            assert (code, out) == (2, ""), sizes
            assert err == f"error: cannot write {command[2]}: File too large: make room, or give another folder\n"
            assert files() == before
    assert {"tokenizer.json", "tokenizer.model", "model.safetensors", "export.json"} <= {path.name for path in before}


def test_tensors_that_are_damaged_are_refused_in_one_line(tmp_path, script, step_dir):
    copied = shutil.copytree(step_dir, tmp_path / "run/checkpoints/step-00000012")
    for file in copied.glob("*.distcp"):
        file.write_bytes(pickle.dumps(Evil(tmp_path)).ljust(file.stat().st_size, b"\0"))
    state = copied / "state.json"
    without_hashes = json.dumps(reader.read_state(copied))
    for name in ("convert_lit_checkpoint", "export_checkpoint"):
        code, out, err = script(name, copied, tmp_path / "out")
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith(f"error: {copied} is damaged (__0_0.distcp does not match its hash): ")
    state.write_text(without_hashes)
    for name in ("convert_lit_checkpoint", "export_checkpoint"):
        code, out, err = script(name, copied, tmp_path / "out")
        assert (code, out) == (2, ""), err
        assert err.splitlines()[-1].startswith(f"error: {copied} cannot be read (")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
