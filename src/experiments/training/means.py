"""How much the loss of a batch counts in a mean over batches, so that it is the mean over all rows.

torch's CrossEntropyLoss and NLLLoss divide by the class weights of the targets that count, not by
the number of rows. With `weight`, or where targets equal `ignore_index`, so must a mean over
batches.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.data.loaders import Loader, TensorLoader
from experiments.data.scan import Scan

Weigh = Callable[[Tensor], Tensor]


def target_weights(loss_func: Any) -> Weigh | None:
    """The function from targets, int64 (batch, ...), to what a mean loss divides by, float64 ();
    None for a loss that is not one of torch's with class weights or ignored targets.
    """
    if type(loss_func) not in (nn.CrossEntropyLoss, nn.NLLLoss) or loss_func.reduction != "mean":
        return None
    ignored: int = loss_func.ignore_index
    class_weights: Tensor | None = loss_func.weight

    def weigh(targets: Tensor) -> Tensor:
        if targets.is_floating_point():  # probabilities of the classes: a mean over rows
            return torch.tensor(len(targets), dtype=torch.float64, device=targets.device)
        counted = targets != ignored
        if class_weights is None:
            return counted.sum(dtype=torch.float64)
        return class_weights.gather(0, targets[counted].long()).sum(dtype=torch.float64)

    return weigh


def evaluation_weights(loss_func: Any, loader: Loader) -> Weigh | None:
    """`target_weights` if the loss may not weigh all rows of a loader alike, else None."""
    weigh = target_weights(loss_func)
    if weigh is not None and type(loader) is TensorLoader and loader.split.block is None:
        even = loss_func.weight is None and not (loader.y == loss_func.ignore_index).any()
        return None if even else weigh
    return weigh


def mean_loss(losses: list[float], sizes: list[int], weights: list[float]) -> float:
    """The mean loss over all rows, from the mean losses of batches with `sizes` rows.

    weights: what each batch counts; empty: its rows. NaN if none counts.
    """
    # as many counted targets in each row: their rows then are the same weights, and exact
    even = all(
        weight * sizes[0] == weights[0] * size > 0
        for weight, size in zip(weights, sizes, strict=bool(weights))
    )
    counts: list[float] = [*sizes] if even else weights
    weighted = (loss * count for loss, count in zip(losses, counts, strict=True) if count)
    return sum(weighted) / sum(counts) if sum(counts) else math.nan


def step_weights(loss_func: Any, train: Scan) -> Weigh | None:
    """`target_weights` if the loss does not weigh all rows of the training split alike, else None:
    then a batch counts by its rows, which takes no time in a step.
    """
    weigh = target_weights(loss_func)
    if weigh is None or train.lowest is None:
        return None
    uneven = loss_func.weight is not None or train.may_contain(loss_func.ignore_index)
    return weigh if uneven else None


def is_mean_over_rows(loss_func: Any, logits: Tensor, targets: Tensor) -> bool:
    """Whether the loss of some rows is the mean of its parts' losses, weighted by their rows.

    logits: (rows, ...), targets: (rows, ...), at least two rows
    """
    part = max(1, len(targets) // 3)
    with torch.no_grad():
        whole = loss_func(logits, targets)
        first, rest = (loss_func(logits[s], targets[s]) for s in (slice(part), slice(part, None)))
        mean = (first * part + rest * (len(targets) - part)) / len(targets)
    return torch.allclose(whole, mean, rtol=1e-3, atol=1e-6, equal_nan=True)
