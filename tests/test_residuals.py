"""The residuals of a regression: figures, a picture, and where they do not fit."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import image
from saved_runs import SMALL, call, go_on
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional

from experiments import evaluate, job, load_run
from experiments.config.schema import check
from experiments.data import Data, Split
from experiments.data.loaders import TensorLoader
from experiments.results.residuals import residual_figures, residual_lines, residual_picture
from experiments.training.objective import NoLoss, Objective, StepOutput
from experiments.training.parts import FunctionLoss
from experiments.training.regression import predictions

Compose = Callable[[list[str]], dict[str, Any]]


def numbers_of(columns: int) -> Data:
    """x: float32 (rows, 3); y: float32 (rows, columns), sums of them."""
    x = torch.randn(90, 3, generator=torch.Generator().manual_seed(0))
    y = x.cumsum(1)[:, [i % 3 for i in range(columns)]]
    parts = (slice(0, 50), slice(50, 70), slice(70, 90))
    return Data(*(Split(x[part], y[part]) for part in parts))


def regression(compose: Compose, columns: int) -> dict[str, Any]:
    """A linear model of such data."""
    config = compose([*SMALL, "metrics=[]"])
    model = {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": columns}
    return check({**config, "model": model, "loss": {"_target_": "torch.nn.MSELoss"}})


@pytest.fixture
def run(compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished regression of one number."""
    data = numbers_of(1)
    monkeypatch.setattr(job, "load_data", lambda config: data)
    go_on(tmp_path / "run", regression(compose, 1), data)
    return tmp_path / "run"


def test_the_figures_follow_from_their_definitions() -> None:
    predicted, targets = np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([[2.0], [2], [0], [4]])
    [figures] = residual_figures(predicted, targets)
    assert figures == {
        "column": 0,
        "mean": -0.5,
        "std": pytest.approx(np.std([1, 0, -3, 0])),
        "rmse": pytest.approx(np.sqrt(10 / 4)),
        "largest": 3.0,
        "q50": 0.5,
        "q90": pytest.approx(np.quantile([1, 0, 3, 0], 0.9)),
        "q99": pytest.approx(np.quantile([1, 0, 3, 0], 0.99)),
        "not_finite": 0,
    }


def test_rows_that_are_not_finite_are_counted_and_left_out() -> None:
    targets = np.array([[1.0], [np.nan], [3.0], [1e308]])
    predicted = np.array([[0.0], [1.0], [np.inf], [-1e308]])
    [figures] = residual_figures(predicted, targets)
    assert (figures["mean"], figures["largest"], figures["not_finite"]) == (1.0, 1.0, 3)
    assert residual_lines([figures])[0].endswith("3 rows not finite")
    [none] = residual_figures(np.full((2, 1), np.nan), np.zeros((2, 1)))
    assert (none["mean"], none["q99"], none["not_finite"]) == (None, None, 2)
    assert residual_lines([none]) == ["residuals: 2 rows not finite"]


