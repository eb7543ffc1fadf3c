"""Per-class metrics and a plot of a confusion matrix. Imports no torch."""

import io
from typing import Any


def class_metrics(matrix: list[list[int]]) -> list[dict[str, float]]:
    """Support, precision, recall and F1 of each class; 0 where a ratio's denominator is 0.

    matrix: (classes, classes) counts; rows are targets, columns predictions
    """
    metrics = []
    for number, row in enumerate(matrix):
        hits, rows, predicted = row[number], sum(row), sum(other[number] for other in matrix)
        metrics.append({
            "class": number,
            "rows": rows,
            "precision": hits / predicted if predicted else 0.0,
            "recall": hits / rows if rows else 0.0,
            "f1": 2 * hits / (rows + predicted) if rows + predicted else 0.0,
        })  # fmt: skip
    return metrics


def confusion_picture(report: dict[str, Any]) -> bytes:
    """The confusion matrix as a PNG: targets down, predictions across, mistakes coloured."""
    from experiments.results.plotting import Figure

    matrix = report["confusion"]
    classes = range(len(matrix))
    mistakes = [[0 if i == j else matrix[i][j] for j in classes] for i in classes]
    figure = Figure(figsize=(6.4, 6.0), dpi=110, layout="constrained")
    axes = figure.add_subplot(
        title=f"{report['split']}, {report['checkpoint']} checkpoint: "
        f"accuracy {report['accuracy']:.4f}",
        xlabel="predicted",
        ylabel="target",
        xticks=classes,
        yticks=classes,
    )
    # on one scale with the correct predictions, the mistakes would all have the same colour
    worst = max(map(max, mistakes))
    axes.imshow(mistakes, cmap="Oranges", vmax=1.5 * max(worst, 1))  # dark text stays legible
    if len(matrix) <= 20:
        for i in classes:
            for j in classes:
                axes.text(j, i, str(matrix[i][j]), ha="center", va="center", fontsize=8,
                          weight="bold" if i == j else "normal")  # fmt: skip
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
