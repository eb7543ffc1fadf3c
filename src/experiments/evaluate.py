"""Evaluate a checkpoint of a run on a split: `python -m experiments.evaluate DIR`.

Prints the loss, the metrics and, for classes, those of each class, or, for a regression, figures of
its residuals, and writes them to the run directory with a picture, also for TensorBoard: the
confusion matrix, or predictions and residuals.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from experiments import stdio
from experiments.directory import durable
from experiments.directory.paths import display_path
from experiments.directory.plain_json import dumps
from experiments.directory.record import read_record
from experiments.errors import UsageError, exit_with_usage_error
from experiments.results.confusion import class_metrics, confusion_picture
from experiments.results.drawing import draw
from experiments.results.predictions import check_file, write
from experiments.results.residuals import residual_figures, residual_lines, residual_picture

if TYPE_CHECKING:
    from experiments.data.loaders import Loader
    from experiments.saved import SavedRun
    from experiments.training.objective import Objective


MAX_CLASSES = 1000  # of a confusion matrix, which has the square of it as numbers


def main() -> None:
    """Parse the command line and evaluate."""
    stdio.protect(ignore_closed_pipes=True)
    parser = argparse.ArgumentParser("python -m experiments.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="the directory of a run")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="valid")
    parser.add_argument("--trust", action="append", default=[], metavar="MODULE",
                        help="a module that the saved config may use")  # fmt: skip
    parser.add_argument("--predictions", type=Path, metavar="FILE",
                        help="write row, target and output to FILE, .npy or .parquet")  # fmt: skip
    parser.error = partial(exit_with_usage_error, "experiments.evaluate")  # type: ignore[method-assign]
    args = parser.parse_args()
    try:
        if args.predictions is not None:
            check_file(args.predictions)
        report = evaluate_run(
            args.run, args.checkpoint, args.split, args.trust, predictions=args.predictions
        )
    except UsageError as error:
        exit_with_usage_error("experiments.evaluate", str(error))
    print(as_text(report))


def evaluate_run(
    path: Path,
    checkpoint: str,
    split: str,
    trust: list[str],
    predictions: Path | None = None,
) -> dict[str, Any]:
    """Loss and metrics of a saved run's checkpoint and, for classes, a confusion matrix and metrics
    of each class, without the last two for more than MAX_CLASSES; for a regression the figures of
    its residuals.

    Writes `evaluation-CHECKPOINT-SPLIT.json` and, if there are figures, `.png` and, for a finished
    run, a TensorBoard image to the run directory; and outputs and targets to `predictions`, if it
    is given. Raises UsageError if the run cannot be read.
    """
    from experiments.saved import load_run

    saved = load_run(path, "best" if checkpoint == "best" else "last", trust)

    from experiments.data.loaders import TensorLoader
    from experiments.training.evaluation import evaluate
    from experiments.training.parts import build_metrics, evaluation_loader

    rows = rows_of(saved, split)
    loader = evaluation_loader(saved.config, rows)
    if isinstance(loader, TensorLoader):
        loader.copies = True  # the model may write to its input
    objective = saved.objective
    metrics = build_metrics(saved.config, objective.loss_func)
    found = evaluate(objective, loader, metrics, split)
    report: dict[str, Any] = {
        "checkpoint": checkpoint,
        "step": saved.step,
        "split": split,
        "rows": len(rows),
        **{tag.removesuffix(f"/{split}"): value for tag, value in found.items()},
    }
    if predictions is not None:
        write_predictions(predictions, objective, loader)
    figures = figures_of(objective, loader)
    if figures is not None:
        report |= figures.numbers
    return {**report, "files": save(path, report, figures)}


@dataclass(frozen=True)
class Figures:
    """What fits a run's task besides loss and metrics.

    tag: of the picture in TensorBoard, before the split and checkpoint
    numbers: for the report. picture: draws the report
    """

    tag: str
    numbers: dict[str, Any]
    picture: Callable[[dict[str, Any]], bytes]


def figures_of(objective: "Objective", loader: "Loader") -> Figures | None:
    """The confusion matrix of classes, the residuals of a regression; None where neither fits."""
    from experiments.training.regression import predictions

    matrix = confusion_matrix(objective, loader)
    if matrix is not None:
        numbers = {"classes": class_metrics(matrix), "confusion": matrix}
        return Figures("confusion", numbers, confusion_picture)
    pairs = predictions(objective, loader)
    if pairs is None:
        return None
    return Figures(
        "residuals",
        {"residuals": residual_figures(*pairs)},
        lambda report: residual_picture(report, *pairs),
    )


def save(path: Path, report: dict[str, Any], figures: Figures | None) -> list[str]:
    """Write a report and its picture to the run directory and, for a finished run, the picture to
    TensorBoard; the files that were written. A directory that cannot be written is told.
    """
    from experiments.directory.tracking import log_image

    split, checkpoint = report["split"], report["checkpoint"]
    data_file = path / f"evaluation-{checkpoint}-{split}.json"
    picture_file = data_file.with_suffix(".png")
    picture = None
    if figures is not None:
        picture = draw(picture_file, lambda: figures.picture(report))
    unchanged = picture_file.exists() and picture_file.read_bytes() == picture
    try:
        durable.write(data_file, dumps(report, indent=2).encode() + b"\n")
        if figures is None or picture is None:
            picture_file.unlink(missing_ok=True)
            return [display_path(data_file)]
        durable.write(picture_file, picture)
        # TensorBoard follows the newest events file: a new one would hide a live run's later events
        if not unchanged and read_record(path)["state"] == "finished":
            log_image(path, f"{figures.tag}/{split}_{checkpoint}", report["step"], picture)
    except OSError as error:  # it may be someone else's run
        print(f"warning: {path}: the report is not saved ({error.strerror})", file=sys.stderr)
        return []
    return [display_path(data_file), display_path(picture_file)]


def rows_of(saved: "SavedRun", split: str) -> Any:
    """The rows of a saved run's split, encoded as when it began."""
    from experiments.job import load_data
    from experiments.training.saved_data import load_split

    if saved.statistics is None:
        return getattr(load_data(saved.config), split)
    return load_split(saved.config, split, saved.statistics)


