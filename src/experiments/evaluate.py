"""Evaluate a checkpoint of a run on a split: `python -m experiments.evaluate DIR`.

Prints loss, accuracy and per-class metrics, and writes them with the confusion matrix, also as an
image for TensorBoard, to the run directory. A model that is not one of classes has a loss only.
"""

import argparse
import sys
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

if TYPE_CHECKING:
    from torch import nn

    from experiments.data.loaders import Loader


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
    parser.error = partial(exit_with_usage_error, "experiments.evaluate")  # type: ignore[method-assign]
    args = parser.parse_args()
    try:
        report = evaluate_run(args.run, args.checkpoint, args.split, args.trust)
    except UsageError as error:
        exit_with_usage_error("experiments.evaluate", str(error))
    print(as_text(report))


def evaluate_run(path: Path, checkpoint: str, split: str, trust: list[str]) -> dict[str, Any]:
    """Loss of a saved run's checkpoint and, for classes, accuracy, confusion matrix and per-class
    metrics, without the last two for more than MAX_CLASSES.

    Writes `evaluation-CHECKPOINT-SPLIT.json` and, if there is a matrix, `.png` and, for a finished
    run, a TensorBoard image to the run directory. Raises UsageError if the run cannot be read.
    """
    from experiments.saved import load_run

    saved = load_run(path, "best" if checkpoint == "best" else "last", trust)

    from experiments.data.loaders import TensorLoader, evaluation_options
    from experiments.directory.tracking import log_image
    from experiments.job import load_data
    from experiments.training.build import build
    from experiments.training.fit import evaluate
    from experiments.training.parts import build_loss
    from experiments.training.saved_data import load_split

    if saved.statistics is None:
        rows = getattr(load_data(saved.config), split)
    else:
        rows = load_split(saved.config, split, saved.statistics)
    options = evaluation_options(rows, saved.config["loader"]["batch_size"])
    loader = cast("Loader", build(saved.config, "loader", rows, **options))
    if isinstance(loader, TensorLoader):
        loader.copies = True  # the model may write to its input
    loss_func = build_loss(saved.config)
    loss_func.load_state_dict(saved.loss_state or loss_func.state_dict())
    loss, accuracy = evaluate(saved.model, loss_func, loader)
    report: dict[str, Any] = {
        "checkpoint": checkpoint,
        "step": saved.step,
        "split": split,
        "rows": len(rows),
        "loss": loss,
    }
    matrix = None
    if accuracy is not None:
        report["accuracy"] = accuracy
        matrix = confusion_matrix(saved.model, loader, getattr(loss_func, "ignore_index", None))
    if matrix is not None:
        report |= {"classes": class_metrics(matrix), "confusion": matrix}
    data_file = path / f"evaluation-{checkpoint}-{split}.json"
    picture_file = data_file.with_suffix(".png")
    picture = None
    if matrix is not None:
        picture = draw(picture_file, lambda: confusion_picture(report))
    unchanged = picture_file.exists() and picture_file.read_bytes() == picture
    try:
        durable.write(data_file, dumps(report, indent=2).encode() + b"\n")
        if picture is None:
            picture_file.unlink(missing_ok=True)
            return {**report, "files": [display_path(data_file)]}
        durable.write(picture_file, picture)
        # TensorBoard follows the newest events file: a new one would hide a live run's later events
        if not unchanged and read_record(path)["state"] == "finished":
            log_image(path, f"confusion/{split}_{checkpoint}", saved.step, picture)
    except OSError as error:  # it may be someone else's run
        print(f"warning: {path}: the report is not saved ({error.strerror})", file=sys.stderr)
        return {**report, "files": []}
    return {**report, "files": [display_path(data_file), display_path(picture_file)]}


def confusion_matrix(
    model: "nn.Module", loader: "Loader", ignored: int | None = None
) -> list[list[int]] | None:
    """(classes, classes) counts of a model's predictions: rows are targets, columns predictions.
    Targets that equal `ignored` do not count. None for more than MAX_CLASSES.
    """
    import torch

    with torch.no_grad():
        predicted = torch.cat([model(xb).argmax(1).flatten() for xb, _ in loader.batches()])
    targets = torch.cat([yb.flatten() for _, yb in loader.batches()])
    # targets below 0 are of no class, and ignored by the loss
    counted = (targets >= 0) & (targets != ignored) if ignored is not None else targets >= 0
    predicted, targets = predicted[counted], targets[counted]
    if not len(targets):
        return None
    classes = int(max(predicted.max(), targets.max())) + 1
    if classes > MAX_CLASSES:
        return None
    pairs = torch.bincount(targets * classes + predicted, minlength=classes**2)
    return cast(list[list[int]], pairs.view(classes, classes).tolist())


def as_text(report: dict[str, Any]) -> str:
    """The report as text for the terminal."""
    accuracy = f"accuracy {report['accuracy']:.4f}, " if "accuracy" in report else ""
    lines = [
        f"{report['checkpoint']} checkpoint (step {report['step']}), {report['split']} split: "
        f"loss {report['loss']:.4f}, {accuracy}{report['rows']} rows",
    ]
    if "classes" not in report:
        return "\n".join([*lines, *report["files"]])
    lines += ["class   rows  precision  recall      f1"]
    lines += [
        f"{metrics['class']:5} {metrics['rows']:6}     {metrics['precision']:.4f}  "
        f"{metrics['recall']:.4f}  {metrics['f1']:.4f}"
        for metrics in report["classes"]
    ]
    return "\n".join([*lines, *report["files"]])


if __name__ == "__main__":
    main()
