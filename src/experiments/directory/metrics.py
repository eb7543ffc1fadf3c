"""metrics.jsonl, read back."""

import json
from pathlib import Path

METRICS = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, in the order in which they were logged.

    A last line without an end, as a killed process leaves it, is passed over.
    """
    try:
        lines = (path / METRICS).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def rows_by_step(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """One row a step out of the lines of metrics.jsonl."""
    rows: dict[float, dict[str, float]] = {}
    for line in lines:
        rows.setdefault(line["step"], {}).update(line)
    return list(rows.values())
