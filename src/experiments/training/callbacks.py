"""Training aids: what runs after a validation, and averages of the weights."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.data.samples import preserved_generators, seed_generators
from experiments.data.streams import derive
from experiments.errors import UsageError
from experiments.training.build import build_callable
from experiments.training.objective import Objective
from experiments.training.own_state import load_state, state_of
from experiments.training.train_log import Metrics, State


@dataclass(frozen=True)
class Validated:
    """What a callback gets after a validation.

    model: in evaluation mode, with the weights that were validated
    monitored: the value of `trainer.monitor`; maximize: whether more of it is better
    log(numbers by tag), log_image(tag, PNG): log at this step
    """

    model: nn.Module
    step: int
    epoch: int
    metrics: Mapping[str, float]
    monitored: float
    maximize: bool
    log: Callable[[Mapping[str, float]], None]
    log_image: Callable[[str, bytes], None]


OWN_TAGS = ("step", "epoch", "lr", "throughput")
ONE_ARGUMENT = "function of one argument, validated, with .model, .metrics, .log and .log_image"
# Returns why training is to end, or None.
Callback = Callable[[Validated], str | None]


class EarlyStopping:
    """Ends training when the monitored number has not become better by more than `min_delta` in
    `patience` validations.
    """

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        if patience < 1:
            raise UsageError(f"callbacks.early_stopping.patience={patience}: expected at least 1")
        self.patience, self.min_delta = patience, min_delta
        self.best, self.waited = math.inf, 0

    def __call__(self, validated: Validated) -> str | None:
        """Count a validation."""
        value = -validated.monitored if validated.maximize else validated.monitored
        if value < self.best - self.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if self.waited < self.patience:
            return None
        return f"early stopping: no better value in {self.waited} validations"


class EMA:
    """The exponential moving average of the parameters, which is validated, tested and loaded.

    The decay begins at 2/11 and grows to `decay`, as that of TensorFlow's ExponentialMovingAverage
    with num_updates, so that the initial weights are soon forgotten.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise UsageError(f"callbacks.ema.decay={decay}: expected a number above 0 and below 1")
        self.decay, self.steps = decay, 0
        self.average: dict[str, Tensor] = {}

    def start(self, model: nn.Module) -> None:
        """Begin with the weights of a model; a resumed run has an average already."""
        parameters = dict(model.named_parameters())
        if not self.average:
            self.average = {name: p.detach().clone() for name, p in parameters.items()}
        self.average = {name: t.to(parameters[name].device) for name, t in self.average.items()}
        self.parameters = parameters.values()
        self.values = list(self.average.values())

    @torch.no_grad()
    def after_step(self) -> None:
        """Take the weights after a step into the average."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, list(self.parameters), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the average in the block."""
        trained = [p.detach().clone() for p in self.parameters]
        self.put(self.values)
        try:
            yield
        finally:
            self.put(trained)

    @torch.no_grad()
    def put(self, values: list[Tensor]) -> None:
        """Write values to the model's parameters."""
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.steps, self.average = state["steps"], state["average"]


class Aids:
    """The callbacks of a run: those that are called after validations, and the averages."""

    def __init__(self, config: Mapping[str, Any], objective: Objective) -> None:
        self.parts = {
            name: build_callback(name, node) for name, node in config["callbacks"].items()
        }
        self.seed, self.objective = config["seed"], objective
        averages = [part for part in self.parts.values() if isinstance(part, EMA)]
        if len(averages) > 1:
            raise UsageError("callbacks: has two averages of the weights; leave one out")
        self.ema = averages[0] if averages else None

    def start(self) -> None:
        """Begin with the weights that the model has now."""
        if self.ema is not None:
            self.ema.start(self.objective.model)

    def after_step(self) -> None:
        """Called after each optimizer step."""
        if self.ema is not None:
            self.ema.after_step()

    def evaluated_weights(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the model has the weights that are evaluated."""
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()

    def validated(self, validated: Validated) -> str | None:
        """Call the callbacks, each with draws of its own; returns why training is to end."""
        reasons = []
        with self.evaluated_weights(), preserved_generators():
            for name, part in self.parts.items():
                if not isinstance(part, EMA):
                    seed_generators(derive(self.seed, f"callback {name}", validated.step))
                    reasons.append(part(validated))
        return next((reason for reason in reasons if isinstance(reason, str)), None)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the callbacks, by name."""
        return {name: state_of(part) for name, part in self.parts.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        for name, part in self.parts.items():
            load_state(part, state[name])


def build_callback(name: str, node: dict[str, Any]) -> Any:
    """A callback of a config. Raises UsageError if it cannot be called."""
    part = build_callable(f"callbacks.{name}", node)
    if not callable(part) and not isinstance(part, EMA):
        raise UsageError(
            f"callbacks.{name}._target_={node['_target_']}: a {type(part).__name__}, expected a "
            + ONE_ARGUMENT
        )
    if not isinstance(part, EMA) and not takes_one(part):
        raise UsageError(
            f"callbacks.{name}._target_={node['_target_']}: cannot be called with one argument, "
            f"expected a {ONE_ARGUMENT}"
        )
    return part


def takes_one(part: Callable[..., Any]) -> bool:
    """Whether a function or object can be called with one positional argument."""
    try:
        inspect.signature(part).bind(None)
    except TypeError:
        return False
    except ValueError:  # of some that are written in C
        pass
    return True


def after_validation(
    aids: Aids, state: State, metrics: Metrics, monitor: str, maximize: bool, tracker: Any
) -> str | None:
    """Call the callbacks of a run after a validation; returns why training is to end."""
    if all(isinstance(part, EMA) for part in aids.parts.values()):
        return None
    epoch = int(state.last["epoch"])

    def log(numbers: Mapping[str, float]) -> None:
        check_tags(numbers, metrics)
        tracker.log(state.step, epoch, {tag: float(value) for tag, value in numbers.items()})

    return aids.validated(
        Validated(
            aids.objective.model.eval(),
            state.step,
            epoch,
            metrics,
            metrics[monitor],
            maximize,
            log,
            lambda tag, png: tracker.image(tag, state.step, png),
        )
    )


def check_tags(numbers: Mapping[str, float], metrics: Mapping[str, float]) -> None:
    """Raise UsageError for a tag that the run has for itself, metrics being those of a validation:
    two numbers of one step would stand under it.
    """
    names = {tag.rpartition("/")[0] for tag in metrics}
    for tag in numbers:
        name, _, split = tag.rpartition("/")
        own = name in names and split in ("train", "train_epoch", "valid", "test")
        if own or tag in OWN_TAGS or name == "lr":
            raise UsageError(
                f"callbacks: one logs {tag}, which the run logs itself; give it another name"
            )


def averaged_weights(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The averages of the parameters in a checkpoint, by name; empty if it has none."""
    for state in content.get("callbacks", {}).values():
        average = state.get("state_dict", {}).get("average")
        if isinstance(average, dict):
            return average
    return {}
