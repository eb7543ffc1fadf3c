"""loss.weight and loss.pos_weight: balanced, from the training targets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_runs import SMALL, assert_same_run, go_on, record, stop_after
from torch import Tensor
from torch.utils.data import Dataset

from experiments.config.compose import CONF
from experiments.data import Data, Split
from experiments.directory.checkpoints import Checkpoints
from experiments.errors import UsageError
from experiments.evaluate import evaluate_run
from experiments.saved import load_run
from experiments.training.class_weights import class_weights, with_weights
from experiments.training.parts import build_loss

Compose = Callable[[list[str]], dict[str, Any]]


def data_of(y: Any) -> Data:
    split = Split(torch.zeros(len(y), 2), y)
    return Data(split, split, split)


def loss(target: str = "CrossEntropyLoss", **settings: Any) -> dict[str, Any]:
    return {"loss": {"_target_": f"torch.nn.{target}", **settings}}


def test_a_class_weighs_the_mean_count_to_its_own() -> None:
    """scikit-learn's compute_class_weight("balanced", y) gives the same."""
    weights = class_weights(loss(weight="balanced"), data_of(torch.tensor([0, 0, 0, 1, 2, 2])))
    assert weights == {"weight": pytest.approx([2 / 3, 2, 1])}


def test_targets_that_the_loss_ignores_do_not_count() -> None:
    y = torch.tensor([[0, 0, -100], [1, -100, 0]])
    assert class_weights(loss(weight="balanced"), data_of(y)) == {
        "weight": pytest.approx([4 / 6, 2])
    }
    ignoring = loss(weight="balanced", ignore_index=2)
    assert class_weights(ignoring, data_of(torch.tensor([0, 1, 2, 2]))) == {"weight": [1, 1]}


class Rows(Dataset[tuple[Tensor, int]]):
    """Rows of class 0, 0, 0, 1."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return torch.zeros(2), int(row == 3)


def test_the_targets_of_a_dataset_are_read_row_by_row() -> None:
    rows: Any = Rows()
    weights = class_weights(loss("NLLLoss", weight="balanced"), Data(rows, rows, rows))
    assert weights == {"weight": pytest.approx([4 / 6, 2])}


@pytest.mark.parametrize(
    ("y", "expected"),
    [([1.0, 0, 0, 0], [3]), ([[1.0, 0], [1, 0], [0, 0], [0, 1]], [1, 3]),
     ([[[1.0, 0, 0, 0]]], [3])],
)  # fmt: skip
def test_a_positive_weighs_the_negatives_to_the_positives_of_its_column(
    y: Any, expected: list[float]
) -> None:
    config = loss("BCEWithLogitsLoss", pos_weight="balanced")
    weights = class_weights(config, data_of(torch.tensor(y)))
    assert weights == {"pos_weight": expected}
    loss_func: Any = build_loss(with_weights(config, weights))
    outputs = torch.zeros_like(torch.tensor(y))
    assert loss_func(outputs, torch.tensor(y)).isfinite()


@pytest.mark.parametrize(
    ("config", "y", "line"),
    [
        (loss(weight="balanced"), torch.tensor([0, 2]),
         "loss.weight=balanced: the training split has no row of class 1, whose weight would be "),
        (loss(weight="balanced"), torch.tensor([0.5, 2]),
         "loss.weight=balanced: the targets are torch.float32 and no classes"),
        (loss(weight="balanced"), torch.tensor([-1, 2]),
         "loss.weight=balanced: the target -1 is no class"),
        (loss(weight="balanced"), {"a": torch.tensor([1])},
         "loss.weight=balanced: the targets are a dict and not one tensor"),
        (loss(weight="even"), torch.tensor([0, 1]), "loss.weight=even: expected balanced, or a "),
        (loss("MSELoss", weight="balanced"), torch.tensor([0, 1]),
         "loss.weight=balanced: torch.nn.MSELoss has no classes to balance; use torch.nn.Cross"),
        (loss("BCEWithLogitsLoss", pos_weight="balanced"), torch.tensor([0.5]),
         "loss.pos_weight=balanced: the targets are not all 0 or 1"),
        (loss("BCEWithLogitsLoss", pos_weight="balanced"), torch.tensor([[1.0, 0], [1, 1]]),
         "loss.pos_weight=balanced: column 0 of the training targets is always 1"),
    ],
)  # fmt: skip
def test_what_has_no_classes_to_balance_is_refused_in_one_line(
    config: dict[str, Any], y: Any, line: str
) -> None:
    split = Split(torch.zeros(1, 2), y)
    with pytest.raises(UsageError) as error:
        class_weights(config, Data(split, split, split))
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_a_loss_of_ones_own_takes_the_word_as_it_is() -> None:
    config = {"loss": {"_target_": "mymodule.Loss", "weight": "balanced"}}
    assert class_weights(config, data_of(torch.tensor([0.5]))) == {}


@pytest.fixture(scope="module")
def uneven(tiny: Data) -> Data:
    """Rows of which a fifth are no zeros."""
    y = tiny.train.y.clone()
    y[(y > 0) & (torch.arange(len(y)) % 2 == 0)] = 0
    return Data(Split(tiny.train.x, y), tiny.valid, tiny.test)


def test_a_run_trains_with_the_weights_and_gets_them_back_from_its_checkpoint(
    compose: Compose, uneven: Data, tmp_path: Path
) -> None:
    go_on(tmp_path / "run", compose([*SMALL, "loss=balanced"]), uneven)
    expected = class_weights(loss(weight="balanced"), uneven)
    assert record(tmp_path / "run")["class_weights"] == expected
    content = Checkpoints(tmp_path / "run" / "checkpoints").load()
    assert content is not None
    assert content["loss"]["weight"].tolist() == expected["weight"]
    loss_func: Any = load_run(tmp_path / "run", "last").objective.loss_func
    assert loss_func.weight.tolist() == expected["weight"]


def test_the_loss_of_an_evaluation_is_weighted_as_in_the_run(
    compose: Compose, uneven: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.job.load_data", lambda config: uneven)
    go_on(tmp_path / "run", compose([*SMALL, "loss=balanced"]), uneven)
    found = evaluate_run(tmp_path / "run", "last", "valid", [])
    assert found["loss"] == record(tmp_path / "run")["metrics"]["last"]["loss/valid"]


def test_a_stopped_run_goes_on_with_the_same_weights(
    compose: Compose, uneven: Data, tmp_path: Path
) -> None:
    config = compose([*SMALL, "loss=balanced"])
    go_on(tmp_path / "unbroken", config, uneven)
    go_on(tmp_path / "run", config, uneven, stop_after(3))
    go_on(tmp_path / "run", config, uneven)
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


def test_the_option_and_the_key_are_the_same(compose: Compose) -> None:
    assert (CONF / "loss" / "balanced.yaml").exists()
    assert compose(["loss=balanced"]) == compose(["+loss.weight=balanced"])
