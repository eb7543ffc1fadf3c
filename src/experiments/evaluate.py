"""Evaluate a checkpoint of a run on a split: `python -m experiments.evaluate DIR`.

Prints the loss, the accuracy and figures for each class; leaves them with the confusion matrix,
as a picture and for TensorBoard, in the run directory.
"""

import argparse
import io
import json
from functools import partial
from pathlib import Path
from typing import Any, cast

from experiments import durable
from experiments import run as runs
from experiments.errors import UsageError, refuse


def main() -> None:
    """Parse the command line and evaluate."""
    parser = argparse.ArgumentParser("python -m experiments.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="the directory of a run")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="valid")
    parser.add_argument("--trust", action="append", default=[], metavar="MODULE",
                        help="a module that the saved config may name")  # fmt: skip
    parser.error = partial(refuse, "experiments.evaluate")  # type: ignore[method-assign]
    args = parser.parse_args()
    try:
        report = evaluate_run(args.run, args.checkpoint, args.split, args.trust)
    except UsageError as error:
        refuse("experiments.evaluate", str(error))
    print(as_text(report))


def evaluate_run(path: Path, checkpoint: str, split: str, trust: list[str]) -> dict[str, Any]:
    """Loss, accuracy, confusion matrix and per-class figures of a saved run's checkpoint.

    Writes `evaluation-CHECKPOINT-SPLIT.json`, the same as `.png`, and for TensorBoard the
    picture of a finished run, into the run directory. Raises UsageError where the run cannot be
    read.
    """
    from experiments.saved import load_run

    saved = load_run(path, "best" if checkpoint == "best" else "last", trust)

    import torch

    from experiments.build import build
    from experiments.fit import Batch, Loader, evaluate
    from experiments.job import load_data
    from experiments.loader import once
    from experiments.tracking import log_image

    rows = getattr(load_data(saved.config), split)
    options = once(rows, saved.config["loader"]["batch_size"])
    loader = cast(Loader[Batch], build(saved.config, "loader", rows, **options))
    loss, accuracy = evaluate(saved.model, build(saved.config, "loss"), loader)
    with torch.no_grad():
        predicted = torch.cat([saved.model(xb).argmax(1) for xb, _ in loader.batches()])
    targets = torch.cat([yb for _, yb in loader.batches()])
    classes = int(max(predicted.max(), targets.max())) + 1
    pairs = torch.bincount(targets * classes + predicted, minlength=classes**2)
    matrix = pairs.view(classes, classes)
    report = {
        "checkpoint": checkpoint,
        "step": saved.step,
        "split": split,
        "rows": len(targets),
        "loss": loss,
        "accuracy": accuracy,
        "classes": class_figures(matrix.tolist()),
        "confusion": matrix.tolist(),
    }
    data_file = path / f"evaluation-{checkpoint}-{split}.json"
    picture_file = data_file.with_suffix(".png")
    picture = confusion_picture(report)
    shown_already = picture_file.exists() and picture_file.read_bytes() == picture
    durable.write(data_file, json.dumps(report, indent=2).encode() + b"\n")
    durable.write(picture_file, picture)
    # TensorBoard follows the newest file: a second one would hide what a live run still writes
    if not shown_already and runs.read_record(path)["state"] == "finished":
        log_image(path, f"confusion/{split}_{checkpoint}", saved.step, picture)
    return {**report, "files": [runs.short(data_file), runs.short(picture_file)]}


def class_figures(matrix: list[list[int]]) -> list[dict[str, float]]:
    """Rows, precision, recall and F1 of each class; 0 where a ratio has nothing below it.

    matrix: rows are targets, columns predictions
    """
    figures = []
    for number, row in enumerate(matrix):
        hits, rows, chosen = row[number], sum(row), sum(other[number] for other in matrix)
        figures.append({
            "class": number,
            "rows": rows,
            "precision": hits / chosen if chosen else 0.0,
            "recall": hits / rows if rows else 0.0,
            "f1": 2 * hits / (rows + chosen) if rows + chosen else 0.0,
        })  # fmt: skip
    return figures


def as_text(report: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    lines = [
        f"{report['checkpoint']} checkpoint (step {report['step']}), {report['split']} split: "
        f"loss {report['loss']:.4f}, accuracy {report['accuracy']:.4f}, {report['rows']} rows",
        "class   rows  precision  recall      f1",
    ]
    lines += [
        f"{figures['class']:5} {figures['rows']:6}     {figures['precision']:.4f}  "
        f"{figures['recall']:.4f}  {figures['f1']:.4f}"
        for figures in report["classes"]
    ]
    return "\n".join([*lines, *report["files"]])


def confusion_picture(report: dict[str, Any]) -> bytes:
    """The confusion matrix as a PNG: targets down, predictions across, mistakes coloured."""
    from experiments.picture import Figure

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
    # on one scale with the right ones, the mistakes could not be told apart
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


if __name__ == "__main__":
    main()
