"""The loop: loss_batch, evaluate, fit."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.errors import Diverged, Interrupted

LossFunc = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]
Metrics = dict[str, float]
Item = TypeVar("Item", covariant=True)

UNREAD = 1000  # losses that may wait on the device to be read together


class Loader(Protocol[Item]):
    """Batches of a split, by epoch and by number within the epoch; `len` counts them."""

    def __len__(self) -> int: ...
    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Item]: ...


class Taken(NamedTuple):
    """Optimizer steps that were taken at once.

    losses: the mean loss of each, float32 (steps,), or () of one. lrs: the learning rate of each.
    rows, batches: what each was taken on.
    """

    losses: Tensor
    lrs: list[float]
    rows: int
    batches: int


class Scheduler(Protocol):
    """What moves the learning rate at every step."""

    def step(self) -> None: ...


class Progress(Protocol):
    """What is shown while a run goes on."""

    def advance(self, epoch: int, batch: int, rows: int, losses: Tensor) -> None: ...
    def epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None: ...


@dataclass
class State:
    """All that changes while fitting, besides the parts' own state; a checkpoint holds it whole."""

    epoch: int = 0  # epochs done
    batch: int = 0  # batches done in the epoch after those
    step: int = 0  # optimizer steps done
    loss: float = 0.0  # loss summed over the rows since the last log line
    rows: int = 0  # and their number
    lr: float = 0.0  # of the last step
    epoch_loss: float = 0.0  # the same since the epoch began, up to the last log line
    epoch_rows: int = 0
    last: Metrics = field(default_factory=dict)  # of the last validation
    best: Metrics = field(default_factory=dict)  # of the best one so far


def loss_batch(
    model: nn.Module,
    loss_func: LossFunc,
    xb: Tensor,
    yb: Tensor,
    opt: Optimizer | None = None,
) -> tuple[Tensor, int]:
    """The mean loss of a batch, float32 (), and its number of rows; with an optimizer, a step.

    xb: (batch, ...), yb: (batch, ...)
    """
    loss = loss_func(model(xb), yb)
    if opt is not None:
        loss.backward()
        opt.step()
        opt.zero_grad()
    return loss.detach(), len(xb)


def accumulate(
    model: nn.Module, loss_func: LossFunc, batches: list[Batch], opt: Optimizer
) -> tuple[Tensor, int]:
    """One step on several batches as if they were one: the loss and its gradient are the mean
    over all their rows, though only one batch's activations are in memory at a time.
    """
    rows = sum(len(xb) for xb, _ in batches)
    total = torch.zeros((), device=batches[0][0].device)
    for xb, yb in batches:
        loss = loss_func(model(xb), yb) * (len(xb) / rows)
        loss.backward()
        total += loss.detach()
    opt.step()
    opt.zero_grad()
    return total, rows


def eager_step(
    model: nn.Module, loss_func: LossFunc, opt: Optimizer, scheduler: Scheduler, group: list[Batch]
) -> Taken:
    """One step on a group of batches, and the scheduler's after it."""
    lr = opt.param_groups[0]["lr"]
    if len(group) == 1:
        loss, rows = loss_batch(model, loss_func, *group[0], opt)
    else:
        loss, rows = accumulate(model, loss_func, group, opt)
    scheduler.step()
    return Taken(loss, [lr], rows, len(group))


@torch.no_grad()
def evaluate(model: nn.Module, loss_func: LossFunc, loader: Loader[Batch]) -> tuple[float, float]:
    """The mean loss over all rows, each batch weighted by its size, and the fraction of rows
    whose largest logit is the target.
    """
    model.eval()
    losses, sizes, correct = [], [], []

    def count_correct(logits: Tensor, targets: Tensor) -> Tensor:
        correct.append((logits.argmax(1) == targets).sum())
        return loss_func(logits, targets)

    for xb, yb in loader.batches():
        loss, size = loss_batch(model, count_correct, xb, yb)
        losses.append(loss)
        sizes.append(size)
    # read from the device once, and added up in double precision
    weighted = (loss * size for loss, size in zip(torch.stack(losses).tolist(), sizes, strict=True))
    return sum(weighted) / sum(sizes), int(torch.stack(correct).sum()) / sum(sizes)


