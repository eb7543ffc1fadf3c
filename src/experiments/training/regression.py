"""The predictions of a regression, if a run is one."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from experiments.data.loaders import Loader
from experiments.training.accuracy import function_of
from experiments.training.evaluation import outputs_of
from experiments.training.objective import NoLoss, Objective

# More columns than this are rather an image or a sequence, for which residuals say little.
MAX_COLUMNS = 16
# torch's losses whose outputs are predictions of the targets, and no logits or rates.
LOSSES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
FUNCTIONS = (functional.mse_loss, functional.l1_loss, functional.smooth_l1_loss,
             functional.huber_loss)  # fmt: skip

Array = NDArray[np.float64]


def predictions(objective: Objective, loader: Loader) -> tuple[Array, Array] | None:
    """The outputs and targets of all rows, float64 (rows, columns) each; None unless the run is a
    regression of up to MAX_COLUMNS numbers, not all of them 0 or 1.
    """
    if not predicts_numbers(objective.loss_func):
        return None
    pairs = []
    for _, output in outputs_of(objective, loader):
        if not are_numbers(output.outputs, output.targets):
            return None
        pairs.append((output.outputs, output.targets))
    outputs, targets = (as_columns(torch.cat(parts)) for parts in zip(*pairs, strict=True))
    # labels of one's own binary loss
    return None if np.isin(targets, (0, 1)).all() else (outputs, targets)


def predicts_numbers(loss_func: nn.Module) -> bool:
    """Whether a loss may compare predictions with targets: all but torch's others do. What a step
    without a loss compares is unknown, as the points that a GAN makes with real ones.
    """
    if isinstance(loss_func, NoLoss):
        return False
    function = function_of(loss_func)
    if getattr(function, "__module__", "") in (functional.__name__, "torch._C._nn"):
        return function in FUNCTIONS
    of_torch = type(loss_func).__module__ == nn.MSELoss.__module__
    return not of_torch or isinstance(loss_func, LOSSES)


def are_numbers(outputs: object, targets: object) -> bool:
    """Whether outputs and targets are float (rows,) or (rows, columns), of one shape."""
    return (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and outputs.shape == targets.shape
        and outputs.is_floating_point()
        and targets.is_floating_point()
        and (targets.ndim == 1 or (targets.ndim == 2 and 1 <= targets.shape[1] <= MAX_COLUMNS))
    )


def as_columns(rows: Tensor) -> Array:
    """(rows,) or (rows, columns) -> float64 (rows, columns)"""
    return rows.double().cpu().numpy().reshape(len(rows), -1)
