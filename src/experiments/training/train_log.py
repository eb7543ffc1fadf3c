"""The state of the training loop, and the logging of its losses."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.errors import Diverged, UsageError
from experiments.training.objective import NO_NUMBERS

Metrics = dict[str, float]

MAX_UNREAD = 1000  # results whose losses may stay on the device before a transfer


class StepResult(NamedTuple):
    """The result of one or more optimizer steps in one call.

    losses: the mean loss of each step, float32 (steps,), or () for one step. lrs: the learning rate
    of each step. rows, batches: the number of rows and of batches per step. weights: how much the
    loss of each step counts in a mean, float64 (steps,), or () for one step; None: by its rows.
    group_lrs: for each step the learning rates of the parameter groups after the first one; empty
    if there are none. numbers: what the step names besides its loss, each as the losses.
    """

    losses: Tensor
    lrs: list[float]
    rows: int
    batches: int
    weights: Tensor | None = None
    group_lrs: Sequence[Sequence[float]] = ()
    numbers: Mapping[str, Tensor] = NO_NUMBERS


@dataclass
class State:
    """All state of the training loop besides the parts' own; checkpoints hold it completely."""

    epoch: int = 0  # epochs done
    batch: int = 0  # batches done in the current epoch
    step: int = 0  # optimizer steps done
    loss: float = 0.0  # loss summed over the rows since the last log line, by their weights
    rows: int = 0  # the number of those rows
    weight: float = 0.0  # the sum of their weights; their number if the loss weighs all alike
    numbers: Metrics = field(default_factory=dict)  # the sums of what else the step names
    lr: float = 0.0  # of the last step, in the first parameter group
    group_lrs: list[float] = field(default_factory=list)  # the same in the groups after it
    epoch_loss: float = 0.0  # the same since the epoch began, up to the last log line
    epoch_rows: int = 0
    epoch_weight: float = 0.0
    epoch_numbers: Metrics = field(default_factory=dict)
    evaluated: int | None = None  # the step of the last validation
    stopped: str | None = None  # why training ended before its time
    last: Metrics = field(default_factory=dict)  # the last validation's metrics
    best: Metrics = field(default_factory=dict)  # the best validation's metrics

    def end_epoch(self) -> Metrics:
        """Count an epoch that is over; returns the means of its training."""
        sums = {"loss": self.epoch_loss, **self.epoch_numbers}
        weight = self.epoch_weight
        means = {f"{name}/train_epoch": total / weight if weight else math.nan
                 for name, total in sums.items()}  # fmt: skip
        self.epoch, self.batch = self.epoch + 1, 0
        self.epoch_loss, self.epoch_rows, self.epoch_weight = 0.0, 0, 0.0
        self.epoch_numbers = {}
        return means

    def validated(self, valid: Metrics, epoch: int, monitor: str, maximize: bool) -> bool:
        """Note a validation's metrics, of an epoch from 1; returns whether they are the best."""
        self.evaluated = self.step
        self.last = {**valid, "epoch": epoch, "step": self.step}
        if monitor not in self.last:
            raise UsageError(
                f"trainer.monitor={monitor}: the validation at step {self.step} has no such "
                "number; let its metric return one for each split, or monitor another"
            )
        value, best = self.last[monitor], self.best.get(monitor, math.nan)
        # NaN compares with nothing, and would stay the best for ever
        better = math.isnan(best) or (value > best if maximize else value < best)
        if better:
            self.best = self.last
        return better


class TrainLog:
    """Turns step losses into log lines. Losses stay on the device until a line is due."""

    def __init__(
        self, state: State, log: Callable[[int, int, Metrics], None], log_every: int
    ) -> None:
        self.state, self.log, self.log_every = state, log, log_every
        self.unread: list[StepResult] = []
        self.first_not_finite: int | None = None  # the step whose loss was the first such one

    def add(self, result: StepResult) -> None:
        """Add the newest steps, which `state.step` includes already."""
        self.unread.append(result)
        if self.state.step % self.log_every < len(result.lrs) or len(self.unread) == MAX_UNREAD:
            self.read()

    def read(self) -> None:
        """Transfer all unread losses from the device, and log the lines that they complete."""
        if not self.unread:
            return
        state = self.state
        # summed one by one in double precision: the bits do not depend on when this is called
        losses = torch.cat([result.losses.flatten() for result in self.unread]).tolist()
        weights = [weight for result in self.unread for weight in weights_of(result)]
        settings = [
            (result.rows, lr, others)
            for result in self.unread
            for lr, others in zip(result.lrs, result.group_lrs or repeat(()), strict=False)
        ]
        numbers = {
            name: torch.cat([result.numbers[name].flatten() for result in self.unread]).tolist()
            for name in self.unread[0].numbers
        }
        self.unread.clear()
        steps = range(state.step - len(losses) + 1, state.step + 1)
        for i, (step, loss, weight, (rows, lr, group_lrs)) in enumerate(
            zip(steps, losses, weights, settings, strict=True)
        ):
            if weight:  # or the loss of a step whose targets are all ignored: 0 / 0
                if self.first_not_finite is None and not math.isfinite(loss):
                    self.first_not_finite = step
                state.loss += loss * weight
                for name, values in numbers.items():
                    state.numbers[name] = state.numbers.get(name, 0.0) + values[i] * weight
            state.rows += rows
            state.weight += weight
            state.lr, state.group_lrs = lr, list(group_lrs)
            if step % self.log_every == 0:
                self.write(step)

    def write(self, step: int) -> None:
        """Log the mean loss since the last line, if a target counted since. Raises Diverged if it
        is not finite.
        """
        state = self.state
        sums = {"loss": state.loss, **state.numbers} if state.weight else {}
        mean = {f"{name}/train": total / state.weight for name, total in sums.items()}
        others = {f"lr/{i}": lr for i, lr in enumerate(state.group_lrs, 1) if lr != state.lr}
        self.log(step, state.epoch + 1, {**mean, "lr": state.lr, **others})
        state.epoch_loss += state.loss
        state.epoch_rows += state.rows
        state.epoch_weight += state.weight
        for name, total in state.numbers.items():
            state.epoch_numbers[name] = state.epoch_numbers.get(name, 0.0) + total
        state.loss, state.rows, state.weight, state.numbers = 0.0, 0, 0.0, {}
        if mean:
            check_finite("loss/train", mean["loss/train"], step, self.first_not_finite)

    def end_epoch(self) -> None:
        """Log the losses of the epoch since the last line."""
        self.read()
        if self.state.rows:
            self.write(self.state.step)


def weights_of(result: StepResult) -> list[float]:
    """How much the loss of each step of a result counts in a mean."""
    if result.weights is None:
        return [result.rows] * len(result.lrs)
    weights: list[float] = result.weights.flatten().tolist()
    return weights


def check_finite(tag: str, value: float, step: int, first: int | None = None) -> None:
    """Raise Diverged if a loss is infinite or NaN, with a remedy that fits the cause.

    first: the first step whose loss was not finite, if that is known
    """
    if math.isfinite(value):
        return
    remedy = "try a smaller optimizer.lr"
    if first == 1:
        remedy = "so it was before any weight changed; look at the data, the model and the loss"
    raise Diverged(f"{tag} is {value} at step {step}; {remedy}")
