"""Learning rate schedules that torch lacks in this form; all count steps, not epochs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau


class Constant:
    """Leaves the lr unchanged. Any of torch's schedulers would take 4 us a step for that."""

    def step(self) -> None:
        """Changes nothing."""

    def state_dict(self) -> dict[str, Any]:
        """There is no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is no state to restore."""


def constant(optimizer: Optimizer) -> Constant:
    """The optimizer's lr at every step."""
    return Constant()


def cosine(
    optimizer: Optimizer, total_steps: int, warmup: float = 0.0, final: float = 0.0
) -> LambdaLR:
    """Linear warmup over the fraction `warmup` of all steps, then cosine decay to `final` times the
    optimizer's lr, reached at the last step.

    The cosine is that of Loshchilov and Hutter, "SGDR", 2017, equation 5, without restarts.
    """
    warmup_steps = round(warmup * total_steps)
    last = max(total_steps - 1, warmup_steps + 1)

    def decay(step: int) -> float:
        progress = min((step - warmup_steps) / (last - warmup_steps), 1.0)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, after_warmup(warmup_steps, decay))


def linear(
    optimizer: Optimizer, total_steps: int, warmup: float = 0.0, final: float = 0.0
) -> LambdaLR:
    """Linear warmup over the fraction `warmup` of all steps, then linear decay to `final` times the
    optimizer's lr, reached at the last step; with final=1 the lr stays.
    """
    warmup_steps = round(warmup * total_steps)
    last = max(total_steps - 1, warmup_steps + 1)

    def decay(step: int) -> float:
        progress = min((step - warmup_steps) / (last - warmup_steps), 1.0)
        return final + (1 - final) * (1 - progress)

    return LambdaLR(optimizer, after_warmup(warmup_steps, decay))


def multistep(
    optimizer: Optimizer,
    total_steps: int,
    warmup: float = 0.0,
    milestones: Sequence[float] = (0.5, 0.75),
    gamma: float = 0.1,
) -> LambdaLR:
    """Linear warmup over the fraction `warmup` of all steps, then the optimizer's lr, multiplied by
    `gamma` from each milestone on.

    milestones: fractions of all steps
    """
    bounds = [round(milestone * total_steps) for milestone in milestones]

    def decay(step: int) -> float:
        return gamma ** sum(step >= bound for bound in bounds)

    return LambdaLR(optimizer, after_warmup(round(warmup * total_steps), decay))


def after_warmup(warmup_steps: int, decay: Callable[[int], float]) -> Callable[[int], float]:
    """The factor of the lr at a step: it rises in equal parts over the warmup, and is `decay`'s
    from there on.
    """

    def factor(step: int) -> float:
        return (step + 1) / (warmup_steps + 1) if step < warmup_steps else decay(step)

    return factor


class Plateau(ReduceLROnPlateau):
    """Linear warmup over the fraction `warmup` of all steps, then torch's ReduceLROnPlateau: the lr
    is multiplied by `factor` when the monitored number has not got better for `patience`
    validations. Those before its end do not count.

    options: those of ReduceLROnPlateau
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup: float = 0.0, **options: Any
    ) -> None:
        super().__init__(optimizer, **options)
        self.warmup_steps, self.taken = round(warmup * total_steps), 0
        self.full_lrs = [group["lr"] for group in optimizer.param_groups]
        self.set_warmup_lrs()

    def set_warmup_lrs(self) -> None:
        """Set the lr of the next step."""
        factor = after_warmup(self.warmup_steps, lambda step: 1.0)(self.taken)
        for group, lr in zip(self.optimizer.param_groups, self.full_lrs, strict=True):
            group["lr"] = lr * factor

    def step(self) -> None:  # type: ignore[override]
        """Go on after an optimizer step; changes nothing after the warmup."""
        if self.taken < self.warmup_steps:
            self.taken += 1
            self.set_warmup_lrs()

    def validated(self, monitored: float) -> None:
        """Go on after a validation. monitored: its `trainer.monitor`."""
        if self.taken >= self.warmup_steps:
            super().step(monitored)
