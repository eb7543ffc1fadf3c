"""A run directory read back: its config, its record, its metrics, its model.

Nothing in the directory is executed, so it may come from anywhere (see trust.py).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from experiments import config as schema
from experiments.errors import UsageError
from experiments.run import METRICS, read_record, refuse_links
from experiments.trust import check_names, check_objects

if TYPE_CHECKING:
    from torch import nn

LARGEST_CONFIG = 1_000_000  # bytes
DEEPEST_CONFIG = 30  # mappings and lists


@dataclass(frozen=True)
class SavedRun:
    """A run as it lies in its directory.

    config: resolved, as nested dicts
    record: run.json
    metrics: a row for each step at which something was logged, `pandas.DataFrame(run.metrics)`
    model: the checkpoint's weights, on the CPU, in evaluation mode
    step: optimizer steps done at that checkpoint
    """

    path: Path
    config: dict[str, Any]
    record: dict[str, Any]
    metrics: list[dict[str, float]]
    model: "nn.Module"
    step: int


def load_run(
    path: str | Path,
    checkpoint: Literal["best", "last"] = "best",
    trust: Sequence[str] = (),
) -> SavedRun:
    """Read a run directory, and its model ready to predict: `load_run(path).model(x)`.

    trust: modules, besides experiments, torch.nn and torch.optim, that its config may name.

    Raises UsageError where the directory holds no run, no checkpoint, or names anything else.
    """
    path = Path(path)
    config = read_config(path, trust)
    from experiments.checkpoint import Checkpoints, restoring
    from experiments.models import build_model

    check_objects(config, trust)
    checkpoints = Checkpoints(path / "checkpoints")
    content = checkpoints.load(checkpoint) or checkpoints.load("last")
    if content is None:
        raise UsageError(f"{path}: has no checkpoint yet; resume={path} goes on with it")
    model = build_model(config)
    with restoring(path):
        model.load_state_dict(content["model"])
    return SavedRun(
        path=path,
        config=config,
        record=read_record(path),
        metrics=table(read_metrics(path)),
        model=model.eval(),
        step=content["state"]["step"],
    )


def read_config(path: Path, trust: Sequence[str]) -> dict[str, Any]:
    """The resolved config of a run directory, checked against the schema and for what it names.

    Imports no torch; call `trust.check_objects` before anything is built. Raises UsageError.
    """
    file = path / "config.yaml"
    if not file.exists():
        raise UsageError(f"{path}: holds no run, there is no config.yaml in it")
    refuse_links(path)
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
    config = schema.check(config)
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


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, in the order in which they were logged.

    A last line without an end, as a killed process leaves it, is passed over.
    """
    try:
        lines = (path / METRICS).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def table(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """One row a step out of the lines of metrics.jsonl."""
    rows: dict[float, dict[str, float]] = {}
    for line in lines:
        rows.setdefault(line["step"], {}).update(line)
    return list(rows.values())
