"""What Hydra 1.4 may call for a config: the targets that it names. Hydra 1.3 has no such list.

What a saved config may name is decided before, in trust.py.
"""

import contextlib
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import hydra.utils
from hydra._internal.callbacks import Callbacks
from omegaconf import DictConfig, OmegaConf

from experiments.config.hydra_versions import BEFORE_1_4
from experiments.directory.trust import locate
from experiments.errors import UsageError

# the modules of what Hydra refuses unless a list allows it
CHANGES_FILES = {"_sitebuiltins", "builtins", "nt", "os", "posix", "shutil"}


def allowed(node: Any, path: str) -> dict[str, Any]:
    """The keyword of Hydra's `instantiate` that allows the targets of a nested config, which stands
    at a path of the whole one; {} for 1.3. Imports them. Raises UsageError as `allow_list` does.
    """
    return {} if BEFORE_1_4 else {"_execution_whitelist_": allow_list(node, path)}


def config_callbacks(composed: DictConfig) -> Callbacks:
    """The callbacks of `hydra.callbacks`, whose targets are allowed."""
    node = composed.hydra.callbacks
    if BEFORE_1_4 or not node:
        return Callbacks(composed)
    named = OmegaConf.to_container(node, resolve=True)
    context: Any = vars(hydra.utils)["execution_whitelist"]
    with context(allow_list(named, "hydra.callbacks")):
        return Callbacks(composed)


def allow_list(node: Any, path: str) -> list[str]:
    """The names that Hydra may call for a nested config: its targets, as they are written and as
    they are defined.

    Hydra also checks an object that can be called, as a model, by its class. What a function
    returns is not known beforehand: with one among the targets, it may be of any package that is
    imported.

    Raises UsageError for a target that Hydra refuses to whoever allows no target.
    """
    names, returns_any = list[str](), False
    for key, target in _named(node, path):
        found = None
        with contextlib.suppress(Exception):  # Hydra will find it, too, and say where
            found = locate(target)
        defined = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
        if _is_blocked(target) or _is_blocked(defined):
            raise UsageError(
                f"{key}={target}: Hydra does not call it for a config, since it runs code or "
                "changes files; call it in a function of your own"
            )
        names += [target] if found is None else [target, defined]
        returns_any |= not inspect.isclass(found)
    return [*names, *_packages()] if returns_any else names


def explain_refusal(reason: str) -> str:
    """Hydra's line for a result that the list does not allow, with a remedy that its reader has;
    any other line is returned unchanged.
    """
    found = re.match(r"Target '([^']+)'.* is not in the Hydra execution whitelist", reason)
    if not found:
        return reason
    package = found[1].partition(".")[0]
    if package in CHANGES_FILES:
        return f"returns {found[1]}, which Hydra does not allow; return a function of your own"
    return (
        f"returns {found[1]}, which Hydra allows if its package is imported before; "
        f"write import {package} at the top of the target's module"
    )


def _named(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """The targets of a nested config, and what Hydra's own functions are to look up, each with its
    dotted key.
    """
    if isinstance(node, dict):
        target, name = node.get("_target_"), node.get("path")
        if isinstance(target, str):
            yield f"{path}._target_", target
            if target.startswith("hydra.utils.get_") and isinstance(name, str):
                yield f"{path}.path", name
        for key, child in node.items():
            yield from _named(child, f"{path}.{key}")
    elif isinstance(node, list):
        for i, child in enumerate(node):
            yield from _named(child, f"{path}.{i}")


def _packages() -> list[str]:
    """Patterns for all that the imported modules define, but those of CHANGES_FILES."""
    roots = {name.partition(".")[0] for name in sys.modules}
    return [f"{root}.*" for root in sorted(roots - CHANGES_FILES)]


def _is_blocked(name: str) -> bool:
    """Whether Hydra refuses a name to whoever allows no target."""
    from hydra._internal import execution_policy  # type: ignore[attr-defined]

    judge = getattr(execution_policy, "_is_blacklisted_target", None)  # private
    return bool(judge(name)) if judge else name.partition(".")[0] in CHANGES_FILES
