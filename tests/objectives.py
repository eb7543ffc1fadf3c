"""A model and a loss as what the loop takes, for the files that test it without a config."""

from collections.abc import Callable
from typing import Any

from torch import nn

from experiments.data.loaders import Loader
from experiments.training.accuracy import Accuracy
from experiments.training.checks import Reader
from experiments.training.evaluation import evaluate
from experiments.training.metrics import Metric
from experiments.training.objective import Objective


def accuracy(loss_func: Any) -> dict[str, Metric]:
    """The metrics of the default config."""
    return {"accuracy": Accuracy(loss_func)}


def evaluated(
    model: nn.Module,
    loss_func: Any,
    loader: Loader,
    stop_signal: Callable[[], int | None] = lambda: None,
) -> tuple[float, float | None]:
    """The loss of a model and its accuracy, None if there is none."""
    objective = Objective(model, loss_func)
    found = evaluate(objective, loader, accuracy(loss_func), "valid", stop_signal)
    return found["loss/valid"], found.get("accuracy/valid")


READ = Reader(None, "cpu")
