"""The state of the training loop, and the logging of its losses."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.errors import Diverged

Metrics = dict[str, float]

MAX_UNREAD = 1000  # results whose losses may stay on the device before a transfer


class StepResult(NamedTuple):
    """The result of one or more optimizer steps in one call.

    losses: the mean loss of each step, float32 (steps,), or () for one step. lrs: the learning rate
    of each step. rows, batches: the number of rows and of batches per step. weights: how much the
    loss of each step counts in a mean, float64 (steps,), or () for one step; None: by its rows.
    """

    losses: Tensor
    lrs: list[float]
    rows: int
    batches: int
    weights: Tensor | None = None


@dataclass
class State:
    """All state of the training loop besides the parts' own; checkpoints hold it completely."""

    epoch: int = 0  # epochs done
    batch: int = 0  # batches done in the current epoch
    step: int = 0  # optimizer steps done
    loss: float = 0.0  # loss summed over the rows since the last log line, by their weights
    rows: int = 0  # the number of those rows
    weight: float = 0.0  # the sum of their weights; their number if the loss weighs all alike
    lr: float = 0.0  # of the last step
    epoch_loss: float = 0.0  # the same since the epoch began, up to the last log line
    epoch_rows: int = 0
    epoch_weight: float = 0.0
    last: Metrics = field(default_factory=dict)  # the last validation's metrics
    best: Metrics = field(default_factory=dict)  # the best validation's metrics


class TrainLog:
    """Turns step losses into log lines. Losses stay on the device until a line is due."""

    def __init__(
        self, state: State, log: Callable[[int, int, Metrics], None], log_every: int
    ) -> None:
        self.state, self.log, self.log_every = state, log, log_every
        self.unread: list[StepResult] = []

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
        rows_and_lrs = [(result.rows, lr) for result in self.unread for lr in result.lrs]
        self.unread.clear()
        steps = range(state.step - len(losses) + 1, state.step + 1)
        for step, loss, weight, (rows, lr) in zip(
            steps, losses, weights, rows_and_lrs, strict=True
        ):
            if weight:  # or the loss of a step whose targets are all ignored: 0 / 0
                state.loss += loss * weight
            state.rows += rows
            state.weight += weight
            state.lr = lr
            if step % self.log_every == 0:
                self.write(step)

    def write(self, step: int) -> None:
        """Log the mean loss since the last line, if a target counted since. Raises Diverged if it
        is not finite.
        """
        state = self.state
        mean = {"loss/train": state.loss / state.weight} if state.weight else {}
        self.log(step, state.epoch + 1, {**mean, "lr": state.lr})
        state.epoch_loss += state.loss
        state.epoch_rows += state.rows
        state.epoch_weight += state.weight
        state.loss, state.rows, state.weight = 0.0, 0, 0.0
        if mean:
            check_finite("loss/train", mean["loss/train"], step)

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


def check_finite(tag: str, value: float, step: int) -> None:
    """Raise Diverged if a loss is infinite or NaN."""
    if not math.isfinite(value):
        raise Diverged(f"{tag} is {value} at step {step}; try a smaller optimizer.lr")
