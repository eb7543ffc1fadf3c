"""Resolved configs as what YAML and JSON can hold, without losing what a part is built from."""

import sys
from enum import Enum
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any

from experiments.errors import UsageError

# modules whose targets take paths and choices as texts
OURS = ("experiments.", "torch.")


def plain(node: Any, key: str, *, built: bool = False, recursive: bool = True) -> Any:
    """A node without Enum and Path values, which a structured config can have.

    Below a `_target_` of the user's own, `built`, each becomes the `_target_` that makes it again,
    so that a resumed run gets the same object; elsewhere an Enum becomes its name and a Path its
    text. Raises UsageError for a value that a run directory cannot hold.
    """
    if isinstance(node, dict):
        if "_target_" in node:
            built = not str(node["_target_"]).startswith(OURS)
            recursive = node.get("_recursive_", True) is not False
        for name in node:
            if isinstance(name, Enum | bytes):
                raise _cannot_be_saved(key, name)
        return {
            name: plain(value, f"{key}.{name}", built=built, recursive=recursive)
            for name, value in node.items()
        }
    if isinstance(node, list):
        return [
            plain(item, f"{key}.{i}", built=built, recursive=recursive)
            for i, item in enumerate(node)
        ]
    if isinstance(node, PurePath | Enum):
        if built and not recursive:
            raise _cannot_be_saved(key, node)
        if isinstance(node, PurePath):
            return _call("pathlib.Path", str(node)) if built else str(node)
        if not built:
            return node.name
        if not isinstance(node.value, str | int | float | bool):
            raise _cannot_be_saved(key, node)
        kind = type(node)
        return _call(f"{_module(kind)}.{kind.__qualname__}", node.value)
    if not isinstance(node, str | int | float | None):
        raise _cannot_be_saved(key, node)
    return node


def _call(target: str, argument: object) -> dict[str, object]:
    return {"_target_": target, "_args_": [argument]}


def _module(kind: type) -> str:
    """The module that defines a class; a script's by the name under which it can be imported."""
    if kind.__module__ not in ("__main__", "__mp_main__"):
        return kind.__module__
    file = getattr(sys.modules[kind.__module__], "__file__", None)
    if file is not None:
        spec = find_spec(Path(file).stem) if Path(file).stem.isidentifier() else None
        if spec is not None and spec.origin and Path(spec.origin).resolve() == Path(file).resolve():
            return Path(file).stem
    return kind.__module__


def _cannot_be_saved(key: str, value: object) -> UsageError:
    return UsageError(
        f"{key}={value!r}: a {type(value).__name__} cannot be saved with the run; "
        "use a text or a number"
    )
