"""Run directories as rows: the config, state and metrics of each run. Imports no torch."""

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.config.names import flatten, format_value
from experiments.directory.claim import is_locked
from experiments.directory.record import read_record
from experiments.errors import UsageError

SUPERSEDED = "superseded"  # the same config was run again with other code, data or versions


@dataclass(frozen=True)
class Row:
    """One run: its config and its results."""

    path: Path
    state: str
    config: dict[str, Any]  # dotted keys
    overrides: dict[str, str]
    best: dict[str, float]
    last: dict[str, float]
    seconds: float
    started: str = ""  # UTC, ISO 8601
    identity: Mapping[str, Any] = field(default_factory=dict)  # of code, data and versions

    @property
    def monitor(self) -> str:
        """The metric that ranks the run."""
        return str(self.config.get("trainer.monitor", "loss/valid"))

    @property
    def rank(self) -> tuple[int, float, str]:
        """A sort key: best first, then failed, pruned and non-finite runs, diverged ones last."""
        value = self.best.get(self.monitor, math.nan)
        if self.state in ("failed", "diverged", "pruned", SUPERSEDED) or not math.isfinite(value):
            return (1 + (self.state == "diverged"), 0.0, str(self.path))
        return (0, value if self.monitor.startswith("loss") else -value, str(self.path))


def collect(directories: Iterable[Path]) -> list[Row]:
    """Every run in and below the directories, best first; runs with different monitored metrics are
    ranked apart, one metric after the other.

    Unreadable runs are skipped with a line on standard error. Raises UsageError for a missing
    directory.
    """
    found: dict[Path, Row] = {}
    for directory in directories:
        if not directory.is_dir():
            raise UsageError(f"{directory}: no such directory")
        for path in run_directories(directory):
            try:
                found[path] = read(path)
            except UsageError as error:
                print(f"skipped: {error}", file=sys.stderr)
    return sorted(mark_superseded(found.values()), key=lambda row: (row.monitor, row.rank))


def mark_superseded(rows: Iterable[Row]) -> list[Row]:
    """The rows, of which a run is superseded where a later one beside it has the same config, but
    other code, data or versions.
    """
    marked: list[Row] = []
    latest: dict[tuple[Path, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.started, reverse=True):
        key = (row.path.parent, json.dumps(row.config, sort_keys=True, default=str))
        newer = latest.setdefault(key, row)
        outdated = newer.identity != row.identity
        marked.append(replace(row, state=SUPERSEDED) if outdated else row)
    return marked


def run_directories(directory: Path) -> Iterator[Path]:
    """The run directories in and below a directory; runs are not nested."""
    for folder, names, files in os.walk(directory):
        if "run.json" in files:
            names.clear()
            yield Path(folder)
        else:
            names.sort()


def read(path: Path) -> Row:
    """The row of one run. Raises UsageError if run.json cannot be read."""
    record = read_record(path)
    overrides = (override.lstrip("+").partition("=") for override in record["overrides"])
    state = record["state"]
    if state == "running" and not is_locked(path):
        state = "interrupted"  # by a kill, after which nobody updated run.json
    return Row(
        path=path,
        state=state,
        config=dict(flatten(record["config"])),
        overrides={key: value for key, _, value in overrides},
        best=record.get("metrics", {}).get("best", {}),
        last=record.get("metrics", {}).get("last", {}),
        seconds=record["seconds"],
        started=record["started"],
        identity={part: record.get(part) for part in ("code", "data", "versions")},
    )


def swept_keys(rows: Sequence[Row]) -> list[str]:
    """The overridden keys whose values differ between the rows, and the monitored metric if it
    differs.
    """
    keys = {key: None for row in rows for key in row.overrides}
    if len(monitors(rows)) > 1:
        keys["trainer.monitor"] = None
    return [key for key in keys if len({value_of(row, key) for row in rows}) > 1]


def monitors(rows: Sequence[Row]) -> list[str]:
    """The monitored metrics of the rows."""
    return list(dict.fromkeys(row.monitor for row in rows))


def value_of(row: Row, key: str) -> str:
    """A run's value of a key, or option of a group, as written on the command line."""
    if key in row.config:
        return format_value(row.config[key])
    return row.overrides.get(key, "default")
