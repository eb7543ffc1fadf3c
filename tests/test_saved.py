"""Loading a saved run."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_runs import SMALL, go_on, record, stop_after

import experiments
from experiments import load_run
from experiments.config.schema import ADDED_LATER
from experiments.data import Data
from experiments.directory.checkpoints import Checkpoints
from experiments.directory.metrics import read_metrics, rows_by_step
from experiments.directory.record import built_part, config_text
from experiments.errors import UsageError

Compose = Callable[[list[str]], dict[str, Any]]


@pytest.fixture(scope="module")
def config(compose: Compose) -> dict[str, Any]:
    # the best epoch is the second of three
    overrides = ["scheduler=constant", "optimizer.lr=0.5", "optimizer.momentum=0"]
    return compose([*SMALL, *overrides, "trainer.epochs=3", "model.dropout=0.1"])


@pytest.fixture(scope="module")
def run(config: dict[str, Any], tiny: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "run"
    go_on(path, config, tiny)
    return path


def test_the_config_and_the_record_come_back(run: Path, config: dict[str, Any]) -> None:
    saved = load_run(run)
    assert saved.config == config
    assert saved.record == record(run)
    assert saved.path == run


@pytest.mark.parametrize("which", ["best", "last"])
def test_the_model_predicts_as_it_did_when_it_was_validated(
    which: Any, run: Path, tiny: Data
) -> None:
    saved = load_run(str(run), which)
    expected = record(run)["metrics"][which]
    assert saved.step == expected["step"]
    logits = saved.model(tiny.valid.x)
    accuracy = (logits.argmax(1) == tiny.valid.y).float().mean()
    loss = torch.nn.functional.cross_entropy(logits, tiny.valid.y)
    assert float(accuracy) == pytest.approx(expected["accuracy/valid"])
    assert float(loss.detach()) == pytest.approx(expected["loss/valid"], rel=1e-5)


def test_the_best_is_not_the_last_here(run: Path) -> None:
    assert load_run(run).step < load_run(run, "last").step


def test_the_model_is_in_evaluation_mode(run: Path, tiny: Data) -> None:
    model = load_run(run).model
    assert not model.training
    assert torch.equal(model(tiny.test.x), model(tiny.test.x))


def test_the_metrics_are_a_row_for_each_step(run: Path) -> None:
    metrics = load_run(run).metrics
    steps = [row["step"] for row in metrics]
    assert steps == sorted(set(steps)) == [3, 5, 6, 9, 10, 12, 15]
    last = metrics[-1]
    assert last["loss/valid"] == record(run)["metrics"]["last"]["loss/valid"]
    assert last["loss/test"] == record(run)["metrics"]["test"]["loss/test"]
    assert {"loss/train", "lr", "throughput", "epoch"} <= last.keys()
    assert metrics[0].keys() == {"step", "epoch", "loss/train", "lr"}


def test_a_copy_elsewhere_reads_the_same(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Data
) -> None:
    shutil.copytree(run, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    before, after = load_run(run), load_run("copy")
    assert before.metrics == after.metrics
    assert torch.equal(before.model(tiny.test.x), after.model(tiny.test.x))


def test_a_run_that_is_not_finished_can_be_read(
    config: dict[str, Any], tiny: Data, tmp_path: Path
) -> None:
    go_on(tmp_path / "run", config, tiny, stop_after(2))
    saved = load_run(tmp_path / "run")
    assert (saved.step, saved.record["state"]) == (2, "interrupted")


def test_a_run_without_a_checkpoint_is_told(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(
        UsageError, match="has no checkpoint yet; go on with: python -m experiments resume="
    ):
        load_run(tmp_path / "run")


def test_a_damaged_best_is_not_silently_the_last(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    for entry in Checkpoints(tmp_path / "run" / "checkpoints").entries():
        if entry.best:
            entry.file.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(UsageError, match="every checkpoint is damaged"),
    ):
        load_run(tmp_path / "run")


def test_a_config_of_before_a_key_was_added_is_that_of_now(
    run: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    earlier = tmp_path / "earlier"
    shutil.copytree(run, earlier)
    text = (earlier / "config.yaml").read_text()
    for key in ADDED_LATER:
        text = re.sub(rf"(?m)^  {key.partition('.')[2]}: .*\n", "", text)
    (earlier / "config.yaml").write_text(text)
    added = {key.partition(".")[2]: value for key, value in ADDED_LATER.items()}
    expected = {**config, "trainer": config["trainer"] | added}
    assert load_run(earlier).config == expected
    assert built_part(text.encode()) == built_part(config_text(expected))


def test_a_config_of_before_an_option_got_a_key_is_the_same_run_only_without_its_use(
    config: dict[str, Any],
) -> None:
    text = config_text(config)
    earlier = re.sub(rb"(?m)^  (groups|no_decay|freeze): .*\n", b"", text)
    assert earlier != text
    assert built_part(earlier) == built_part(text)
    used = {**config, "optimizer": {**config["optimizer"], "freeze": ["0"]}}
    assert built_part(config_text(used)) != built_part(text)


def test_a_key_of_ones_own_optimizer_counts_also_with_the_value_of_an_optional_one(
    config: dict[str, Any],
) -> None:
    own = {**config, "optimizer": {"_target_": "mine.Optimizer", "groups": None}}
    other = {**config, "optimizer": {"_target_": "mine.Optimizer"}}
    assert built_part(config_text(own)) != built_part(config_text(other))


def test_a_config_without_a_key_that_every_version_had_is_refused(
    run: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    text = (damaged / "config.yaml").read_text().replace("  epochs: 3\n", "")
    (damaged / "config.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"trainer\.epochs is missing"):
        load_run(damaged)


def test_a_directory_without_a_run_is_told(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match=r"holds no run, there is no config\.yaml in it"):
            load_run(path)


def test_a_line_that_a_kill_tore_is_passed_over(tmp_path: Path) -> None:
    whole = json.dumps({"step": 1, "loss/train": 0.1 + 0.2})
    (tmp_path / "metrics.jsonl").write_text(f'{whole}\n{{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss/train": 0.1 + 0.2}]
    assert read_metrics(tmp_path / "nowhere") == []


def test_numbers_that_are_none_come_back(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "a": math.nan, "b": -math.inf}))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("\n")
    [line] = read_metrics(tmp_path)
    assert math.isnan(line["a"])
    assert line["b"] == -math.inf


def test_the_lines_of_a_step_become_one_row() -> None:
    lines = [{"step": 1.0, "a": 1.0}, {"step": 2.0, "a": 2.0}, {"step": 2.0, "b": 3.0}]
    assert rows_by_step(lines) == [{"step": 1.0, "a": 1.0}, {"step": 2.0, "a": 2.0, "b": 3.0}]


def test_the_package_offers_what_it_says() -> None:
    assert experiments.__all__ == ["SavedRun", "StepOutput", "load_run"]
    assert all(hasattr(experiments, name) for name in experiments.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'lode_run'"):
        _ = experiments.lode_run
