"""statistics.json: what the training split says is saved, and encodes the rows of an evaluation."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saved_runs import SMALL, call, go_on

from experiments import evaluate, load_run
from experiments.data import Data, Missing, Split
from experiments.directory import statistics
from experiments.errors import UsageError
from experiments.training.saved_data import load_split

Compose = Callable[[list[str]], dict[str, Any]]
calls: list[Any] = []


def shifted(folder: str, statistics: Any = None) -> Data:
    """Rows from which the mean of the training rows is taken; a file for each split."""
    calls.append(statistics)
    files = {name: Path(folder) / f"{name}.npy" for name in ("train", "valid", "test")}
    found = {name: torch.from_numpy(np.load(f)) for name, f in files.items() if f.exists()}
    if statistics is None:
        statistics = {"mean": float(found["train"].mean())}
    splits = {
        name: Split(found[name] - statistics["mean"], torch.arange(len(found[name])) % 3)
        if name in found
        else Missing(f"{files[name]}: is gone")
        for name in files
    }
    return Data(**splits, statistics=statistics)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "rows"
    found.mkdir()
    for number, name in enumerate(("train", "valid", "test")):
        rows = np.random.default_rng(number).normal(number, 1, (12, 784)).astype(np.float32)
        np.save(found / f"{name}.npy", rows)
    return found


@pytest.fixture
def run(folder: Path, compose: Compose, tmp_path: Path) -> Path:
    config = compose([*SMALL, "loader.batch_size=4", "trainer.epochs=1"])
    config["data"] = {"_target_": f"{__name__}.shifted", "folder": str(folder)}
    path = tmp_path / "run"
    go_on(path, config, shifted(str(folder)))
    return path


def test_the_statistics_of_the_data_are_saved_and_loaded(run: Path, folder: Path) -> None:
    expected = shifted(str(folder)).statistics
    assert json.loads((run / "statistics.json").read_text()) == expected
    assert load_run(run, trust=[__name__]).statistics == expected


def test_evaluating_uses_the_saved_ones_though_the_training_file_has_changed_or_gone(
    run: Path, folder: Path
) -> None:
    reports = []
    arguments = [run, "--split", "test", "--trust", __name__]
    for state in ("as it was", "changed", "gone"):
        if state == "changed":
            np.save(folder / "train.npy", np.ones((5, 784), np.float32))
        elif state == "gone":
            (folder / "train.npy").unlink()
        assert call(evaluate.main, *arguments) == 0
        reports.append((run / "evaluation-best-test.json").read_bytes())
    assert reports[0] == reports[1] == reports[2]


def test_a_split_whose_file_is_gone_is_refused_in_its_own_words(run: Path, folder: Path) -> None:
    (folder / "train.npy").unlink()
    config = load_run(run, trust=[__name__]).config
    with pytest.raises(UsageError, match=r"train\.npy: is gone"):
        load_split(config, "train", {"mean": 0.0})


def test_a_run_without_statistics_has_no_file(tmp_path: Path) -> None:
    statistics.write(tmp_path, None)
    assert list(tmp_path.iterdir()) == []
    assert statistics.read(tmp_path) is None


def test_what_a_file_says_is_an_argument_and_never_built(folder: Path) -> None:
    config = {"data": {"_target_": f"{__name__}.shifted", "folder": str(folder)}}
    with pytest.raises(KeyError, match="mean"):
        load_split(config, "test", {"_target_": "os.getcwd"})
    assert calls[-1] == {"_target_": "os.getcwd"}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"mean": float("nan")}, "are no JSON"),
        ({"mean": np.float32(1)}, "are no JSON"),
        ({"range": (0, 1)}, "come back from JSON as others"),
        ({3: "c"}, "come back from JSON as others"),
    ],
)
def test_statistics_that_json_would_change_are_refused(
    found: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        statistics.write(tmp_path, found)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["text", "link", "fifo"])
def test_a_damaged_file_is_reported_in_one_line(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "statistics.json"
    if damage == "text":
        file.write_text("{")
    elif damage == "link":
        file.symlink_to("/dev/zero")
    else:
        os.mkfifo(file)
    with pytest.raises(UsageError, match=r"statistics\.json: cannot be read .*; copy the run"):
        statistics.read(tmp_path)
