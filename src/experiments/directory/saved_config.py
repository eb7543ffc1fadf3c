"""The config of a run directory that may come from anywhere, read without executing anything."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.config.names import rename_moved_targets
from experiments.config.schema import check
from experiments.directory.claim import reject_symlinks
from experiments.directory.trust import check_names
from experiments.errors import UsageError

LARGEST_CONFIG = 1_000_000  # bytes
DEEPEST_CONFIG = 30  # mappings and lists


def read_config(path: Path, trust: Sequence[str]) -> dict[str, Any]:
    """The resolved config of a run directory, checked against the schema and for what it names.

    Imports no torch; call `trust.check_objects` before anything is built. Raises UsageError.
    """
    file = path / "config.yaml"
    if not file.exists():
        raise UsageError(f"{path}: holds no run, there is no config.yaml in it")
    reject_symlinks(path)
    try:
        text = file.read_bytes()[: LARGEST_CONFIG + 1].decode()
        if len(text) > LARGEST_CONFIG:
            raise ValueError(f"more than {LARGEST_CONFIG} bytes")
        check_events(yaml.parse(text, yaml.SafeLoader))
        config = yaml.safe_load(text)
        if not isinstance(config, dict):
            raise ValueError("it is no mapping")
        check_plain(config)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{file}: cannot be read as a saved config ({reason})") from None
    config = check(rename_moved_targets(config))
    check_names(config, trust)
    return config


def check_events(events: Iterable[yaml.Event]) -> None:
    """Raise ValueError, before anything is made of a YAML text, for what takes for ever to read:
    aliases of aliases, and nesting without end. A resolved config has neither.
    """
    depth = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has YAML aliases")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST_CONFIG:
            raise ValueError(f"it is nested more than {DEEPEST_CONFIG} deep")


def check_plain(node: object) -> None:
    """Raise ValueError for what a resolved config does not hold: references, and what YAML's tags
    make besides mappings, lists and scalars.
    """
    if isinstance(node, dict):
        for key, value in node.items():
            check_plain(key)
            check_plain(value)
    elif isinstance(node, list):
        for value in node:
            check_plain(value)
    elif isinstance(node, str) and "${" in node:
        raise ValueError(f"it has a reference, {node}, and should be resolved")
    elif not isinstance(node, str | int | float | None):
        raise ValueError(f"it holds a {type(node).__name__}")
