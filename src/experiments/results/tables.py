"""Rows as a ranked table: for a terminal, results.csv and results.png. Imports no torch."""

import csv
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.config.names import format_value
from experiments.directory import durable
from experiments.directory.paths import display_path
from experiments.errors import UsageError
from experiments.results.rows import Row, swept_keys, value_of

SHOWN = 40  # rows of a table in a terminal; results.csv has all
METRICS = ("loss/valid", "accuracy/valid")


def cells(rows: Sequence[Row], keys: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table, in full precision, with a column for each of the keys."""
    head = ["rank", *(keys or ["run"]), "state"]
    head += [f"{which} {metric}" for which in ("best", "last") for metric in METRICS]
    body = []
    for rank, row in enumerate(rows, 1):
        told = [value_of(row, key) for key in keys] or [display_path(row.path)]
        numbers = [
            repr(metrics[metric]) if metric in metrics else ""
            for metrics in (row.best, row.last)
            for metric in METRICS
        ]
        epochs = str(row.last.get("epoch", 0))
        body.append([str(rank), *told, row.state, *numbers, epochs, f"{row.seconds:.1f}"])
    return [*head, "epochs", "seconds"], body


def table(rows: Sequence[Row]) -> str:
    """The ranked table as text, numbers shortened; failures are red in a terminal."""
    head, body = cells(rows[:SHOWN], swept_keys(rows))
    first, last = head.index("best loss/valid"), head.index("epochs")
    short = [
        [
            f"{float(cell):.4f}" if cell and first <= i < last else shorten(cell)
            for i, cell in enumerate(line)
        ]
        for line in body
    ]
    titles = [cell.replace("accuracy/valid", "accuracy").replace("/valid", "") for cell in head]
    widths = [max(len(line[i]) for line in [titles, *short]) for i in range(len(head))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(titles, widths, strict=True))]
    for line, row in zip(short, rows, strict=False):
        text = "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        red = row.state in ("failed", "diverged") and sys.stdout.isatty()
        lines.append(f"\033[31m{text}\033[0m" if red else text)
    if len(rows) > SHOWN:
        lines.append(f"and {len(rows) - SHOWN} more")
    return "\n".join(lines)


def shorten(cell: str) -> str:
    """A number with six digits at most, anything else as it is."""
    try:
        return f"{float(cell):g}" if len(cell) > 6 else cell
    except ValueError:
        return cell


def side_by_side(one: Row, other: Row) -> str:
    """Why two runs differ: their configs and their numbers, where they are not the same."""
    lines = [f"A  {display_path(one.path)}", f"B  {display_path(other.path)}", ""]
    pairs = [("state", one.state, other.state)]
    keys = {**one.config, **other.config}
    pairs += [
        (key, format_value(one.config.get(key, "-")), format_value(other.config.get(key, "-")))
        for key in keys
    ]
    for which, first, second in (("best", one.best, other.best), ("last", one.last, other.last)):
        names = {**first, **second}
        pairs += [
            (f"{which} {name}", repr(first.get(name, "-")), repr(second.get(name, "-")))
            for name in names
        ]
    differing = [pair for pair in pairs if pair[1] != pair[2]]
    if not differing:
        return "\n".join([*lines, "no difference in config, state or numbers"])
    widths = [max(len(pair[i]) for pair in differing) for i in range(3)]
    for name, mine, theirs in differing:
        lines.append(f"{name:{widths[0]}}  {mine:>{widths[1]}}  {theirs:>{widths[2]}}")
    return "\n".join(lines)


def as_json(row: Row) -> dict[str, Any]:
    """A row for other programs; what is no number is null, since JSON has no other word."""
    finite = {
        which: {key: number if math.isfinite(number) else None for key, number in metrics.items()}
        for which, metrics in (("best", row.best), ("last", row.last))
    }
    return {**vars(row), "path": str(row.path), **finite}


def save(rows: Sequence[Row], into: Path) -> list[Path]:
    """Write results.csv and results.png; returns their paths."""
    keys = swept_keys(rows)
    head, body = cells(rows, keys)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[*head, "directory"]] + [
        [*line, str(row.path)] for line, row in zip(body, rows, strict=True)
    ])  # fmt: skip
    numbers, picture = into / "results.csv", into / "results.png"
    content = text.getvalue().encode()
    # to draw takes longer than all the rest, so it is done once for the same numbers
    if not (picture.exists() and numbers.exists() and numbers.read_bytes() == content):
        from experiments.results.pictures import results_picture

        write(picture, results_picture(rows, keys))
        write(numbers, content)
    return [numbers, picture]


def write(file: Path, content: bytes) -> None:
    """Write a result. Raises UsageError where the file cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        durable.write(file, content)
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror})") from None
