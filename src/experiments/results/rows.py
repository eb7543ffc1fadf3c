"""Run directories as rows: the config, state and metrics of each run. Imports no torch."""

import functools
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.config.monitoring import mode_of
from experiments.config.names import flatten, format_value
from experiments.directory.claim import is_locked
from experiments.directory.metrics import METRICS, read_metrics
from experiments.directory.record import counts_since, read_record
from experiments.errors import UsageError
from experiments.stdio import printable

SUPERSEDED = "superseded"  # the same config was run again with other code, data or versions
MAX_HYDRA_YAML = 100_000  # characters
NO_NUMBER = "no number"  # running, or interrupted, before the first validation
# What ranks below the runs that have a number, in this order.
BELOW = ("pruned", SUPERSEDED, NO_NUMBER, "failed", "diverged")


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
    maximize: bool = False  # whether more of the monitored number is better
    counts_since: str = ""  # started, or kept by a sweep; UTC, ISO 8601
    identity: Mapping[str, Any] = field(default_factory=dict)  # of code, data and versions

    @property
    def monitor(self) -> str:
        """The metric that ranks the run."""
        return str(self.config.get("trainer.monitor", "loss/valid"))

    @property
    def rank(self) -> tuple[int, float, str]:
        """A sort key: best first, then the groups of BELOW, each best first."""
        value = self.best.get(self.monitor, math.nan)
        known = math.isfinite(value)
        group = self.state if known or self.state in BELOW else NO_NUMBER
        score = -value if self.maximize else value
        place = 1 + BELOW.index(group) if group in BELOW else 0
        return (place, score if known else math.inf, str(self.path))


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
                print(f"skipped: {printable(str(error))}", file=sys.stderr)
    return sorted(mark_superseded(found.values()), key=lambda row: (row.monitor, row.rank))


def mark_superseded(rows: Iterable[Row]) -> list[Row]:
    """The rows, of which a run is superseded where a later one beside it has the same config, but
    other code, data or versions.
    """
    marked: list[Row] = []
    latest: dict[tuple[Path, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.counts_since, reverse=True):
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
    state, metrics, seconds = record["state"], record.get("metrics", {}), record["seconds"]
    if state == "running":  # run.json is not updated within a run, or was not after a kill
        locked = is_locked(path)
        state = "running" if locked else "interrupted"
        metrics = progress(path, record) or metrics
        seconds += seconds_since_record(path, time.time() if locked else None)
    return Row(
        path=path,
        state=state,
        config=dict(flatten(record["config"])),
        overrides={key: value for key, _, value in overrides},
        best=metrics.get("best", {}),
        last=metrics.get("last", {}),
        seconds=seconds,
        maximize=mode_of(record),
        counts_since=counts_since(record),
        identity={part: record.get(part) for part in ("code", "data", "versions")},
    )


def progress(path: Path, record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The best and last validation of a run so far, from metrics.jsonl; {} before the first one."""
    try:
        lines = [line for line in read_metrics(path) if "loss/valid" in line]
        if not lines:
            return {}
        monitor = str(record["config"]["trainer"]["monitor"])
        finite = [line for line in lines if math.isfinite(line[monitor])]
        choose = max if mode_of(record) else min
        return {"best": choose(finite, key=lambda line: line[monitor]) if finite else {},
                "last": lines[-1]}  # fmt: skip
    except (KeyError, OSError, TypeError, ValueError):  # damaged, or in the middle of a write
        return {}


def seconds_since_record(path: Path, now: float | None) -> float:
    """Seconds that a run has gone on since its run.json was written: until now, or until its last
    number if `now` is None.
    """
    try:
        end = (path / METRICS).stat().st_mtime if now is None else now
        return max(0.0, end - (path / "run.json").stat().st_mtime)
    except OSError:
        return 0.0


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
    return row.overrides.get(key) or chosen_options(row.path).get(key, "default")


@functools.lru_cache(maxsize=100_000)
def chosen_options(path: Path) -> dict[str, str]:
    """The chosen option of each group of a run, from what Hydra left; else the defaults."""
    try:
        with (path / ".hydra" / "hydra.yaml").open(errors="replace") as file:
            lines = file.read(MAX_HYDRA_YAML).splitlines()
    except OSError:
        return default_options()
    start = lines.index("    choices:") if "    choices:" in lines else len(lines)
    options = {}
    for line in lines[start + 1 :]:
        group, separator, option = line.strip().partition(": ")
        if not line.startswith("      ") or not separator:
            break
        options[group] = option.strip("'\"")
    return options or default_options()


@functools.cache
def default_options() -> dict[str, str]:
    """The options in the defaults list of the shipped config."""
    from experiments.config.compose import CONF  # imports Hydra

    defaults = (CONF / "config.yaml").read_text().splitlines()
    entries = (line.removeprefix("  - ").partition(": ") for line in defaults)
    return {group: option.split(" #")[0].strip() for group, found, option in entries if found}
