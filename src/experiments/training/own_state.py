"""The state of objects of one's own, steps and callbacks, that a checkpoint holds."""

import copy
import functools
import inspect
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.errors import UsageError
from experiments.training.frozen import copied, frozen


def state_parts(part: Any) -> dict[str, Any]:
    """The attributes of an object that have a state_dict, such as its optimizers, by name."""
    return {
        name: value
        for name, value in getattr(part, "__dict__", {}).items()
        if hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
    }


def plain_parts(part: Any) -> dict[str, Any]:
    """The attributes of an object that are plain values: numbers, texts, tensors, and lists, tuples
    and dicts of them, which a checkpoint can hold.
    """
    return {name: value for name, value in getattr(part, "__dict__", {}).items() if is_plain(value)}


def is_plain(value: Any) -> bool:
    """Whether a checkpoint can hold a value."""
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def state_of(part: Any) -> dict[str, Any]:
    """What a checkpoint holds of an object: its state_dict, if it has one; otherwise its plain
    attributes, and the state_dict of each attribute with one. Of a module its state_dict and those
    of its attributes. Nothing of a function.
    """
    if inspect.isfunction(part) or isinstance(part, functools.partial):
        return {}
    found: dict[str, Any] = {}
    if hasattr(part, "state_dict"):
        found["state_dict"] = part.state_dict()
    elif plain := plain_parts(part):
        found["attributes"] = plain
    if isinstance(part, nn.Module) or "state_dict" not in found:
        parts = {name: value.state_dict() for name, value in state_parts(part).items()}
        found |= {"parts": parts} if parts else {}
    return found


def load_state(part: Any, state: dict[str, Any]) -> None:
    """Restore what `state_of` returned. Raises KeyError if the object has other parts."""
    attributes = state_parts(part)
    if attributes.keys() != state.get("parts", {}).keys() and not hasattr(part, "state_dict"):
        raise KeyError(
            f"has {sorted(attributes)}, and the checkpoint {sorted(state.get('parts', {}))}"
        )
    if "state_dict" in state:
        part.load_state_dict(state["state_dict"])
    for name, value in state.get("attributes", {}).items():
        setattr(part, name, value)
    for name, value in state.get("parts", {}).items():
        attributes[name].load_state_dict(value)


class OwnOptimizers:
    """Stands for the optimizer of a step that has its own: their parameter groups, in order.

    Their state is part of the step's.
    """

    def __init__(self, step: Any) -> None:
        self.optimizers = {
            name: value for name, value in vars(step).items() if isinstance(value, Optimizer)
        }
        if not self.optimizers:
            raise UsageError(
                "step: takes its own optimizer steps, and none of its attributes is an optimizer, "
                "so their state would be in no checkpoint; keep each in an attribute"
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimizers."""
        return [group for opt in self.optimizers.values() for group in opt.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a checkpoint has it with the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is nothing to restore."""


class OwnState:
    """A snapshot of an object that is no module: its attributes, to compare and to restore.

    modules: those among its attributes, which are looked at like the model
    """

    def __init__(self, part: Any, name: str = "step") -> None:
        self.part, self.name = part, name
        self.modules: dict[str, nn.Module] = {}
        if isinstance(part, nn.Module):
            self.modules[name] = part
            self.part = None
        attributes = vars(self.part) if hasattr(self.part, "__dict__") else {}
        self.saved = {key: (value, copied(value)) for key, value in attributes.items()}
        for key, value in attributes.items():
            if isinstance(value, nn.Module):
                self.modules[f"{name}.{key}"] = value
        self.state = copy.deepcopy(state_of(part))
        self.before = self.attributes()

    def attributes(self) -> dict[str, Any]:
        """Comparable values of the attributes that no checkpoint holds, by dotted name."""
        if self.part is None or hasattr(self.part, "state_dict"):
            return {}
        held = {**state_parts(self.part), **plain_parts(self.part)}
        attributes = getattr(self.part, "__dict__", {})
        return {
            f"{self.name}.{key}": frozen(value)
            for key, value in attributes.items()
            if key not in held
        }

    def restore_checkpointed(self) -> None:
        """Restore what a checkpoint holds, as resuming does."""
        if self.part is not None and self.state:
            load_state(self.part, copy.deepcopy(self.state))

    def restore(self) -> None:
        """Restore everything."""
        if self.part is None:
            return
        self.restore_checkpointed()
        attributes = getattr(self.part, "__dict__", {})
        for key in [key for key in attributes if key not in self.saved]:
            del attributes[key]
        for key, (value, saved) in self.saved.items():
            if (
                saved is not None
                and f"{self.name}.{key}" in self.before
                and (frozen(value) != self.before[f"{self.name}.{key}"])
            ):
                value = saved
            attributes[key] = value
