"""Compare compiled steps with the eager ones before training, on the first rows of the data.

Both begin with the run's weights and take the same steps; then losses, weights, buffers and the
optimizer's state are compared. The eager steps are taken with the real parts, which are put back,
because a copy would not have their hooks and closures.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from experiments.compiled.updates import GroupedUpdate
from experiments.errors import UsageError
from experiments.training.steps import EagerSteps

CALLS = 2  # what is carried from one call to the next shows in the second
ATTEMPTS = 3  # at a kink, of a ReLU say, rounding can change one gradient by much
# A small lr, since a large one would amplify rounding, but large enough for the update to exceed
# the rounding of the weights.
LR = 0.01
# Relative to the largest value of a tensor, and to the largest of all tensors of its kind: the
# gradient of a bias before BatchNorm is nothing but rounding errors.
TOLERANCE, FLOOR = 1e-2, 1e-5
LOW_PRECISION_TOLERANCE, LOW_PRECISION_FLOOR = 0.15, 0.02  # of bfloat16 and float16

Values = dict[str, dict[str, Tensor]]  # kind -> name -> tensor
# takes steps in place: (parameters, untrained tensors, states, rows, scalars) -> losses (steps,)
RunSteps = Callable[[list[Tensor], list[Tensor], list[dict[str, Tensor]], Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Checked:
    """What is compared: the eager steps and the tensors of the graph.

    module: the model with its loss. parameters, untrained: its tensors, by name. states: of each
        parameter. index: int64 (rows of a call,).
    """

    module: nn.Module
    eager: EagerSteps
    opt: Optimizer
    update: GroupedUpdate
    parameters: dict[str, nn.Parameter]
    untrained: dict[str, Tensor]
    states: list[dict[str, Tensor]]
    index: Tensor
    steps_per_call: int
    low_precision: bool


class NoScheduler:
    """Leaves the lr as it is."""

    def step(self) -> None:
        """Changes nothing."""


def check_against_eager(checked: Checked, run: RunSteps) -> None:
    """Compare the steps that `run` takes with the eager ones. Neither changes anything.

    Raises UsageError if they differ by more than rounding.
    """
    rows, difference = len(checked.eager.loader.split), ""  # type: ignore[attr-defined]
    for attempt in range(ATTEMPTS):
        first = attempt * rows // ATTEMPTS
        calls = [
            (checked.index + first + call * len(checked.index)) % rows for call in range(CALLS)
        ]
        with check_options(checked) as scalars, global_generators_restored():
            torch.manual_seed(attempt)
            expected = take_eager_steps(checked, calls)
            torch.manual_seed(attempt)
            found = take_steps(checked, run, calls, scalars)
        difference = largest_difference(checked, expected, found)
        if not difference:
            return
    raise UsageError(
        f"trainer.compile=true: a compiled step computes something else than an eager one: "
        f"{difference}; use trainer.compile=false"
    )


@contextlib.contextmanager
def check_options(checked: Checked) -> Iterator[list[Tensor]]:
    """Give the optimizer the check's lr and state; yields the scalars of each call."""
    groups, lrs, state = checked.opt.param_groups, checked.update.lrs(), checked.opt.state
    for number, group in enumerate(groups, 1):
        group["lr"] = LR / number  # or a parameter in another's group would not show
    checked.opt.state = type(state)(dict)
    states = zip(checked.parameters.values(), check_states(checked.states), strict=True)
    checked.opt.state.update(states)
    count = checked.steps_per_call
    try:
        yield [
            torch.tensor(
                [checked.update.scalars(call * count + i + 1) for i in range(count)],
                device=checked.index.device,
            )
            for call in range(CALLS)
        ]
    finally:
        checked.opt.state = state
        for group, lr in zip(groups, lrs, strict=True):
            group["lr"] = lr


