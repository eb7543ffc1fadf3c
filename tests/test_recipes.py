"""Every recipe in conf/experiment: trained for a few steps, killed, resumed, reproduced, swept,
compared, evaluated and loaded. `make test-long` runs them.
"""

import csv
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from saved_runs import assert_same_run, call, go_on, kill_after, record, stop_after

from experiments import compare, load_run, reproduce
from experiments.config.compose import CONF
from experiments.data.nests import tensors_of
from experiments.errors import UsageError
from experiments.evaluate import evaluate_run
from experiments.job import load_data
from experiments.training.evaluation import evaluate, outputs_of
from experiments.training.parts import build_metrics, evaluation_loader

pytestmark = pytest.mark.long

RECIPES = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
FEW_STEPS = [
    *("trainer.steps=6", "trainer.evaluate_every=4", "trainer.log_every=2", "trainer.threads=1"),
    *("loader.batch_size=32", "checkpoint.every_steps=1", "checkpoint.keep=20"),
]
MNIST = ["data.path={mnist}"]
CONVOLUTIONS = ["model.channels=[4,8]"]
# What makes a recipe small enough to be trained many times in a test.
SMALL = {
    "tutorial": MNIST,
    "mnist_mlp": [*MNIST, "model.hidden=[16,16]"],
    "mnist_convnet": [*MNIST, *CONVOLUTIONS],
    "fashion_mnist": [*MNIST, *CONVOLUTIONS],
    "fine_tuning": ["+data.path={mnist}", *CONVOLUTIONS, "init.run={pretrained}"],
    "two_inputs": ["+data.path={mnist}", "model.width=16"],
    "vae": [*MNIST, "model.hidden=[16]"],
    "characters": ["data.length=32", "model.width=32", "model.layers=1"],
    "segmentation": ["data.rows=400", *CONVOLUTIONS],
    "multilabel": ["data.rows=400", *CONVOLUTIONS],
    "gan": ["data.rows=400"],
    "table": ["model.hidden=[16]"],
    "regression": ["model.hidden=[16]"],
}


@dataclass
class Recipe:
    """A recipe: how a command line names it, its small config, and a run of it."""

    overrides: list[str]
    config: dict[str, Any]
    run: Path


@pytest.fixture(scope="module")
def pretrained(
    tmp_path_factory: pytest.TempPathFactory,
    small_mnist_dir: Path,
    written: Callable[[list[str]], dict[str, Any]],
) -> Path:
    """A run that the fine-tuning starts from."""
    path = tmp_path_factory.mktemp("pretrained") / "run"
    small = [option.format(mnist=small_mnist_dir) for option in SMALL["mnist_convnet"]]
    config = written(["experiment=mnist_convnet", *FEW_STEPS, *small])
    go_on(path, config, load_data(config))
    return path


@pytest.fixture(scope="module", params=RECIPES)
def recipe(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    small_mnist_dir: Path,
    pretrained: Path,
    written: Callable[[list[str]], dict[str, Any]],
) -> Recipe:
    """Each recipe, trained for a few steps without a break."""
    folders = {"mnist": small_mnist_dir, "pretrained": pretrained}
    small = [option.format(**folders) for option in SMALL.get(request.param, [])]
    overrides = [f"experiment={request.param}", *FEW_STEPS, *small]
    config = written(overrides)
    run = tmp_path_factory.mktemp(request.param) / "run"
    go_on(run, config, load_data(config))
    return Recipe(overrides, config, run)


def test_a_killed_run_ends_with_the_same_bits(recipe: Recipe, tmp_path: Path) -> None:
    data = load_data(recipe.config)
    for steps in (1, 4, 5):
        killed = tmp_path / f"killed-{steps}"
        assert go_on(killed, recipe.config, data, kill_after(steps)) == "running"
        assert go_on(killed, recipe.config, data, stop_after(1)) == "interrupted"
        go_on(killed, recipe.config, data)
        assert_same_run(killed, recipe.run)


def test_its_reproduction_is_identical(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(reproduce.main, recipe.run, "--into", tmp_path / "again") == 0
    assert "identical: all" in capsys.readouterr().out


def test_a_loaded_run_predicts_what_its_evaluation_measured(recipe: Recipe) -> None:
    report = evaluate_run(recipe.run, "best", "valid", [])
    best = record(recipe.run)["metrics"]["best"]
    measured = {tag.removesuffix("/valid"): value for tag, value in best.items() if "/" in tag}
    assert {name: report[name] for name in measured} == measured
    run = load_run(recipe.run)
    loader = evaluation_loader(run.config, load_data(recipe.config).valid)
    metrics = build_metrics(run.config, run.objective.loss_func)
    found = evaluate(run.objective, loader, metrics, "valid")
    assert found == {tag: value for tag, value in best.items() if tag in found}


def test_the_model_alone_gives_the_outputs_of_the_step(recipe: Recipe) -> None:
    run = load_run(recipe.run)
    if not run.objective.is_supervised:
        pytest.skip("its step decides what is given to the model")
    loader = evaluation_loader(run.config, load_data(recipe.config).valid)
    for (x, _), output in outputs_of(run.objective, loader):
        for expected, given in zip(
            tensors_of(output.outputs), tensors_of(run.model(x)), strict=True
        ):
            assert given.equal(expected)


def test_two_rates_and_two_batch_sizes_are_swept_and_compared(
    recipe: Recipe,
    tmp_path: Path,
    cli_in: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    swept = ["optimizer.lr=0.001,0.002", "loader.batch_size=16,32", f"hydra.sweep.dir={tmp_path}/s"]
    done = cli_in(tmp_path, "-m", *recipe.overrides, *swept)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "s" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    monitor = recipe.config["trainer"]["monitor"]
    assert [row["state"] for row in rows] == ["finished"] * 4
    assert all(math.isfinite(float(row[f"best {monitor}"])) for row in rows)
    capsys.readouterr()
    assert call(compare.main, tmp_path / "s") == 0
    shown = capsys.readouterr().out
    assert shown.count("finished") == 4 or all(row["directory"] in shown for row in rows)


@pytest.mark.parametrize("group", ["model", "step", "data"])
def test_a_stranger_s_run_that_names_another_module_is_refused(
    group: str, recipe: Recipe, tmp_path: Path
) -> None:
    strange = tmp_path / "strange"
    shutil.copytree(recipe.run, strange)
    config = yaml.safe_load((strange / "config.yaml").read_text())
    config[group]["_target_"] = "os.system"
    (strange / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UsageError, match=f"{group}._target_=os.system: not built"):
        load_run(strange)
    assert call(reproduce.main, strange, "--into", tmp_path / "again") == 2
