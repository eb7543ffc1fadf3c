"""Learning rate schedules that torch does not have in this form; all move at every step."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Constant:
    """Moves nothing. Any scheduler of torch's would take 4 us a step for that."""

    def step(self) -> None:
        """Nothing moves."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing comes back."""


def constant(optimizer: Optimizer) -> Constant:
    """The optimizer's own lr, always."""
    return Constant()


def cosine(
    optimizer: Optimizer, total_steps: int, warmup: float = 0.0, final: float = 0.0
) -> LambdaLR:
    """Linear warm-up over the fraction `warmup` of all steps, then half a cosine down to
    `final` times the optimizer's lr, reached at the last step.

    The cosine is that of Loshchilov and Hutter, "SGDR", 2017, equation 5, without restarts.
    """
    warm = round(warmup * total_steps)
    last = max(total_steps - 1, warm + 1)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        progress = min((step - warm) / (last - warm), 1.0)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
