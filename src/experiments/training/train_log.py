"""What changes while fitting, and the log lines that the losses of its steps become."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.errors import Diverged

Metrics = dict[str, float]

UNREAD = 1000  # losses that may wait on the device to be read together


class StepResult(NamedTuple):
    """Optimizer steps that were taken together.

    losses: the mean loss of each, float32 (steps,), or () of one. lrs: the learning rate of each.
    rows, batches: what each was taken on.
    """

    losses: Tensor
    lrs: list[float]
    rows: int
    batches: int


@dataclass
class State:
    """All that changes while fitting, besides the parts' own state; a checkpoint holds it whole."""

    epoch: int = 0  # epochs done
    batch: int = 0  # batches done in the current epoch
    step: int = 0  # optimizer steps done
    loss: float = 0.0  # loss summed over the rows since the last log line
    rows: int = 0  # and their number
    lr: float = 0.0  # of the last step
    epoch_loss: float = 0.0  # the same since the epoch began, up to the last log line
    epoch_rows: int = 0
    last: Metrics = field(default_factory=dict)  # of the last validation
    best: Metrics = field(default_factory=dict)  # of the best one so far


class TrainLog:
    """Sums the losses of steps into log lines; they stay on the device until they are due."""

    def __init__(
        self, state: State, log: Callable[[int, int, Metrics], None], log_every: int
    ) -> None:
        self.state, self.log, self.log_every = state, log, log_every
        self.unread: list[StepResult] = []

    def add(self, result: StepResult) -> None:
        """Take in the newest steps, which the state has counted already."""
        self.unread.append(result)
        if self.state.step % self.log_every < len(result.lrs) or len(self.unread) == UNREAD:
            self.read()

    def read(self) -> None:
        """Read all waiting losses from the device, and log the lines that they complete."""
        if not self.unread:
            return
        state = self.state
        # added up one after the other in double precision: the bits do not depend on when
        losses = torch.cat([result.losses.flatten() for result in self.unread]).tolist()
        each = [(result.rows, lr) for result in self.unread for lr in result.lrs]
        self.unread.clear()
        numbers = range(state.step - len(losses) + 1, state.step + 1)
        for step, loss, (rows, lr) in zip(numbers, losses, each, strict=True):
            state.loss += loss * rows
            state.rows += rows
            state.lr = lr
            if step % self.log_every == 0:
                self.write(step)

    def write(self, step: int) -> None:
        """Log the mean since the last line. Raises Diverged where it is not finite."""
        state = self.state
        mean = state.loss / state.rows
        self.log(step, state.epoch + 1, {"loss/train": mean, "lr": state.lr})
        state.epoch_loss += state.loss
        state.epoch_rows += state.rows
        state.loss, state.rows = 0.0, 0
        check_finite("loss/train", mean, step)

    def end_epoch(self) -> None:
        """Log what is left of an epoch."""
        self.read()
        if self.state.rows:
            self.write(self.state.step)


def check_finite(tag: str, value: float, step: int) -> None:
    """Raise Diverged where a loss is infinite or no number."""
    if not math.isfinite(value):
        raise Diverged(f"{tag} is {value} at step {step}; try a smaller optimizer.lr")
