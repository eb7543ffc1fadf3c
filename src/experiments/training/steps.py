"""The optimizer steps of an epoch, taken one by one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.data.loaders import Batch, Loader
from experiments.data.nests import row_count, tensors_of
from experiments.errors import UsageError
from experiments.training.means import Weigh
from experiments.training.objective import NO_NUMBERS, Objective
from experiments.training.train_log import StepResult


class Scheduler(Protocol):
    """Changes the learning rate; stepped after each optimizer step."""

    def step(self) -> None: ...


class Steps(Protocol):
    """The optimizer steps of an epoch; `len` is the number of its batches."""

    def __len__(self) -> int: ...
    def take(self, epoch: int, start: int, limit: int | None = None) -> Iterator[StepResult]: ...


def loss_batch(
    model: nn.Module,
    loss_func: Any,
    xb: Any,
    yb: Any,
    opt: Optimizer | None = None,
) -> tuple[Tensor, int]:
    """The mean loss of a batch, float32 (), and its number of rows; with `opt`, also take a step.

    xb, yb: (batch, ...), or a nest of tensors
    """
    loss = loss_func(model(xb), yb)
    if opt is not None:
        loss.backward()
        opt.step()
        opt.zero_grad()
    return loss.detach(), row_count(xb)


class MeanLoss(NamedTuple):
    """The mean of a step's losses over its batches, float (), that of each of their numbers, and
    how much they count: their weight, float (); None: their rows.
    """

    loss: Tensor
    numbers: Mapping[str, Tensor] = NO_NUMBERS
    weight: Tensor | None = None


def accumulate(
    objective: Objective,
    batches: list[Batch],
    opt: Optimizer,
    weights: list[float] | None = None,
) -> MeanLoss:
    """One step with the gradient accumulated over several batches: loss and gradient are the mean
    over all their rows, while only one batch's activations are in memory at a time.

    weights: how much the loss of each batch counts in the mean; None: as its output says, or by its
        rows. The loss of a batch that counts 0 is left out, since it would be 0 / 0.
    """
    counts: list[float] = [row_count(batch) for batch in batches] if weights is None else weights
    count = sum(counts)
    total = torch.zeros((), device=tensors_of(batches[0])[0].device)
    numbers: dict[str, Any] = {}
    given: list[float] = []
    for batch, part in zip(batches, counts, strict=True):
        output = objective(batch)
        scale = part / count if count else 0.0
        if weights is None and output.weight is not None:
            scale = float(output.weight)  # their sum is known at the end
            given.append(scale)
        # a batch that counts 0 has a loss of 0 / 0, and its gradient is zero
        counted: Any = output.loss if scale else sum(t.sum() for t in tensors_of(output.outputs))
        loss = counted * scale
        loss.backward()
        total += loss.detach()
        for name, value in output.numbers.items():
            numbers[name] = numbers.get(name, 0) + (value.detach() * scale if scale else 0)
    if not given:
        take_step(opt)
        return MeanLoss(total, numbers)
    if len(given) < len(batches):
        raise UsageError(
            "step: gives the weight of some batches and not of others; give it for all or none"
        )
    divisor = sum(given) or 1.0
    for group in opt.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad.div_(divisor)
    take_step(opt)
    means = {name: value / divisor for name, value in numbers.items()}
    return MeanLoss(total / divisor, means, torch.tensor(sum(given), dtype=torch.float64))


def take_step(opt: Optimizer) -> None:
    """Update the parameters with their gradients, and clear these."""
    opt.step()
    opt.zero_grad()


@dataclass(frozen=True)
class EagerSteps:
    """One step per `accumulated` batches of a loader; the last of an epoch may have fewer.

    weigh: how much the loss of a batch counts, from its targets; None: by its rows
    """

    objective: Objective
    opt: Optimizer
    scheduler: Scheduler
    loader: Loader
    accumulated: int = 1
    weigh: Weigh | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def take(self, epoch: int, start: int, limit: int | None = None) -> Iterator[StepResult]:
        """Take the steps of an epoch, from batch number `start` on; at most `limit` of them."""
        batches = self.loader.batches(epoch, start)
        taken = 0
        while taken != limit and (group := list(islice(batches, self.accumulated))):
            yield self.step(group)
            taken += 1

    def step(self, batches: list[Batch]) -> StepResult:
        """One optimizer step on some batches, then one scheduler step."""
        lr, *group_lrs = [group["lr"] for group in self.opt.param_groups]
        if self.objective.augment:
            batches = [self.objective.augmented(batch) for batch in batches]
        result = self.mean_loss(batches)
        self.scheduler.step()
        rows = sum(map(row_count, batches))
        return StepResult(
            result.loss, [lr], rows, len(batches), result.weight, [group_lrs], result.numbers
        )

    def mean_loss(self, batches: list[Batch]) -> MeanLoss:
        """Take the optimizer step on some batches; returns its mean loss."""
        objective = self.objective
        if self.weigh is not None:
            weights = torch.stack([self.weigh(batch[1]) for batch in batches])
            result = accumulate(objective, batches, self.opt, weights.tolist())
            return MeanLoss(result.loss, result.numbers, weights.sum())
        if len(batches) > 1:
            return accumulate(objective, batches, self.opt)
        if objective.is_supervised:
            xb, yb = batches[0]
            loss, _ = loss_batch(objective.model, objective.loss_func, xb, yb, self.opt)
            return MeanLoss(loss)
        if objective.is_manual:
            output = objective.update(batches[0])
        else:
            output = objective(batches[0])
            output.loss.backward()
            take_step(self.opt)
        numbers = {name: value.detach() for name, value in output.numbers.items()}
        weight = None if output.weight is None else torch.as_tensor(output.weight).double()
        return MeanLoss(output.loss.detach(), numbers, weight)