def fit(
    epochs: int,
    model: nn.Module,
    loss_func: LossFunc,
    opt: Optimizer,
    train_loader: Loader[Any],
    valid_loader: Loader[Batch],
    *,
    scheduler: Scheduler,
    state: State,
    log: Callable[[int, int, Metrics], None],
    save: Callable[[State, bool], None],
    due: Callable[[int, int], bool] = lambda step, taken: False,
    stopped: Callable[[], int | None] = lambda: None,
    progress: Progress,
    monitor: str = "loss/valid",
    log_every: int = 100,
    steps: Callable[[list[Any]], Taken] | None = None,
    at_once: int = 1,
) -> Metrics:
    """Train until `epochs` epochs are done, from wherever `state` stands; returns the best metrics.

    log: is given step, epoch (from 1) and numbers: `loss/train` and `lr` every `log_every` steps,
        `loss/train_epoch`, `loss/valid`, `accuracy/valid` and `throughput` at each epoch's end.
    save: is given the state, and whether it is the best so far, at each epoch's end, when `due`
        (given the last step and how many were taken at once) says so, and when `stopped` gives
        the number of a signal.
    steps: takes optimizer steps, and the scheduler's, on `at_once` of what `train_loader` gives,
        or on what is left at the epoch's end; by default one, eager, on all of them.

    Raises Interrupted after a signal, Diverged when a logged loss is not finite.
    """
    steps = steps or partial(eager_step, model, loss_func, opt, scheduler)
    unread: list[Taken] = []  # whose losses are still on the device
    in_epoch = len(train_loader)

    def read_losses() -> None:
        # added up one after the other in double precision: the bits do not depend on when
        losses = torch.cat([taken.losses.flatten() for taken in unread]).tolist() if unread else []
        each = [(taken, lr) for taken in unread for lr in taken.lrs]
        unread.clear()
        numbers = range(state.step - len(losses) + 1, state.step + 1)
        for step, loss, (taken, lr) in zip(numbers, losses, each, strict=True):
            state.loss += loss * taken.rows
            state.rows += taken.rows
            state.lr = lr
            if step % log_every == 0:
                log_train(step)

    def log_train(step: int) -> None:
        mean = state.loss / state.rows
        log(step, state.epoch + 1, {"loss/train": mean, "lr": state.lr})
        state.epoch_loss += state.loss
        state.epoch_rows += state.rows
        state.loss, state.rows = 0.0, 0
        check_finite("loss/train", mean, step)

    while state.epoch < epochs:
        started, rows_before = time.perf_counter(), state.epoch_rows + state.rows
        model.train()
        batches = train_loader.batches(state.epoch, state.batch)
        while group := list(islice(batches, at_once)):
            taken = steps(group)
            unread.append(taken)
            count = len(taken.lrs)
            state.step += count
            state.batch += count * taken.batches
            progress.advance(state.epoch + 1, state.batch, count * taken.rows, taken.losses)
            if state.step % log_every < count or len(unread) == UNREAD:
                read_losses()
            signal_number = stopped()
            if signal_number or (state.batch < in_epoch and due(state.step, count)):
                read_losses()
                save(state, False)
            if signal_number:
                raise Interrupted(signal_number)
        read_losses()
        if state.rows:
            log_train(state.step)
        seconds = time.perf_counter() - started
        throughput = (state.epoch_rows - rows_before) / seconds

        valid_loss, accuracy = evaluate(model, loss_func, valid_loader)
        train_loss = state.epoch_loss / state.epoch_rows
        state.epoch, state.batch, state.epoch_loss, state.epoch_rows = state.epoch + 1, 0, 0.0, 0
        valid = {"loss/valid": valid_loss, "accuracy/valid": accuracy}
        metrics = {"loss/train_epoch": train_loss, **valid}
        log(state.step, state.epoch, metrics)
        log(state.step, state.epoch, {"throughput": throughput})  # alone: no two runs share it
        check_finite("loss/valid", valid_loss, state.step)
        state.last = {**valid, "epoch": state.epoch, "step": state.step}
        better = not state.best or improves(monitor, state.last[monitor], state.best[monitor])
        if better:
            state.best = state.last
        save(state, better)
        progress.epoch_end(state.epoch, {**metrics, "throughput": throughput})
    return state.best


def improves(monitor: str, value: float, best: float) -> bool:
    """Whether a number is better than the best so far; an equal one is not."""
    return value < best if monitor.startswith("loss") else value > best


def check_finite(tag: str, value: float, step: int) -> None:
    """Raise Diverged where a loss is infinite or no number."""
    if not math.isfinite(value):
        raise Diverged(f"{tag} is {value} at step {step}; try a smaller optimizer.lr")
