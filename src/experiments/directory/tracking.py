"""Metrics logging: `Tracker.log` writes every number to TensorBoard and to metrics.jsonl.

Tags are `loss/train`, `loss/train_epoch`, `loss/valid`, `accuracy/valid`, `lr` (`lr/1` and so on of
further parameter groups whose rates differ), `throughput` (rows per second), `loss/test`,
`accuracy/test`; steps are optimizer steps. Only models of classes have an accuracy.
"""

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from experiments.directory import durable
from experiments.directory.metrics import METRICS
from experiments.directory.plain_json import dumps

EVENTS = "events.out.tfevents."


class Tracker:
    """The open log files of a run, in step with each other after every call.

    A new run starts at step 0. A resumed one passes the `positions` (file sizes) of its checkpoint,
    and its files are truncated to them. TensorBoard takes a torn record for the end of a file, and
    a live server keeps the points it has read, so a resumed run writes to a new file, which sorts
    after the others and starts with a session log that discards later steps.
    """

    def __init__(self, directory: Path, step: int = 0, positions: Mapping[str, int] | None = None):
        self.directory = directory
        positions = positions or {}
        next_file = next_events_file(directory)
        for file in (directory / METRICS, *directory.glob(EVENTS + "*")):
            truncate(file, positions.get(file.name, 0))
        self._metrics: BinaryIO = (directory / METRICS).open("ab")
        self._events: BinaryIO = next_file.open("xb")
        self._records = RecordWriter(self._events)
        self._write(Event(file_version="brain.Event:2"))
        # makes a live server discard the later steps that it has read
        restart = SessionLog(status=SessionLog.START)
        self._write(Event(step=step + 1 if positions else 0, session_log=restart))
        self._events.flush()

    def log(self, step: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log metrics of one step; `epoch` is the epoch it belongs to, counted from 1."""
        line = {"step": step, "epoch": epoch, **metrics}
        self._metrics.write(dumps(line).encode() + b"\n")
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
        self._write(Event(step=step, summary=Summary(value=values)))
        self._flush()

    def text(self, tag: str, markdown: str) -> None:
        """Log a markdown text to TensorBoard at step 0."""
        value = Summary.Value(
            tag=tag,
            metadata=text_metadata.create_summary_metadata(tag, ""),
            tensor=TensorProto(dtype="DT_STRING", string_val=[markdown.encode()]),
        )
        self._write(Event(step=0, summary=Summary(value=[value])))
        self._flush()

    def image(self, tag: str, step: int, png: bytes) -> None:
        """Log a picture to TensorBoard."""
        self._write(Event(step=step, summary=image_summary(tag, png)))
        self._flush()

    def hparams(self, values: Mapping[str, bool | float | str]) -> None:
        """Add the run to TensorBoard's HParams tab, with these values.

        The record is written to the run's own events file, which avoids a sub-run; without an
        experiment record TensorBoard infers the columns from all runs.
        """
        info = SessionStartInfo(start_time_secs=time.time())
        for name, value in values.items():
            if isinstance(value, bool):
                info.hparams[name].bool_value = value
            elif isinstance(value, int | float):
                info.hparams[name].number_value = value
            else:
                info.hparams[name].string_value = value
        self._hparams_record(
            hparams.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=info)
        )

    def hparams_end(self, *, success: bool) -> None:
        """Set the final status of the run's row. TensorBoard keeps the first one it reads."""
        status = Status.Value("STATUS_SUCCESS" if success else "STATUS_FAILURE")
        info = SessionEndInfo(end_time_secs=time.time(), status=status)
        self._hparams_record(hparams.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=info))

    def _hparams_record(self, tag: str, data: HParamsPluginData) -> None:
        metadata = hparams.create_summary_metadata(data)
        value = Summary.Value(tag=tag, metadata=metadata, tensor=hparams.NULL_TENSOR)
        self._write(Event(step=0, summary=Summary(value=[value])))
        self._flush()

    def sync(self) -> dict[str, int]:
        """Flush to disk; returns the size of each file in bytes: a checkpoint's `positions`."""
        for file in (self._metrics, self._events):
            file.flush()
            durable.sync(file.fileno())
        files = [METRICS, *(file.name for file in self.directory.glob(EVENTS + "*"))]
        return {name: (self.directory / name).stat().st_size for name in files}

    def close(self) -> None:
        """Close the files."""
        try:
            self._metrics.close()
        finally:
            self._events.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def _flush(self) -> None:
        self._metrics.flush()
        self._events.flush()


def log_image(directory: Path, tag: str, step: int, png: bytes) -> None:
    """Log an image to TensorBoard for a run, in a separate events file."""
    summary = image_summary(tag, png)
    with next_events_file(directory).open("xb") as file:
        records = RecordWriter(file)
        for event in (Event(file_version="brain.Event:2"), Event(step=step, summary=summary)):
            event.wall_time = time.time()
            records.write(event.SerializeToString())


def image_summary(tag: str, png: bytes) -> Summary:
    """A picture as TensorBoard's record."""
    width, height = struct.unpack(">II", png[16:24])  # in the IHDR chunk, which comes first
    image = Summary.Image(width=width, height=height, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def next_events_file(directory: Path) -> Path:
    """A new events file, which TensorBoard reads after all existing ones."""
    names = sorted(file.name for file in directory.glob(EVENTS + "*"))
    number = int(names[-1].removeprefix(EVENTS)) + 1 if names else 0
    return directory / f"{EVENTS}{number:04d}"


def truncate(file: Path, size: int) -> None:
    """Truncate a file to an earlier size; 0 if it did not exist yet.

    It is not deleted then: a live TensorBoard whose file vanishes reads no later one.
    """
    if file.exists():
        os.truncate(file, size)