def test_an_evaluation_tells_them_and_leaves_a_picture(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert call(evaluate.main, run, "--split", "test") == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads((run / "evaluation-best-test.json").read_text())
    [figures] = report["residuals"]
    rows = numbers_of(1).test
    with torch.no_grad():
        residuals = (rows.y - load_run(run).model(rows.x)).double()
    assert figures["mean"] == pytest.approx(float(residuals.mean()))
    assert figures["rmse"] == pytest.approx(float(residuals.square().mean().sqrt()))
    assert figures["rmse"] ** 2 == pytest.approx(report["loss"], rel=1e-5)
    assert lines[1].startswith(f"residuals: mean {figures['mean']:.4g}, std ")
    assert [line.rpartition(".")[2] for line in lines[2:]] == ["json", "png"]
    accumulator = EventAccumulator(str(run))
    accumulator.Reload()
    [picture] = accumulator.Images("residuals/test_best")
    assert picture.encoded_image_string == (run / "evaluation-best-test.png").read_bytes()


def test_each_column_of_targets_has_its_figures_and_the_picture_says_which_it_leaves_out(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = numbers_of(6)
    monkeypatch.setattr(job, "load_data", lambda config: data)
    go_on(tmp_path / "run", regression(compose, 6), data)
    capsys.readouterr()
    assert call(evaluate.main, tmp_path / "run") == 0
    report = json.loads((tmp_path / "run" / "evaluation-best-valid.json").read_text())
    assert [column["column"] for column in report["residuals"]] == list(range(6))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[1:5]] == [
        f"residuals of column {number}" for number in range(4)
    ]
    assert lines[5] == "2 more columns in the report"
    height, width = image.imread(tmp_path / "run" / "evaluation-best-valid.png").shape[:2]
    assert height > width


REPORT = {"split": "valid", "checkpoint": "best", "loss": 1.0}


def drawn(predicted: Any, targets: Any) -> bytes:
    """The picture of some columns."""
    figures = residual_figures(predicted, targets)
    return residual_picture(REPORT | {"residuals": figures}, predicted, targets)


def test_a_million_rows_are_counted_in_hexagons_so_that_the_picture_stays_small() -> None:
    targets = np.random.default_rng(0).normal(size=(1_000_000, 1))
    picture = drawn(targets * 0.9, targets)
    assert len(picture) < 500_000
    assert image.imread(io.BytesIO(picture)).shape[:2] == (420, 1000)


@pytest.mark.parametrize(
    ("predicted", "targets"),
    [
        ([[2.0]] * 5, [[2.0]] * 5),
        ([[2.0]] * 3000, [[2.0]] * 3000),
        ([[np.nan], [1.0]], [[1.0], [np.inf]]),
        ([[1e300], [-1e300], [1.0]], [[1e-300], [1e300], [2.0]]),
    ],
    ids=["constant", "constant and many", "none finite", "huge"],
)
def test_a_picture_is_drawn_whatever_the_numbers_are(predicted: Any, targets: Any) -> None:
    picture = drawn(np.array(predicted), np.array(targets))
    assert picture.startswith(b"\x89PNG")


def fits(loss_func: nn.Module, outputs: Any, targets: Any) -> bool:
    """Whether a run with such outputs and targets has residuals."""

    def step(model: nn.Module, batch: Tensor) -> StepOutput:
        return StepOutput(torch.zeros(()), outputs, targets)

    split = Split(torch.zeros(4, 1))
    objective = Objective(nn.Linear(1, 1), loss_func, step)
    return predictions(objective, TensorLoader(split, batch_size=4)) is not None


NUMBERS = torch.tensor([0.5, -1.0, 2.0, 0.0])


def test_residuals_fit_losses_of_predictions_and_of_ones_own() -> None:
    functions = (functional.l1_loss, lambda outputs, targets: (outputs - targets).mean())
    losses = (nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss())
    for loss_func in (*losses, *map(FunctionLoss, functions)):
        assert fits(loss_func, NUMBERS, NUMBERS)
        assert fits(loss_func, NUMBERS[:, None], NUMBERS[:, None])


@pytest.mark.parametrize(
    ("loss_func", "outputs", "targets"),
    [
        (nn.BCEWithLogitsLoss(), NUMBERS, NUMBERS),
        (NoLoss(), NUMBERS, NUMBERS),
        (nn.PoissonNLLLoss(), NUMBERS, NUMBERS),
        (FunctionLoss(functional.binary_cross_entropy_with_logits), NUMBERS, NUMBERS),
        (nn.MSELoss(), NUMBERS, (NUMBERS > 0).float()),
        (nn.MSELoss(), NUMBERS, NUMBERS.long()),
        (nn.MSELoss(), NUMBERS[:, None], NUMBERS),
        (nn.MSELoss(), torch.randn(4, 784), torch.randn(4, 784)),
        (nn.MSELoss(), torch.randn(4, 2, 2), torch.randn(4, 2, 2)),
        (NoLoss(), None, None),
        (NoLoss(), (NUMBERS, NUMBERS), NUMBERS),
    ],
    ids=[
        "logits", "what a step compares", "log rates", "logits of a function", "labels", "integers",
        "other shapes", "reconstructions", "images", "no outputs", "a tuple",
    ],
)  # fmt: skip
def test_residuals_do_not_fit(loss_func: nn.Module, outputs: Any, targets: Any) -> None:
    assert not fits(loss_func, outputs, targets)
