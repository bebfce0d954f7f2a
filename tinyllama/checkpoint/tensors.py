"""The tensors of a checkpoint, by the names that they are saved and loaded by."""

import torch


def materialize_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make the state that it makes only at its first step: a checkpoint is loaded into it before.

    It does so in a step that is rejected, and which therefore changes nothing. Collective, as a step is.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if all(optimizer.state[parameter] for parameter in parameters):
        return
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.found_inf = torch.ones((), device=parameters[0].device)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()


def named_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint by name, the very ones in use; the optimizer must have its state.

    There are no other entries: DCP would pickle them.
    """
    named = {}
    optimized = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert parameter in optimized, f"{name} is gathered: reshard the model before a checkpoint"
        named[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            named[f"optimizer.{key}.{name}"] = value
    return named
