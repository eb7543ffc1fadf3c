"""Tries a training step before training, to find state that no checkpoint would hold.

The step runs twice from the same weights, on the same rows, with the same draws, and everything is
put back afterwards. What a module keeps outside its state_dict shows as an attribute that goes on
changing, or as another loss the second time.
"""

import copy
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.data.checks import same_bits
from experiments.data.loaders import Batch
from experiments.data.samples import preserved_generators, seed_generators

# Attributes that every module has; its tensors and submodules are looked at by themselves.
INTERNAL = frozenset(vars(nn.Module()))
# Larger tensors and containers are compared by identity and version or by length only.
MAX_ELEMENTS, MAX_ITEMS, MAX_DEPTH = 1 << 20, 10_000, 6


@dataclass(frozen=True)
class Findings:
    """What a training step did besides its gradients.

    evolving: the attributes that go on changing, by dotted name
    changed: those that changed in the first of two equal steps
    repeatable: whether the second of two equal steps gave the same loss and gradients
    writes_input: whether model or loss wrote to the batch
    """

    evolving: list[str]
    changed: list[str]
    repeatable: bool
    writes_input: bool


class DetachedLoss(Exception):
    """The loss of a training step has no gradient."""


def probe(parts: Mapping[str, nn.Module], batch: Batch) -> Findings | None:
    """Try two equal steps of the parts `model` and `loss` on a batch; None if a step raises, which
    training itself will show. Weights, buffers, attributes and generators are put back.

    Raises DetachedLoss if the loss does not depend on any parameter.
    """
    modules = [(name, module) for name, part in parts.items() for name, module in named(name, part)]
    snapshot = Snapshot(modules)
    try:
        with preserved_generators(), torch.random.fork_rng(enabled=torch.cuda.is_initialized()):
            loss, wrote = step(parts, batch)
            first = snapshot.attributes()
            snapshot.restore_checkpointed()
            again, _ = step(parts, batch)
            second = snapshot.attributes()
            wrote = wrote or writes_in_evaluation(parts, batch)
    except DetachedLoss:
        raise
    except Exception:
        return None
    finally:
        snapshot.restore()
    before = snapshot.frozen
    return Findings(
        evolving=[name for name, value in second.items() if first.get(name) != value],
        changed=[name for name, value in first.items() if before.get(name) != value],
        repeatable=all(map(same_bits, loss, again)),
        writes_input=wrote,
    )


def named(name: str, part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a part with its dotted name."""
    for path, module in part.named_modules():
        yield f"{name}.{path}" if path else name, module


def step(parts: Mapping[str, nn.Module], batch: Batch) -> tuple[list[Tensor], bool]:
    """The loss of a batch and the sum of each gradient, and whether the batch was written to."""
    model, loss_func = parts["model"].train(), parts["loss"].train()
    seed_generators(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)
    xb, yb = (part.clone() for part in batch)
    loss = loss_func(model(xb), yb)
    if not loss.requires_grad:
        raise DetachedLoss
    parameters = [p for part in parts.values() for p in part.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    results = [loss.detach(), *(grad.sum() for grad in grads if grad is not None)]
    return results, not (same_bits(xb, batch[0]) and same_bits(yb, batch[1]))


@torch.no_grad()
def writes_in_evaluation(parts: Mapping[str, nn.Module], batch: Batch) -> bool:
    """Whether model or loss write to their batch in evaluation mode."""
    xb, yb = (part.clone() for part in batch)
    parts["loss"].eval()(parts["model"].eval()(xb), yb)
    return not (same_bits(xb, batch[0]) and same_bits(yb, batch[1]))


class Snapshot:
    """The state of some modules: tensors, mode and plain attributes, to compare and restore."""

    def __init__(self, modules: list[tuple[str, nn.Module]]) -> None:
        self.modules = modules
        self.frozen = self.attributes()
        self.values = [
            {name: (value, copied(value)) for name, value in plain_attributes(module)}
            for _, module in modules
        ]
        self.training = [module.training for _, module in modules]
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
        return found

    @torch.no_grad()
    def restore_checkpointed(self) -> None:
        """Restore what a checkpoint holds, as resuming does: tensors and extra state."""
        self.restore_tensors(lambda persistent: persistent)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore everything."""
        self.restore_tensors(lambda persistent: True)
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


def copied(value: Any) -> Any:
    """A copy of a value that can change in place; None if it cannot, or is no plain value."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.detach().clone()
    if isinstance(value, list | dict | set | deque | bytearray | np.ndarray):
        try:
            return copy.deepcopy(value)
        except Exception:  # tensors in the middle of a graph, locks, files
            return copy.copy(value)
    return None


def frozen(value: Any, depth: int = 0) -> Any:
    """A value to compare with the same attribute's at another time."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)  # NaN equals itself
    if isinstance(value, nn.Parameter):
        return "parameter", id(value)
    if isinstance(value, Tensor):
        return frozen_tensor(value)
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        return array.dtype.str, array.shape, array.tobytes() if array.dtype.kind != "O" else 0
    if isinstance(value, torch.Generator):
        return value.get_state().cpu().numpy().tobytes()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if depth == MAX_DEPTH:
        return type(value).__name__
    if isinstance(value, dict):
        if len(value) > MAX_ITEMS:
            return "dict", len(value)
        return "dict", [(repr(key), frozen(item, depth + 1)) for key, item in value.items()]
    if isinstance(value, list | tuple | deque | set | frozenset):
        if len(value) > MAX_ITEMS:
            return type(value).__name__, len(value)
        return type(value).__name__, [frozen(item, depth + 1) for item in value]
    if isinstance(value, type) or (callable(value) and not isinstance(value, nn.Module)):
        return type(value).__name__
    return type(value).__name__, [
        (name, frozen(item, depth + 1)) for name, item in sorted(vars_of(value).items())
    ]


def vars_of(value: Any) -> dict[str, Any]:
    """The attributes of an object, if it keeps any in a __dict__."""
    found = getattr(value, "__dict__", {})
    return found if isinstance(found, dict) else {}


def frozen_tensor(value: Tensor) -> Any:
    """A tensor's dtype, shape and bytes; of a large one its memory and version."""
    kind = str(value.dtype), tuple(value.shape)
    if value.layout != torch.strided or value.is_meta:
        return kind
    if value.numel() > MAX_ELEMENTS:
        return *kind, value.data_ptr(), 0 if value.is_inference() else value._version
    flat = value.detach().cpu().resolve_conj().contiguous().reshape(-1)
    return *kind, flat.view(torch.uint8).numpy().tobytes()
