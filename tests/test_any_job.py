"""Jobs of any kind: batches of any form, steps, metrics and training aids of one's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import polars
import pytest
import torch
from saved_runs import assert_same_run, go_on, kill_after, stop_after

from experiments import load_run
from experiments.config.schema import check
from experiments.data import Data
from experiments.errors import UsageError
from experiments.evaluate import evaluate_run

Compose = Callable[[list[str]], dict[str, Any]]
NO_LOSS = {"_target_": "experiments.training.objective.NoLoss"}
SMALL = ["loader.batch_size=16", "trainer.epochs=2", "trainer.log_every=4", "optimizer.lr=0.02"]

JOBS: dict[str, dict[str, Any]] = {
    "two-inputs": {
        "data": {"_target_": "jobs.two_inputs"},
        "model": {"_target_": "jobs.TwoInputs", "out_features": "auto"},
    },
    "vae": {
        "data": {"_target_": "jobs.points"},
        "model": {"_target_": "jobs.Vae", "in_features": "auto"},
        "step": {"_target_": "jobs.vae_step"},
        "loss": NO_LOSS,
    },
    "gan": {
        "data": {"_target_": "jobs.points"},
        "model": {"_target_": "jobs.Gan"},
        "step": {"_target_": "jobs.GanStep"},
        "loss": NO_LOSS,
        "scheduler": {"_target_": "experiments.training.schedules.constant", "_partial_": True},
    },
    "sequences": {
        "data": {"_target_": "jobs.sequences"},
        "model": {"_target_": "jobs.bag"},
        "step": {"_target_": "jobs.bag_step"},
        "loss": {"_target_": "torch.nn.MSELoss"},
        "metrics": {"gap": {"_target_": "jobs.mean_gap"}},
    },
    "aids": {
        "data": {"_target_": "jobs.two_inputs"},
        "model": {"_target_": "jobs.TwoInputs", "out_features": "auto"},
        "callbacks": {
            "ema": {"_target_": "experiments.training.callbacks.EMA", "decay": 0.9},
            "early_stopping": {
                "_target_": "experiments.training.callbacks.EarlyStopping",
                "patience": 3,
            },
            "drawing": {"_target_": "jobs.Drawing"},
        },
    },
}
OPTIONS = {
    "sequences": ["loader=torch", "trainer.accumulate=2"],
    "aids": ["trainer.steps=10", "trainer.evaluate_every=3"],
}


def job_of(compose: Compose, name: str, *overrides: str) -> tuple[dict[str, Any], Data]:
    """The config of a job, and its data."""
    config = compose([*SMALL, *OPTIONS.get(name, []), *overrides])
    config = check({**config, **JOBS[name]})
    return config, getattr(jobs, config["data"]["_target_"].partition(".")[2])()


@pytest.fixture(params=JOBS)
def name(request: pytest.FixtureRequest) -> str:
    """Each kind of job."""
    return str(request.param)


def test_a_killed_job_ends_with_the_bits_of_one_that_went_through(
    name: str, compose: Compose, tmp_path: Path
) -> None:
    config, data = job_of(compose, name, "checkpoint.every_steps=1", "checkpoint.keep=20")
    go_on(tmp_path / "whole", config, data)
    for steps in (1, 3, 4):
        killed = tmp_path / f"killed-{steps}"
        assert go_on(killed, config, data, kill_after(steps)) == "running"
        assert go_on(killed, config, data, stop_after(2)) == "interrupted"
        go_on(killed, config, data)
        assert_same_run(tmp_path / "whole", killed)


def test_a_saved_job_predicts_what_its_evaluation_measured(
    name: str, compose: Compose, tmp_path: Path
) -> None:
    config, data = job_of(compose, name)
    go_on(tmp_path / "run", config, data)
    report = evaluate_run(tmp_path / "run", "best", "valid", ["jobs"])
    best = json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]["best"]
    measured = {tag.removesuffix("/valid"): value for tag, value in best.items() if "/" in tag}
    assert {key: report[key] for key in measured} == measured


def test_a_stranger_s_job_is_refused_before_its_modules_are_imported(
    name: str, compose: Compose, tmp_path: Path
) -> None:
    config, data = job_of(compose, name)
    go_on(tmp_path / "run", config, data)
    with pytest.raises(UsageError, match="not built from a saved run"):
        load_run(tmp_path / "run")


def test_each_number_that_a_step_names_is_logged_like_the_loss(
    compose: Compose, tmp_path: Path
) -> None:
    config, data = job_of(compose, "vae")
    go_on(tmp_path / "run", config, data)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    tags = {tag for row in rows for tag in row}
    for part in ("train", "train_epoch", "valid", "test"):
        assert {f"loss/{part}", f"kl/{part}", f"reconstruction/{part}"} <= tags
    valid = next(row for row in rows if "loss/valid" in row)
    assert valid["loss/valid"] == pytest.approx(valid["kl/valid"] + valid["reconstruction/valid"])


def test_an_epoch_may_end_before_the_first_validation(
    compose: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, data = job_of(compose, "two-inputs", "trainer.steps=10", "trainer.evaluate_every=8")
    assert go_on(tmp_path / "run", config, data) == "finished"
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("epoch 1/2  loss/train ")
    assert "loss/valid" not in first
    assert second.startswith("step 8  loss/valid ")
    assert third.startswith("epoch 2/2  loss/train ")
    assert "loss/valid" in third


def test_any_number_of_the_validation_can_be_monitored(compose: Compose, tmp_path: Path) -> None:
    config, data = job_of(compose, "vae", "trainer.monitor=kl/valid", "trainer.mode=max")
    go_on(tmp_path / "run", config, data)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    highest = max(row["kl/valid"] for row in rows if "kl/valid" in row)
    assert (record["mode"], record["metrics"]["best"]["kl/valid"]) == ("max", highest)


REFUSED: dict[str, tuple[str, list[str], dict[str, Any], str]] = {
    "an unknown number": (
        "vae", ["trainer.monitor=klx/valid"], {}, "did you mean kl/valid"),
    "a metric that does not say what is better": (
        "sequences", ["trainer.monitor=gap/valid"], {}, "set trainer.mode=max"),
    "a batch that is no pair": (
        "vae", [], {"step": {"_target_": "experiments.training.objective.supervised"},
                    "loss": {"_target_": "torch.nn.MSELoss"}}, r"takes batches \(x, y\)"),
    "a loss that the step does not take": (
        "vae", [], {"loss": {"_target_": "torch.nn.MSELoss"}}, "use loss=none"),
    "a metric without outputs": (
        "vae", [], {"metrics": {"gap": {"_target_": "jobs.mean_gap"}}}, "gives no outputs"),
    "accumulation by a step of its own": (
        "gan", ["trainer.accumulate=2"], {}, "use trainer.accumulate=1"),
    "a schedule for a step of its own": (
        "gan", [], {"scheduler": {"_target_": "torch.optim.lr_scheduler.OneCycleLR",
                                  "_partial_": True, "max_lr": 0.1}}, "use scheduler=constant"),
    "a size that the data does not have": (
        "two-inputs", [], {"model": {"_target_": "torch.nn.Linear", "in_features": "auto",
                                     "out_features": 2}}, "model.in_features=auto"),
    "compiling a step of its own": (
        "gan", ["trainer.compile=true"], {}, "use trainer.compile=false"),
    "compiling samples": (
        "sequences", ["trainer.compile=true", "trainer.accumulate=1"], {},
        "compile=true: jobs.Sequences: it is read sample by sample; use trainer.compile=false"),
    "a number that is named as the loss": (
        "vae", [], {"step": {"_target_": "jobs.named_step", "name": "loss"}},
        "gives a number loss, which is the name of the run's loss"),
    "a number that is named as a metric": (
        "vae", [], {"step": {"_target_": "jobs.named_step", "name": "gap"},
                    "metrics": {"gap": {"_target_": "jobs.mean_gap"}}},
        "gives a number gap, which is the name of the run's metric"),
    "a metric that is named as the loss": (
        "sequences", [], {"metrics": {"loss": {"_target_": "jobs.mean_gap"}}},
        "metrics.loss: logs loss, which is the name of the run's loss; .* as metrics.my_loss"),
    "a step that returns nothing": (
        "vae", [], {"step": {"_target_": "jobs.forgetful_step"}},
        "returns a NoneType for a batch; return the loss, a tensor"),
    "a function of a metric that returns nothing": (
        "sequences", [], {"metrics": {"gap": {"_target_": "jobs.no_gap"}}},
        "metrics.gap: its function returns None, expected one number"),
    "a callback of several arguments": (
        "vae", [], {"callbacks": {"told": {"_target_": "jobs.several"}}},
        "callbacks.told._target_=jobs.several: cannot be called with one argument"),
    "a callback that logs what the run logs": (
        "vae", [], {"callbacks": {"told": {"_target_": "jobs.log_loss"}}},
        "callbacks: one logs loss/valid, which the run logs itself"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused_in_one_line(
    case: str, compose: Compose, tmp_path: Path
) -> None:
    name, overrides, nodes, message = REFUSED[case]
    config, data = job_of(compose, name, *overrides)
    with pytest.raises(UsageError, match=message) as refused:
        go_on(tmp_path / "run", {**config, **nodes}, data)
    assert "\n" not in str(refused.value)


def test_early_stopping_ends_a_run_that_no_longer_gets_better(
    compose: Compose, tmp_path: Path
) -> None:
    config, data = job_of(compose, "two-inputs", "trainer.epochs=50", "optimizer.lr=1e-12")
    stopping = {"_target_": "experiments.training.callbacks.EarlyStopping", "patience": 2}
    config["callbacks"] = {"stop": stopping | {"min_delta": 0.1}}
    go_on(tmp_path / "run", config, data)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["metrics"]["last"]["epoch"] == 3


def test_the_average_of_the_weights_is_what_is_evaluated_and_loaded(
    compose: Compose, tmp_path: Path
) -> None:
    config, data = job_of(compose, "aids")
    del config["callbacks"]["early_stopping"]
    go_on(tmp_path / "run", config, data)
    saved = load_run(tmp_path / "run", "last", ["jobs"])
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    with torch.no_grad():
        outputs = saved.model(data.valid.x)
    loss = torch.nn.functional.cross_entropy(outputs, data.valid.y)
    assert float(loss) == pytest.approx(record["metrics"]["last"]["loss/valid"], rel=1e-5)


def test_the_outputs_of_an_evaluation_are_written_with_their_targets(
    compose: Compose, tmp_path: Path
) -> None:
    config, data = job_of(compose, "two-inputs")
    go_on(tmp_path / "run", config, data)
    for file in (tmp_path / "outputs.npy", tmp_path / "outputs.parquet"):
        report = evaluate_run(tmp_path / "run", "best", "test", ["jobs"], predictions=file)
    found = np.load(tmp_path / "outputs.npy")
    assert found["row"].tolist() == list(range(30))
    assert found["target"].tolist() == data.test.y.tolist()
    assert (found["output"].argmax(1) == found["target"]).mean() == report["accuracy"]
    table = polars.read_parquet(tmp_path / "outputs.parquet")
    assert table["output"].to_numpy().tolist() == found["output"].tolist()


def test_outputs_that_a_step_does_not_give_cannot_be_written(
    compose: Compose, tmp_path: Path
) -> None:
    config, data = job_of(compose, "vae")
    go_on(tmp_path / "run", config, data)
    with pytest.raises(UsageError, match="the step gives no tensors of outputs and targets"):
        evaluate_run(tmp_path / "run", "best", "test", ["jobs"], predictions=tmp_path / "a.npy")
