"""The steps of torch's optimizers as functions of tensors, which a graph can hold."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from experiments.errors import UsageError


class Update(NamedTuple):
    """An optimizer's step in three parts; all that changes between steps is in `numbers`.

    state: what torch's optimizer keeps of a parameter, as it begins.
    numbers: of the next step, from the parameter group and the count of steps with it.
    apply: a parameter and its state after the step, given both before it, its gradient and the
        numbers.
    """

    state: Callable[[dict[str, Any], Tensor], dict[str, Tensor]]
    numbers: Callable[[dict[str, Any], int], tuple[float, ...]]
    apply: Callable[..., tuple[Tensor, dict[str, Tensor]]]


def sgd_state(group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
    """The momentum buffer, where there is momentum."""
    return {"momentum_buffer": torch.zeros_like(p)} if group["momentum"] != 0 else {}


def sgd_numbers(group: dict[str, Any], count: int) -> tuple[float, ...]:
    """lr and momentum, both of which a scheduler may move."""
    return group["lr"], group["momentum"]


def sgd(
    group: dict[str, Any], p: Tensor, grad: Tensor, state: dict[str, Tensor], numbers: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The step of torch.optim.SGD (formulas in its documentation), without dampening."""
    lr, momentum = numbers.unbind()
    if group["weight_decay"] != 0:
        grad = grad + group["weight_decay"] * p
    if state:
        buffer = momentum * state["momentum_buffer"] + grad
        grad = grad + momentum * buffer if group["nesterov"] else buffer
        state = {"momentum_buffer": buffer}
    return p - lr * grad, state


def adam_state(group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
    """Both moments and the count of steps."""
    count = torch.zeros((), device=p.device)
    return {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def adam_numbers(group: dict[str, Any], count: int) -> tuple[float, ...]:
    """lr over the first bias correction, 1 - beta1, root of the second correction, decay."""
    beta1, beta2 = group["betas"]
    decay = group["lr"] * group["weight_decay"]
    return group["lr"] / (1 - beta1**count), 1 - beta1, math.sqrt(1 - beta2**count), decay


def adam(
    group: dict[str, Any], p: Tensor, grad: Tensor, state: dict[str, Tensor], numbers: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The step of torch.optim.Adam and AdamW (formulas in their documentation)."""
    lr, weight1, correction, decay = numbers.unbind()
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


UPDATES: dict[type[Optimizer], Update] = {
    SGD: Update(sgd_state, sgd_numbers, sgd),
    Adam: Update(adam_state, adam_numbers, adam),
    AdamW: Update(adam_state, adam_numbers, adam),
}
# keys of torch's optimizers that change the step in ways which are not written down above
UNKNOWN = ("amsgrad", "dampening", "differentiable", "maximize")


def update_of(opt: Optimizer) -> Update:
    """The compiled form of an optimizer's step. Raises UsageError where there is none."""
    kind = type(opt)
    if kind not in UPDATES:
        raise UsageError(
            f"optimizer._target_={kind.__module__}.{kind.__qualname__}: trainer.compile=true "
            "knows torch.optim's SGD, Adam and AdamW; use one of them or trainer.compile=false"
        )
    if len(opt.param_groups) > 1:
        raise UsageError(
            f"optimizer: trainer.compile=true takes one group of parameters, not "
            f"{len(opt.param_groups)}; give it one or use trainer.compile=false"
        )
    for name in UNKNOWN:
        if opt.param_groups[0].get(name):
            raise UsageError(
                f"optimizer.{name}={opt.param_groups[0][name]}: trainer.compile=true does not "
                "know it; leave it out or use trainer.compile=false"
            )
    return UPDATES[kind]
