"""Runs made in this process, and what they left, for the files that compare them bit for bit."""

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from experiments.data import Data
from experiments.directory import record as runs
from experiments.directory.checkpoints import Checkpoints, serialize
from experiments.errors import Interrupted
from experiments.train import train

# five steps an epoch on the 320 rows of `tiny`, the last of them on fewer rows; two epochs
SMALL = [
    *("model=mlp_small", "model.hidden=[16]", "loader.batch_size=72", "trainer.epochs=2"),
    *("trainer.log_every=3", "optimizer.lr=0.02", "checkpoint.keep=3"),
]
STEPS = 10
StopSignal = Callable[[], int | None]


class Killed(BaseException):
    """What a kill is to a run in this process: nothing after it happens."""


def stop_after(steps: int, signal_number: int = 15) -> StopSignal:
    """A `stop_signal` that gives the signal after so many steps from now."""
    calls = iter(range(1, steps + 1))
    return lambda: signal_number if next(calls, steps) == steps else None


def kill_after(steps: int) -> StopSignal:
    """A `stop_signal` that kills after so many steps from now."""
    calls = iter(range(1, steps + 1))

    def stopped() -> None:
        if next(calls, steps) == steps:
            raise Killed

    return stopped


def go_on(
    path: Path, config: dict[str, Any], data: Data, stop_signal: StopSignal = lambda: None
) -> runs.State:
    """Start the run in a directory, or go on with it, with nothing left of the process before."""
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    path.mkdir(exist_ok=True)
    begun = (path / "run.json").exists()
    owned = runs.reopen(path) if begun else runs.start(path, config, [])
    state: runs.State = "finished"
    try:
        train(config, data, owned, stop_signal)
    except Interrupted:
        state = "interrupted"
    except Killed:
        state = "running"
    owned.end(state)
    return state


def record(path: Path) -> dict[str, Any]:
    """run.json."""
    content = json.loads((path / "run.json").read_text())
    assert isinstance(content, dict)
    return content


def change_record(path: Path, **changes: Any) -> None:
    """Change fields of run.json."""
    (path / "run.json").write_text(json.dumps(record(path) | changes))


def lines(path: Path) -> list[bytes]:
    """metrics.jsonl as bytes, without what measures the machine."""
    written = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    return [line for line in written if b"throughput" not in line]


def points(path: Path) -> list[tuple[str, int, float]]:
    """Every scalar in the event files as written: nothing that is there twice is taken away."""

    def all_points() -> Iterator[tuple[str, int, float]]:
        for file in sorted(path.glob("events.out.tfevents.*")):
            for event_bytes in RawEventFileLoader(str(file)).Load():
                event = Event.FromString(event_bytes)
                for value in event.summary.value:
                    if value.HasField("simple_value") and value.tag != "throughput":
                        yield value.tag, event.step, value.simple_value

    return list(all_points())


def curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve as TensorBoard shows it."""
    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0})
    accumulator.Reload()
    return curves_of(accumulator)


def curves_of(accumulator: EventAccumulator) -> dict[str, list[tuple[int, float]]]:
    """The curves in what TensorBoard has read."""
    return {
        tag: [(point.step, point.value) for point in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
        if tag != "throughput"
    }


def everything(path: Path) -> bytes:
    """The last checkpoint, whole, but for the sizes of files, which throughput lines change."""
    content = Checkpoints(path / "checkpoints").load()
    assert content is not None
    return serialize({name: part for name, part in content.items() if name != "positions"})


def assert_same_run(run: Path, unbroken: Path) -> None:
    """Weights, optimizer, schedule, generators, metrics and curves are those of the other run."""
    assert lines(run) == lines(unbroken)
    assert points(run) == points(unbroken)
    assert curves(run) == curves(unbroken)
    assert record(run)["weights"] == record(unbroken)["weights"]
    assert record(run)["metrics"] == record(unbroken)["metrics"]
    assert everything(run) == everything(unbroken)


def call(main: Callable[[], None], *arguments: object) -> int:
    """Call an entrypoint with a command line; its exit code."""
    before = sys.argv
    sys.argv = ["experiments", *map(str, arguments)]
    try:
        main()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    finally:
        sys.argv = before
    return 0
