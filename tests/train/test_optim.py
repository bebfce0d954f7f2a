"""The optimizer: its settings, and clipping."""

import pytest
import torch

from tinyllama.config.args import OptimArgs
from tinyllama.config.model import ModelConfig
from tinyllama.model import GPT
from tinyllama.train.optim import build_optimizer, clip, local_gradients


def test_the_optimizer_has_every_setting_and_every_parameter() -> None:
    sizes = {"block_size": 8, "vocab_size": 64, "n_layer": 2, "n_head": 2, "n_query_groups": 1, "n_embd": 16}
    model = GPT(ModelConfig("tiny", **sizes, intermediate_size=24))  # type: ignore[arg-type]
    args = OptimArgs(lr=0.5, beta1=0.25, beta2=0.75, weight_decay=0.125)
    (group,) = build_optimizer(model, args).param_groups  # one: norms and embeddings decay too, as upstream
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in model.parameters()}
    found = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "fused")}
    assert found == {"lr": 0.5, "betas": (0.25, 0.75), "eps": 1e-8, "weight_decay": 0.125} | {
        "amsgrad": False,
        "maximize": False,
        "fused": True,  # the one that skips a step on the device
    }


def test_clipping_scales_what_the_optimizer_sees() -> None:
    model = torch.nn.Linear(2, 1)
    model(torch.tensor([[3.0, 4.0]])).sum().backward()  # gradients 3, 4 and 1
    gradients = local_gradients(model)
    norm = torch.tensor(26.0).sqrt()
    clip(gradients, norm, 10.0)
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[3.0, 4.0]]
    clip(gradients, norm, 0.5)
    scale = 0.5 / 26**0.5
    assert model.weight.grad.tolist()[0] == pytest.approx([3 * scale, 4 * scale], rel=1e-6)
    assert model.bias.grad.tolist() == pytest.approx([scale], rel=1e-6)
    model.bias.grad = None
    assert len(local_gradients(model)) == 1
