"""A search instead of a grid, `hydra/sweeper=tpe`: its space, its count of trials, its pruning."""

import os
import re
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import optuna
import paced
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    json_to_distribution,
)
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from saved_runs import record
from under_way import UnderWay

from experiments.config.compose import CONF
from experiments.config.hydra_versions import VERSION_BASE
from experiments.errors import UsageError
from experiments.sweeps.search import search_space
from experiments.sweeps.study import Setting, describe, open_study

pytestmark = pytest.mark.long

Completed = subprocess.CompletedProcess[str]
Command = Callable[..., Completed]

SPACE = ["optimizer.lr=tag(log,interval(0.0001,1))", "loader.batch_size=32,64"]


def trials(sweep: Path) -> list[FrozenTrial]:
    """What the study in a sweep's directory holds."""
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(sweep / "study.journal")))
    return optuna.load_study(study_name="search", storage=storage).trials


def over(sweep: Path) -> list[FrozenTrial]:
    """The trials that count."""
    return [t for t in trials(sweep) if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def run_records(sweep: Path) -> list[dict[str, Any]]:
    return [record(file.parent) for file in sweep.glob("*/run.json")]


def searched(found: dict[str, Any]) -> tuple[float, int]:
    """The point of the space at which a run lies."""
    return found["config"]["optimizer"]["lr"], found["config"]["loader"]["batch_size"]


# The space


def test_an_interval_is_drawn_from_evenly_or_by_its_logarithm() -> None:
    _, space = search_space(["a=interval(0.1,2)", "b=tag(log,interval(0.001,1))"])
    assert space == {
        "a": FloatDistribution(0.1, 2.0),
        "b": FloatDistribution(0.001, 1.0, log=True),
    }


def test_a_range_is_whole_numbers_without_its_end_as_everywhere_in_hydra() -> None:
    _, space = search_space(["a=range(1,5)", "b=range(10,50,10)"])
    assert space == {"a": IntDistribution(1, 4), "b": IntDistribution(10, 40, step=10)}


def test_choices_keep_their_types() -> None:
    _, space = search_space(["a=1,2", "b=0.5,null,true", "optimizer=sgd,adam"])
    assert space == {
        "a": CategoricalDistribution([1, 2]),
        "b": CategoricalDistribution([0.5, None, True]),
        "optimizer": CategoricalDistribution(["sgd", "adam"]),
    }


def test_what_is_not_swept_stays_as_it_was_written() -> None:
    fixed = ["optimizer.lr=1e-3", "model.hidden=[3,4]", "+a.b='x y'"]
    assert search_space([*fixed, "seed=0,1"])[0] == fixed


@pytest.mark.filterwarnings("error")
@given(st.integers(-50, 50), st.integers(1, 50), st.integers(1, 7))
def test_a_range_offers_what_hydra_sweeps(start: int, length: int, step: int) -> None:
    _, space = search_space([f"a=range({start},{start + length},{step})"])
    distribution = space["a"]
    assert isinstance(distribution, IntDistribution)
    offered = range(distribution.low, distribution.high + 1, distribution.step)
    assert list(offered) == list(range(start, start + length, step))


# Slips


def test_nothing_to_search_is_told_in_one_line(cli: Command) -> None:
    completed = cli("-m", "hydra/sweeper=tpe", "optimizer.lr=0.1", "sweep=s")
    assert completed.returncode == 2
    [line] = completed.stderr.splitlines()
    assert line.startswith("experiments: hydra/sweeper=tpe: nothing to search")
    assert "interval(" in line


def test_a_missing_optuna_is_told_in_one_line_with_what_installs_it(
    tmp_path: Path, cli: Command
) -> None:
    """A module of that name that cannot be imported stands before the real one."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "optuna.py").write_text("raise ImportError('not here')\n")
    completed = cli(
        "-m", "hydra/sweeper=tpe", *SPACE, "sweep=s",
        env={"PYTHONPATH": os.pathsep.join([str(tmp_path / "hidden")])},
    )  # fmt: skip
    assert completed.returncode == 2
    [line] = completed.stderr.splitlines()
    assert line == (
        "experiments: hydra/sweeper=tpe needs Optuna: pip install 'experiments[search]'"
    )


# A study that continues has to be the same search

Made = Callable[..., Setting]


@pytest.fixture
def made() -> Made:
    """The setting of a search: `made(*arguments)`."""

    def made(*arguments: str) -> Setting:
        fixed, space = search_space([*arguments])
        with hydra.initialize_config_dir(str(CONF), "experiments", **VERSION_BASE):
            return describe(lambda overrides: hydra.compose("config", overrides), fixed, space)

    return made


def ask_one(file: Path, setting: Setting) -> None:
    """Open the study of a search and draw a trial."""
    study = open_study(file, setting, seed=0, prune=False)
    study.ask({key: json_to_distribution(text) for key, text in setting.space.items()})


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (["trainer.monitor=accuracy/valid"], "trainer.monitor=loss/valid (now accuracy/valid)"),
        (["trainer.epochs=3"], "trainer.epochs=10 (now 3)"),
        (["data.path=/elsewhere"], "data.path=null (now /elsewhere)"),
        (["seed=1"], "seed=0 (now 1)"),
        (["+model.bias=false"], "model.bias=(missing) (now false)"),
        (["model.dropout=0,0.1"], "model.dropout=(not searched) (now 0,0.1)"),
    ],
)
def test_a_study_is_not_continued_with_another_config(
    change: list[str], difference: str, made: Made, tmp_path: Path
) -> None:
    ask_one(tmp_path / "study.journal", made(*SPACE))
    before = (tmp_path / "study.journal").read_bytes()
    with pytest.raises(UsageError) as raised:
        ask_one(tmp_path / "study.journal", made(*SPACE, *change))
    assert f": its search began with {difference}; use another sweep=" in str(raised.value)
    ask_one(tmp_path / "study.journal", made(*SPACE))
    assert (tmp_path / "study.journal").read_bytes().startswith(before)


def test_a_study_is_not_continued_with_other_bounds_or_choices(made: Made, tmp_path: Path) -> None:
    ask_one(tmp_path / "study.journal", made(*SPACE))
    with pytest.raises(UsageError) as raised:
        ask_one(
            tmp_path / "study.journal",
            made("optimizer.lr=interval(0.1,1)", "loader.batch_size=8,9"),
        )
    assert (
        "optimizer.lr=tag(log,interval(0.0001,1.0)) (now interval(0.1,1.0)), "
        "loader.batch_size=32,64 (now 8,9);"
    ) in str(raised.value)


def test_what_does_not_change_a_trial_may_differ(made: Made, tmp_path: Path) -> None:
    ask_one(tmp_path / "study.journal", made(*SPACE))
    others = ["checkpoint.keep=5", "trainer.log_every=1", "trainer.threads=2"]
    ask_one(tmp_path / "study.journal", made(*reversed(SPACE), *others))
    assert len(trials(tmp_path)) == 2


def test_an_option_of_a_searched_group_may_not_change(made: Made, tmp_path: Path) -> None:
    searched = "optimizer=sgd,adam"
    setting = made(searched)
    ask_one(tmp_path / "study.journal", setting)
    changed = {label: dict(config) for label, config in setting.configs.items()}
    changed["optimizer=adam"]["optimizer.eps"] = 1e-3
    with pytest.raises(UsageError, match=r"optimizer\.eps=1e-08 \(now 0\.001\)"):
        ask_one(tmp_path / "study.journal", replace(setting, configs=changed))


def test_a_study_of_before_continues_if_its_direction_is_the_same(
    made: Made, tmp_path: Path
) -> None:
    """Version 0.1.0 did not store what a study was made with."""
    file = tmp_path / "study.journal"
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(file)))
    study = optuna.create_study(storage=storage, study_name="search", direction="minimize")
    study.ask(search_space(SPACE)[1])
    with pytest.raises(UsageError, match=r"trainer\.monitor=loss/valid \(now accuracy/valid\)"):
        ask_one(file, made(*SPACE, "trainer.monitor=accuracy/valid"))
    with pytest.raises(UsageError, match=r"loader\.batch_size=32,64 \(now 16,32\)"):
        ask_one(file, made(SPACE[0], "loader.batch_size=16,32"))
    ask_one(file, made(*SPACE))
    with pytest.raises(UsageError, match=r"trainer\.epochs=10 \(now 3\)"):
        ask_one(file, made(*SPACE, "trainer.epochs=3"))


def test_the_metric_itself_cannot_be_searched(made: Made, tmp_path: Path) -> None:
    setting = made(*SPACE, "trainer.monitor=loss/valid,accuracy/valid")
    with pytest.raises(UsageError, match=r"^trainer\.monitor: a search needs one metric"):
        open_study(tmp_path / "study.journal", setting, seed=0, prune=False)
    assert list(tmp_path.iterdir()) == []


def test_another_metric_for_the_same_search_is_told_in_one_line(
    tmp_path: Path, small_mnist_dir: Path, cli: Command
) -> None:
    command = [
        *("-m", "hydra/sweeper=tpe", "hydra.sweeper.trials=1", "sweep=s", "trainer.epochs=1"),
        *(f"data.path={small_mnist_dir}", *SPACE),
    ]
    assert cli(*command).returncode == 0
    completed = cli(*command, "trainer.monitor=accuracy/valid")
    assert completed.returncode == 2
    [line] = completed.stderr.splitlines()
    assert line == (
        "experiments: outputs/s: its search began with trainer.monitor=loss/valid "
        "(now accuracy/valid); use another sweep= for a new search, or the same settings"
    )
    assert len(trials(tmp_path / "outputs" / "s")) == 1
    more = cli(*command, "hydra.sweeper.trials=2", "hydra.sweeper.prune=false")
    assert more.returncode == 0, more.stderr
    assert len(over(tmp_path / "outputs" / "s")) == 2


# A search, stopped, continued and made longer


class Search(NamedTuple):
    """A search that was stopped, then came to its end, then was given more trials.

    It is stopped on two workers, both held in their second run. It goes on on one: which runs are
    pruned depends on what was over before them.
    """

    path: Path
    stopped: tuple[int, str]
    under_way: list[tuple[float, int]]  # points whose runs were interrupted
    first: Completed
    after_first: list[FrozenTrial]
    files: dict[Path, tuple[int, bytes]]  # run.json after the first
    second: Completed


FIRST, SECOND = 9, 11


@pytest.fixture(scope="module")
def search(
    tmp_path_factory: pytest.TempPathFactory, small_mnist_dir: Path, cli_in: Command
) -> Search:
    directory = tmp_path_factory.mktemp("search")
    path = directory / "outputs" / "s"
    command = [
        *("-m", "hydra/sweeper=tpe", "sweep=s", f"data.path={small_mnist_dir}", *SPACE),
        *("trainer.epochs=10", "model=mlp_small", "model._target_=paced.held"),
    ]

    def some_over_and_some_begun() -> bool:
        found = {file.parent: record(file.parent)["state"] for file in path.glob("*/run.json")}
        begun = [run for run in found if found[run] == "running" and (run / "checkpoints").exists()]
        return list(found.values()).count("finished") >= 2 and begun != []

    def go_on(trials: int) -> Completed:
        one = ("hydra.sweeper.workers=1", f"hydra.sweeper.trials={trials}")
        return cli_in(directory, *command, *one, env=paced.environment())

    with UnderWay(
        directory,
        *command,
        *("hydra.sweeper.workers=2", f"hydra.sweeper.trials={FIRST}"),
        environment=paced.environment(held_runs=1, held_after=25),
    ) as process:
        process.wait_until(some_over_and_some_begun)
        process.popen.send_signal(signal.SIGINT)
        code, _, error = process.end()
    under_way = [searched(found) for found in run_records(path) if found["state"] == "interrupted"]
    first = go_on(FIRST)
    after_first = trials(path)
    files = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in path.glob("*/run.json")}
    return Search(path, (code, error), under_way, first, after_first, files, go_on(SECOND))


def test_a_search_that_is_stopped_says_how_to_go_on(search: Search) -> None:
    code, error = search.stopped
    assert code == 130
    assert re.fullmatch(r"interrupted; the same command with \S+=outputs/s goes on\n", error)


def test_the_runs_that_were_stopped_are_the_first_to_go_on(search: Search) -> None:
    assert search.under_way
    by_point = {searched(found): found for found in run_records(search.path)}
    for point in search.under_way:
        assert by_point[point]["state"] in ("finished", "pruned")
        assert len(by_point[point]["resumed_at"]) == 1


def test_trials_are_counted_in_total_over_the_commands(search: Search) -> None:
    assert search.first.returncode == 0, search.first.stderr
    counted = (TrialState.COMPLETE, TrialState.PRUNED)
    assert sum(trial.state in counted for trial in search.after_first) == FIRST
    assert search.second.returncode == 0, search.second.stderr
    assert len(over(search.path)) == SECOND
    assert f"sweep of {SECOND - FIRST} runs" in search.second.stdout


def test_no_trial_is_lost_and_none_is_counted_twice(search: Search) -> None:
    """Each point that was tried has one run, and one trial that ended."""
    points = sorted(
        (trial.params["optimizer.lr"], trial.params["loader.batch_size"])
        for trial in over(search.path)
    )
    assert points == sorted(searched(found) for found in run_records(search.path))
    assert all(trial.state != TrialState.RUNNING for trial in trials(search.path))


def test_a_search_that_goes_on_tries_new_numbers_and_leaves_the_old_runs(search: Search) -> None:
    for file, content in search.files.items():
        assert (file.stat().st_mtime_ns, file.read_bytes()) == content
    rates = [found["config"]["optimizer"]["lr"] for found in run_records(search.path)]
    assert len(set(rates)) == len(rates) == SECOND


def test_every_trial_lies_in_the_space(search: Search) -> None:
    for lr, batch_size in map(searched, run_records(search.path)):
        assert 0.0001 <= lr <= 1
        assert batch_size in (32, 64)


def test_the_study_has_the_number_that_each_run_reached(search: Search) -> None:
    best = {
        searched(found): found["metrics"]["best"]["loss/valid"]
        for found in run_records(search.path)
        if found["state"] == "finished"
    }
    told = {
        (trial.params["optimizer.lr"], trial.params["loader.batch_size"]): trial.value
        for trial in over(search.path)
        if trial.state == TrialState.COMPLETE
    }
    assert len(best) >= 5
    assert told == best


def test_hopeless_runs_are_pruned_before_their_last_epoch(search: Search) -> None:
    pruned = [found for found in run_records(search.path) if found["state"] == "pruned"]
    assert pruned
    assert all(found["metrics"]["last"]["epoch"] < 10 for found in pruned)
    states = [trial.state for trial in over(search.path)]
    assert states.count(TrialState.PRUNED) == len(pruned)


def test_pruned_runs_are_told_and_rank_below_the_finished(search: Search) -> None:
    [*_, table] = search.second.stdout.partition("\nrank ")
    told = re.findall(r"^ +\d+ .*(finished|pruned)", table, re.M)
    assert len(told) == SECOND
    assert told == sorted(told)


def test_a_space_smaller_than_the_trials_is_tried_whole_and_no_run_twice(
    tmp_path: Path, small_mnist_dir: Path, cli: Command
) -> None:
    completed = cli(
        "-m", "hydra/sweeper=tpe", "hydra.sweeper.trials=6", "sweep=s", "trainer.epochs=1",
        f"data.path={small_mnist_dir}", "optimizer.lr=0.1,0.01",
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    # it ends there: what is left to ask for has been run
    assert len(over(tmp_path / "outputs" / "s")) >= 2
    found = [f["config"]["optimizer"]["lr"] for f in run_records(tmp_path / "outputs" / "s")]
    assert sorted(found) == [0.01, 0.1]
