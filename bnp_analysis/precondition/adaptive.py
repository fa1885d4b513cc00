"""What adaptive optimizers of torch divide their steps by, read from their state (T15)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.names import clean_name
from bnp_analysis.network.parameters import ParameterSpace
from bnp_analysis.network.snapshot import unwrap

_ADAPTIVE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad)


def optimizer_divisors(
    optimizer: torch.optim.Optimizer, space: ParameterSpace, model: nn.Module | None
) -> tuple[Tensor, dict[str, str]]:
    """`sqrt(v_hat) + eps` of every parameter, `(n,)` in float64 and 1 where there is none; and why there is none."""
    if not isinstance(optimizer, _ADAPTIVE):
        raise InvalidInputError(
            f"{type(optimizer).__name__} has no diagonal step matrix that is known here; Adam, AdamW, RMSprop and "
            "Adagrad have. Give its scales as a tensor (n,)"
        )
    found: dict[str, Tensor] = {}
    uncovered = dict.fromkeys(space.names, "not among the optimizer's parameters")
    for parameter, group, name in _named_parameters(optimizer, model):
        if name not in space:
            continue
        listed = space.canonical(name)
        if parameter.shape != space.shapes[listed]:
            raise InvalidInputError(
                f"{name} has shape {tuple(parameter.shape)} in the optimizer, {tuple(space.shapes[listed])} in the "
                "risk: they belong to different models"
            )
        uncovered[listed] = "the optimizer has not stepped it"
        state = optimizer.state.get(parameter)
        if state and float(state["step"]) > 0:
            found[listed] = _divisor(optimizer, group, state)
            del uncovered[listed]
    if not found:
        raise InvalidInputError(
            f"{type(optimizer).__name__} holds no state for any parameter of the risk: it has made no step, or belongs "
            "to another model"
        )
    every = {n: found.get(n, torch.ones(shape, dtype=torch.float64)).cpu() for n, shape in space.shapes.items()}
    return space.flatten(every).to(space.device), uncovered


def _divisor(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    """What the optimizer divides a parameter's step by."""
    if isinstance(optimizer, torch.optim.RMSprop):
        square = state["square_avg"]
        if group["centered"]:
            # In the state's own precision, as the optimizer does.
            square = square.addcmul(state["grad_avg"], state["grad_avg"], value=-1)
    elif isinstance(optimizer, torch.optim.Adagrad):
        square = state["sum"]
    else:
        name = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
        square = state[name].double() / (1 - float(group["betas"][1]) ** float(state["step"]))
    divisor: Tensor = square.detach().double().sqrt() + float(group["eps"])
    return divisor


def _named_parameters(
    optimizer: torch.optim.Optimizer, model: nn.Module | None
) -> list[tuple[Tensor, Mapping[str, Any], str]]:
    """Every parameter of the optimizer with its group and its name: by identity in `model`, else as it was given."""
    of = {} if model is None else {id(p): clean_name(n) for n, p in unwrap(model).named_parameters()}
    named: list[tuple[Tensor, Mapping[str, Any], str]] = []
    strangers = 0
    for group in optimizer.param_groups:
        given = group.get("param_names") or [None] * len(group["params"])
        for parameter, own in zip(group["params"], given, strict=True):
            name = of.get(id(parameter)) if model is not None else own
            if name is None:
                strangers += 1
            else:
                named.append((parameter, group, clean_name(name)))
    if not named:
        raise InvalidInputError(
            "the optimizer's parameters have no names: give model=, the module they belong to, or make the optimizer "
            "from model.named_parameters()"
            if model is None
            else f"none of the {strangers} parameters of the optimizer belongs to the given model"
        )
    return named
