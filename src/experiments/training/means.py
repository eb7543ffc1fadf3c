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
from experiments.data.nests import map_tensors, row_count
from experiments.data.samples import preserved_generators, seed_generators
from experiments.data.scan import Scan
from experiments.training.objective import Objective, StepOutput

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


def evaluation_weights(objective: Objective, loader: Loader) -> Weigh | None:
    """`target_weights` if the loss may not weigh all rows of a loader alike, else None. A step of
    one's own gives the weight of a batch itself.
    """
    loss_func: Any = objective.loss_func
    weigh = target_weights(loss_func) if objective.is_supervised else None
    if weigh is not None and type(loader) is TensorLoader and loader.split.block is None:
        ignored = (loader.split.y == loss_func.ignore_index).any()
        return None if loss_func.weight is None and not ignored else weigh
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


def step_weights(objective: Objective, train: Scan) -> Weigh | None:
    """`target_weights` if the loss does not weigh all rows of the training split alike, else None:
    then a batch counts by its rows, which takes no time in a step.
    """
    loss_func: Any = objective.loss_func
    weigh = target_weights(loss_func) if objective.is_supervised else None
    if weigh is None or train.lowest is None:
        return None
    uneven = loss_func.weight is not None or train.may_contain(loss_func.ignore_index)
    return weigh if uneven else None


def is_mean_over_rows(objective: Objective, batch: Any) -> bool:
    """Whether the loss of a batch is the mean of its parts' losses, weighted by their rows.

    batch: at least two rows
    """
    rows = row_count(batch)
    part = max(1, rows // 3)

    def loss(first: int, last: int, seed: int = 0) -> Tensor:
        seed_generators(seed)
        output: StepOutput = objective(map_tensors(lambda t: t[first:last], batch))
        return output.loss

    with torch.no_grad(), preserved_generators():
        whole, first, rest = loss(0, rows), loss(0, part), loss(part, rows)
        if not torch.equal(whole, loss(0, rows, seed=1)):
            return True  # it draws, so the parts differ for that alone
        mean = (first * part + rest * (rows - part)) / rows
    return torch.allclose(whole, mean, rtol=1e-3, atol=1e-6, equal_nan=True)
