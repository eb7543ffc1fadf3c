"""The parent process of a sweep: assigns directories, passes jobs to the pool, shows progress.

A sweep is identified by its directory, and a run in it by its overrides, so the same command on
the same directory finds the earlier runs: finished, diverged and pruned ones are kept, all others
continue from their checkpoints. Imports no torch.
"""

import atexit
import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hydra.core.utils import JobReturn
from hydra.types import HydraContext
from omegaconf import DictConfig

from experiments.config.names import run_name
from experiments.directory.claim import explain_mkdir_errors, lock_directory, remove_temporary_files
from experiments.directory.identity import keep_changed
from experiments.directory.paths import display_path
from experiments.errors import Interrupted, UsageError
from experiments.interrupt import Interrupt
from experiments.results.rows import collect
from experiments.results.tables import save, table
from experiments.sweeps.fork_server import start_fork_server
from experiments.sweeps.jobs import CachedConfigLoader, Continuation, Job, job_return, place_job
from experiments.sweeps.pool import Pool, default_size, never_prune
from experiments.sweeps.view import make_view

# Names of failed runs in this process, including those whose directory is unreadable.
failures: list[str] = []


@dataclass
class Sweep:
    """A running sweep; Hydra's sweepers may launch it in several batches."""

    config: DictConfig
    context: HydraContext
    workers: int | None

    def __post_init__(self) -> None:
        self.directory = Path(self.config.hydra.sweep.dir)
        self.pool = Pool(self.workers or default_size())
        self.continuation = Continuation(self.pool.read_data, keep_changed())
        # Hydra's sweeper composes every job to validate it, then the launcher does so again
        self.loader = CachedConfigLoader(self.context.config_loader)
        self.context.config_loader = self.loader  # type: ignore[assignment]
        # multiprocessing joins the workers at exit, and they wait until their pipes are closed
        atexit.register(self.pool.close)
        start_fork_server()

    def launch(self, batch: list[list[str]], first: int) -> list[JobReturn]:
        """Run a batch of jobs on all workers; returns Hydra's result for each, in order.

        Failures are reported as values (see `job_return`): an exception would make the sweeper
        drop the remaining jobs.
        """

        def jobs(placed: list[Job]) -> Iterator[Job]:
            for number, overrides in enumerate(batch, first):
                composed = self.loader.pop(self.config, overrides)
                try:
                    job = self.place(composed, number)
                except UsageError as error:
                    name = run_name(" ".join(overrides))
                    job = Job(name, self.directory / name, composed, "failed", error=str(error))
                if any(job.path == other.path for other in placed):
                    job.state, job.reused = "duplicate", True
                placed.append(job)
                yield job

        ended = self.run_all(jobs, len(batch))
        return [job_return(job, overrides) for job, overrides in zip(ended, batch, strict=True)]

    def place(self, composed: DictConfig, number: int) -> Job:
        """Assign a job its directory; a run there of other code, data or versions is reported."""
        job, notices = place_job(self.directory, composed, number, self.continuation)
        for notice in notices:
            print(f"changed: {notice}", file=sys.stderr, flush=True)
        return job

    def run_all(
        self,
        jobs: Callable[[list[Job]], Iterator[Job]],
        total: int,
        *,
        should_prune: Callable[[Job, int, float], bool] = never_prune,
        on_job_end: Callable[[Job], None] = lambda job: None,
    ) -> list[Job]:
        """Run jobs on all workers; returns them in the order in which they were placed.

        jobs: a generator function, called with the list to which it appends each job; it composes
            and places one job at a time while the workers run earlier ones.
        should_prune, on_job_end: as in Pool.

        Raises Interrupted after a signal, once every running job has written a checkpoint.
        """
        # needed for the plot at the end; imported here, where the parent is idle anyway
        with contextlib.suppress(Exception):  # told at the end
            from experiments.results import pictures  # noqa: F401

        self.directory.mkdir(parents=True, exist_ok=True)
        placed: list[Job] = []
        view = make_view(self.directory, total, placed)

        def job_ended(job: Job) -> None:
            if job.state == "failed":
                failures.append(job.name)
            view.job_ended(job)
            on_job_end(job)

        self.pool.should_prune, self.pool.on_job_end = should_prune, job_ended
        try:
            with Interrupt() as interrupt:
                self.pool.run(jobs(placed), view, interrupt)
        except KeyboardInterrupt:  # the second Ctrl-C
            self.pool.kill()
            raise
        except BaseException:
            self.pool.terminate()
            raise
        finally:
            view.close()
        if interrupt.number is not None:
            self.pool.close()
            raise Interrupted(interrupt.number)
        return placed


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the advisory lock of a sweep's directory, which is created if missing.

    Raises UsageError if another process holds it.
    """
    with explain_mkdir_errors(directory, "hydra.sweep.dir"):
        directory.mkdir(parents=True, exist_ok=True)
    lock = lock_directory(directory)
    remove_temporary_files(directory)
    try:
        yield
    finally:
        lock.close()


def report_results(directory: Path) -> bool:
    """Print the ranked table of a sweep and write results.csv and results.png into its directory;
    returns whether any run failed.
    """
    rows = collect([directory])
    if not rows:
        return bool(failures)
    print(f"\n{table(rows)}\n")
    files = [display_path(file) for file in save(rows, directory)]
    print(f"results  {'  '.join(files)}")
    print(f"look     tensorboard --logdir {shlex.quote(display_path(directory))}")
    failed = [row for row in rows if row.state == "failed"]
    if failed:
        name = shlex.quote(f"hydra.sweep.dir={display_path(directory)}")
        print(
            f"failed   {len(failed)}: see error.txt in each; the same command with {name} retries "
            "them"
        )
    return bool(failed or failures)
