"""Evaluates an objective on a split: its mean loss, the numbers it names, and the metrics."""

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch

from experiments.data.loaders import Batch, Loader
from experiments.data.nests import row_count
from experiments.data.samples import preserved_generators, seed_generators
from experiments.data.streams import derive
from experiments.errors import Interrupted
from experiments.training.means import evaluation_weights, mean_loss
from experiments.training.metrics import Metric, Running
from experiments.training.objective import Objective, StepOutput

__all__ = ["Metric", "evaluate"]


@torch.no_grad()
def outputs_of(objective: Objective, loader: Loader) -> Generator[tuple[Batch, StepOutput]]:
    """Each batch of a loader with the step's output for it, in evaluation mode.

    What the step draws is the same each time.
    """
    objective.eval()
    with preserved_generators():
        seed_generators(derive(0, "evaluate"))
        for batch in loader.batches():
            yield batch, objective(batch)


@torch.no_grad()
def evaluate(
    objective: Objective,
    loader: Loader,
    metrics: Mapping[str, Metric],
    split: str,
    stop_signal: Callable[[], int | None] = lambda: None,
) -> dict[str, float]:
    """The mean loss over all rows, as `loss/SPLIT`, that of the numbers which the step names, and
    the metrics, as `NAME/SPLIT`.

    Each batch is weighted by its rows, or as the step or the loss weighs its targets (NaN if no
    target counts). What the step draws is the same in each evaluation. Raises Interrupted after a
    signal.
    """
    weigh = evaluation_weights(objective, loader)
    losses, sizes, weights = [], [], []
    numbers: dict[str, list[Any]] = {}
    running = Running(metrics)
    with contextlib.closing(outputs_of(objective, loader)) as found:
        for batch, output in found:
            losses.append(output.loss)
            sizes.append(row_count(batch))
            if weigh is not None:
                weights.append(weigh(output.targets))
            elif output.weight is not None:
                weights.append(torch.as_tensor(output.weight, dtype=torch.float64))
            for name, value in output.numbers.items():
                numbers.setdefault(name, []).append(value)
            running.update(output.outputs, output.targets)
            if signal_number := stop_signal():
                raise Interrupted(signal_number)
    counts = torch.stack(weights).tolist() if weights else []
    # one transfer from the device each, summed in double precision
    means = {
        f"{name}/{split}": mean_loss(torch.stack(values).tolist(), sizes, counts)
        for name, values in {"loss": losses, **numbers}.items()
    }
    return means | running.compute(split)
