"""The recipes as one would write each by hand: loops over tensors in memory, without logs.

Each is a generator that trains an epoch, validates and yields the validation's numbers. The loss of
training is read once an epoch, and nothing is read from a batch of the validation. Models, losses,
steps, optimizers, schedules, augmentations and torchmetrics' metrics are the recipe's own; accuracy
and perplexity are computed as one would here.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.data import Data, Split

Batch = tuple[Any, Any]


@dataclass
class Job:
    """What a loop trains, and how.

    metrics: by name, with update, compute and reset, as torchmetrics has
    functions: metrics that are functions of the outputs and targets of the whole split
    step: of the recipes that have one
    ema: the decay of an average of the weights, which is validated
    """

    data: Data
    model: nn.Module
    loss_func: nn.Module
    opt: Any
    scheduler: Any
    batch_size: int
    valid_batch_size: int
    augment: Sequence[Callable[[Batch], Batch]] = ()
    metrics: Sequence[Any] = ()
    functions: Sequence[Callable[[Tensor, Tensor], float]] = ()
    step: Any = None
    clip_norm: float | None = None
    ema: float | None = None
    perplexity: bool = False
    multilabel: bool = False


class Accuracy:
    """The fraction of targets whose class has the largest output."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin with a validation."""
        self.correct, self.count = torch.zeros((), dtype=torch.int64), 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        self.correct += (outputs.argmax(1) == targets).sum()
        self.count += targets.numel()

    def compute(self) -> float:
        """The accuracy, in [0, 1]."""
        return self.correct.item() / self.count


class Average:
    """A copy of a model with the moving average of its weights."""

    def __init__(self, model: nn.Module, copy: nn.Module, decay: float) -> None:
        copy.load_state_dict(model.state_dict())
        self.model, self.copy, self.decay, self.steps = model, copy, decay, 0
        self.weights = list(model.parameters())
        self.averages = [p.detach() for p in copy.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after a step into the average."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)

    @torch.no_grad()
    def finished(self) -> nn.Module:
        """The copy, with the model's buffers."""
        for mine, other in zip(self.copy.buffers(), self.model.buffers(), strict=True):
            mine.copy_(other)
        return self.copy


def rows_of(part: Any, rows: Any) -> Any:
    """Some rows of a tensor, or of each tensor of a dict."""
    if isinstance(part, dict):
        return {name: tensor[rows] for name, tensor in part.items()}
    return part[rows]


def supervised(job: Job, copy: nn.Module) -> Iterator[dict[str, float]]:
    """A model of x, a loss of its outputs and y. copy: another model like it, for an average."""
    model, loss_func, opt = job.model, job.loss_func, job.opt
    x, y = job.data.train.x, job.data.train.y
    average = Average(model, copy, job.ema) if job.ema else None
    while True:
        model.train()
        total = torch.zeros(())
        for rows in torch.randperm(len(y)).split(job.batch_size):
            batch = rows_of(x, rows), y[rows]
            for function in job.augment:
                batch = function(batch)
            xb, yb = batch
            loss = loss_func(model(xb), yb)
            loss.backward()
            if job.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
            opt.step()
            opt.zero_grad()
            job.scheduler.step()
            if average is not None:
                average.update()
            total += loss.detach() * len(rows)
        found = {"loss/train": total.item() / len(y)}
        yield found | validate(job, model if average is None else average.finished())


def validate(job: Job, model: nn.Module) -> dict[str, float]:
    """The loss and the metrics of the validation split."""
    model.eval()
    x, y = job.data.valid.x, job.data.valid.y
    total = torch.zeros(())
    with torch.no_grad():
        for first in range(0, len(y), job.valid_batch_size):
            rows = slice(first, first + job.valid_batch_size)
            xb, yb = rows_of(x, rows), y[rows]
            outputs = model(xb)
            total += job.loss_func(outputs, yb) * len(yb)
            for metric in job.metrics:
                metric.update(outputs, yb.long() if job.multilabel else yb)
    loss = total.item() / len(y)
    found = {"loss/valid": loss} | ({"perplexity": math.exp(loss)} if job.perplexity else {})
    for metric in job.metrics:
        found[type(metric).__name__] = float(metric.compute())
        metric.reset()
    return found


def vae(job: Job, copy: nn.Module) -> Iterator[dict[str, float]]:
    """A model of x alone, whose step names two terms of its loss."""
    model, opt = job.model, job.opt
    x, valid_x = job.data.train.x, job.data.valid.x
    while True:
        model.train()
        totals = torch.zeros(3)
        for rows in torch.randperm(len(x)).split(job.batch_size):
            output = job.step(model, (x[rows],))
            output.loss.backward()
            opt.step()
            opt.zero_grad()
            job.scheduler.step()
            parts = [output.loss.detach(), *(part.detach() for part in output.numbers.values())]
            totals += torch.stack(parts) * len(rows)
        means = (totals / len(x)).tolist()
        model.eval()
        totals = torch.zeros(3)
        with torch.no_grad():
            for xb in valid_x.split(job.valid_batch_size):
                output = job.step(model, (xb,))
                totals += torch.stack([output.loss, *output.numbers.values()]) * len(xb)
        yield {"loss/train": means[0], "loss/valid": (totals[0] / len(valid_x)).item()}


def gan(job: Job, copy: nn.Module) -> Iterator[dict[str, float]]:
    """A step that takes its own optimizer steps, and metrics of all points that are made."""
    model, x, valid_x = job.model, job.data.train.x, job.data.valid.x
    while True:
        model.train()
        totals = torch.zeros(2)
        for rows in torch.randperm(len(x)).split(job.batch_size):
            output = job.step.update(model, x[rows])
            totals += torch.stack(list(output.numbers.values())) * len(rows)
        means = (totals / len(x)).tolist()
        model.eval()
        totals, points = torch.zeros(2), []
        with torch.no_grad():
            for xb in valid_x.split(job.valid_batch_size):
                output = job.step(model, xb)
                points.append(output.outputs)
                totals += torch.stack(list(output.numbers.values())) * len(xb)
        made = torch.cat(points)
        found = {function.__name__: function(made, valid_x) for function in job.functions}
        yield {"loss/train": sum(means), "loss/valid": totals.sum().item() / len(valid_x), **found}


def first_rows(data: Data, share: int) -> Data:
    """The first rows of the training and the validation split, one of `share`."""

    def cut(split: Split) -> Split:
        count = len(split) // share
        x, y = split.x, split.y
        x = {k: t[:count] for k, t in x.items()} if isinstance(x, dict) else x[:count]
        return Split(x, None if y is None else y[:count], pixels=split.pixels)

    if share == 1:
        return data
    splits = cut(data.train), cut(data.valid), cut(data.test)
    return Data(*splits, sizes=data.sizes, statistics=data.statistics)


LOOPS = {"vae": vae, "gan": gan}  # of all others `supervised`
