"""Signals: which are handled, and what they do to a run, its children and its parent."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import paced
import pytest
from saved_runs import record
from under_way import UnderWay

from experiments import interrupt
from experiments.directory.checkpoints import Checkpoints
from experiments.interrupt import STOP_SIGNALS, Interrupt


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Every signal's handler is the same again after the test."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_is_noted_and_nothing_else(number: signal.Signals) -> None:
    with Interrupt() as stopped:
        signal.raise_signal(number)
        assert stopped.number == number


def test_a_signal_that_is_ignored_as_under_nohup_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupt() as stopped:
        signal.raise_signal(signal.SIGHUP)
        assert stopped.number is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_handler_of_the_users_own_for_sigusr1_stays() -> None:
    received: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    with Interrupt() as stopped:
        signal.raise_signal(signal.SIGUSR1)
    assert (stopped.number, received) == (None, [signal.SIGUSR1])


def test_signals_that_come_together_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    with Interrupt() as stopped:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
        assert stopped.number == signal.SIGTERM


def test_a_second_signal_takes_effect_later(monkeypatch: pytest.MonkeyPatch) -> None:
    with Interrupt():
        signal.raise_signal(signal.SIGTERM)
        later = time.monotonic() + interrupt.REPEAT_SECONDS
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def small_run(data: Path, *overrides: str) -> list[str]:
    """A small run that goes on until `paced.held` is released."""
    return [
        *(f"data.path={data}", "model=mlp_small", "trainer.epochs=1000", "loader.batch_size=60"),
        *("model._target_=paced.held", *overrides),
    ]


WITH_WORKERS = ("loader=torch", "loader.num_workers=2", "hydra.run.dir=run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_process_group_stops_a_run_with_loader_workers_at_a_checkpoint(
    number: signal.Signals, small_mnist_dir: Path, tmp_path: Path
) -> None:
    """Sent twice, as `timeout` does."""
    arguments = small_run(small_mnist_dir, *WITH_WORKERS)
    with UnderWay(tmp_path, *arguments, environment=paced.environment(held_after=14)) as process:
        process.wait_for_line("epoch +1/")
        os.killpg(process.popen.pid, number)
        os.killpg(process.popen.pid, number)
        code, _, error = process.end()
        assert (code, process.outlived()) == (128 + number, []), error
    assert record(tmp_path / "run")["state"] == "interrupted"
    content = Checkpoints(tmp_path / "run" / "checkpoints").load()
    assert content is not None
    assert content["state"]["step"] > 10


def test_loader_workers_leave_when_their_run_is_killed_with_9(
    small_mnist_dir: Path, tmp_path: Path
) -> None:
    arguments = small_run(small_mnist_dir, *WITH_WORKERS)
    with UnderWay(tmp_path, *arguments, environment=paced.environment(held_after=14)) as process:
        process.wait_for_line("epoch +1/")
        process.popen.kill()
        process.end()
        assert process.outlived() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2])
def test_a_signal_to_the_process_group_stops_a_sweep_at_checkpoints(
    number: signal.Signals, small_mnist_dir: Path, tmp_path: Path
) -> None:
    arguments = ["-m", *small_run(small_mnist_dir, "seed=0,1,2", "sweep=s")]
    with UnderWay(tmp_path, *arguments, environment=paced.environment(held_after=14)) as sweep:
        files = tmp_path / "outputs" / "s"
        sweep.wait_until(lambda: any(files.glob("*/checkpoints/step-*")))
        os.killpg(sweep.popen.pid, number)
        os.killpg(sweep.popen.pid, number)
        code, out, error = sweep.end()
        assert (code, sweep.outlived()) == (128 + number, []), error
    assert "failed" not in out
    states = {json.loads(file.read_text())["state"] for file in files.glob("*/run.json")}
    assert states == {"interrupted"}
