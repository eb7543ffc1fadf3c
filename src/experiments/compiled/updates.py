"""The update rules of torch's optimizers as pure functions of tensors, for tracing."""

import math
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
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
    for group in opt.param_groups:
        for name in UNSUPPORTED:
            if group.get(name):
                raise UsageError(
                    f"optimizer.{name}={group[name]}: trainer.compile=true does not support it; "
                    "remove it or use trainer.compile=false"
                )
    return UPDATES[kind]


class GroupedUpdate:
    """The update rule of an optimizer with the options of each of its parameter groups.

    Raises UsageError if it is not supported.
    """

    def __init__(self, opt: Optimizer) -> None:
        self.opt, self.update = opt, find_update(opt)
        self.constants = self.constants_now()

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups with their options of now."""
        return self.opt.param_groups

    def constants_now(self) -> list[dict[str, object]]:
        """The options of each group that the graph has as constants, by name."""
        return [self.update.constants(group) for group in self.groups]

    def check_constants(self) -> None:
        """Raise UsageError if an option has changed that the graph has as a constant."""
        now = self.constants_now()
        if now == self.constants:
            return
        for before, after in zip_longest(self.constants, now):
            if before != after:
                raise UsageError(
                    f"optimizer: trainer.compile=true has {before} as constants, which became "
                    f"{after}; use trainer.compile=false"
                )

    def lrs(self) -> list[float]:
        """The learning rate of each group."""
        return [group["lr"] for group in self.groups]

    def scalars(self, count: int) -> tuple[float, ...]:
        """All numbers that change between steps, of one group after the other. count: of steps,
        with the next one.
        """
        of_groups = (self.update.scalars(group, count) for group in self.groups)
        return tuple(chain.from_iterable(of_groups))

    def group_numbers(self, parameters: Sequence[Tensor]) -> list[int]:
        """The number of the group of each parameter."""
        numbers = {p: i for i, group in enumerate(self.groups) for p in group["params"]}
        return [numbers[p] for p in parameters]

    def states(self, parameters: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """The optimizer's state of each parameter, initialized if it has none yet."""
        for p, number in zip(parameters, self.group_numbers(parameters), strict=True):
            if not self.opt.state[p]:
                self.opt.state[p].update(self.update.init_state(self.groups[number], p))
        return [dict(self.opt.state[p]) for p in parameters]

    def apply(
        self,
        parameters: Sequence[Tensor],
        numbers: Sequence[int],
        grads: Sequence[Tensor | None],
        states: Sequence[dict[str, Tensor]],
        scalars: Tensor,
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """The updated parameters and states.

        numbers: of each parameter's group. grads: None if the loss does not depend on it. scalars:
        as from `scalars`, float32 (groups * n,)
        """
        several = len(self.groups) > 1
        of_group = scalars.view(len(self.groups), -1).unbind() if several else [scalars]
        pairs = [
            (p, state)
            if grad is None
            else self.update.apply(self.groups[number], p, grad, state, of_group[number])
            for p, number, grad, state in zip(parameters, numbers, grads, states, strict=True)
        ]
        return [p for p, _ in pairs], [state for _, state in pairs]
