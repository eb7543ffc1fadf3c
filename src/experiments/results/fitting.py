"""Fits a table to a terminal: what says least is left out, and nothing wraps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

GAP = "  "
SHORTEST = 6  # columns that a shortened cell keeps
ELLIPSIS = "…"


@dataclass(frozen=True)
class Columns:
    """The columns of a table: titles, and the cells of each row.

    keys: the titles of columns that tell the runs apart; they are never left out.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    keys: Sequence[str]

    @property
    def widths(self) -> list[int]:
        """The width of each column, in characters."""
        return [max(map(len, column)) for column in zip(self.titles, *self.rows, strict=True)]

    @property
    def width(self) -> int:
        """The width of a line, in characters."""
        return sum(self.widths) + len(GAP) * (len(self.titles) - 1)

    def without(self, unwanted: Callable[[str, Sequence[str]], bool]) -> "Columns":
        """Leave out the columns for whose title and cells `unwanted` is true."""
        kept = [
            i
            for i, title in enumerate(self.titles)
            if title in self.keys or not unwanted(title, [row[i] for row in self.rows])
        ]
        rows = [[row[i] for i in kept] for row in self.rows]
        return replace(self, titles=[self.titles[i] for i in kept], rows=rows)

    def lines(self) -> list[str]:
        """The header and each row, as aligned text."""
        widths = self.widths
        return [
            GAP.join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
            for line in (self.titles, *self.rows)
        ]


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key with its shortest end that no other key has: `lr` for `optimizer.lr`."""
    short = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        others = [other for other in keys if other != key]
        unique = (
            end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)
        )
        short[key] = next(unique, key)
    return short


def fit(columns: Columns, width: int, order: Sequence[str], kept: Sequence[str] = ()) -> Columns:
    """The columns in at most `width` characters, as far as possible.

    First the keys are shortened to what distinguishes them, then columns that are the same in all
    rows are left out, but for `kept` ones, then those of `order`, one by one; at last, long cells
    lose their beginning.
    """
    if columns.width > width:
        short = short_keys(columns.keys)
        titles = [short.get(title, title) for title in columns.titles]
        columns = replace(columns, titles=titles, keys=[short[key] for key in columns.keys])
    if columns.width > width and len(columns.rows) > 1:
        columns = columns.without(lambda title, cells: title not in kept and len(set(cells)) == 1)
    for unwanted in order:
        if columns.width > width:
            columns = columns.without(lambda title, cells, unwanted=unwanted: title == unwanted)  # type: ignore[misc]
    while columns.width > width and max(columns.widths) > SHORTEST:
        widest = columns.widths.index(max(columns.widths))
        room = max(SHORTEST, columns.widths[widest] - (columns.width - width))
        columns = shorten_column(columns, widest, room)
    return columns


def shorten_column(columns: Columns, number: int, room: int) -> Columns:
    """A column with at most `room` characters, the last ones of each cell."""

    def shorten(line: Sequence[str]) -> list[str]:
        cell = line[number]
        short = cell if len(cell) <= room else ELLIPSIS + cell[1 - room :]
        return [*line[:number], short, *line[number + 1 :]]

    titles = shorten(columns.titles)
    keys = [titles[number] if key == columns.titles[number] else key for key in columns.keys]
    return Columns(titles, [shorten(row) for row in columns.rows], keys)
