"""Metrics: named numbers over all rows of a split, with torchmetrics' update and compute."""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from experiments.data.nests import map_tensors, named_leaves, tensors_of
from experiments.errors import UsageError


class Metric(Protocol):
    """Takes the batches of a split and gives one number; None where it has none for such data.

    It may have an attribute `higher_is_better`: True, False, or None where that is not known.
    """

    def update(self, outputs: Any, targets: Any) -> None: ...
    def compute(self) -> Any: ...


class OverSplit:
    """A function of the outputs and targets of a whole split as a metric.

    Both stay in memory until the end of an evaluation.
    """

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self.function = function
        self.higher_is_better = getattr(function, "higher_is_better", None)
        self.outputs: list[Any] = []
        self.targets: list[Any] = []

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch."""
        self.outputs.append(outputs)
        self.targets.append(targets)

    def compute(self) -> Any:
        """The function of all outputs and targets."""
        return self.function(concatenated(self.outputs), concatenated(self.targets))


def concatenated(batches: Sequence[Any]) -> Any:
    """Batches of one form as one nest, their rows one after the other."""
    columns = iter(zip(*map(tensors_of, batches), strict=True))
    return map_tensors(lambda _: torch.cat(list(next(columns))), batches[0])


def as_metric(name: str, part: Any) -> Metric:
    """An object with update and compute, or a function of outputs and targets, as a metric.

    Raises UsageError for anything else.
    """
    if hasattr(part, "update") and hasattr(part, "compute"):
        metric: Metric = part
        return metric
    if callable(part) and not inspect.isclass(part):
        return OverSplit(part.func if is_bare(part) else part)
    raise UsageError(
        f"metrics.{name}: a {type(part).__name__}, expected an object with "
        "update(outputs, targets) and compute(), as torchmetrics has, or a function of both"
    )


def is_bare(part: Any) -> bool:
    """Whether a partial gives its function no argument."""
    return isinstance(part, functools.partial) and not part.args and not part.keywords


class Perplexity:
    """e to the mean cross entropy over all targets.

    outputs: logits, float (batch, classes, ...); targets: int64 (batch, ...)
    """

    higher_is_better = False

    def __init__(self, loss_func: Any = None) -> None:
        self.ignored: int = getattr(loss_func, "ignore_index", -100)
        self.sums: list[Tensor] = []
        self.counts: list[Tensor] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        losses = functional.cross_entropy(
            outputs, targets, ignore_index=self.ignored, reduction="sum"
        )
        self.sums.append(losses.double())
        self.counts.append((targets != self.ignored).sum())

    def compute(self) -> float | None:
        """The perplexity; None if no target counts."""
        count = int(torch.stack(self.counts).sum())
        return math.exp(float(torch.stack(self.sums).sum()) / count) if count else None


class Running:
    """Metrics that accumulate over one evaluation; those that it is made of stay as they are."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.metrics = {name: copy.deepcopy(metric) for name, metric in metrics.items()}

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch."""
        for metric in self.metrics.values():
            metric.update(outputs, targets)

    def compute(self, split: str) -> dict[str, float]:
        """The numbers by tag, without those that a metric has none for."""
        found = {}
        for name, metric in self.metrics.items():
            computed = metric.compute()
            if computed is None and isinstance(metric, OverSplit):
                raise UsageError(f"metrics.{name}: its function returns None, expected one number")
            for leaf, value in named_leaves(computed, name):
                if value is not None:
                    found[f"{leaf.replace('.', '_')}/{split}"] = as_number(leaf, value)
        return found


def as_number(name: str, value: Any) -> float:
    """The value of a metric. Raises UsageError if it is not one number."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else (
            f"a {type(value).__name__}")  # fmt: skip
        raise UsageError(
            f"metrics.{name}: its value is {kind}, expected one number; average it over the classes"
        ) from None


def maximizes(monitor: str, mode: str | None, metrics: Mapping[str, Metric]) -> bool:
    """Whether a larger value of the monitored number is better: as `trainer.mode` says, or else as
    its metric does. What is no metric, the loss or a part of it, is minimised.

    Raises UsageError if nobody says.
    """
    if mode is not None:
        return mode == "max"
    name = monitor.rpartition("/")[0]
    owners = [key for key in metrics if name == key or name.startswith(f"{key}_")]
    if not owners:
        return False
    metric = metrics[max(owners, key=len)]
    higher: bool | None = getattr(metric, "higher_is_better", None)
    if higher is None:
        raise UsageError(
            f"trainer.monitor={monitor}: its metric does not say whether more is better; set "
            "trainer.mode=max or trainer.mode=min"
        )
    return higher
