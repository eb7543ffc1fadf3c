"""Resuming: a stopped or killed run ends with the same bits as an uninterrupted one."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import paced
import pytest
import torch
from saved_runs import (
    SMALL,
    STEPS,
    assert_same_run,
    call,
    change_record,
    curves,
    curves_of,
    go_on,
    kill_after,
    lines,
    points,
    record,
    stop_after,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from under_way import UnderWay

from experiments import __main__ as entrypoint
from experiments import job
from experiments.data import Data, Split
from experiments.directory import record as runs
from experiments.directory.checkpoints import Checkpoints
from experiments.directory.claim import Lock, is_locked, lock_directory
from experiments.errors import Interrupted, UsageError
from experiments.train import train

Compose = Callable[[list[str]], dict[str, Any]]

VARIANTS = {
    "momentum": ["optimizer=sgd", "scheduler=constant"],
    "adam-cosine": ["optimizer=adam", "scheduler=cosine", "optimizer.lr=0.005"],
    "adamw-onecycle": ["optimizer=adamw", "scheduler=onecycle", "optimizer.lr=0.005"],
    "dropout": ["model.dropout=0.3"],
    "accumulate": ["trainer.accumulate=3", "loader.batch_size=24", "model.dropout=0.1"],
    "clip-norm": ["trainer.clip_norm=0.1", "trainer.monitor=accuracy/valid"],
    "torch-loader": ["loader=torch", "model.dropout=0.2", "loader.drop_last=true"],
    "not-shuffled": ["loader.shuffle=false"],
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(
    request: pytest.FixtureRequest,
    compose: Compose,
    tiny: Data,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], Path]:
    """A config and the directory of its uninterrupted run."""
    config = compose([*SMALL, *VARIANTS[request.param]])
    unbroken = tmp_path_factory.mktemp("unbroken") / request.param
    go_on(unbroken, config, tiny)
    return config, unbroken


@pytest.fixture(scope="module")
def config(compose: Compose) -> dict[str, Any]:
    """A config for which every part of a checkpoint matters."""
    return compose([*SMALL, *VARIANTS["dropout"], "optimizer=adamw", "optimizer.lr=0.005"])


@pytest.fixture(scope="module")
def unbroken(config: dict[str, Any], tiny: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of its uninterrupted run."""
    path = tmp_path_factory.mktemp("unbroken") / "run"
    go_on(path, config, tiny)
    return path


def steps_of(path: Path) -> int:
    """Number of optimizer steps of a finished run."""
    steps: int = record(path)["metrics"]["last"]["step"]
    return steps


def test_stopped_at_any_step_it_ends_with_the_same_bits(
    variant: tuple[dict[str, Any], Path], tiny: Data, tmp_path: Path
) -> None:
    config, unbroken = variant
    for step in range(1, steps_of(unbroken) + 1):
        run = tmp_path / str(step)
        assert go_on(run, config, tiny, stop_after(step)) == "interrupted"
        assert go_on(run, config, tiny) == "finished"
        assert_same_run(run, unbroken)


def test_stopped_after_every_single_step_it_ends_with_the_same_bits(
    variant: tuple[dict[str, Any], Path], tiny: Data, tmp_path: Path
) -> None:
    config, unbroken = variant
    stops = 0
    while go_on(tmp_path / "run", config, tiny, stop_after(1)) == "interrupted":
        stops += 1
    assert stops == steps_of(unbroken)
    assert_same_run(tmp_path / "run", unbroken)


def test_stopped_within_a_validation_it_ends_with_the_same_bits(
    config: dict[str, Any], unbroken: Path, tiny: Data, tmp_path: Path
) -> None:
    """The first validation, the second, and the test after it."""
    for evaluation in (1, 2, 3):
        run = tmp_path / str(evaluation)
        run.mkdir()
        owned = runs.start(run, config, [])
        with pytest.raises(Interrupted):
            train(config, tiny, owned, stop_evaluation=stop_after(evaluation))
        owned.end("interrupted")
        content = Checkpoints(run / "checkpoints").load()
        assert content is not None
        assert content["state"]["step"] == STEPS // 2 * min(evaluation, 2)
        assert go_on(run, config, tiny) == "finished"
        assert_same_run(run, unbroken)


