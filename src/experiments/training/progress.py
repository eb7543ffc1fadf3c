"""Progress of a run: a progress bar in a terminal, a line per epoch elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

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


def epoch_line(epoch: int, epochs: int, metrics: Mapping[str, float]) -> str:
    """The metrics of one epoch in a line that fits a narrow terminal."""
    return (
        f"epoch {epoch:{len(str(epochs))}}/{epochs}  loss/train {metrics['loss/train_epoch']:.4f}  "
        f"loss/valid {metrics['loss/valid']:.4f}  {metrics_text(metrics)}"
        f"{metrics['throughput']:,.0f} rows/s"
    )


def validation_line(step: int, metrics: Mapping[str, float]) -> str:
    """The metrics of a validation within an epoch."""
    return (
        f"step {step:,}  loss/valid {metrics['loss/valid']:.4f}  {metrics_text(metrics)}".rstrip()
    )


def metrics_text(metrics: Mapping[str, float]) -> str:
    """The first numbers of a validation besides its loss, as a part of a line."""
    names = [tag.removesuffix("/valid") for tag in metrics if tag.endswith("/valid")]
    shown = [name for name in names if name != "loss"][:MAX_METRICS]
    return "".join(f"{name} {metrics[f'{name}/valid']:.4f}  " for name in shown)


class EpochLines:
    """Prints a line at the end of each epoch."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def advance(self, epoch: int, batch: int, rows: int, losses: "Tensor") -> None:
        """Prints nothing within an epoch."""

    def epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        print(epoch_line(epoch, self.epochs, metrics), flush=True)

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        print(validation_line(step, metrics), flush=True)

    def close(self) -> None:
        """There is nothing to close."""


class ProgressBar:
    """A progress bar over all epochs, with metrics and remaining time, below the epoch lines."""

    def __init__(self, epochs: int, batches: int) -> None:
        # imported here, since only a terminal needs rich
        from rich import progress
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self.epochs, self.batches = epochs, batches
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
        self.metrics = metrics_text(metrics)
        self.bar.console.print(epoch_line(epoch, self.epochs, metrics), highlight=False)
        self.bar.update(self.task, completed=epoch * self.batches, refresh=True)
        self._rows, self._drawn_at = 0, time.perf_counter()

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics = metrics_text(metrics)
        self.bar.console.print(validation_line(step, metrics), highlight=False)

    def close(self) -> None:
        self.bar.stop()


def make_progress(epochs: int, batches: int) -> Progress:
    """The bar or the lines, depending on standard output, for `epochs` epochs of `batches` each."""
    terminal = sys.stdout.isatty()
    return ProgressBar(epochs, batches) if terminal else EpochLines(epochs)
