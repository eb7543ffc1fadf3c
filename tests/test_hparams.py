"""TensorBoard's HParams tab, as returned by its backend: one row per run."""

import math
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NamedTuple

import pytest
from saved_runs import SMALL, go_on, kill_after, record, stop_after
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams.api_pb2 import ListSessionGroupsRequest, Status
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler

from experiments.data import Data

Compose = Callable[[list[str]], dict[str, Any]]


class Line(NamedTuple):
    """A row of the HParams tab."""

    run: str
    hparams: dict[str, Any]
    metrics: dict[str, float]
    status: str


def tab(directory: Path) -> list[Line]:
    """The rows that TensorBoard shows for a directory of runs."""
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(directory))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(directory))
    context = Context(TBContext(data_provider=provider, logdir=str(directory)))
    request = ListSessionGroupsRequest(
        start_index=0, slice_size=100, allowed_statuses=Status.values()
    )
    lines = []
    for group in Handler(RequestContext(), context, "", request).run().session_groups:
        [session] = group.sessions
        lines.append(
            Line(
                session.name,
                {name: getattr(v, str(v.WhichOneof("kind"))) for name, v in group.hparams.items()},
                {f"{m.name.group}{m.name.tag}": m.value for m in session.metric_values},
                Status.Name(session.status),
            )
        )
    return lines


def runs_of(directory: Path) -> list[str]:
    """All runs that TensorBoard lists."""
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(directory))
    multiplexer.Reload()
    return sorted(multiplexer.Runs())


@pytest.fixture(scope="module")
def sweep(
    tmp_path_factory: pytest.TempPathFactory,
    small_mnist_dir: Path,
    cli_in: Callable[..., CompletedProcess[str]],
) -> Path:
    """A sweep of four runs by the real command, two of which diverge."""
    directory = tmp_path_factory.mktemp("hparams")
    completed = cli_in(
        directory, "-m", "sweep=s", f"data.path={small_mnist_dir}", "trainer.epochs=2",
        "optimizer=sgd,adam", "optimizer.lr=0.01,1e30", "trainer.log_every=1",
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    return directory / "outputs" / "s"


def test_every_run_of_a_sweep_is_one_row(sweep: Path) -> None:
    names = sorted(file.parent.name for file in sweep.glob("*/run.json"))
    assert len(names) == 4
    assert sorted(line.run for line in tab(sweep)) == names


def test_there_are_no_stray_sub_runs(sweep: Path) -> None:
    assert runs_of(sweep) == sorted(file.parent.name for file in sweep.glob("*/run.json"))


def test_a_row_has_the_swept_keys_with_their_values(sweep: Path) -> None:
    found = {(line.hparams["optimizer"], line.hparams["optimizer.lr"]) for line in tab(sweep)}
    assert found == {(name, lr) for name in ("sgd", "adam") for lr in (0.01, 1e30)}


def test_a_row_has_the_runs_last_numbers(sweep: Path) -> None:
    for line in tab(sweep):
        found = record(sweep / line.run)
        if found["state"] == "finished":
            last, test = found["metrics"]["last"], found["metrics"]["test"]
            for tag in ("loss/valid", "accuracy/valid"):
                assert line.metrics[tag] == pytest.approx(last[tag], rel=1e-6)
            assert line.metrics["loss/test"] == pytest.approx(test["loss/test"], rel=1e-6)


def test_a_row_says_whether_the_run_ended_well(sweep: Path) -> None:
    statuses = {
        record(sweep / line.run)["state"]: line.status for line in tab(sweep)
    }  # both runs of each state have the same status, so one is enough
    assert statuses == {"finished": "STATUS_SUCCESS", "diverged": "STATUS_FAILURE"}


@pytest.fixture(scope="module")
def mended(tmp_path_factory: pytest.TempPathFactory, compose: Compose, tiny: Data) -> Path:
    """Runs that were stopped or killed, early and late, and then resumed to the end."""
    directory = tmp_path_factory.mktemp("mended")
    config = compose(SMALL)
    stops = {
        "unbroken": [],
        "killed-before-a-checkpoint": [kill_after(2)],
        "stopped-twice": [stop_after(3), stop_after(4)],
        "killed-after-a-checkpoint": [kill_after(7)],
    }
    for name, stopped in stops.items():
        for stop in stopped:
            assert go_on(directory / name, config, tiny, stop) != "finished"
        assert go_on(directory / name, config, tiny) == "finished"
    return directory


def test_a_run_that_was_stopped_or_killed_is_one_row_like_the_unbroken_one(mended: Path) -> None:
    lines = {line.run: line for line in tab(mended)}
    assert len(tab(mended)) == len(lines) == 4
    unbroken = lines.pop("unbroken")
    assert unbroken.status == "STATUS_SUCCESS"
    assert unbroken.hparams == {"seed": 0.0}
    measured = {"throughput"}
    for line in lines.values():
        assert line.hparams == unbroken.hparams
        assert line.status == unbroken.status
        assert line.metrics.keys() == unbroken.metrics.keys()
        for tag in line.metrics.keys() - measured:
            assert line.metrics[tag] == unbroken.metrics[tag]


def test_a_run_that_goes_on_is_a_row_without_an_end(
    compose: Compose, tiny: Data, tmp_path: Path
) -> None:
    assert go_on(tmp_path / "run", compose(SMALL), tiny, stop_after(6)) == "interrupted"
    [line] = tab(tmp_path)
    assert line.status in ("STATUS_UNKNOWN", "STATUS_RUNNING")
    assert math.isfinite(line.metrics["loss/valid"])
