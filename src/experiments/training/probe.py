"""Tries a training step before training, to find state that no checkpoint would hold.

The step runs twice from the same weights, on the same rows, with the same draws, and everything is
put back afterwards. What a module keeps outside its state_dict shows as an attribute that goes on
changing, or as another loss the second time.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.data.checks import same_bits
from experiments.data.loaders import Batch
from experiments.data.nests import map_tensors, tensors_of
from experiments.data.samples import preserved_generators, seed_generators
from experiments.training.frozen import copied, frozen, restore_buffers, save_buffers
from experiments.training.objective import Objective
from experiments.training.own_state import OwnState

# Attributes that every module has; its tensors and submodules are looked at by themselves.
INTERNAL = frozenset(vars(nn.Module()))
HOOKS = frozenset(name for name in INTERNAL if name.endswith("_hooks"))


@dataclass(frozen=True)
class Findings:
    """What a training step did besides its gradients.

    evolving: the attributes that go on changing, by dotted name
    changed: those that changed in the first of two equal steps
    repeatable: whether the second of two equal steps gave the same loss and gradients
    writes_input: whether model or loss wrote to the batch
    has_gradient: whether the loss has a gradient
    trains_model: whether a gradient reaches a parameter of the model
    """

    evolving: list[str]
    changed: list[str]
    repeatable: bool
    writes_input: bool
    has_gradient: bool
    trains_model: bool


def probe(objective: Objective, batch: Batch) -> Findings | None:
    """Try two equal steps on a batch; None if a step raises, which training itself will show.
    Weights, buffers, attributes and generators are put back.
    """
    snapshot = Snapshot(objective)
    try:
        with preserved_generators():
            one = step(objective, batch)
            first = snapshot.attributes()
            snapshot.restore_checkpointed()
            again = step(objective, batch)
            second = snapshot.attributes()
            wrote = one.wrote or writes_in_evaluation(objective, batch)
    except Exception:
        return None
    finally:
        snapshot.restore()
    before = snapshot.frozen
    return Findings(
        evolving=[name for name, value in second.items() if first.get(name) != value],
        changed=[name for name, value in first.items() if before.get(name) != value],
        repeatable=all(map(same_bits, one.results, again.results)),
        writes_input=wrote,
        has_gradient=one.has_gradient,
        trains_model=one.trains_model,
    )


@contextlib.contextmanager
def preserved_buffers(*parts: nn.Module) -> Iterator[None]:
    """Put the values of buffers back that a forward pass changes in evaluation mode, too, so that
    training starts from those that the parts were built with.
    """
    saved = save_buffers(*parts)
    yield
    restore_buffers(saved)


def named(name: str, part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a part with its dotted name."""
    for path, module in part.named_modules():
        yield f"{name}.{path}" if path else name, module


@dataclass(frozen=True)
class Step:
    """A step without its update: the loss and the sum of each gradient; the rest as in Findings."""

    results: list[Tensor]
    wrote: bool
    has_gradient: bool
    trains_model: bool


def step(objective: Objective, batch: Batch) -> Step:
    """Compute the loss of a batch and its gradients, with the draws of one seed. A manual step
    takes its own optimizer steps.
    """
    objective.train()
    seed_generators(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)
    own = map_tensors(torch.clone, batch)
    if objective.is_manual:
        output = objective.update(objective.augmented(own))
        weights = [p.detach().sum() for p in objective.parameters()]
        return Step([output.loss.detach(), *weights], was_written(own, batch), True, True)
    loss = objective(objective.augmented(own)).loss
    parameters = [p for p in objective.parameters() if p.requires_grad]
    of_model = sum(p.requires_grad for p in objective.model.parameters())
    grads: tuple[Tensor | None, ...] = ()
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return Step(
        [loss.detach(), *(grad.sum() for grad in grads if grad is not None)],
        was_written(own, batch),
        loss.requires_grad,
        any(grad is not None for grad in grads[:of_model]),
    )


@torch.no_grad()
def writes_in_evaluation(objective: Objective, batch: Batch) -> bool:
    """Whether model or loss write to their batch in evaluation mode."""
    own = map_tensors(torch.clone, batch)
    objective.eval()(own)
    return was_written(own, batch)