def write_predictions(file: Path, objective: "Objective", loader: "Loader") -> None:
    """Write the outputs for all rows and their targets to a file. Raises UsageError if the step
    gives no tensors to write.
    """
    import torch
    from torch import Tensor

    from experiments.training.evaluation import outputs_of

    found = []
    for _, output in outputs_of(objective, loader):
        if not isinstance(output.outputs, Tensor) or not isinstance(output.targets, Tensor):
            raise UsageError(
                f"--predictions {file}: the step gives no tensors of outputs and targets; "
                "return experiments.StepOutput(loss, outputs, targets)"
            )
        found.append((output.outputs, output.targets))
    outputs, targets = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    try:
        write(file, outputs, targets)
    except OSError as error:
        raise UsageError(f"--predictions {file}: cannot be written ({error.strerror})") from None


def confusion_matrix(objective: "Objective", loader: "Loader") -> list[list[int]] | None:
    """(classes, classes) counts of predictions: rows are targets, columns predictions. Targets that
    the loss ignores do not count. None where targets are no classes, and for more than MAX_CLASSES.
    """
    import torch

    from experiments.training.accuracy import has_accuracy, is_of_classes
    from experiments.training.evaluation import outputs_of

    of_classes = is_of_classes(objective.loss_func)
    ignored = getattr(objective.loss_func, "ignore_index", None)
    pairs = []
    for _, output in outputs_of(objective, loader):
        if not has_accuracy(output.outputs, output.targets, of_classes=of_classes):
            return None
        pairs.append((output.outputs.argmax(1).flatten(), output.targets.flatten()))
    predicted, targets = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    # targets below 0 are of no class, and ignored by the loss
    counted = (targets >= 0) & (targets != ignored) if ignored is not None else targets >= 0
    predicted, targets = predicted[counted], targets[counted]
    if not len(targets):
        return None
    classes = int(max(predicted.max(), targets.max())) + 1
    if classes > MAX_CLASSES:
        return None
    counts = torch.bincount(targets * classes + predicted, minlength=classes**2)
    return cast(list[list[int]], counts.view(classes, classes).tolist())


def as_text(report: dict[str, Any]) -> str:
    """The report as text for the terminal."""
    numbers = [
        f"{name} {value:.4f}, " for name, value in report.items() if isinstance(value, float)
    ]
    lines = [
        f"{report['checkpoint']} checkpoint (step {report['step']}), {report['split']} split: "
        f"{''.join(numbers)}{report['rows']} rows",
    ]
    if "classes" not in report:
        return "\n".join([*lines, *residual_lines(report.get("residuals", [])), *report["files"]])
    lines += ["class   rows  precision  recall      f1"]
    lines += [
        f"{metrics['class']:5} {metrics['rows']:6}     {metrics['precision']:.4f}  "
        f"{metrics['recall']:.4f}  {metrics['f1']:.4f}"
        for metrics in report["classes"]
    ]
    return "\n".join([*lines, *report["files"]])


if __name__ == "__main__":
    main()