class Counting(nn.Linear):
    """Counts its batches in a buffer, also in evaluation."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__(784, 10)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x) * (1 + self.count / 100)


def test_a_buffer_that_a_stopped_validation_changed_is_put_back(
    config: dict[str, Any], tiny: Data, tmp_path: Path
) -> None:
    config = config | {"model": {"_target_": f"{__name__}.Counting"}}
    go_on(tmp_path / "unbroken", config, tiny)
    run = tmp_path / "run"
    run.mkdir()
    owned = runs.start(run, config, [])
    with pytest.raises(Interrupted):
        train(config, tiny, owned, stop_evaluation=stop_after(1))
    owned.end("interrupted")
    go_on(run, config, tiny)
    assert_same_run(run, tmp_path / "unbroken")


def test_killed_at_any_step_it_ends_with_the_same_bits(
    variant: tuple[dict[str, Any], Path], tiny: Data, tmp_path: Path
) -> None:
    config, unbroken = variant
    config = config | {"checkpoint": config["checkpoint"] | {"every_steps": 3}}
    for step in range(1, steps_of(unbroken) + 1):
        run = tmp_path / str(step)
        assert go_on(run, config, tiny, kill_after(step)) == "running"
        assert go_on(run, config, tiny) == "finished"
        assert_same_run(run, unbroken)


def test_killed_twice_inside_one_epoch_it_ends_with_the_same_bits(
    config: dict[str, Any], unbroken: Path, tiny: Data, tmp_path: Path
) -> None:
    config = config | {"checkpoint": config["checkpoint"] | {"every_steps": 1}}
    for kill in (6, 1, 2):
        go_on(tmp_path / "run", config, tiny, kill_after(kill))
    assert Checkpoints(tmp_path / "run/checkpoints").entries()[-1].step == 6
    go_on(tmp_path / "run", config, tiny)
    assert_same_run(tmp_path / "run", unbroken)


def test_killed_exactly_at_the_end_of_an_epoch_it_does_not_repeat_it(
    config: dict[str, Any], unbroken: Path, tiny: Data, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    go_on(run, config, tiny, kill_after(6))
    [last] = Checkpoints(run / "checkpoints").entries()
    assert (last.step, last.epochs) == (5, 1)
    go_on(run, config, tiny)
    assert_same_run(run, unbroken)


def test_killed_before_any_checkpoint_it_begins_again(
    config: dict[str, Any], unbroken: Path, tiny: Data, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    go_on(run, config, tiny, kill_after(4))
    assert lines(run) != []
    assert not (run / "checkpoints").exists()
    go_on(run, config, tiny)
    assert_same_run(run, unbroken)


def test_killed_after_its_last_epoch_it_only_ends(
    config: dict[str, Any], unbroken: Path, tiny: Data, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    change_record(run, state="running", weights={"initial": record(run)["weights"]["initial"]})
    go_on(run, config, tiny)
    assert_same_run(run, unbroken)


@pytest.mark.parametrize("file", ["metrics.jsonl", "events.out.tfevents.0000"])
@pytest.mark.parametrize("torn", [b'{"step": 6, "epo', b"\x18" + bytes(6), bytes(5000)])
def test_what_a_kill_left_half_written_is_cut_off(
    file: str, torn: bytes, config: dict[str, Any], unbroken: Path, tiny: Data, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    go_on(run, config, tiny, kill_after(8))
    with (run / file).open("ab") as written:
        written.write(torn)
    go_on(run, config, tiny)
    assert_same_run(run, unbroken)


@pytest.mark.parametrize("kills", [[9], [8, 2], [9, 1, 1], [4], [4, 3]])
def test_a_live_tensorboard_shows_an_unbroken_curve(
    kills: list[int], config: dict[str, Any], unbroken: Path, tiny: Data, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    live = None
    for kill in kills:
        go_on(run, config, tiny, kill_after(kill))
        live = live or EventAccumulator(str(run), size_guidance={"scalars": 0})
        live.Reload()
    assert live
    assert len(curves_of(live)["loss/train"]) > 0
    go_on(run, config, tiny)
    live.Reload()
    assert curves_of(live) == curves(unbroken)


def test_every_curve_has_each_step_once(unbroken: Path) -> None:
    found = points(unbroken)
    assert len({(tag, step) for tag, step, _ in found}) == len(found)
    assert [step for tag, step, _ in found if tag == "loss/train"] == [3, 5, 6, 9, 10]
    assert [step for tag, step, _ in found if tag == "loss/valid"] == [5, STEPS]


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    config: dict[str, Any], unbroken: Path, tiny: Data, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = config | {"checkpoint": config["checkpoint"] | {"every_steps": 2}}
    go_on(run, config, tiny, kill_after(9))
    newest = Checkpoints(run / "checkpoints").entries()[-1]
    damaged = bytearray(newest.file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.file.write_bytes(damaged)
    with pytest.warns(UserWarning, match=f"{newest.file.name} is damaged"):
        go_on(run, config, tiny)
    assert_same_run(run, unbroken)


def test_with_every_checkpoint_damaged_it_refuses(
    config: dict[str, Any], tiny: Data, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    go_on(run, config, tiny, stop_after(7))
    for entry in Checkpoints(run / "checkpoints").entries():
        entry.file.write_bytes(entry.file.read_bytes()[:-1])
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(UsageError, match="every checkpoint is damaged"),
    ):
        go_on(run, config, tiny)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_one_changed_bit_of_data_is_refused_and_its_split_named(
    split: str, config: dict[str, Any], tiny: Data, tmp_path: Path
) -> None:
    go_on(tmp_path / "run", config, tiny, stop_after(3))
    was: Split = getattr(tiny, split)
    x = was.x.clone()
    x.view(torch.int32)[7, 300] ^= 1
    change: dict[str, Any] = {split: Split(x, was.y)}
    changed = replace(tiny, **change)
    before = lines(tmp_path / "run")
    with pytest.raises(UsageError, match=f"data: {split} rows differ"):
        go_on(tmp_path / "run", config, changed)
    assert lines(tmp_path / "run") == before


def test_one_changed_label_is_refused(config: dict[str, Any], tiny: Data, tmp_path: Path) -> None:
    go_on(tmp_path / "run", config, tiny, stop_after(3))
    y = tiny.train.y.clone()
    y[5] = (y[5] + 1) % 10
    with pytest.raises(UsageError, match="train rows differ"):
        go_on(tmp_path / "run", config, replace(tiny, train=Split(tiny.train.x, y)))


def test_another_version_of_a_package_is_told(
    config: dict[str, Any], tiny: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    go_on(run, config, tiny, stop_after(3))
    now = record(run)["packages"]["torch"]
    change_record(run, packages={**record(run)["packages"], "torch": "1.0"})
    go_on(run, config, tiny)
    assert f"warning: torch was 1.0, is {now}: bits may differ" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(
    compose: Compose, config: dict[str, Any], tiny: Data, tmp_path: Path
) -> None:
    go_on(tmp_path / "run", config, tiny, stop_after(3))
    other = config | {"model": config["model"] | {"hidden": [17]}}
    with pytest.raises(UsageError, match="its checkpoint does not fit its config"):
        go_on(tmp_path / "run", other, tiny)


def test_a_checkpoint_with_parameters_in_another_order_is_refused(
    config: dict[str, Any], tiny: Data, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    go_on(run, config, tiny, stop_after(3))
    checkpoints = Checkpoints(run / "checkpoints")
    content = checkpoints.load()
    assert content is not None
    content["parameters"].reverse()
    checkpoints.save(3, 0, content)
    with pytest.raises(UsageError, match="the order of the model's parameters has changed"):
        go_on(run, config, tiny)


def test_a_stopped_run_keeps_its_best_across_the_resume(
    compose: Compose, tiny: Data, tmp_path: Path
) -> None:
    # the last epoch is worse, so the best one precedes the stop
    overrides = ["scheduler=constant", "optimizer.lr=0.5", "optimizer.momentum=0"]
    config = compose([*SMALL, *overrides, "trainer.epochs=3"])
    run = tmp_path / "run"
    go_on(tmp_path / "unbroken", config, tiny)
    go_on(run, config, tiny, stop_after(13))
    go_on(run, config, tiny)
    assert record(run)["metrics"]["best"]["epoch"] == 2
    assert_same_run(run, tmp_path / "unbroken")
    best = Checkpoints(run / "checkpoints").load("best")
    assert best is not None
    assert best["state"]["best"] == record(run)["metrics"]["best"]


# The command line.


@pytest.fixture
def stopped_run(
    config: dict[str, Any], tiny: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The directory of a stopped run whose data set is available to the command line."""
    monkeypatch.setattr(job, "load_data", lambda config: tiny)
    go_on(tmp_path / "run", config, tiny, stop_after(7))
    return tmp_path / "run"


