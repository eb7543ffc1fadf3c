"""Restricts what an untrusted run directory may build.

Instantiating a saved config calls its `_target_`s. So that an untrusted config cannot execute
arbitrary code, a target's name must be in one of a few allowed modules, which is checked before
anything is imported, and the object must be of the kind that its group expects.
"""

import importlib
import inspect
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.config.schema import CLOSED
from experiments.directory.paths import display_path
from experiments.errors import UsageError

# Functions that make plain values of plain values, as arguments of a part; never a part themselves.
# config/plain.py writes a path down as the call that makes it.
HARMLESS = ("pathlib.Path", "torch.tensor")
# The modules that targets of each group may come from, besides those passed with --trust.
ALLOWED_MODULES: Mapping[str, tuple[str, ...]] = {
    "data": ("experiments.data", "experiments.recipes"),
    "loader": ("experiments.data.loaders", "experiments.data.samplers"),
    "model": ("experiments.training.models", "experiments.recipes", "torch.nn"),
    "loss": ("torch.nn", "experiments.training.objective"),
    "step": ("experiments.training.objective", "experiments.recipes"),
    "metrics": (
        "experiments.training.accuracy",
        "experiments.training.metrics",
        "experiments.recipes",
        "torchmetrics.classification",
        "torchmetrics.regression",
    ),
    "augment": ("experiments.data.augment",),
    "callbacks": ("experiments.training.callbacks",),
    "optimizer": ("torch.optim",),
    "scheduler": ("experiments.training.schedules", "torch.optim.lr_scheduler"),
}


def check_names(config: Mapping[str, Any], trusted: Sequence[str]) -> None:
    """Raise UsageError for a `_target_` outside its group's allowed modules; imports nothing.

    Root keys of the user's own, which other groups may have taken a part from, share the modules of
    all groups.
    """
    found = list(untrusted(config, trusted))
    if found:
        key, target, group = found[0]
        allowed = ", ".join((*allowed_modules(group), *trusted))
        modules = modules_of(found)
        raise UsageError(
            f"{key}={target}: not built from a saved run, which may only use "
            f"{allowed or 'no target'} here; if you trust {'them' if modules[1:] else 'it'}, pass "
            f"{trust_flags(modules)} (in Python trust={modules})"
        )


def untrusted(config: Mapping[str, Any], trusted: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    """The targets outside the allowed and the trusted modules as (dotted key, target, group)."""
    for group, node in config.items():
        allowed = (*allowed_modules(group), *trusted)
        for key, target in targets(node, group):
            named = isinstance(target, str) and any(_is_in(target, name) for name in allowed)
            if not named and not is_harmless(key, target, group):
                yield key, target, group


def modules_of(found: Iterable[tuple[str, Any, str]]) -> list[str]:
    """The modules of some targets, once each."""
    names = (str(target).rpartition(".")[0] or "MODULE" for _, target, _ in found)
    return list(dict.fromkeys(names))


def trust_flags(modules: Iterable[str]) -> str:
    """The flags that trust some modules, as a shell takes them."""
    return " ".join(f"--trust {shlex.quote(module)}" for module in modules)


def resume_command(path: Path, config: Mapping[str, Any]) -> str:
    """The command that resumes a run in a directory, as a shell takes it, with the `--trust` that
    its config needs.
    """
    command = f"python -m experiments resume={shlex.quote(display_path(path))}"
    return f"{command} {trust_flags(modules_of(untrusted(config, ())))}".rstrip()


def is_harmless(key: str, target: object, group: str) -> bool:
    """Whether a target only makes a plain value, and is no part of a run."""
    return target in HARMLESS and not (group in ALLOWED_MODULES and key == f"{group}._target_")


def check_objects(config: Mapping[str, Any], trusted: Sequence[str]) -> None:
    """Raise UsageError for a `_target_` that is not the kind of object its group builds from.

    A torch name must be a module, optimizer or scheduler class, since torch.nn also contains
    loaders. One of ours must be a function or class defined in the module that it names, since a
    module's attributes include imported modules.
    """
    from torch.nn import Module
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    for group, node in config.items():
        for key, target in targets(node, group):
            if any(_is_in(target, module) for module in trusted):
                continue
            if is_harmless(key, target, group):
                continue
            found = locate(target)
            module_name = str(getattr(found, "__module__", ""))
            if target.startswith("torch."):
                parts = (Module, Optimizer, LRScheduler)
                # some classes give the package as their module, as torch.optim.Adafactor does
                packages = ("torch.nn", "torch.optim")
                allowed = any(_is_in(f"{module_name}.", package) for package in packages)
                fits = allowed and inspect.isclass(found) and issubclass(found, parts)
            elif target.startswith("torchmetrics."):
                # a class of a module below the named one, which exports it
                names = {kind.__qualname__ for kind in getattr(found, "__mro__", ())[1:]}
                fits = _is_in(module_name, target.rpartition(".")[0]) and "Metric" in names
            else:
                defined_there = module_name == target.rpartition(".")[0]
                fits = defined_there and (inspect.isfunction(found) or inspect.isclass(found))
            if not fits:
                raise UsageError(f"{key}={target}: not a {group}, so not built from a saved run")


def allowed_modules(group: str) -> tuple[str, ...]:
    """The modules that targets of a group, or of a root key that is none, may come from."""
    if group in ALLOWED_MODULES or group in CLOSED:
        return ALLOWED_MODULES.get(group, ())
    return tuple(dict.fromkeys(name for names in ALLOWED_MODULES.values() for name in names))


def targets(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every `_target_` in a nested config as (dotted key, value)."""
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
    """The object with a dotted name; None if there is none."""
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


def _is_in(name: str, module: str) -> bool:
    return name.startswith(module + ".")
