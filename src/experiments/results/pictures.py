"""The plot of a comparison: the monitored value over the swept keys, and the loss curves."""

import io
import math
from collections.abc import Sequence
from typing import Any

from experiments.directory.metrics import read_metrics
from experiments.results.plotting import Figure, colormaps
from experiments.results.rows import Row, value_of

MAX_CURVES = 24  # the best runs: more curves could not be told apart
MAX_LINES = 300  # runs in parallel coordinates
MAX_TICKS = 16  # labelled values of a key
MAX_LABEL = 40  # characters of a name or value in a label


def results_picture(rows: Sequence[Row], keys: Sequence[str]) -> bytes:
    """A PNG with two plots: the swept keys (a line plot of one, a heatmap of two, parallel
    coordinates of more), for the runs with the monitored metric of the first, and the validation
    loss of the best runs over their steps.
    """
    figure = Figure(figsize=(13, 5.5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    monitor = rows[0].monitor
    # one axis cannot hold two metrics
    scored = [row for row in rows if row.monitor == monitor]
    drawn_keys = [key for key in keys if key != "trainer.monitor"]
    if len(drawn_keys) == 1:
        draw_line(left, scored, drawn_keys[0], monitor)
    elif len(drawn_keys) == 2:
        draw_heatmap(figure, left, scored, drawn_keys[0], drawn_keys[1], monitor)
    elif len(drawn_keys) > 2:
        draw_parallel(figure, left, scored, drawn_keys, monitor)
    else:
        drawn = scored[:MAX_CURVES][::-1]
        names = [shorten_label(row.path.name) for row in drawn]
        left.barh(range(len(drawn)), [score(row) for row in drawn], tick_label=names)
        left.set_xlabel(f"best {monitor}")
    draw_curves(right, rows, keys)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def shorten_label(text: str) -> str:
    """The end of a name or value that is too long to leave room for the plot; dollar signs, which
    would begin a formula, as they are.
    """
    short = text if len(text) <= MAX_LABEL else f"…{text[1 - MAX_LABEL :]}"
    return short.replace("$", r"\$")


def score(row: Row) -> float:
    """The best monitored value of a run; NaN if it has none, failed or diverged."""
    if row.state in ("failed", "diverged"):
        return math.nan
    return float(row.best.get(row.monitor, math.nan))


def values_of(rows: Sequence[Row], key: str) -> list[str]:
    """The distinct values of a key in the rows, sorted, numbers before text."""
    found = {value_of(row, key) for row in rows}

    def order(text: str) -> tuple[int, float, str]:
        try:
            return (0, float(text), text)
        except ValueError:
            return (1, 0.0, text)

    return sorted(found, key=order)


def ticks(values: Sequence[str]) -> tuple[list[int], list[str]]:
    """Positions and labels of the ticks: every value, or every n-th of more than MAX_TICKS."""
    step = -(-len(values) // MAX_TICKS)
    places = list(range(0, len(values), step))
    return places, [shorten_label(values[place]) for place in places]


def mean_scores(rows: Sequence[Row], keys: Sequence[str]) -> dict[tuple[str, ...], float]:
    """The mean score of the runs that share their values of `keys`."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(value_of(row, key) for key in keys), []).append(score(row))
    return {place: sum(scores) / len(scores) for place, scores in groups.items()}


def draw_line(axes: Any, rows: Sequence[Row], key: str, monitor: str) -> None:
    """The mean score over the values of one key; a red cross where it is not finite."""
    values = values_of(rows, key)
    scores = mean_scores(rows, [key])
    heights = [scores[(value,)] for value in values]
    axes.plot(range(len(values)), heights, marker="o")
    axes.set_xticks(*ticks(values))
    known = [height for height in heights if math.isfinite(height)]
    for place, height in enumerate(heights):
        if math.isfinite(height) and len(values) <= MAX_TICKS:
            axes.annotate(
                f"{height:.4f}", (place, height), xytext=(0, 6), textcoords="offset points"
            )
        elif known and not math.isfinite(height):
            axes.plot([place], [max(known)], marker="x", color="red")
    axes.set(xlabel=key, ylabel=f"best {monitor}", title=f"best {monitor}")


def draw_heatmap(
    figure: Figure, axes: Any, rows: Sequence[Row], down: str, across: str, monitor: str
) -> None:
    """The mean score of each pair of values; cells without a finite score are blank."""
    ys, xs = values_of(rows, down), values_of(rows, across)
    scores = mean_scores(rows, [down, across])
    grid = [[scores.get((y, x), math.nan) for x in xs] for y in ys]
    # darker is better
    image = axes.imshow(grid, cmap="Blues" if rows[0].maximize else "Blues_r", aspect="auto")
    known = [height for line in grid for height in line if math.isfinite(height)]
    middle = (min(known) + max(known)) / 2 if known else 0.0
    for i, line in enumerate(grid if max(len(xs), len(ys)) <= MAX_TICKS else []):
        for j, height in enumerate(line):
            dark = (height < middle) != rows[0].maximize
            text = f"{height:.4f}" if math.isfinite(height) else "none"
            axes.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
    axes.set(xlabel=across, ylabel=down, title=f"best {monitor}")
    axes.set_xticks(*ticks(xs))
    axes.set_yticks(*ticks(ys))
    figure.colorbar(image, ax=axes)


def draw_parallel(
    figure: Figure, axes: Any, rows: Sequence[Row], keys: Sequence[str], monitor: str
) -> None:
    """A line for each run through its values of all keys, coloured by rank."""
    values = {key: values_of(rows, key) for key in keys}
    heights = {
        key: {text: place / max(len(texts) - 1, 1) for place, text in enumerate(texts)}
        for key, texts in values.items()
    }
    finite = [row for row in rows if math.isfinite(score(row))][:MAX_LINES]
    colours = colormaps["viridis"]
    for rank, row in reversed(list(enumerate(finite))):
        line = [heights[key][value_of(row, key)] for key in keys]
        axes.plot(range(len(keys)), line, color=colours(rank / max(len(finite) - 1, 1)), lw=1.2)
    for i, key in enumerate(keys):
        for number, text in zip(*ticks(values[key]), strict=True):
            place = (i, heights[key][values[key][number]])
            axes.annotate(text, place, fontsize=8, bbox={"fc": "white", "ec": "none", "pad": 1})
    axes.set_xticks(range(len(keys)), keys, rotation=15)
    axes.set_yticks([])
    axes.set_title(f"by best {monitor}: the darker, the better")


def draw_curves(axes: Any, rows: Sequence[Row], keys: Sequence[str]) -> None:
    """loss/valid of the best runs over their steps."""
    drawn = [row for row in rows if score(row) == score(row)][:MAX_CURVES]
    for rank, row in enumerate(drawn):
        lines = [line for line in read_metrics(row.path) if "loss/valid" in line]
        steps, losses = [line["step"] for line in lines], [line["loss/valid"] for line in lines]
        values = [f"{key.rpartition('.')[2]}={shorten_label(value_of(row, key))}" for key in keys]
        name = ", ".join(values)
        label = (name or shorten_label(row.path.name)) if rank < 10 else None
        axes.plot(steps, losses, label=label, marker=".", lw=1)
    axes.set(xlabel="step", ylabel="loss/valid", yscale="log", title=f"the best {len(drawn)} runs")
    if drawn:
        axes.legend(fontsize=7)
