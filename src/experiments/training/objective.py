"""What is minimised: a model, a loss and a step as one module, from a batch to its loss."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from experiments.training.build import takes

NO_NUMBERS: Mapping[str, Tensor] = MappingProxyType({})


class StepOutput(NamedTuple):
    """What a step computes of a batch.

    loss: the mean over the batch, float (), which training minimises
    outputs, targets: what the metrics compare; None for a step whose metrics need none
    numbers: named parts of the loss, say, float () each, which are averaged and logged like it
    weight: how much the loss counts in a mean over batches, such as the number of tokens, float ();
        None: the number of rows
    """

    loss: Tensor
    outputs: Any = None
    targets: Any = None
    numbers: Mapping[str, Tensor] = NO_NUMBERS
    weight: Tensor | float | None = None


def supervised(model: nn.Module, batch: Any, loss_func: Callable[..., Tensor]) -> StepOutput:
    """The default step: the loss of the model's outputs for x and the targets y.

    batch: (x, y), each a tensor (batch, ...) or a nest of them, as the model and the loss take it
    """
    x, y = batch
    outputs = model(x)
    return StepOutput(loss_func(outputs, y), outputs, y)


def multilabel(model: nn.Module, batch: Any, loss_func: Callable[..., Tensor]) -> StepOutput:
    """The default step for targets that are labels, float of 0 and 1, of which a row may have any
    number: the metrics get them as integers.
    """
    output = supervised(model, batch, loss_func)
    return output._replace(targets=output.targets.long())


class NoLoss(nn.Module):
    """Stands for the loss of a step that computes its own."""


class Objective(nn.Module):
    """The model, the loss and the step of a run, as one module: batch -> StepOutput.

    step: a function or object of (model, batch), or of (model, batch, loss_func) if it has a
        parameter of that name; returns a StepOutput, or the loss alone
    augment: functions from a batch to a batch, applied in training
    """

    def __init__(
        self,
        model: nn.Module,
        loss_func: nn.Module,
        step: Callable[..., Any] = supervised,
        augment: Sequence[Callable[[Any], Any]] = (),
    ) -> None:
        super().__init__()
        self.model, self.loss_func, self.step, self.augment = model, loss_func, step, augment
        self.takes_loss = takes(step, "loss_func")
        # a step that takes its own optimizer steps
        self.is_manual = hasattr(step, "update")

    @property
    def is_supervised(self) -> bool:
        """Whether the step is the default one, of pairs (x, y)."""
        return self.step is supervised

    @property
    def loss_group(self) -> str:
        """The group of the config whose part decides the loss."""
        return "loss" if self.is_supervised else "step"

    def forward(self, batch: Any) -> StepOutput:
        """The output of the step for a batch."""
        if self.takes_loss:
            return as_output(self.step(self.model, batch, loss_func=self.loss_func))
        return as_output(self.step(self.model, batch))

    def augmented(self, batch: Any) -> Any:
        """A batch to train on, from one of the training split."""
        for function in self.augment:
            batch = function(batch)
        return batch

    def update(self, batch: Any) -> StepOutput:
        """Let a manual step take its own optimizer steps on a batch."""
        return as_output(self.step.update(self.model, batch))  # type: ignore[attr-defined]


def as_output(value: Any) -> StepOutput:
    """What a step returned: a StepOutput, or the loss alone."""
    return value if isinstance(value, StepOutput) else StepOutput(value)
