"""The picture of a comparison: the swept keys against the monitored number, and the loss curves."""

import io
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

# At its first import it looks for fonts and for a folder to remember them in, and tells of both.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

from matplotlib import colormaps  # noqa: E402
from matplotlib.figure import Figure as Figure  # noqa: E402  (for evaluate, too)

from experiments.saved import read_metrics  # noqa: E402

if TYPE_CHECKING:
    from experiments.compare import Row

CURVES = 24  # runs whose curves are drawn, the best first: more cannot be told apart
LINES = 300  # runs in parallel coordinates
TICKS = 16  # values of a key that are written out
WIDEST = 40  # characters of a name or value that are written out


def results_picture(rows: Sequence["Row"], keys: Sequence[str]) -> bytes:
    """A PNG: a heatmap for two swept keys, a line for one, parallel coordinates for more, and
    beside it the validation loss of the best runs over their steps.
    """
    figure = Figure(figsize=(13, 5.5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    monitor = rows[0].monitor
    if len(keys) == 1:
        draw_line(left, rows, keys[0], monitor)
    elif len(keys) == 2:
        draw_heatmap(figure, left, rows, keys[0], keys[1], monitor)
    elif len(keys) > 2:
        draw_parallel(figure, left, rows, keys, monitor)
    else:
        drawn = rows[:CURVES][::-1]
        names = [brief(row.path.name) for row in drawn]
        left.barh(range(len(drawn)), [score(row) for row in drawn], tick_label=names)
        left.set_xlabel(f"best {monitor}")
    draw_curves(right, rows, keys)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def brief(text: str) -> str:
    """A name or value; the end of it where all of it would leave no room for the picture."""
    return text if len(text) <= WIDEST else f"…{text[1 - WIDEST :]}"


def score(row: "Row") -> float:
    """The best monitored number of a run; NaN where it has none or did not end well."""
    if row.state in ("failed", "diverged"):
        return math.nan
    return float(row.best.get(row.monitor, math.nan))


def values_of(rows: Sequence["Row"], key: str) -> list[str]:
    """The values of a key in the rows, numbers in order of size."""
    from experiments.compare import value

    found = {value(row, key) for row in rows}

    def order(text: str) -> tuple[int, float, str]:
        try:
            return (0, float(text), text)
        except ValueError:
            return (1, 0.0, text)

    return sorted(found, key=order)


def ticks(values: Sequence[str]) -> tuple[list[int], list[str]]:
    """Places on an axis and the values there: all, or evenly chosen ones of many."""
    step = -(-len(values) // TICKS)
    places = list(range(0, len(values), step))
    return places, [brief(values[place]) for place in places]


def mean_scores(rows: Sequence["Row"], keys: Sequence[str]) -> dict[tuple[str, ...], float]:
    """The mean score of the runs that share their values of `keys`."""
    from experiments.compare import value

    groups: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(value(row, key) for key in keys), []).append(score(row))
    return {place: sum(scores) / len(scores) for place, scores in groups.items()}


def draw_line(axes: Any, rows: Sequence["Row"], key: str, monitor: str) -> None:
    """The number over the values of the one key, a point each; a cross where a run has none."""
    values = values_of(rows, key)
    scores = mean_scores(rows, [key])
    heights = [scores[(value,)] for value in values]
    axes.plot(range(len(values)), heights, marker="o")
    axes.set_xticks(*ticks(values))
    known = [height for height in heights if math.isfinite(height)]
    for place, height in enumerate(heights):
        if math.isfinite(height) and len(values) <= TICKS:
            axes.annotate(
                f"{height:.4f}", (place, height), xytext=(0, 6), textcoords="offset points"
            )
        elif known and not math.isfinite(height):
            axes.plot([place], [max(known)], marker="x", color="red")
    axes.set(xlabel=key, ylabel=f"best {monitor}", title=f"best {monitor}")


def draw_heatmap(
    figure: Figure, axes: Any, rows: Sequence["Row"], down: str, across: str, monitor: str
) -> None:
    """The number for each pair of values, written into its field; empty where there is none."""
    ys, xs = values_of(rows, down), values_of(rows, across)
    scores = mean_scores(rows, [down, across])
    grid = [[scores.get((y, x), math.nan) for x in xs] for y in ys]
    # the better is the darker
    image = axes.imshow(
        grid, cmap="Blues_r" if monitor.startswith("loss") else "Blues", aspect="auto"
    )
    known = [height for line in grid for height in line if math.isfinite(height)]
    middle = (min(known) + max(known)) / 2 if known else 0.0
    for i, line in enumerate(grid if max(len(xs), len(ys)) <= TICKS else []):
        for j, height in enumerate(line):
            dark = (height < middle) == monitor.startswith("loss")
            text = f"{height:.4f}" if math.isfinite(height) else "none"
            axes.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
    axes.set(xlabel=across, ylabel=down, title=f"best {monitor}")
    axes.set_xticks(*ticks(xs))
    axes.set_yticks(*ticks(ys))
    figure.colorbar(image, ax=axes)


def draw_parallel(
    figure: Figure, axes: Any, rows: Sequence["Row"], keys: Sequence[str], monitor: str
) -> None:
    """A line for each run through its values of all keys, coloured by its rank."""
    from experiments.compare import value

    values = {key: values_of(rows, key) for key in keys}
    heights = {
        key: {text: place / max(len(texts) - 1, 1) for place, text in enumerate(texts)}
        for key, texts in values.items()
    }
    shown = [row for row in rows if math.isfinite(score(row))][:LINES]
    colours = colormaps["viridis"]
    for rank, row in reversed(list(enumerate(shown))):
        line = [heights[key][value(row, key)] for key in keys]
        axes.plot(range(len(keys)), line, color=colours(rank / max(len(shown) - 1, 1)), lw=1.2)
    for i, key in enumerate(keys):
        for number, text in zip(*ticks(values[key]), strict=True):
            place = (i, heights[key][values[key][number]])
            axes.annotate(text, place, fontsize=8, bbox={"fc": "white", "ec": "none", "pad": 1})
    axes.set_xticks(range(len(keys)), keys, rotation=15)
    axes.set_yticks([])
    axes.set_title(f"by best {monitor}: the darker, the better")


def draw_curves(axes: Any, rows: Sequence["Row"], keys: Sequence[str]) -> None:
    """loss/valid over the steps of the best runs."""
    from experiments.compare import value

    drawn = [row for row in rows if score(row) == score(row)][:CURVES]
    for rank, row in enumerate(drawn):
        lines = [line for line in read_metrics(row.path) if "loss/valid" in line]
        steps, losses = [line["step"] for line in lines], [line["loss/valid"] for line in lines]
        name = ", ".join(f"{key.rpartition('.')[2]}={brief(value(row, key))}" for key in keys)
        label = (name or brief(row.path.name)) if rank < 10 else None
        axes.plot(steps, losses, label=label, marker=".", lw=1)
    axes.set(xlabel="step", ylabel="loss/valid", yscale="log", title=f"the best {len(drawn)} runs")
    if drawn:
        axes.legend(fontsize=7)
