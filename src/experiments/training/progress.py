"""Progress of a run: a progress bar in a terminal, a line per epoch elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from experiments.config.monitoring import monitored_first

if TYPE_CHECKING:
    from torch import Tensor

REDRAW_SECONDS = 0.1


class Progress(Protocol):
    """Receives the progress of a run."""

    def advance(self, epoch: int, batch: int, rows: int, losses: "Tensor") -> None: ...
    def epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None: ...
    def validated(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


MAX_METRICS = 3  # of a line


def epoch_line(epoch: int, epochs: int, metrics: Mapping[str, float], monitor: str) -> str:
    """The metrics of one epoch in a line that fits a narrow terminal."""
    return (
        f"epoch {epoch:{len(str(epochs))}}/{epochs}  loss/train {metrics['loss/train_epoch']:.4f}  "
        f"{validation_text(metrics, monitor)}{metrics['throughput']:,.0f} rows/s"
    )


def validation_line(step: int, metrics: Mapping[str, float], monitor: str) -> str:
    """The metrics of a validation within an epoch."""
    return f"step {step:,}  {validation_text(metrics, monitor)}".rstrip()


def validation_text(metrics: Mapping[str, float], monitor: str) -> str:
    """The numbers of the last validation as a part of a line; "" if there was none yet."""
    if "loss/valid" not in metrics:
        return ""
    return f"loss/valid {metrics['loss/valid']:.4f}  {metrics_text(metrics, monitor)}"


def metrics_text(metrics: Mapping[str, float], monitor: str) -> str:
    """The first numbers of a validation besides its loss, as a part of a line."""
    others = [tag for tag in metrics if tag.endswith("/valid") and tag != "loss/valid"]
    shown = monitored_first(others, monitor)[:MAX_METRICS]
    return "".join(f"{tag.removesuffix('/valid')} {metrics[tag]:.4f}  " for tag in shown)


class EpochLines:
    """Prints a line at the end of each epoch."""

    def __init__(self, epochs: int, monitor: str) -> None:
        self.epochs, self.monitor = epochs, monitor

    def advance(self, epoch: int, batch: int, rows: int, losses: "Tensor") -> None:
        """Prints nothing within an epoch."""

    def epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        print(epoch_line(epoch, self.epochs, metrics, self.monitor), flush=True)

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        print(validation_line(step, metrics, self.monitor), flush=True)

    def close(self) -> None:
        """There is nothing to close."""


class ProgressBar:
    """A progress bar over all epochs, with metrics and remaining time, below the epoch lines."""

    def __init__(self, epochs: int, batches: int, monitor: str) -> None:
        # imported here, since only a terminal needs rich
        from rich import progress
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self.epochs, self.batches, self.monitor = epochs, batches, monitor
        columns = (
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        # refreshed manually: a refresh thread would compete with the training loop for the GIL
        self.bar = progress.Progress(*columns, console=Console(file=sys.stdout), auto_refresh=False,
                                     transient=True)  # fmt: skip
        self.task = self.bar.add_task("", total=epochs * batches, epoch=0, epochs=epochs)
        self.metrics = ""
        self._rows, self._drawn_at = 0, time.perf_counter()
        self.bar.start()

    def advance(self, epoch: int, batch: int, rows: int, losses: "Tensor") -> None:
        self._rows += rows
        now = time.perf_counter()
        if now - self._drawn_at < REDRAW_SECONDS:
            return
        throughput = self._rows / (now - self._drawn_at)
        self.bar.update(
            self.task,
            completed=(epoch - 1) * self.batches + batch,
            epoch=epoch,
            description=f"loss {losses.mean().item():.4f}  {self.metrics}{throughput:,.0f} rows/s",
            refresh=True,
        )
        self._rows, self._drawn_at = 0, now

    def epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.metrics = metrics_text(metrics, self.monitor)
        line = epoch_line(epoch, self.epochs, metrics, self.monitor)
        self.bar.console.print(line, highlight=False)
        self.bar.update(self.task, completed=epoch * self.batches, refresh=True)
        self._rows, self._drawn_at = 0, time.perf_counter()

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics = metrics_text(metrics, self.monitor)
        line = validation_line(step, metrics, self.monitor)
        self.bar.console.print(line, highlight=False)

    def close(self) -> None:
        self.bar.stop()


def make_progress(epochs: int, batches: int, monitor: str) -> Progress:
    """The bar or the lines, depending on standard output, for `epochs` epochs of `batches` each.

    monitor: the number that is shown first after the loss
    """
    if sys.stdout.isatty():
        return ProgressBar(epochs, batches, monitor)
    return EpochLines(epochs, monitor)
