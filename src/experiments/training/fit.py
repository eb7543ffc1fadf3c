"""The training loop: loss_batch, evaluate, fit."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.data.loaders import Batch, Loader
from experiments.errors import Interrupted
from experiments.training.accuracy import Accuracy
from experiments.training.determinism import global_state, restore_global_state
from experiments.training.frozen import restore_buffers, save_buffers
from experiments.training.means import Weigh, evaluation_weights, mean_loss
from experiments.training.progress import Progress
from experiments.training.train_log import Metrics, State, StepResult, TrainLog, check_finite

LossFunc = Callable[[Tensor, Tensor], Tensor]


class Scheduler(Protocol):
    """Changes the learning rate; stepped after each optimizer step."""

    def step(self) -> None: ...


class Steps(Protocol):
    """The optimizer steps of an epoch; `len` is the number of its batches."""

    def __len__(self) -> int: ...
    def take(self, epoch: int, start: int) -> Iterator[StepResult]: ...


@dataclass(frozen=True)
class FitOptions:
    """How long to train, how often to log, and which metric decides what is best."""

    epochs: int
    log_every: int = 100  # optimizer steps
    monitor: str = "loss/valid"


@dataclass(frozen=True)
class Callbacks:
    """What the loop calls.

    log(step, epoch from 1, metrics): `loss/train` and `lr` every `log_every` steps, with `lr/1`
        and so on for the further parameter groups whose rates differ from the first one's;
        `loss/train_epoch`, `loss/valid`, `accuracy/valid` if there is one, and `throughput` at each
        epoch's end.
    save(state, whether it is the best so far): at each epoch's end, when `checkpoint_due(last step,
        number of steps in the last result)` is true, and when `stop_signal` returns a signal's
        number, which is asked once a step.
    stop_evaluation: the same within a validation, asked once a batch.
    end_epoch(the epoch's monitored number): at each epoch's end, before `save`.
    """

    log: Callable[[int, int, Metrics], None]
    save: Callable[[State, bool], None]
    progress: Progress
    checkpoint_due: Callable[[int, int], bool] = lambda step, step_count: False
    stop_signal: Callable[[], int | None] = lambda: None
    stop_evaluation: Callable[[], int | None] = lambda: None
    end_epoch: Callable[[float], None] = lambda monitored: None


def loss_batch(
    model: nn.Module,
    loss_func: LossFunc,
    xb: Tensor,
    yb: Tensor,
    opt: Optimizer | None = None,
) -> tuple[Tensor, int]:
    """The mean loss of a batch, float32 (), and its number of rows; with `opt`, also take a step.

    xb: (batch, ...), yb: (batch, ...)
    """
    loss = loss_func(model(xb), yb)
    if opt is not None:
        loss.backward()
        opt.step()
        opt.zero_grad()
    return loss.detach(), len(xb)


def accumulate(
    model: nn.Module,
    loss_func: LossFunc,
    batches: list[Batch],
    opt: Optimizer,
    weights: list[float] | None = None,
) -> tuple[Tensor, int]:
    """One step with the gradient accumulated over several batches: loss and gradient are the mean
    over all their rows, while only one batch's activations are in memory at a time.

    weights: how much the loss of each batch counts in the mean; None: by its rows. The loss of a
        batch that counts 0 is not computed, since it would be 0 / 0: its gradient is zero.
    """
    rows = sum(len(xb) for xb, _ in batches)
    counts: list[float] = [len(xb) for xb, _ in batches] if weights is None else weights
    count = sum(counts)
    total = torch.zeros((), device=batches[0][0].device)
    for (xb, yb), part in zip(batches, counts, strict=True):
        logits = model(xb)
        loss = loss_func(logits, yb) * (part / count) if part else logits.sum() * 0
        loss.backward()
        total += loss.detach()
    opt.step()
    opt.zero_grad()
    return total, rows


@dataclass(frozen=True)
class EagerSteps:
    """One step per `accumulated` batches of a loader; the last of an epoch may have fewer.

    weigh: how much the loss of a batch counts, from its targets; None: by its rows
    """

    model: nn.Module
    loss_func: LossFunc
    opt: Optimizer
    scheduler: Scheduler
    loader: Loader
    accumulated: int = 1
    weigh: Weigh | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def take(self, epoch: int, start: int) -> Iterator[StepResult]:
        """Take the steps of an epoch, from batch number `start` on."""
        batches = self.loader.batches(epoch, start)
        while group := list(islice(batches, self.accumulated)):
            yield self.step(group)

    def step(self, batches: list[Batch]) -> StepResult:
        """One optimizer step on some batches, then one scheduler step."""
        lr, *group_lrs = [group["lr"] for group in self.opt.param_groups]
        weights = None
        if self.weigh is not None:
            weights = torch.stack([self.weigh(yb) for _, yb in batches])
            loss, rows = accumulate(self.model, self.loss_func, batches, self.opt, weights.tolist())
            weights = weights.sum()
        elif len(batches) == 1:
            loss, rows = loss_batch(self.model, self.loss_func, *batches[0], self.opt)
        else:
            loss, rows = accumulate(self.model, self.loss_func, batches, self.opt)
        self.scheduler.step()
        return StepResult(loss, [lr], rows, len(batches), weights, group_lrs)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loss_func: LossFunc,
    loader: Loader,
    stop_signal: Callable[[], int | None] = lambda: None,
) -> tuple[float, float | None]:
    """The mean loss over all rows, each batch weighted by its size, or as the loss weighs its
    targets (NaN if no target counts), and the fraction of targets whose class has the largest
    logit; None where outputs and targets have no accuracy. Raises Interrupted after a signal.
    """
    model.eval()
    if isinstance(loss_func, nn.Module):
        loss_func.eval()
    losses, sizes, accuracy = [], [], Accuracy(loss_func)
    weigh, weights = evaluation_weights(loss_func, loader), []

    def count_correct(logits: Tensor, targets: Tensor) -> Tensor:
        accuracy.add(logits, targets)
        return loss_func(logits, targets)

    for xb, yb in loader.batches():
        loss, size = loss_batch(model, count_correct, xb, yb)
        losses.append(loss)
        sizes.append(size)
        if weigh is not None:
            weights.append(weigh(yb))
        if signal_number := stop_signal():
            raise Interrupted(signal_number)
    # one transfer from the device, summed in double precision
    mean = mean_loss(
        torch.stack(losses).tolist(), sizes, torch.stack(weights).tolist() if weights else []
    )
    return mean, accuracy.compute()


def as_metrics(split: str, loss: float, accuracy: float | None) -> Metrics:
    """What `evaluate` returned for a split, by tag."""
    return {f"loss/{split}": loss} | ({} if accuracy is None else {f"accuracy/{split}": accuracy})


def fit(
    model: nn.Module,
    loss_func: LossFunc,
    steps: Steps,
    valid_loader: Loader,
    state: State,
    options: FitOptions,
    callbacks: Callbacks,
) -> Metrics:
    """Train from `state` until `options.epochs` epochs are done; returns the best metrics.

    Raises Interrupted after a signal, Diverged if a logged loss is not finite.
    """
    train_log = TrainLog(state, callbacks.log, options.log_every)
    while state.epoch < options.epochs:
        started, rows_before = time.perf_counter(), state.epoch_rows + state.rows
        model.train()
        if isinstance(loss_func, nn.Module):
            loss_func.train()
        for result in steps.take(state.epoch, state.batch):
            step_count = len(result.lrs)
            state.step += step_count
            state.batch += step_count * result.batches
            callbacks.progress.advance(
                state.epoch + 1, state.batch, step_count * result.rows, result.losses
            )
            train_log.add(result)
            signal_number = callbacks.stop_signal()
            in_epoch = state.batch < len(steps)
            if signal_number or (in_epoch and callbacks.checkpoint_due(state.step, step_count)):
                train_log.read()
                callbacks.save(state, False)
            if signal_number:
                raise Interrupted(signal_number)
        train_log.end_epoch()
        seconds = time.perf_counter() - started
        throughput = (state.epoch_rows - rows_before) / seconds
        valid = validate(model, loss_func, valid_loader, state, callbacks)
        end_epoch(state, valid, throughput, options, callbacks)
    return state.best


def validate(
    model: nn.Module, loss_func: LossFunc, loader: Loader, state: State, callbacks: Callbacks
) -> Metrics:
    """The metrics of the validation split. After a signal, saves the state before the validation,
    which a resumed run repeats, and raises Interrupted.
    """
    random_state = global_state()
    # some count or average in evaluation, too
    buffers = save_buffers(model, loss_func)
    try:
        results = evaluate(model, loss_func, loader, callbacks.stop_evaluation)
    except Interrupted:
        restore_global_state(*random_state)
        restore_buffers(buffers)
        callbacks.save(state, False)
        raise
    return as_metrics("valid", *results)


def end_epoch(
    state: State, valid: Metrics, throughput: float, options: FitOptions, callbacks: Callbacks
) -> None:
    """Update the state, log the metrics and save. Raises Diverged if the loss is not finite.

    throughput: rows trained on per second.
    """
    train_loss = state.epoch_loss / state.epoch_weight if state.epoch_weight else math.nan
    metrics = {"loss/train_epoch": train_loss, **valid}
    state.epoch, state.batch = state.epoch + 1, 0
    state.epoch_loss, state.epoch_rows, state.epoch_weight = 0.0, 0, 0.0
    callbacks.log(state.step, state.epoch, metrics)
    # on a separate line, since it differs between runs
    callbacks.log(state.step, state.epoch, {"throughput": throughput})
    check_finite("loss/valid", valid["loss/valid"], state.step)
    state.last = {**valid, "epoch": state.epoch, "step": state.step}
    monitor = options.monitor
    better = not state.best or improves(monitor, state.last[monitor], state.best[monitor])
    if better:
        state.best = state.last
    callbacks.end_epoch(state.last[monitor])
    callbacks.save(state, better)
    callbacks.progress.epoch_end(state.epoch, {**metrics, "throughput": throughput})


def improves(monitor: str, value: float, best: float) -> bool:
    """Whether a metric is strictly better than the best so far."""
    return value < best if monitor.startswith("loss") else value > best
