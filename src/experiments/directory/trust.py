"""What a run directory from anywhere may ask to have built.

A saved config names what it is made of by `_target_`, and instantiating calls it. So that a
stranger's directory executes nothing, a name must lie in a few modules before anything is
imported, and what it leads to must be of the kind that its place in the config expects.
"""

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.errors import UsageError

# Where each group's targets may lie, besides the modules that the person trusts.
HOMES: Mapping[str, tuple[str, ...]] = {
    "data": ("experiments.data",),
    "loader": ("experiments.data.loaders",),
    "model": ("experiments.training.models", "torch.nn"),
    "loss": ("torch.nn",),
    "optimizer": ("torch.optim",),
    "scheduler": ("experiments.training.schedules", "torch.optim.lr_scheduler"),
}


def check_names(config: Mapping[str, Any], trusted: Sequence[str]) -> None:
    """Raise UsageError for a `_target_` outside the homes of its group; imports nothing."""
    for group, node in config.items():
        for key, target in targets(node, group):
            homes = (*HOMES.get(group, ()), *trusted)
            if not isinstance(target, str) or not any(_inside(target, home) for home in homes):
                raise UsageError(
                    f"{key}={target}: not built from a saved run, since it is none of "
                    f"{', '.join(homes) or 'the groups'}; --trust MODULE if you know it"
                )


def check_objects(config: Mapping[str, Any], trusted: Sequence[str]) -> None:
    """Raise UsageError for a `_target_` that leads to something else than a part of its group.

    A torch name must be a module, optimizer or scheduler class, one of ours a function or class
    of the very module it names: torch.nn also holds loaders, and modules hold other modules.
    """
    from torch.nn import Module
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    for group, node in config.items():
        for key, target in targets(node, group):
            if any(_inside(target, module) for module in trusted):
                continue
            found = locate(target)
            home = str(getattr(found, "__module__", ""))
            if target.startswith("torch."):
                parts = (Module, Optimizer, LRScheduler)
                at_home = _inside(home, "torch.nn") or _inside(home, "torch.optim")
                fits = at_home and inspect.isclass(found) and issubclass(found, parts)
            else:
                written_here = home == target.rpartition(".")[0]
                fits = written_here and (inspect.isfunction(found) or inspect.isclass(found))
            if not fits:
                raise UsageError(f"{key}={target}: not a {group}, so not built from a saved run")


def targets(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) of a `_target_` in a nested config."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "_target_":
                yield f"{path}.{key}", value
            else:
                yield from targets(value, f"{path}.{key}")
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from targets(value, f"{path}.{i}")


def locate(target: str) -> object:
    """What a dotted name stands for; None where it stands for nothing."""
    parts = target.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for part in parts[split:]:
            found = getattr(found, part, None)
        return found
    return None


def _inside(name: str, module: str) -> bool:
    return name.startswith(module + ".")
