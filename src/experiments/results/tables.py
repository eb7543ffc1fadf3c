"""Rows as a ranked table in a terminal, results.csv and results.png. Imports no torch."""

import contextlib
import csv
import io
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.config.names import format_value
from experiments.directory import durable
from experiments.directory.paths import display_path
from experiments.errors import UsageError
from experiments.results.drawing import draw
from experiments.results.fitting import Columns, fit
from experiments.results.rows import Row, monitors, swept_keys, value_of
from experiments.stdio import printable

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # with which spreadsheets begin one
MAX_ROWS = 40  # of a table in a terminal; results.csv has all
NOT_METRICS = ("epoch", "step")


def cells(rows: Sequence[Row], keys: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and body of the table, in full precision, with a column for each of the keys. Ranks
    count within the runs of the same monitored metric.
    """
    shown = metrics_of(rows)
    head = ["rank", *(keys or ["run"]), "state"]
    head += [f"{which} {metric}" for which in ("best", "last") for metric in shown]
    body = []
    ranks: dict[str, int] = {}  # by metric
    for row in rows:
        ranks[row.monitor] = rank = ranks.get(row.monitor, 0) + 1
        values = [value_of(row, key) for key in keys] or [display_path(row.path)]
        numbers = [
            repr(metrics[metric]) if metric in metrics else ""
            for metrics in (row.best, row.last)
            for metric in shown
        ]
        epochs = str(row.last.get("epoch", 0))
        body.append([str(rank), *values, row.state, *numbers, epochs, f"{row.seconds:.1f}"])
    return [*head, "epochs", "seconds"], body


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """The metrics of the table: the loss, then all others that a run has; before there are any, the
    accuracy.
    """
    names = {name: None for row in rows for name in row.best if name not in NOT_METRICS}
    return list({"loss/valid": None, **(names or {"accuracy/valid": None})})


def left_out(metrics: Sequence[str]) -> list[str]:
    """What a narrow terminal does without, in this order."""
    short = [metric.replace("/valid", "") for metric in reversed(metrics)]
    numbers = [f"{which} {metric}" for which in ("last", "best") for metric in short]
    return ["seconds", "epochs", *numbers, "state"]


def table(rows: Sequence[Row]) -> str:
    """The ranked table as text, numbers rounded. In a terminal it fits the width and failures are
    red.
    """
    keys = swept_keys(rows)
    head, body = cells(rows[:MAX_ROWS], keys)
    first, last = head.index("best loss/valid"), head.index("epochs")
    short = [
        [
            f"{float(cell):.4f}" if cell and first <= i < last else printable(shorten(cell))
            for i, cell in enumerate(line)
        ]
        for line in body
    ]
    columns = Columns(
        [printable(cell).replace("/valid", "") for cell in head],
        short,
        [printable(key) for key in keys or ["run"]],
    )
    terminal = sys.stdout.isatty()
    if terminal:
        width = shutil.get_terminal_size().columns
        monitor = f"best {rows[0].monitor}".replace("/valid", "")
        order = [name for name in left_out(metrics_of(rows)) if name != monitor]
        columns = fit(columns, width, order, kept=["rank", monitor])
    title, *body_lines = columns.lines()
    lines = [title[:width] if terminal else title]
    for text, row in zip(body_lines, rows, strict=False):
        red = row.state in ("failed", "diverged") and terminal
        text = text[:width] if terminal else text
        lines.append(f"\033[31m{text}\033[0m" if red else text)
    if len(rows) > MAX_ROWS:
        lines.append(f"and {len(rows) - MAX_ROWS} more")
    if len(metrics := monitors(rows)) > 1:
        lines.append(f"ranked apart: trainer.monitor is {' or '.join(metrics)}")
    return "\n".join(lines)


def shorten(cell: str) -> str:
    """A number rounded to six significant digits; any other text unchanged."""
    try:
        return f"{float(cell):g}" if len(cell) > 6 else cell
    except ValueError:
        return cell


def side_by_side(one: Row, other: Row) -> str:
    """The differences between two runs: keys, state and metrics whose values differ."""
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
    differing = [(printable(a), printable(b), printable(c)) for a, b, c in differing]
    widths = [max(len(pair[i]) for pair in differing) for i in range(3)]
    for name, mine, theirs in differing:
        lines.append(f"{name:{widths[0]}}  {mine:>{widths[1]}}  {theirs:>{widths[2]}}")
    return "\n".join(lines)


def as_json(row: Row) -> dict[str, Any]:
    """A row for JSON; NaN and infinities become null, since JSON has no such numbers."""
    finite = {
        which: {key: number if math.isfinite(number) else None for key, number in metrics.items()}
        for which, metrics in (("best", row.best), ("last", row.last))
    }
    return {**vars(row), "path": str(row.path), **finite}


def save(rows: Sequence[Row], into: Path) -> list[Path]:
    """Write results.csv and results.png; returns their paths, without a picture that cannot be
    drawn.
    """
    keys = swept_keys(rows)
    head, body = cells(rows, keys)
    text = io.StringIO()
    lines = [[*head, "directory"]] + [
        [*line, path_cell(row.path)] for line, row in zip(body, rows, strict=True)
    ]
    csv.writer(text, lineterminator="\n").writerows([map(no_formula, line) for line in lines])
    csv_file, picture = into / "results.csv", into / "results.png"
    content = text.getvalue().encode()
    # plotting takes longer than all the rest, so skip it if the numbers are unchanged
    if not (picture.exists() and csv_file.exists() and csv_file.read_bytes() == content):
        # a picture of other numbers must not stay if drawing fails
        with contextlib.suppress(OSError):
            picture.unlink()
        write(csv_file, content)

        def results_picture() -> bytes:
            from experiments.results import pictures

            return pictures.results_picture(rows, keys)

        drawn = draw(picture, results_picture)
        if drawn is None:
            return [csv_file]
        write(picture, drawn)
    return [csv_file, picture]


def no_formula(cell: str) -> str:
    """A cell of a CSV file that no spreadsheet takes for a formula; a number stays as it is."""
    if not cell.startswith(FORMULA):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def path_cell(path: Path) -> str:
    """A path as the text of a cell, still a path where it would begin a formula."""
    return f"./{path}" if str(path).startswith(FORMULA) else str(path)


def write(file: Path, content: bytes) -> None:
    """Write a file, creating its directory. Raises UsageError if it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        durable.write(file, content)
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror})") from None
