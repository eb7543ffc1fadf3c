"""Learning rate schedules that torch lacks in this form; all count steps, not epochs."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


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

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min((step - warmup_steps) / (last - warmup_steps), 1.0)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
