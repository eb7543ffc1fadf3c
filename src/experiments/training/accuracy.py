"""The accuracy of a model of classes, for outputs and targets that have one."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# losses that define which dimension of the outputs is that of the classes: the second
OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)
OF_CLASSES_FUNCTIONS = (functional.cross_entropy, functional.nll_loss)


def is_of_classes(loss_func: object) -> bool:
    """Whether a loss defines that the second dimension of the outputs is that of the classes."""
    return isinstance(loss_func, OF_CLASSES) or loss_func in OF_CLASSES_FUNCTIONS


def function_of(loss_func: object) -> Any:
    """The function that a loss calls, without the arguments that a partial gives it; the loss
    itself if it calls none.
    """
    function = getattr(loss_func, "function", loss_func)
    return getattr(function, "func", function)


def has_accuracy(outputs: object, targets: object, *, of_classes: bool) -> bool:
    """Whether the targets are classes, and the outputs have a number for each class.

    That is: targets are integers (batch, ...), outputs float (batch, classes, ...) with at least
    two classes. Where the last dimension could be that of the classes as well, the loss must tell:
    of_classes, see `is_of_classes`.
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return False
    integers = not (targets.is_floating_point() or targets.is_complex())
    if not integers or targets.dtype == torch.bool or not outputs.is_floating_point():
        return False
    if outputs.ndim < 2 or outputs.shape[1] < 2:
        return False
    if targets.shape != (outputs.shape[0], *outputs.shape[2:]):
        return False
    ambiguous = outputs.ndim > 2 and outputs.shape[:-1] == targets.shape
    return of_classes or not ambiguous


class Accuracy:
    """The fraction of targets whose class has the largest output, over all batches that are added.

    Targets that equal the loss's `ignore_index` do not count.
    """

    higher_is_better = True

    def __init__(self, loss_func: object = None) -> None:
        self.of_classes = is_of_classes(loss_func)
        self.ignored: Any = getattr(loss_func, "ignore_index", None)
        self.exists: bool | None = None  # unknown before the first batch
        self._correct: list[Tensor] = []
        self._counted: list[int | Tensor] = []

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch: outputs as the loss takes them, targets (batch, ...)."""
        if self.exists is None:
            self.exists = has_accuracy(outputs, targets, of_classes=self.of_classes)
        if not self.exists:
            return
        hits = outputs.argmax(1) == targets
        counted: int | Tensor = targets.numel()
        if self.ignored is not None:
            counts = targets != self.ignored
            hits, counted = hits & counts, counts.sum()
        self._correct.append(hits.sum())
        self._counted.append(counted)

    def compute(self) -> float | None:
        """The accuracy, in [0, 1]; None if there is none, or no target counts."""
        if not self._correct:
            return None
        counted = int(sum(self._counted))
        return int(torch.stack(self._correct).sum()) / counted if counted else None