def test_resume_goes_on_in_place(stopped_run: Path, unbroken: Path) -> None:
    assert call(entrypoint.main, f"resume={stopped_run}") == 0
    assert_same_run(stopped_run, unbroken)
    assert record(stopped_run)["state"] == "finished"
    assert len(record(stopped_run)["resumed_at"]) == 1


def test_a_finished_run_is_left_as_it_is(
    stopped_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(entrypoint.main, f"resume={stopped_run}")
    before = {file: file.read_bytes() for file in stopped_run.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert call(entrypoint.main, f"resume={stopped_run}") == 0
    assert "already finished" in capsys.readouterr().out
    after = {file: file.read_bytes() for file in stopped_run.rglob("*") if file.is_file()}
    assert after == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resume=nowhere"], "nowhere: holds no run"),
        (["resume="], "holds no run"),
        (["resume={run}", "seed=1"], "seed=1: a resumed run keeps its config"),
        (["resume={run}", "resume=other"], "resume=other: a resumed run keeps its config"),
        (["resume={run}", "-m"], "-m: a resumed run keeps its config"),
        (["--trust", "os", "seed=1"], "--trust os: only valid with resume=RUN_DIR"),
    ],
)
def test_a_slip_is_told_in_one_line(
    arguments: list[str], message: str, stopped_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = record(stopped_run)
    code = call(entrypoint.main, *(text.format(run=stopped_run) for text in arguments))
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert record(stopped_run) == before


def test_of_two_processes_only_one_goes_on(
    stopped_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "LOCK_SECONDS", 0.1)
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        runs.reopen(stopped_run)
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    code = call(entrypoint.main, f"resume={stopped_run}")
    error = capsys.readouterr().err
    os.write(go[1], b"x")
    os.waitpid(child, 0)
    assert code == 2
    assert "another process is running it" in error
    # the kernel releases the lock when a process dies, whatever its record says
    assert call(entrypoint.main, f"resume={stopped_run}") == 0


def test_a_run_that_another_process_finishes_before_its_lock_is_taken_is_left_as_it_is(
    stopped_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other one finishes it between the first look at its record and the lock."""

    def finished_meanwhile(path: Path, timeout: float) -> Lock:
        change_record(path, state="finished")
        return lock_directory(path, timeout)

    monkeypatch.setattr(runs, "lock_directory", finished_meanwhile)
    assert call(entrypoint.main, f"resume={stopped_run}") == 0
    assert capsys.readouterr().out.endswith(": already finished\n")
    assert record(stopped_run)["resumed_at"] == []
    assert not is_locked(stopped_run)


# Real processes.


EPOCHS = 2  # after which a run is held
STEPS_HELD = 10 * EPOCHS


def held(directory: Path, *arguments: str) -> UnderWay:
    """The command with a run in `directory` that is held after two of its epochs."""
    return UnderWay(directory, *arguments, environment=paced.environment(held_after=STEPS_HELD))


@pytest.fixture(scope="module")
def real(
    small_mnist_dir: Path, compose: Compose, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path]:
    """A command line and the directory of its uninterrupted run, made in this process."""
    overrides = [
        *(f"data.path={small_mnist_dir}", "optimizer=adam"),
        *("trainer.epochs=40", "checkpoint.every_steps=5", "loader.batch_size=60"),
        *("model=mlp_small", "model.dropout=0.2", "model._target_=paced.held"),
    ]
    config = compose(overrides)
    unbroken = tmp_path_factory.mktemp("real") / "unbroken"
    go_on(unbroken, config, job.load_data(config))
    return overrides, unbroken


def test_a_process_killed_with_9_ends_with_the_same_bits(
    real: tuple[list[str], Path], tmp_path: Path
) -> None:
    overrides, unbroken = real
    with held(tmp_path, *overrides, "hydra.run.dir=run") as process:
        process.wait_for_line(rf"epoch +{EPOCHS}/")
        process.popen.kill()
        process.end()
    run = tmp_path / "run"
    assert record(run)["state"] == "running"
    assert call(entrypoint.main, f"resume={run}", "--trust", "paced") == 0
    assert_same_run(run, unbroken)


def test_a_run_whose_output_nobody_reads_any_more_can_be_resumed(
    real: tuple[list[str], Path], tmp_path: Path
) -> None:
    overrides, unbroken = real
    with held(tmp_path, *overrides, "hydra.run.dir=run") as process:
        process.wait_for_line(rf"epoch +{EPOCHS}/")
        process.stop_reading()
        (tmp_path / "released").touch()
        code, _, error = process.end()
    assert code == 128 + signal.SIGPIPE
    assert error == "interrupted; resume with: python -m experiments resume=run --trust paced\n"
    assert record(tmp_path / "run")["state"] == "interrupted"
    assert call(entrypoint.main, f"resume={tmp_path / 'run'}", "--trust", "paced") == 0
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        *((signal.SIGTERM, 143), (signal.SIGINT, 130)),
        *((signal.SIGHUP, 129), (signal.SIGUSR1, 138)),
    ],
)
def test_a_signal_stops_at_a_checkpoint_and_says_how_to_go_on(
    number: signal.Signals, code: int, real: tuple[list[str], Path], tmp_path: Path
) -> None:
    """At once: the step under way is the last one."""
    overrides, unbroken = real
    with held(tmp_path, *overrides, "hydra.run.dir=my run") as process:
        process.wait_for_line(rf"epoch +{EPOCHS}/")
        process.popen.send_signal(number)
        found, _, error = process.end()
    run = tmp_path / "my run"
    assert found == code
    assert (
        error == "interrupted; resume with: python -m experiments resume='my run' --trust paced\n"
    )
    assert record(run)["state"] == "interrupted"
    entry = Checkpoints(run / "checkpoints").entries()[-1]
    content = Checkpoints(run / "checkpoints").load()
    assert content is not None
    assert content["state"]["step"] == entry.step == STEPS_HELD + 1
    assert call(entrypoint.main, f"resume={run}", "--trust", "paced") == 0
    assert_same_run(run, unbroken)
