"""Progress of a sweep: a live table in a terminal, one line per run elsewhere."""

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from experiments.directory.paths import display_path
from experiments.stdio import printable

if TYPE_CHECKING:
    from rich.table import Table

    from experiments.sweeps.jobs import Job

REDRAW_SECONDS = 0.25
RANKED = 10  # number of finished runs in the live table


class View(Protocol):
    """Shows the progress of a sweep."""

    def job_ended(self, job: "Job") -> None: ...
    def refresh(self) -> None: ...
    def close(self) -> None: ...


def make_view(directory: Path, total: int, jobs: list["Job"]) -> View:
    """The view that suits standard output; `jobs` grows while the sweep runs."""
    print(f"sweep of {total} runs in {display_path(directory)}", flush=True)
    return LiveTable(total, jobs) if sys.stdout.isatty() else RunLines(total)


def outcome(job: "Job") -> str:
    """How a run ended, in a few words."""
    if job.state == "duplicate":
        return "duplicate of another job"
    before = " before" if job.reused else f"  {job.seconds:.1f} s"
    if job.state == "finished" and job.value is not None:
        return f"{job.monitor} {job.value:.4f}{before}"
    return f"{job.state}{before}" + (f": {job.error}" if job.error else "")


def format_number(value: float) -> str:
    """A number for the table; a dash for NaN, the value before the first report."""
    return "-" if math.isnan(value) else f"{value:.4f}"


class RunLines:
    """Prints one line when a run ends."""

    def __init__(self, total: int) -> None:
        self.total, self.count = total, 0

    def job_ended(self, job: "Job") -> None:
        self.count += 1
        line = f"[{self.count}/{self.total}] {job.name}  {outcome(job)}"
        print(printable(line), flush=True)

    def refresh(self) -> None:
        """Does nothing: only the end of a run is shown."""

    def close(self) -> None:
        """Does nothing: there is nothing to close."""


class LiveTable:
    """A live table of the running jobs and the best finished ones; failures are printed above."""

    def __init__(self, total: int, jobs: list["Job"]) -> None:
        from rich import live

        self.total, self.jobs = total, jobs
        self.started, self._drawn = time.monotonic(), 0.0
        self.live = live.Live(auto_refresh=False, transient=True)
        self.live.start()

    def job_ended(self, job: "Job") -> None:
        from rich.text import Text

        if job.state == "failed":
            # as Text, since a name or an error may hold what rich takes for markup
            failure = Text(f"failed {printable(f'{job.name}: {job.error}')}")
            failure.stylize("red", 0, len("failed"))
            self.live.console.print(failure)
        self._drawn = 0.0

    def refresh(self) -> None:
        if time.monotonic() - self._drawn >= REDRAW_SECONDS:
            self.live.update(self.table(), refresh=True)
            self._drawn = time.monotonic()

    def close(self) -> None:
        self.live.stop()

    def table(self) -> "Table":
        """The current state of the sweep."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        ended = [job for job in self.jobs if job.state not in ("waiting", "running")]
        running = [job for job in self.jobs if job.state == "running"]
        counts: dict[str, int] = {}
        for job in ended:
            counts[job.state] = counts.get(job.state, 0) + 1
        counts_text = ", ".join(f"{number} {state}" for state, number in counts.items())
        table = Table(
            title=f"{len(ended)} of {self.total} runs over ({counts_text or 'none yet'}), "
            f"{self.time_left()}"
        )
        names = list(dict.fromkeys(job.metric[0] for job in running if job.metric[0]))
        for column in ("", "run", "progress", "loss", ", ".join(names) or "accuracy"):
            table.add_column(column, overflow="fold")
        for job in running:
            bar = ProgressBar(total=1.0, completed=job.done, width=24)
            table.add_row("", Text(job.name), bar, *map(format_number, (job.loss, job.metric[1])))
        table.add_section()
        ranked = sorted(
            (job for job in ended if job.value is not None),
            key=lambda job: (
                job.monitor,
                (job.value or 0.0) * (-1 if job.maximize else 1),
            ),
        )
        for rank, job in enumerate(ranked[:RANKED], 1):
            table.add_row(str(rank), Text(job.name), f"{job.monitor} {job.value:.4f}", "", "")
        for job in ended:
            if job.state in ("failed", "diverged"):
                table.add_row("", Text(job.name), f"[red]{job.state}[/red]", "", "")
        return table

    def time_left(self) -> str:
        """The estimated time left, from the fraction of this command's work that is done."""
        fresh = [job for job in self.jobs if not job.reused]
        done = sum(1.0 if job.seconds else job.done for job in fresh)
        work = self.total - sum(job.reused for job in self.jobs)
        if done < 0.05 or work <= 0:
            return "time left unknown"
        seconds = (time.monotonic() - self.started) * (work - done) / done
        return (
            f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"
        )
