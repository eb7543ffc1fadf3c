import json
import math
import struct
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from conftest import FinishedRun
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.directory.metrics import read_metrics
from experiments.directory.tracking import Tracker

Points = dict[tuple[str, int], list[float]]


def events(directory: Path) -> Any:
    """The events of a directory, as read by TensorBoard."""
    return EventAccumulator(str(directory)).Reload()


def in_tensorboard(directory: Path) -> Points:
    """All scalars that TensorBoard shows, by tag and step."""
    accumulator, points = events(directory), Points()
    for tag in accumulator.Tags()["scalars"]:
        for point in accumulator.Scalars(tag):
            points.setdefault((tag, point.step), []).append(point.value)
    return points


def in_metrics(directory: Path) -> Points:
    """The same from metrics.jsonl."""
    points = Points()
    for line in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines()):
        for tag, value in line.items():
            if tag not in ("step", "epoch"):
                points.setdefault((tag, line["step"]), []).append(value)
    return points


def float32(value: float) -> float:
    """A number rounded to float32, as TensorBoard stores it."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def bits(values: list[float]) -> bytes:
    return struct.pack(f"{len(values)}d", *values)


def test_a_run_shows_the_same_numbers_in_tensorboard_and_in_metrics(
    finished_run: FinishedRun,
) -> None:
    metrics = in_metrics(finished_run.path)
    assert in_tensorboard(finished_run.path) == {
        key: [float32(value) for value in values] for key, values in metrics.items()
    }


def test_a_run_has_every_tag_at_every_step_once(finished_run: FinishedRun) -> None:
    """Ten batches per epoch, two epochs, a line every four steps."""
    validation = ("loss/train_epoch", "loss/valid", "accuracy/valid", "throughput")
    expected = {(tag, step) for tag in ("loss/train", "lr") for step in (4, 8, 10, 12, 16, 20)}
    expected |= {(tag, step) for tag in validation for step in (10, 20)}
    expected |= {(tag, 20) for tag in ("loss/test", "accuracy/test")}
    points = in_tensorboard(finished_run.path)
    assert set(points) == expected
    assert all(len(values) == 1 for values in points.values())


def test_a_run_shows_its_config_as_text(finished_run: FinishedRun) -> None:
    [event] = events(finished_run.path).Tensors("config")
    [text] = event.tensor_proto.string_val
    assert (finished_run.path / "config.yaml").read_text() in text.decode()
    assert event.step == 0


@settings(max_examples=30)
@given(st.lists(st.floats(), min_size=1, max_size=20))
def test_every_float_comes_back_from_metrics_with_every_bit(values: list[float]) -> None:
    """Including infinities, NaN, subnormals and minus zero; none of them breaks TensorBoard."""
    with TemporaryDirectory() as folder:
        tracker = Tracker(Path(folder))
        for step, value in enumerate(values):
            tracker.log(step, 1, {"loss": value})
        tracker.close()
        found = [line["loss"] for line in read_metrics(Path(folder))]
        scalars = [event.value for event in events(Path(folder)).Scalars("loss")]
    numbers = [value for value in values if not math.isnan(value)]
    assert bits([value for value in found if not math.isnan(value)]) == bits(numbers)
    assert [math.isnan(value) for value in found] == [math.isnan(value) for value in values]
    assert len(scalars) == len(values)


def test_numbers_can_be_read_while_the_run_still_goes_on(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log(1, 1, {"loss/train": 0.5})
    assert read_metrics(tmp_path) == [{"step": 1, "epoch": 1, "loss/train": 0.5}]
    assert in_tensorboard(tmp_path) == {("loss/train", 1): [0.5]}
    tracker.close()


def test_what_was_logged_after_the_checkpoint_is_gone_from_both_when_a_run_goes_on(
    tmp_path: Path,
) -> None:
    tracker = Tracker(tmp_path)
    tracker.log(1, 1, {"loss": 1.0})
    tracker.log(2, 1, {"loss": 2.0})
    positions = tracker.sync()
    tracker.log(3, 1, {"loss": 3.0})
    tracker.close()
    again = Tracker(tmp_path, 2, positions)
    again.log(3, 1, {"loss": 3.5})
    again.log(4, 1, {"loss": 4.0})
    again.close()
    expected = {("loss", 1): [1.0], ("loss", 2): [2.0], ("loss", 3): [3.5], ("loss", 4): [4.0]}
    assert in_tensorboard(tmp_path) == in_metrics(tmp_path) == expected


def test_a_torn_end_of_either_file_is_cut_off_when_a_run_goes_on(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log(1, 1, {"loss": 1.0})
    positions = tracker.sync()
    tracker.close()
    for name in positions:
        with (tmp_path / name).open("ab") as file:
            file.write(b'{"torn')
    again = Tracker(tmp_path, 1, positions)
    again.log(2, 1, {"loss": 2.0})
    again.close()
    assert in_tensorboard(tmp_path) == in_metrics(tmp_path)
    assert in_metrics(tmp_path) == {("loss", 1): [1.0], ("loss", 2): [2.0]}


def test_a_live_server_takes_back_the_points_of_a_future_that_was_given_up(tmp_path: Path) -> None:
    """The accumulator has read step 3 before the run is resumed from step 2."""
    tracker = Tracker(tmp_path)
    for step in (1, 2):
        tracker.log(step, 1, {"loss": float(step)})
    positions = tracker.sync()
    tracker.log(3, 1, {"loss": 3.0})
    tracker.close()
    live = events(tmp_path)
    assert [event.step for event in live.Scalars("loss")] == [1, 2, 3]
    again = Tracker(tmp_path, 2, positions)
    again.log(3, 1, {"loss": 3.5})
    again.close()
    live.Reload()
    found = [(event.step, event.value) for event in live.Scalars("loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.5)]


@pytest.mark.parametrize("tags", [("a",), ("a", "b", "c")])
def test_numbers_of_one_call_stand_in_one_line(tags: tuple[str, ...], tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log(7, 2, dict.fromkeys(tags, 0.25))
    tracker.close()
    assert read_metrics(tmp_path) == [{"step": 7, "epoch": 2, **dict.fromkeys(tags, 0.25)}]
    assert Counter(tag for tag, _ in in_tensorboard(tmp_path)) == Counter(tags)