def check_states(states: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Initial states for the check: ones for the mean square gradient, since Adam would turn a
    gradient of pure rounding errors into a full step, zeros for all others.
    """
    return [
        {
            name: torch.ones_like(t) if name == "exp_avg_sq" else torch.zeros_like(t)
            for name, t in state.items()
        }
        for state in states
    ]


@contextlib.contextmanager
def global_generators_restored() -> Iterator[None]:
    """Put the global generators back after the block."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def take_eager_steps(checked: Checked, calls: list[Tensor]) -> Values:
    """The results of eager steps with the real parts, whose tensors are then put back.

    Raises UsageError if a step replaces a parameter or a buffer by another tensor.
    """
    tensors = {**checked.parameters, **checked.untrained}
    places = {name: t.data_ptr() for name, t in tensors.items()}
    holders = [(part, dict(part._buffers)) for part in checked.module.modules()]
    saved = {name: t.detach().clone() for name, t in tensors.items()}
    eager = replace(checked.eager, scheduler=NoScheduler())
    size = eager.accumulated * eager.loader.rows.batch_size  # type: ignore[attr-defined]
    losses = []
    try:
        for index in calls:
            for step_rows in index.split(size):
                batches = step_rows.split(size // eager.accumulated)
                split: Any = eager.loader.split  # type: ignore[attr-defined]
                result = eager.step([split.gather(rows) for rows in batches])
                losses.append(result.losses)
        states = [checked.opt.state[p] for p in checked.parameters.values()]
        values = collect(checked, saved, list(tensors.values()), states, torch.stack(losses))
    finally:
        with torch.no_grad():
            for name, t in tensors.items():
                t.copy_(saved[name])
        now = dict([*checked.module.named_parameters(), *checked.module.named_buffers()])
        for part, buffers in holders:
            for name, buffer in buffers.items():
                if part._buffers[name] is not buffer:
                    part._buffers[name] = buffer
    for name, t in tensors.items():
        if now.get(name) is not t or t.data_ptr() != places[name]:
            raise UsageError(
                f"trainer.compile=true: each step replaces {name} by another tensor, which a "
                "compiled step does not do; change it in place (copy_, mul_, add_) "
                "or use trainer.compile=false"
            )
    return values


def take_steps(
    checked: Checked, run: RunSteps, calls: list[Tensor], scalars: list[Tensor]
) -> Values:
    """The results of the steps that `run` takes, on copies of the tensors."""
    clone = [*checked.parameters.values()], [*checked.untrained.values()]
    parameters, untrained = tree_map(lambda t: t.detach().clone(), clone)
    states = check_states(checked.states)
    before = dict(
        zip(
            [*checked.parameters, *checked.untrained],
            [t.detach() for part in clone for t in part],
            strict=True,
        )
    )
    losses = [
        run(parameters, untrained, states, index, step_scalars)
        for index, step_scalars in zip(calls, scalars, strict=True)
    ]
    return collect(checked, before, [*parameters, *untrained], states, torch.cat(losses))


def collect(
    checked: Checked,
    before: dict[str, Tensor],
    after: list[Tensor],
    states: list[dict[str, Tensor]],
    losses: Tensor,
) -> Values:
    """What is compared, in double precision, by kind and name: the change of each tensor."""
    names = [*checked.parameters, *checked.untrained]
    changes = {
        name: t.detach().double() - before[name].double()
        for name, t in zip(names, after, strict=True)
    }
    values: Values = {
        "loss": {"loss": losses.detach().double()},
        "weight": {name: changes[name] for name in checked.parameters},
        "buffer": {name: changes[name] for name in checked.untrained},
    }
    for name, state in zip(checked.parameters, states, strict=True):
        for key, t in state.items():
            values.setdefault(f"optimizer's {key} of", {})[name] = t.detach().double().clone()
    return values


def largest_difference(checked: Checked, expected: Values, found: Values) -> str:
    """The first tensor that differs by more than rounding, in words; empty if none does."""
    tolerance, floor = (
        (LOW_PRECISION_TOLERANCE, LOW_PRECISION_FLOOR)
        if checked.low_precision
        else (TOLERANCE, FLOOR)
    )
    rounding = torch.finfo(torch.float32).eps * 8
    for kind, tensors in expected.items():
        largest = max((size(t) for t in tensors.values()), default=0.0)
        for name, value in tensors.items():
            other = found[kind][name]
            allowed = tolerance * size(value) + floor * largest
            if kind in ("weight", "buffer"):  # of which the change is compared
                tensor = checked.parameters.get(name, checked.untrained.get(name))
                allowed += rounding * size(cast(Tensor, tensor).detach().double())
            if not value.isfinite().all():  # diverged, as the eager step did
                continue
            off = (value - other).abs().max().item() if value.numel() else 0.0
            if not off <= allowed:
                what = "the loss" if kind == "loss" else f"the {kind} {name}"
                return f"{what} differs by {off:.2g}, of {size(value):.2g}"
    return ""


def size(t: Tensor) -> float:
    """The largest finite absolute value, 0 if there is none."""
    return t.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if t.numel() else 0.0
