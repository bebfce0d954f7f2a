"""The optimizers: their settings, what a further one must do, and clipping."""

import pytest
import torch

from tinyllama import InputError
from tinyllama.config.args import OptimArgs
from tinyllama.config.model import ModelConfig
from tinyllama.model import GPT
from tinyllama.train import optim
from tinyllama.train.optim import build_optimizer, check_optimizer, clip, local_gradients


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
    optimizer = torch.optim.SGD(model.parameters())
    norm = torch.tensor(26.0).sqrt()
    clip(optimizer, gradients, norm, 10.0)
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[3.0, 4.0]]
    clip(optimizer, gradients, norm, 0.5)
    scale = 0.5 / 26**0.5
    assert model.weight.grad.tolist()[0] == pytest.approx([3 * scale, 4 * scale], rel=1e-6)
    assert model.bias.grad.tolist() == pytest.approx([scale], rel=1e-6)
    model.bias.grad = None
    assert len(local_gradients(model)) == 1


class Lion(torch.optim.Optimizer):
    """As somebody would add it (arXiv:2302.06675)."""

    found_inf: torch.Tensor

    def __init__(self, model: GPT, args: OptimArgs, dtype: torch.dtype) -> None:
        super().__init__(model.parameters(), {"lr": args.lr, "decay": args.weight_decay})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        for p in self.param_groups[0]["params"]:
            m = self.state[p].setdefault("momentum", torch.zeros_like(p))
            grad = torch.where(self.found_inf.bool(), m, p.grad)
            lr = self.param_groups[0]["lr"] * (1 - self.found_inf)
            p.mul_(1 - lr * self.param_groups[0]["decay"]).sub_(lr * (0.9 * m + 0.1 * grad).sign())
            m.lerp_(grad, 0.01)


class Heedless(Lion):
    """Ignores found_inf."""

    def step(self, closure: object = None) -> None:
        self.found_inf = torch.zeros(())
        super().step()


class HeedlessOfState(Lion):
    """Counts the steps that found_inf rejects."""

    def step(self, closure: object = None) -> None:
        super().step()
        for state in self.state.values():
            state["step"] = state.get("step", torch.zeros(())) + 1


class OfNumbers(Lion):
    """Keeps what no checkpoint holds."""

    def step(self, closure: object = None) -> None:
        super().step()
        for state in self.state.values():
            state["step"] = 3


class Late(Lion):
    """Makes its state in the first step that is accepted."""

    def step(self, closure: object = None) -> None:
        if not self.found_inf or self.state:
            super().step()


REFUSED = {
    Heedless: "changes model.lm_head.weight in a step that found_inf rejects",
    HeedlessOfState: "changes optimizer.step.lm_head.weight in a step that found_inf rejects",
    OfNumbers: "has no tensor in optimizer.step.lm_head.weight but 3: a checkpoint cannot hold it",
    Late: "does not make optimizer.momentum.lm_head.weight in a step that found_inf rejects",
}


@pytest.mark.parametrize("cls", REFUSED)
def test_an_optimizer_that_would_break_a_run_is_refused(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(optim.OPTIMIZERS, "mine", cls)
    with pytest.raises(InputError, match=f"^optim.name mine {REFUSED[cls]}"):
        check_optimizer(OptimArgs(name="mine"))


def test_an_optimizer_of_torch_that_is_not_fused_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"mine": lambda model, args, dtype: torch.optim.SGD(model.parameters(), lr=args.lr)}
    monkeypatch.setattr(optim, "OPTIMIZERS", mine)
    with pytest.raises(InputError, match=r"^optim.name mine cannot take found_inf \(.*\): give fused=True$"):
        check_optimizer(OptimArgs(name="mine"))


@pytest.mark.parametrize("name", [*optim.OPTIMIZERS, "of_a_test"])
def test_an_optimizer_that_obeys_is_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(optim.OPTIMIZERS, "of_a_test", Lion)
    check_optimizer(OptimArgs(name=name))


def test_an_unknown_optimizer_is_refused_with_those_there_are() -> None:
    known = " or ".join(optim.OPTIMIZERS)
    assert known.startswith("adamw or muon")
    with pytest.raises(InputError, match=f"^optim.name 'adam' is not known: choose {known}$"):
        check_optimizer(OptimArgs(name="adam"))
