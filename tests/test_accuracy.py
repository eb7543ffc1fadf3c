"""Accuracy: only where outputs and targets are those of classes, and then a fraction."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_runs import SMALL, call, go_on, record
from torch import Tensor, nn

from experiments import evaluate, job
from experiments.data import Data, Split
from experiments.errors import UsageError
from experiments.sweeps.worker import ProgressReporter
from experiments.training.accuracy import Accuracy, has_accuracy, is_of_classes

Compose = Callable[[list[str]], dict[str, Any]]

CLASSES = nn.CrossEntropyLoss()


def floats(*shape: int) -> Tensor:
    return torch.zeros(shape)


def integers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (floats(6, 3), integers(6)),
        (floats(6, 3), integers(6).to(torch.uint8)),
        (floats(6, 3, 8), integers(6, 8)),
        (floats(6, 8, 8), integers(6, 8)),  # which dimension is that of classes tells the loss
        (floats(6, 2, 4, 5), integers(6, 4, 5)),
    ],
)
def test_classes_have_an_accuracy(outputs: Tensor, targets: Tensor) -> None:
    assert has_accuracy(outputs, targets, of_classes=is_of_classes(CLASSES))


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (floats(6, 1), floats(6, 1)),  # a regression, or two classes by one logit
        (floats(6), floats(6)),
        (floats(6, 1), integers(6)),
        (floats(6, 5), floats(6, 5)),  # several labels
        (floats(6, 5), integers(6, 5)),
        (floats(6, 5), torch.zeros(6, dtype=torch.bool)),
        (floats(6, 8, 3), integers(6, 8)),  # classes last
        (floats(6, 8, 8), integers(6, 8)),  # classes last, or second?
        ((floats(6, 3), floats(6, 3)), integers(6)),
    ],
)
def test_what_is_no_class_has_none(outputs: Any, targets: Tensor) -> None:
    assert not has_accuracy(outputs, targets, of_classes=is_of_classes(nn.Identity()))
    accuracy = Accuracy(nn.Identity())
    accuracy.update(outputs, targets)
    assert accuracy.compute() is None


def test_it_is_the_fraction_of_all_elements() -> None:
    outputs = torch.stack([torch.tensor([[1.0, 0, 0], [1, 1, 0]]), torch.full((2, 3), 0.5)], 1)
    accuracy = Accuracy(CLASSES)
    accuracy.update(outputs, torch.tensor([[0, 0, 0], [0, 1, 1]]))
    accuracy.update(outputs[:1], torch.tensor([[1, 1, 1]]))
    assert accuracy.compute() == (1 + 2 + 2) / 9


def test_ignored_targets_do_not_count() -> None:
    accuracy = Accuracy(CLASSES)
    accuracy.update(torch.eye(4), torch.tensor([0, 1, 0, -100]))
    assert accuracy.compute() == 2 / 3
    nothing = Accuracy(CLASSES)
    nothing.update(torch.eye(4), torch.full((4,), -100))
    assert nothing.compute() is None


@pytest.fixture(scope="module")
def lengths(tiny: Data) -> Data:
    """A regression: how much ink each digit has, (rows, 1)."""

    def ink(split: Split) -> Split:
        return Split(split.x, split.x.mean(1, keepdim=True))

    return Data(train=ink(tiny.train), valid=ink(tiny.valid), test=ink(tiny.test))


@pytest.fixture(scope="module")
def regression(compose: Compose) -> dict[str, Any]:
    config = compose([*SMALL, "model.out_features=1"])
    config["loss"] = {"_target_": "torch.nn.MSELoss"}
    return config


@pytest.fixture(scope="module")
def run(
    regression: dict[str, Any], lengths: Data, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("regression") / "run"
    go_on(path, regression, lengths)
    return path


def test_a_regression_is_shown_and_logged_without_one(
    regression: dict[str, Any], lengths: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    go_on(path, regression, lengths)
    shown = capsys.readouterr().out
    assert "loss/valid" in shown
    assert "accuracy" not in shown
    assert "accuracy" not in (path / "metrics.jsonl").read_text()
    assert "accuracy" not in json.dumps(record(path)["metrics"])


def test_the_summary_of_a_regression_has_none(run: Path) -> None:
    directory = type("Directory", (), {"record": record(run), "path": run})()
    lines = job.summary(directory).splitlines()
    assert [line.split()[0] for line in lines] == ["best", "test", "run", "look"]
    assert "accuracy" not in "".join(lines[:2])


def test_a_regression_is_evaluated_by_its_loss(
    run: Path, lengths: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "load_data", lambda config: lengths)
    assert call(evaluate.main, run) == 0
    report = json.loads((run / "evaluation-best-valid.json").read_text())
    assert report["loss"] == pytest.approx(record(run)["metrics"]["best"]["loss/valid"])
    assert report["rows"] == len(lengths.valid)
    assert not report.keys() & {"accuracy", "classes", "confusion"}
    assert "class" not in capsys.readouterr().out
    assert list(report["residuals"][0])[:3] == ["column", "mean", "std"]


def test_a_sweep_is_told_that_there_is_none() -> None:
    sent: list[tuple[Any, ...]] = []
    parent = type("Parent", (), {"send": lambda self, message: sent.append(message)})()
    reporter = ProgressReporter(parent, 2, 5, "loss/valid")
    reporter.epoch_end(1, {"loss/train_epoch": 0.5, "loss/valid": 0.4})
    kind, done, loss, (name, value) = sent[0]
    assert (kind, done, loss, name) == ("progress", 0.5, 0.5, "")
    assert value != value


def test_to_monitor_an_accuracy_that_there_is_not_is_refused(
    regression: dict[str, Any], lengths: Data, tmp_path: Path
) -> None:
    trainer = regression["trainer"] | {"monitor": "accuracy/valid"}
    with pytest.raises(UsageError, match=r"^trainer.monitor=accuracy/valid: outputs \(rows, 1\)"):
        go_on(tmp_path / "run", regression | {"trainer": trainer}, lengths)


class PerPixel(nn.Module):
    """Two classes for each pixel of an image: x (rows, 784) -> (rows, 2, 784)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.stack([x, 0.5 * torch.ones_like(x)], 1)


def test_a_segmentation_has_the_accuracy_of_its_elements_and_a_confusion_matrix(
    compose: Compose, tiny: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dark(split: Split) -> Split:
        targets = (split.x <= 0.5).long()
        targets[:, :28] = -100
        return Split(split.x, targets)

    data = Data(train=dark(tiny.train), valid=dark(tiny.valid), test=dark(tiny.test))
    config = compose(SMALL) | {"model": {"_target_": f"{__name__}.PerPixel"}}
    monkeypatch.setattr(job, "load_data", lambda config: data)
    go_on(tmp_path / "run", config, data)
    assert 0 < record(tmp_path / "run")["metrics"]["best"]["accuracy/valid"] <= 1
    assert call(evaluate.main, tmp_path / "run", "--trust", __name__) == 0
    report = json.loads((tmp_path / "run/evaluation-best-valid.json").read_text())
    assert report["rows"] == len(data.valid)
    assert sum(map(sum, report["confusion"])) == len(data.valid) * (784 - 28)
