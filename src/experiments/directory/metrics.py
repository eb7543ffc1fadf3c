"""Reads metrics.jsonl."""

import json
from pathlib import Path

from experiments.directory.plain_json import nan_for_null

METRICS = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, in the order in which they were logged; NaN for null.

    A last line without a newline, as a killed process may leave it, is skipped.
    """
    try:
        lines = (path / METRICS).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [nan_for_null(json.loads(line)) for line in lines if line.endswith(b"\n")]


def rows_by_step(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """Merge the lines of metrics.jsonl into one row per step."""
    rows: dict[float, dict[str, float]] = {}
    for line in lines:
        rows.setdefault(line["step"], {}).update(line)
    return list(rows.values())
