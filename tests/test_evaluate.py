"""Evaluating a checkpoint: its metrics against an independent computation."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from saved_runs import SMALL, call, curves, go_on, record, stop_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import evaluate, job, load_run
from experiments.data import Data, Split
from experiments.results.confusion import class_metrics, confusion_picture

Compose = Callable[[list[str]], dict[str, Any]]


@pytest.fixture(autouse=True)
def small_data(tiny: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "load_data", lambda config: tiny)


@pytest.fixture(scope="module")
def config(compose: Compose) -> dict[str, Any]:
    # the best epoch is the second of three
    overrides = ["scheduler=constant", "optimizer.lr=0.5", "optimizer.momentum=0"]
    return compose([*SMALL, *overrides, "trainer.epochs=3", "model.dropout=0.1"])


@pytest.fixture(scope="module")
def finished(config: dict[str, Any], tiny: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluated") / "run"
    go_on(path, config, tiny)
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run without evaluations."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def report_of(run: Path, *arguments: str) -> dict[str, Any]:
    """Run the evaluate command; returns the report that it wrote."""
    assert call(evaluate.main, run, *arguments) == 0
    [file] = run.glob("evaluation-*.json")
    report = json.loads(file.read_text())
    assert isinstance(report, dict)
    return report


@pytest.mark.parametrize("which", ["best", "last"])
def test_on_the_validation_split_it_finds_what_the_run_logged(which: str, run: Path) -> None:
    report = report_of(run, "--checkpoint", which)
    logged = record(run)["metrics"][which]
    assert report["loss"] == logged["loss/valid"]
    assert report["accuracy"] == logged["accuracy/valid"]
    assert report["step"] == logged["step"]


@pytest.mark.parametrize("which", ["best", "last"])
def test_on_the_test_split_it_finds_what_the_run_logged(
    which: str, config: dict[str, Any], tiny: Data, tmp_path: Path
) -> None:
    run = tmp_path / "tested"
    go_on(run, {**config, "trainer": {**config["trainer"], "test": which}}, tiny)
    report = report_of(run, "--checkpoint", which, "--split", "test")
    logged = record(run)["metrics"]["test"]
    assert (report["loss"], report["accuracy"]) == (logged["loss/test"], logged["accuracy/test"])
    assert report["rows"] == 100


def test_the_best_checkpoint_and_the_validation_split_are_the_defaults(run: Path) -> None:
    report = report_of(run)
    assert (report["checkpoint"], report["split"], report["rows"]) == ("best", "valid", 150)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_every_row_is_counted_once_where_it_belongs(split: str, run: Path, tiny: Data) -> None:
    rows: Split = getattr(tiny, split)
    predicted = load_run(run).model(rows.x).argmax(1).tolist()
    expected = np.zeros((10, 10), dtype=int)
    for target, guess in zip(rows.y.tolist(), predicted, strict=True):
        expected[target, guess] += 1
    report = report_of(run, "--split", split)
    assert report["confusion"] == expected.tolist()
    assert report["accuracy"] == pytest.approx(np.trace(expected) / len(rows))


def test_the_figures_of_each_class_follow_from_their_definitions() -> None:
    matrix = [[4, 1, 0], [2, 3, 0], [0, 0, 0]]
    first, second, third = class_metrics(matrix)
    assert first == {
        "class": 0,
        "rows": 5,
        "precision": pytest.approx(4 / 6),
        "recall": pytest.approx(4 / 5),
        "f1": pytest.approx(2 * (4 / 6) * (4 / 5) / (4 / 6 + 4 / 5)),
    }
    assert second["precision"] == pytest.approx(3 / 4)
    assert second["recall"] == pytest.approx(3 / 5)
    # no row has this class, and none was predicted as it
    assert third == {"class": 2, "rows": 0, "precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_it_prints_the_figures_of_every_class_and_its_files(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = report_of(run)
    lines = capsys.readouterr().out.splitlines()
    assert f"accuracy {report['accuracy']:.4f}" in lines[0]
    assert [int(line.split()[0]) for line in lines[2:12]] == list(range(10))
    assert [f"{figures['f1']:.4f}" for figures in report["classes"]] == [
        line.split()[-1] for line in lines[2:12]
    ]
    assert lines[12:] == [str(run / f"evaluation-best-valid.{kind}") for kind in ("json", "png")]


def test_the_confusion_matrix_is_a_picture_that_shows_mistakes(run: Path, tmp_path: Path) -> None:
    report_of(run)
    picture = image.imread(run / "evaluation-best-valid.png")
    assert min(picture.shape[:2]) > 400
    perfect = {"confusion": [[5, 0], [0, 5]], "split": "a", "checkpoint": "b", "accuracy": 1.0}
    wrong = perfect | {"confusion": [[5, 3], [0, 5]]}
    pictures = [confusion_picture(report) for report in (perfect, wrong)]
    assert pictures[0] != pictures[1]
    assert pictures[0].startswith(b"\x89PNG")


def test_tensorboard_shows_the_picture_beside_the_curves(run: Path, finished: Path) -> None:
    report_of(run)
    accumulator = EventAccumulator(str(run))
    accumulator.Reload()
    [image] = accumulator.Images("confusion/valid_best")
    assert image.encoded_image_string == (run / "evaluation-best-valid.png").read_bytes()
    assert (image.step, image.width > 0) == (record(run)["metrics"]["best"]["step"], True)
    assert curves(run) == curves(finished)


def test_evaluated_again_it_is_shown_once(run: Path) -> None:
    before = report_of(run)
    files = sorted(run.glob("events*"))
    assert report_of(run) == before
    assert sorted(run.glob("events*")) == files


def test_a_run_that_goes_on_gets_no_events_from_others(
    config: dict[str, Any], tiny: Data, tmp_path: Path
) -> None:
    go_on(tmp_path / "run", config, tiny, stop_after(7))
    files = sorted((tmp_path / "run").glob("events*"))
    report_of(tmp_path / "run")
    assert sorted((tmp_path / "run").glob("events*")) == files


def test_an_evaluated_run_that_goes_on_ends_with_the_same_bits(
    config: dict[str, Any], tiny: Data, tmp_path: Path, finished: Path
) -> None:
    run = tmp_path / "run"
    go_on(run, config, tiny, stop_after(7))
    report_of(run, "--split", "test")
    go_on(run, config, tiny)
    assert record(run)["weights"] == record(finished)["weights"]
    assert curves(run) == curves(finished)


def test_a_run_with_other_rows_here_is_evaluated_on_them(
    run: Path, tiny: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Data(tiny.train, Split(tiny.valid.x[:9], tiny.valid.y[:9]), tiny.test)
    monkeypatch.setattr(job, "load_data", lambda config: few)
    report = report_of(run)
    assert report["rows"] == 9
    assert math.isclose(sum(map(sum, report["confusion"])), 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: holds no run"),
        (["{run}", "--split", "all"], "invalid choice: 'all'"),
        (["{run}", "--checkpoint", "first"], "invalid choice: 'first'"),
        ([], "the following arguments are required: run"),
    ],
)
def test_a_slip_is_told_in_one_line(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(evaluate.main, *(text.format(run=run) for text in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("experiments.evaluate: ")
    assert message in error
    assert error.count("\n") == 1
