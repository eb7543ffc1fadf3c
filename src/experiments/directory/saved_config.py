"""Reads the saved config of an untrusted run directory without executing anything."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.config.names import rename_moved_targets
from experiments.config.schema import check, with_added
from experiments.config.secrets import SAVED
from experiments.directory.claim import reject_symlinks
from experiments.directory.trust import check_names
from experiments.errors import UsageError

MAX_BYTES = 1_000_000
MAX_DEPTH = 30  # nested mappings and lists


def read_config(path: Path, trust: Sequence[str]) -> dict[str, Any]:
    """The resolved config of a run directory, with its values and the names in it checked.

    Imports no torch; call `trust.check_objects` before building anything. Raises UsageError if
    the config is missing, malformed, or violates the schema or the trust rules.
    """
    file = path / "config.yaml"
    if not file.exists():
        raise UsageError(f"{path}: holds no run, there is no config.yaml in it")
    reject_symlinks(path)
    try:
        text = file.read_bytes()[: MAX_BYTES + 1].decode()
        if len(text) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        check_events(yaml.parse(text, yaml.SafeLoader))
        config = yaml.safe_load(text)
        if not isinstance(config, dict):
            raise ValueError("it is not a mapping")
        check_plain(config)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{file}: cannot be read as a saved config ({reason})") from None
    config = check(with_added(rename_moved_targets(config)))
    check_names(config, trust)
    return config


def check_events(events: Iterable[yaml.Event]) -> None:
    """Raise ValueError, before a YAML text is loaded, for aliases and deep nesting, which can take
    exponential time or exhaust the stack. A resolved config has neither.
    """
    depth = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has YAML aliases")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def check_plain(node: object) -> None:
    """Raise ValueError for anything that a resolved config cannot contain: references other than to
    a secret in the environment, and objects from YAML tags other than mappings, lists and scalars.
    """
    if isinstance(node, dict):
        for key, value in node.items():
            check_plain(key)
            check_plain(value)
    elif isinstance(node, list):
        for value in node:
            check_plain(value)
    elif isinstance(node, str) and "${" in re.sub(SAVED, "", node):
        raise ValueError(f"it has an unresolved reference, {node}")
    elif not isinstance(node, str | int | float | None):
        raise ValueError(f"it contains a {type(node).__name__}")