def was_written(clones: Batch, batch: Batch) -> bool:
    """Whether something has written to fresh clones of a batch. A write such as clamp_ may leave
    these rows' values as they are, and one through numpy or `.data` the version.
    """
    return any(
        clone._version > 0 or not same_bits(clone, part)
        for clone, part in zip(tensors_of(clones), tensors_of(batch), strict=True)
    )


class Snapshot:
    """The state of an objective's modules: tensors, mode and plain attributes, to compare and to
    restore; and of an object that is its step.
    """

    def __init__(self, objective: Objective) -> None:
        self.owned = OwnState(objective.step)
        parts = {"model": objective.model, "loss": objective.loss_func, **self.owned.modules}
        modules = [found for name, part in parts.items() for found in named(name, part)]
        self.modules = modules
        self.frozen = self.attributes()
        self.values = [
            {name: (value, copied(value)) for name, value in plain_attributes(module)}
            for _, module in modules
        ]
        self.training = [module.training for _, module in modules]
        # or a hook that the first training step registers would be there twice
        self.hooks = [
            (hooks, hooks.copy())
            for _, module in modules
            for name, hooks in vars(module).items()
            if name in HOOKS
        ]
        self.tensors = [
            (table, name, tensor, tensor.detach().clone(), name in persistent(module, table))
            for _, module in modules
            for table in tables(module)
            for name, tensor in table.items()
            if tensor is not None
        ]
        self.extra = [
            (module, copy.deepcopy(module.get_extra_state()))
            for _, module in modules
            if type(module).get_extra_state is not nn.Module.get_extra_state
        ]

    def attributes(self) -> dict[str, Any]:
        """Comparable values of all that no state_dict holds, by dotted name."""
        found = {}
        for path, module in self.modules:
            for name, value in plain_attributes(module):
                found[f"{path}.{name}"] = frozen(value)
            for name in module._non_persistent_buffers_set:
                found[f"{path}.{name}"] = frozen(module._buffers.get(name))
        return found | self.owned.attributes()

    @torch.no_grad()
    def restore_checkpointed(self) -> None:
        """Restore what a checkpoint holds, as resuming does: tensors and extra state."""
        self.restore_tensors(lambda persistent: persistent)
        self.owned.restore_checkpointed()

    @torch.no_grad()
    def restore(self) -> None:
        """Restore everything."""
        self.restore_tensors(lambda persistent: True)
        self.owned.restore()
        for hooks, before in self.hooks:
            for key in [key for key in hooks if key not in before]:
                del hooks[key]
            hooks.update(before)
        for (_, module), values, training in zip(
            self.modules, self.values, self.training, strict=True
        ):
            module.training = training
            for name in [name for name, _ in plain_attributes(module) if name not in values]:
                del module.__dict__[name]
            for name, (value, saved) in values.items():
                self.restore_value(module, name, value, saved)

    def restore_tensors(self, chosen: Callable[[bool], bool]) -> None:
        """Put parameters and buffers back in place, and their values; then extra state."""
        for table, name, tensor, saved, is_persistent in self.tensors:
            if chosen(is_persistent):
                table[name] = tensor
                tensor.detach().copy_(saved)
        for module, extra in self.extra:
            module.set_extra_state(copy.deepcopy(extra))

    def restore_value(self, module: nn.Module, name: str, value: Any, saved: Any) -> None:
        """Put an attribute's object back, with its content if that has changed in place."""
        path = next(path for path, other in self.modules if other is module)
        if frozen(value) != self.frozen[f"{path}.{name}"]:
            if isinstance(value, Tensor):
                value.detach().copy_(saved)
            elif saved is not None:
                value = saved
        module.__dict__[name] = value


def persistent(module: nn.Module, table: Any) -> set[str]:
    """The names of the parameters or buffers in a table that the state_dict holds."""
    return set(table) - module._non_persistent_buffers_set


def tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters and the buffers of a module itself."""
    return module._parameters, module._buffers


def plain_attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """The attributes of a module that are neither parameters, buffers nor submodules."""
    return [(name, value) for name, value in vars(module).items() if name not in INTERNAL]
