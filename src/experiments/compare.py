"""Many run directories as one table and one picture: `python -m experiments.compare DIR...`.

Two runs are laid side by side instead: where their configs differ, beside where their numbers do.
Imports no torch.
"""

import argparse
import csv
import io
import json
import math
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments import durable
from experiments import run as runs
from experiments.config import leaves, show
from experiments.errors import UsageError, refuse

SHOWN = 40  # rows of a table in a terminal; results.csv has all
METRICS = ("loss/valid", "accuracy/valid")


@dataclass(frozen=True)
class Row:
    """One run: what it was told and what it reached."""

    path: Path
    state: str
    config: dict[str, Any]  # dotted keys
    overrides: dict[str, str]
    best: dict[str, float]
    last: dict[str, float]
    seconds: float

    @property
    def monitor(self) -> str:
        """The number that ranks it."""
        return str(self.config.get("trainer.monitor", "loss/valid"))

    @property
    def rank(self) -> tuple[int, float, str]:
        """Sorts the better before the worse, runs without a number last."""
        value = self.best.get(self.monitor, math.nan)
        if self.state in ("failed", "diverged", "pruned") or not math.isfinite(value):
            return (1 + (self.state == "diverged"), 0.0, str(self.path))
        return (0, value if self.monitor.startswith("loss") else -value, str(self.path))


def main() -> None:
    """Parse the command line and compare."""
    parser = argparse.ArgumentParser("python -m experiments.compare", description=__doc__)
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR",
                        help="runs, or directories with runs below them")  # fmt: skip
    parser.add_argument("--into", type=Path, metavar="DIR",
                        help="where the results go; the one DIR if it is one")  # fmt: skip
    parser.add_argument("--export", type=Path, metavar="FILE", help="all of it as JSON")
    parser.error = partial(refuse, "experiments.compare")  # type: ignore[method-assign]
    args = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no mistake
    try:
        rows = collect(args.directories)
        if not rows:
            raise UsageError(f"{args.directories[0]}: there is no run in it")
        if args.export:
            write(args.export, json.dumps([as_json(row) for row in rows], indent=2).encode())
        runs_given = [read(path) for path in args.directories if (path / "run.json").exists()]
        pair = len(args.directories) == len(rows) == len(runs_given) == 2
        print(side_by_side(*runs_given) if pair else table(rows))
        into = args.into or (args.directories[0] if len(args.directories) == 1 else None)
        if into is not None and not (into / "run.json").exists():
            print("\n".join(map(runs.short, save(rows, into))))
    except UsageError as error:
        refuse("experiments.compare", str(error))


def write(file: Path, content: bytes) -> None:
    """Write a result. Raises UsageError where the file cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        durable.write(file, content)
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror})") from None


def collect(directories: Iterable[Path]) -> list[Row]:
    """Every run in and below the directories, the best first.

    A run that cannot be read is told on standard error and left out. Raises UsageError for a
    directory that is not there.
    """
    found: dict[Path, Row] = {}
    for directory in directories:
        if not directory.is_dir():
            raise UsageError(f"{directory}: there is no such directory")
        for path in run_directories(directory):
            try:
                found[path] = read(path)
            except UsageError as error:
                print(f"left out: {error}", file=sys.stderr)
    return sorted(found.values(), key=lambda row: row.rank)


def run_directories(directory: Path) -> Iterator[Path]:
    """The run directories in and below a directory; a run has none inside it."""
    for folder, names, files in os.walk(directory):
        if "run.json" in files:
            names.clear()
            yield Path(folder)
        else:
            names.sort()


def read(path: Path) -> Row:
    """The row of one run. Raises UsageError where run.json cannot be read."""
    record = runs.read_record(path)
    overrides = (override.lstrip("+").partition("=") for override in record["overrides"])
    state = record["state"]
    if state == "running" and not runs.is_locked(path):
        state = "interrupted"  # it was killed
    return Row(
        path=path,
        state=state,
        config=dict(leaves(record["config"])),
        overrides={key: value for key, _, value in overrides},
        best=record.get("metrics", {}).get("best", {}),
        last=record.get("metrics", {}).get("last", {}),
        seconds=record["seconds"],
    )


def swept_keys(rows: Sequence[Row]) -> list[str]:
    """The overridden keys whose values differ between the rows."""
    keys = {key: None for row in rows for key in row.overrides}
    return [key for key in keys if len({value(row, key) for row in rows}) > 1]


def value(row: Row, key: str) -> str:
    """A run's value of a key, or option of a group, as one would write it."""
    if key in row.config:
        return show(row.config[key])
    return row.overrides.get(key, "default")


def cells(rows: Sequence[Row], keys: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table, in full precision, with a column for each of the keys."""
    head = ["rank", *(keys or ["run"]), "state"]
    head += [f"{which} {metric}" for which in ("best", "last") for metric in METRICS]
    body = []
    for rank, row in enumerate(rows, 1):
        told = [value(row, key) for key in keys] or [runs.short(row.path)]
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
            f"{float(cell):.4f}" if cell and first <= i < last else brief(cell)
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


def brief(cell: str) -> str:
    """A number with six digits at most, anything else as it is."""
    try:
        return f"{float(cell):g}" if len(cell) > 6 else cell
    except ValueError:
        return cell


def side_by_side(one: Row, other: Row) -> str:
    """Why two runs differ: their configs and their numbers, where they are not the same."""
    lines = [f"A  {runs.short(one.path)}", f"B  {runs.short(other.path)}", ""]
    pairs = [("state", one.state, other.state)]
    keys = {**one.config, **other.config}
    pairs += [
        (key, show(one.config.get(key, "-")), show(other.config.get(key, "-"))) for key in keys
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
        from experiments.picture import results_picture

        write(picture, results_picture(rows, keys))
        write(numbers, content)
    return [numbers, picture]


if __name__ == "__main__":
    main()
