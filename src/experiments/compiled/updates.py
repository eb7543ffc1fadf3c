"""The update rules of torch's optimizers as pure functions of tensors, for tracing."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from experiments.errors import UsageError


class Update(NamedTuple):
    """An optimizer's update rule in four functions.

    init_state: (group, parameter) -> the initial state that torch's optimizer keeps for it.
    scalars: (group, step count with the next step) -> all numbers that change between steps.
    apply: (group, parameter, gradient, state, scalars) -> the updated parameter and state.
    constants: (group) -> the options of the group that `apply` has as constants, by name.
    """

    init_state: Callable[[dict[str, Any], Tensor], dict[str, Tensor]]
    scalars: Callable[[dict[str, Any], int], tuple[float, ...]]
    apply: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    constants: Callable[[dict[str, Any]], dict[str, object]]


def sgd_state(group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
    """The momentum buffer, if momentum is not zero."""
    return {"momentum_buffer": torch.zeros_like(p)} if group["momentum"] != 0 else {}


def sgd_scalars(group: dict[str, Any], count: int) -> tuple[float, ...]:
    """lr and momentum, both of which a scheduler may change."""
    return group["lr"], group["momentum"]


def sgd(
    group: dict[str, Any], p: Tensor, grad: Tensor, state: dict[str, Tensor], scalars: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The update of torch.optim.SGD (formulas in its documentation), without dampening."""
    lr, momentum = scalars.unbind()
    if group["weight_decay"] != 0:
        grad = grad + group["weight_decay"] * p
    if state:
        buffer = momentum * state["momentum_buffer"] + grad
        grad = grad + momentum * buffer if group["nesterov"] else buffer
        state = {"momentum_buffer": buffer}
    return p - lr * grad, state


def sgd_constants(group: dict[str, Any]) -> dict[str, object]:
    """Weight decay, Nesterov's formula, and whether there is momentum."""
    return {
        "weight_decay": group["weight_decay"],
        "nesterov": group["nesterov"],
        "momentum": group["momentum"] != 0,
    }


def adam_state(group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
    """Both moments and the step count."""
    count = torch.zeros((), device=p.device)
    return {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def adam_scalars(group: dict[str, Any], count: int) -> tuple[float, ...]:
    """lr / first bias correction, 1 - beta1, sqrt of the second bias correction, weight decay."""
    beta1, beta2 = group["betas"]
    decay = group["lr"] * group["weight_decay"]
    return group["lr"] / (1 - beta1**count), 1 - beta1, math.sqrt(1 - beta2**count), decay


def adam(
    group: dict[str, Any], p: Tensor, grad: Tensor, state: dict[str, Tensor], scalars: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The update of torch.optim.Adam and AdamW (formulas in their documentation)."""
    lr, weight1, correction, decay = scalars.unbind()
    beta2 = group["betas"][1]
    if group["weight_decay"] != 0:
        if group["decoupled_weight_decay"]:
            p = p - decay * p
        else:
            grad = grad + group["weight_decay"] * p
    mean = state["exp_avg"].lerp(grad, weight1)
    square = beta2 * state["exp_avg_sq"] + (1 - beta2) * grad * grad
    p = p - lr * mean / (square.sqrt() / correction + group["eps"])
    return p, {"step": state["step"] + 1, "exp_avg": mean, "exp_avg_sq": square}


def adam_constants(group: dict[str, Any]) -> dict[str, object]:
    """beta2, eps, and weight decay unless it is decoupled: then only whether there is any."""
    decay = group["weight_decay"]
    return {
        "betas": group["betas"][1],
        "eps": group["eps"],
        "weight_decay": decay != 0 if group["decoupled_weight_decay"] else decay,
    }


UPDATES: dict[type[Optimizer], Update] = {
    SGD: Update(sgd_state, sgd_scalars, sgd, sgd_constants),
    Adam: Update(adam_state, adam_scalars, adam, adam_constants),
    AdamW: Update(adam_state, adam_scalars, adam, adam_constants),
}
# options of torch's optimizers that the functions above do not implement
UNSUPPORTED = ("amsgrad", "dampening", "differentiable", "maximize")


def find_update(opt: Optimizer) -> Update:
    """The update rule of an optimizer. Raises UsageError if it is not supported."""
    kind = type(opt)
    if kind not in UPDATES:
        raise UsageError(
            f"optimizer._target_={kind.__module__}.{kind.__qualname__}: trainer.compile=true "
            "supports torch.optim's SGD, Adam and AdamW; use one of them or trainer.compile=false"
        )
    if len(opt.param_groups) > 1:
        raise UsageError(
            f"optimizer: trainer.compile=true supports one parameter group, not "
            f"{len(opt.param_groups)}; use one group or trainer.compile=false"
        )
    for name in UNSUPPORTED:
        if opt.param_groups[0].get(name):
            raise UsageError(
                f"optimizer.{name}={opt.param_groups[0][name]}: trainer.compile=true does not "
                "support it; remove it or use trainer.compile=false"
            )
    return UPDATES[kind]


def optimizer_states(
    opt: Optimizer, update: Update, parameters: list[Tensor]
) -> list[dict[str, Tensor]]:
    """The optimizer's state of each parameter, initialized in `opt` if it has none yet."""
    for p in parameters:
        if not opt.state[p]:
            opt.state[p].update(update.init_state(opt.param_groups[0], p))
    return [dict(opt.state[p]) for p in parameters]
