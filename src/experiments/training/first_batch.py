"""Checks on the first batch of a run: do model, loss, step, metrics and data fit together?"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from experiments.config.names import suggest
from experiments.data import Data, reads_samples
from experiments.data.nests import describe, is_tensor
from experiments.errors import UsageError
from experiments.training.accuracy import Accuracy, has_accuracy, is_of_classes
from experiments.training.build import ends_in_user_code, user_line
from experiments.training.checks import Reader, evaluated, mismatch_remedy
from experiments.training.compatibility import check_loss, check_outputs, report_broadcast
from experiments.training.metrics import Metric, Running, maximizes
from experiments.training.objective import Objective, StepOutput


def check_batches(config: dict[str, Any], data: Data, loader: Any) -> None:
    """Raise UsageError for a loader without batches, or for samples that make none."""
    if len(loader) == 0:
        raise UsageError(
            f"loader.batch_size={config['loader']['batch_size']}: drop_last leaves no batch of "
            f"{len(data.train)} rows; make it smaller"
        )
    if getattr(loader, "collate", None) is not None:
        return
    for name, split in data.splits.items():
        uneven = data.scans[name].uneven
        if uneven is not None and not hasattr(split, "collate_fn"):
            raise UsageError(
                f"data: a Dataset: {uneven}, so they make no batch; give all rows of {name} one "
                "shape, or the Dataset a collate_fn"
            )


def check_fit(
    config: dict[str, Any],
    objective: Objective,
    split: Any,
    read: Reader,
) -> StepOutput:
    """The step's output for the first rows. Raises UsageError if the model rejects the data, or the
    loss the outputs and targets.
    """
    batch = read(split, list(range(min(2, len(split)))))
    output = None
    try:
        output = check_supervised(config, objective, batch, split) if objective.is_supervised else (
            evaluated(objective, batch))  # fmt: skip
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if ends_in_user_code(error.__traceback__):
            raise
        reason = str(error).partition("\n")[0] + user_line(error.__traceback__)
        raise UsageError(
            f"step._target_={config['step']['_target_']}: does not fit a batch of the data, "
            f"{describe(batch)} ({reason}); change the step, the model or data"
        ) from error
    check_loss(config, output.loss, objective.loss_group)
    for name, value in output.numbers.items():
        if not is_tensor(value) or value.ndim:
            raise UsageError(
                f"step._target_={config['step']['_target_']}: gives {name} as "
                f"{describe(value) if is_tensor(value) else type(value).__name__}, expected a "
                "tensor (), one number of the batch"
            )
    return output


def check_metrics(metrics: Mapping[str, Metric], output: StepOutput) -> list[str]:
    """Raise UsageError if a metric does not take the outputs and targets; returns the names of
    those that have a number.
    """
    found = []
    for name, metric in metrics.items():
        if output.outputs is None and not isinstance(metric, Accuracy):
            raise UsageError(
                f"metrics.{name}: the step gives no outputs and targets to compare; return "
                "experiments.StepOutput(loss, outputs, targets), or use metrics=[]"
            )
        running = Running({name: metric})
        try:
            running.update(output.outputs, output.targets)
            tags = running.compute("valid")
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            if ends_in_user_code(error.__traceback__):
                raise
            reason = str(error).partition("\n")[0]
            raise UsageError(
                f"metrics.{name}: does not take outputs {describe(output.outputs)} and targets "
                f"{describe(output.targets)} ({reason}); change its settings, or leave it out"
            ) from error
        found += [tag.rpartition("/")[0] for tag in tags]
    return found


def check_names(config: dict[str, Any], output: StepOutput, names: list[str]) -> None:
    """Raise UsageError if two numbers of a validation have one name: one would hide the other."""
    name = next((name for name in names if names.count(name) > 1), None)
    if name is None:
        return
    if name in output.numbers:
        other = "loss" if name == "loss" else "metric"
        raise UsageError(
            f"step._target_={config['step']['_target_']}: gives a number {name}, which is the name "
            f"of the run's {other}; give it another name"
        )
    of_loss = ", which is the name of the run's loss" if name == "loss" else " twice"
    raise UsageError(
        f"metrics.{name}: logs {name}{of_loss}; give the metric another name, as metrics.my_{name}"
    )


def check_monitor(
    trainer: dict[str, Any], names: list[str], metrics: Mapping[str, Metric], output: StepOutput
) -> bool:
    """Raise UsageError if `trainer.monitor` is none of the names that a validation logs; returns
    whether a larger value is better.
    """
    monitor = trainer["monitor"]
    if monitor == "accuracy/valid" and "accuracy" in metrics and "accuracy" not in names:
        targets = output.targets
        kind = f"{targets.dtype} targets " if is_tensor(targets) else "targets "
        raise UsageError(
            f"trainer.monitor={monitor}: outputs {describe(output.outputs)} and {kind}"
            f"{describe(targets)} have no accuracy; use trainer.monitor=loss/valid"
        )
    if monitor not in (tags := [f"{name}/valid" for name in names]):
        hint = suggest(monitor, tags) or f"; there is {', '.join(tags)}"
        raise UsageError(f"trainer.monitor={monitor}: the run has no such number{hint}")
    return maximizes(monitor, trainer["mode"], metrics)


def check_supervised(
    config: dict[str, Any], objective: Objective, batch: Any, split: Any
) -> StepOutput:
    """The output of the default step for a batch. Raises UsageError if the batch is no pair, or the
    model, the loss and the data do not fit together.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise UsageError(
            f"step._target_={config['step']['_target_']}: takes batches (x, y), and one of the "
            f"data is {describe(batch)}; give a step of your own, a function of model and batch"
        )
    x, y = batch
    loss_func, logits = objective.loss_func, None
    try:
        objective.eval()
        with torch.no_grad():
            logits = objective.model(x)
            check_outputs(config, loss_func, logits, y)
            loss = loss_func(logits, y)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if ends_in_user_code(error.__traceback__):
            raise
        reason = str(error).partition("\n")[0] + user_line(error.__traceback__)
        raise UsageError(
            f"model._target_={config['model']['_target_']}: does not fit data of "
            f"x {of_all(x, split)}, y {of_all(y, split)} ({reason}); "
            f"{mismatch_remedy(loss_func, x, y, logits)}"
        ) from error
    check_loss(config, loss)
    report_broadcast(config, loss_func, logits, y)
    check_classes(split, logits, y, loss_func)
    return StepOutput(loss, logits, y)


def of_all(part: Any, split: Any) -> object:
    """The shape of a part of the data with the number of its rows; of a nest, its form."""
    return (len(split), *part.shape[1:]) if is_tensor(part) else describe(part)


def check_classes(split: Any, logits: Any, y: Any, loss_func: nn.Module) -> None:
    """Raise UsageError if the data has more classes than the model has outputs."""
    of_classes = is_of_classes(loss_func)
    if not (of_classes or has_accuracy(logits, y, of_classes=of_classes)):
        return
    if reads_samples(split) or y.is_floating_point() or logits.ndim != 2:
        return
    highest = int(split.y.max())
    if highest >= logits.shape[1] and highest != getattr(loss_func, "ignore_index", None):
        raise UsageError(
            f"model.out_features={logits.shape[1]}: the data has {highest + 1} classes; "
            "change model.out_features or data"
        )
