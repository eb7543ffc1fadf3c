"""Figures and a plot of a regression's residuals, target minus prediction. Imports no torch."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # not needed by a command line that is refused
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]

MAX_SHOWN = 4  # columns of targets in the plot and in the terminal
MAX_POINTS = 2000  # drawn one by one; more rows are counted in hexagons
QUANTILES = (0.5, 0.9, 0.99)  # of the absolute residuals


def residual_figures(predicted: "Array", targets: "Array") -> list[dict[str, Any]]:
    """Of each column of targets the mean, standard deviation and root mean square of the residuals,
    and the quantiles and largest of their absolute values, over the rows in which both numbers are
    finite; None where there is no such row. `not_finite` is the number of the others.

    predicted, targets: float64 (rows, columns)
    """
    import numpy as np

    figures = []
    for column in range(targets.shape[1]):
        with np.errstate(over="ignore", invalid="ignore"):
            residuals = targets[:, column] - predicted[:, column]
            found = residuals[np.isfinite(residuals)]
            size = np.abs(found)
            numbers: list[float | None] = [None] * (4 + len(QUANTILES))
            if len(found):
                rmse = np.sqrt(np.mean(np.square(found)))
                values = (found.mean(), found.std(), rmse, size.max())
                numbers = [*map(float, (*values, *np.quantile(size, QUANTILES)))]
        names = ["mean", "std", "rmse", "largest", *(f"q{100 * q:.0f}" for q in QUANTILES)]
        figures.append({
            "column": column,
            **dict(zip(names, numbers, strict=True)),
            "not_finite": len(residuals) - len(found),
        })  # fmt: skip
    return figures


def residual_lines(figures: Sequence[dict[str, Any]]) -> list[str]:
    """The figures in a line for each column, for the terminal."""
    lines = []
    for column in figures[:MAX_SHOWN]:
        name = f"residuals of column {column['column']}" if len(figures) > 1 else "residuals"
        numbers = [
            f"{key} {value:.4g}"
            for key, value in column.items()
            if key not in ("column", "not_finite") and value is not None
        ]
        if column["not_finite"]:
            numbers.append(f"{column['not_finite']} rows not finite")
        lines.append(f"{name}: {', '.join(numbers)}")
    return lines + left_out(figures)


def left_out(figures: Sequence[dict[str, Any]]) -> list[str]:
    """A line about columns that are not shown, if there are any."""
    more = len(figures) - MAX_SHOWN
    return [f"{more} more columns in the report"] if more > 0 else []


def residual_picture(report: dict[str, Any], predicted: "Array", targets: "Array") -> bytes:
    """A PNG with a row for each column of targets: the predictions against the targets with the
    diagonal, and the residuals against the predictions. Rows that are not finite are left out.
    """
    import numpy as np

    from experiments.results.plotting import Figure

    figures = report["residuals"]
    columns = min(targets.shape[1], MAX_SHOWN)
    figure = Figure(figsize=(10, 4.2 * columns), dpi=100, layout="constrained")
    note = "".join(f"; {line}" for line in left_out(figures))
    figure.suptitle(
        f"{report['split']}, {report['checkpoint']} checkpoint: loss {report['loss']:.4g}{note}"
    )
    axes = figure.subplots(columns, 2, squeeze=False)
    for column in range(columns):
        y, x = targets[:, column], predicted[:, column]
        with np.errstate(over="ignore", invalid="ignore"):
            kept = np.isfinite(y - x)
        y, x = y[kept], x[kept]
        name = f"column {column}: " if targets.shape[1] > 1 else ""
        left, right = axes[column]
        draw_points(left, x, y)
        # through a point among the others, since the view includes it
        at = float(x[0]) if len(x) else 0.0
        left.axline((at, at), slope=1, color="black", linewidth=0.8)
        left.set(xlabel="predicted", ylabel=f"{name}target")
        draw_points(right, x, y - x)
        right.axhline(0, color="black", linewidth=0.8)
        right.set(xlabel="predicted", ylabel="target - predicted")
        rmse = figures[column]["rmse"]
        if rmse is not None:
            missing = len(kept) - len(y)
            more = f", {missing} rows not finite" if missing else ""
            right.set_title(f"{name}RMSE {rmse:.4g}{more}", fontsize=10)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def draw_points(axes: Any, x: "Array", y: "Array") -> None:
    """Draw points one by one, or the logarithm of their number in hexagons if there are many."""
    if len(x) <= MAX_POINTS:
        axes.scatter(x, y, s=6, alpha=0.6, linewidths=0)
    else:
        axes.hexbin(x, y, gridsize=60, bins="log", cmap="Blues", mincnt=1, linewidths=0.1)
