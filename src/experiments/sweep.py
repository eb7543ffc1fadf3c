"""The parent of a sweep: places each run in a directory, hands it to a worker, shows how it goes.

A sweep's identity is its directory. A run's name in it comes from its overrides, so the same
command on the same directory finds what is there: finished and diverged runs are kept, all
others go on from their checkpoints. Imports no torch.
"""

import atexit
import contextlib
import math
import multiprocessing
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict

from experiments import config as schema
from experiments import run as runs
from experiments.errors import Interrupted, UsageError
from experiments.interrupt import Interrupt
from experiments.sweep_view import View, view

# The runs of this process's sweeps that failed; a directory that cannot be read does not tell.
failures: list[str] = []

FORKING = multiprocessing.get_context("forkserver")


@dataclass
class Job:
    """One run of a sweep: where it lies, and how far it is."""

    name: str
    path: Path
    composed: DictConfig
    state: str = "waiting"
    monitor: str = "loss/valid"
    done: float = 0.0  # fraction of its epochs
    loss: float = math.nan
    accuracy: float = math.nan
    value: float | None = None  # the best of trainer.monitor
    error: str | None = None
    started: float = 0.0
    seconds: float = 0.0
    reused: bool = False  # it was over before this command
    pruned: bool = False  # it was asked to stop, since there is no hope in it


@dataclass
class Worker:
    """A worker process, the pipe to it and the job that it has."""

    process: Any
    pipe: Connection
    device: int | None
    job: Job | None = None
    asked: bool = False  # to stop a run; the signal may meet the next one before it listens


@dataclass
class Sweep:
    """A sweep under way; Hydra's sweepers may launch it in several batches."""

    config: DictConfig
    context: HydraContext
    workers: int | None
    pool: list[Worker] = field(default_factory=list)
    again: list[Job] = field(default_factory=list)  # given to a worker that could not run them
    stopping: bool = False
    hopeless: Callable[[Job, int, float], bool] = lambda job, epoch, value: False

    def __post_init__(self) -> None:
        self.directory = Path(self.config.hydra.sweep.dir)
        # Hydra's sweeper composes every job to check it, then the launcher does so again
        self.loader = Remembering(self.context.config_loader)
        self.context.config_loader = self.loader  # type: ignore[assignment]
        # multiprocessing waits for the workers when the parent leaves, and they for their pipes
        atexit.register(self.close)
        start_fork_server()

    def launch(self, batch: list[list[str]], first: int) -> list[JobReturn]:
        """Run a batch of jobs on all workers; returns Hydra's result for each, in order.

        A failed job's value is NaN and a diverged one's the worst there is: an exception would
        make the sweeper drop what is left.
        """

        def jobs(placed: list[Job]) -> Iterator[Job]:
            for number, overrides in enumerate(batch, first):
                composed = self.loader.take(self.config, overrides)
                try:
                    job = place(self.directory, composed, number)
                except UsageError as error:
                    name = schema.run_name(" ".join(overrides))
                    job = Job(name, self.directory / name, composed, "failed", error=str(error))
                if any(job.path == other.path for other in placed):
                    job.state, job.reused = "twice", True
                placed.append(job)
                yield job

        jobs_run = self.run_all(jobs, len(batch))
        return [result(job, overrides) for job, overrides in zip(jobs_run, batch, strict=True)]

    def run_all(
        self,
        jobs: Callable[[list[Job]], Iterator[Job]],
        total: int,
        *,
        hopeless: Callable[[Job, int, float], bool] = lambda job, epoch, value: False,
        ended: Callable[[Job], None] = lambda job: None,
    ) -> list[Job]:
        """Run jobs on all workers; returns them as they ended.

        jobs: is given the list that it appends each job to, and composes and places one after
            the other, while workers are busy with earlier ones.
        hopeless: is given a job, the epochs it has done and its monitored number, and says
            whether to stop it. ended: is given each job when it is over.

        Raises Interrupted after a signal, when every running job has written a checkpoint.
        """
        # for the picture at the end, now that the fork server is busy and this process is not
        from experiments import picture  # noqa: F401

        self.directory.mkdir(parents=True, exist_ok=True)
        placed: list[Job] = []
        shown = view(self.directory, total, placed)
        self.hopeless = hopeless

        def over(job: Job) -> None:
            if job.state == "failed":
                failures.append(job.name)
            shown.ended(job)
            ended(job)

        try:
            with Interrupt() as interrupt:
                self.keep_busy(jobs(placed), shown, over, interrupt)
        except BaseException:
            for worker in self.pool:
                worker.process.terminate()
            raise
        finally:
            shown.close()
        if interrupt.number is not None:
            self.close()
            raise Interrupted(interrupt.number)
        return placed

    def keep_busy(
        self,
        waiting: Iterator[Job],
        shown: View,
        over: Callable[[Job], None],
        interrupt: Interrupt,
    ) -> None:
        """Give every worker a job until none is left, or until a signal has stopped them all."""
        count = self.workers or len(os.sched_getaffinity(0))
        next_job = next(waiting, None)
        while next_job is not None or any(worker.job for worker in self.pool):
            if interrupt.number is not None and not self.stopping:
                self.stopping, waiting, next_job = True, iter(()), None
                for worker in self.pool:
                    worker.process.terminate()
            if next_job is not None and next_job.state != "waiting":
                over(next_job)
                next_job = next(waiting, None)
                continue
            idle = [worker for worker in self.pool if worker.job is None]
            if next_job is not None and (idle or len(self.pool) < count):
                self.give(next_job, idle[0] if idle else self.add_worker(next_job))
                # the next one is composed and placed while this one runs
                next_job = self.again.pop() if self.again else next(waiting, None)
                continue
            busy = {worker.pipe: worker for worker in self.pool if worker.job is not None}
            for pipe in connection.wait(list(busy), timeout=0.2):
                self.hear(busy[pipe], over)  # type: ignore[index]
            next_job = next_job or (self.again.pop() if self.again else None)
            shown.refresh()

    def add_worker(self, job: Job) -> Worker:
        """Start a worker; each gets one of the CUDA devices, in turn, where the run may use one."""
        devices = 0 if job.composed.trainer.device == "cpu" else schema.cuda_devices()
        taken = [worker.device for worker in self.pool]
        device = min(range(devices), key=taken.count) if devices > 1 else None
        ours, theirs = FORKING.Pipe()
        # no daemon: a run's DataLoader may have processes of its own
        process = FORKING.Process(target=worker_main, args=(theirs, device))
        process.start()
        theirs.close()
        self.pool.append(Worker(process, ours, device))
        return self.pool[-1]

    def give(self, job: Job, worker: Worker) -> None:
        """Send a job to a worker; it comes up again where the worker has just died."""
        try:
            worker.pipe.send(job.composed)
        except OSError:
            self.pool.remove(worker)
            self.again.append(job)
            return
        worker.job = job
        job.state, job.started = "running", time.monotonic()

    def hear(self, worker: Worker, over: Callable[[Job], None]) -> None:
        """Take in one message of a worker, or that it has died."""
        job = worker.job
        assert job is not None
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            self.pool.remove(worker)
            asked = worker.process.exitcode == -signal.SIGTERM and (self.stopping or worker.asked)
            if asked:  # before the run could listen to signals
                message = ("end", "interrupted", None, None)
            else:
                message = ("end", *self.after_death(job, death(worker.process.exitcode)))
        if message[0] == "at":
            job.done, job.loss, job.accuracy = message[1:]
            return
        if message[0] == "epoch":
            hopeless = job.done < 1 and self.hopeless(job, message[1], message[2][job.monitor])
            if hopeless and not job.pruned:
                job.pruned = worker.asked = True
                worker.process.terminate()
            return
        worker.job = None
        _, job.state, job.value, job.error = message
        job.seconds = time.monotonic() - job.started
        if job.state == "interrupted" and job.pruned:
            job.state = "pruned"
            runs.record_end(job.path, "pruned")
        elif job.state == "interrupted" and not self.stopping:
            # by a signal that was meant for the run before it
            job.state = "waiting"
            self.again.append(job)
            return
        over(job)

    def after_death(self, job: Job, error: str) -> tuple[str, float | None, str | None]:
        """Record a run whose worker died; returns its state, value and error. What had come to its
        end by then keeps it, and what had no record yet gets one.
        """
        try:
            if not (job.path / "run.json").exists():
                job.path.mkdir(exist_ok=True)
                overrides = [str(override) for override in job.composed.hydra.overrides.task]
                runs.start(job.path, schema.validate(job.composed), overrides).end("failed", error)
            record = runs.record_end(job.path, "failed", error)
        except UsageError:  # it cannot be read, or a child of the dead worker lives on
            return "failed", None, error
        if record["state"] == "finished":
            return "finished", record["metrics"]["best"][job.monitor], None
        return record["state"], None, record.get("error")

    def close(self) -> None:
        """Let the workers go, each when its run is over."""
        for worker in self.pool:
            worker.pipe.close()
        self.pool.clear()


class Remembering:
    """Hydra's config loader, which keeps what it composed for a sweeper's check for a launcher."""

    def __init__(self, loader: ConfigLoader) -> None:
        self._loader = loader
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def load_sweep_config(
        self, master_config: DictConfig, sweep_overrides: list[str]
    ) -> DictConfig:
        composed = self._loader.load_sweep_config(master_config, sweep_overrides)
        self._composed[tuple(sweep_overrides)] = composed
        return composed

    def take(self, master_config: DictConfig, overrides: list[str]) -> DictConfig:
        """The composed config of a job; the one of the check where there was one."""
        kept = self._composed.pop(tuple(overrides), None)
        return kept or self._loader.load_sweep_config(master_config, overrides)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


@contextlib.contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Own a sweep's directory for a while. Raises UsageError where another process does."""
    with runs.making(directory, "hydra.sweep.dir"):
        directory.mkdir(parents=True, exist_ok=True)
    lock = runs.lock_directory(directory)
    runs.clean_up(directory)
    try:
        yield
    finally:
        os.close(lock)


def conclude(directory: Path) -> bool:
    """Print the ranked table of a sweep and write results.csv and results.png into its directory;
    returns whether a run failed.
    """
    from experiments.compare import collect, save, table

    rows = collect([directory])
    if not rows:
        return bool(failures)
    print(f"\n{table(rows)}\n")
    files = [runs.short(file) for file in save(rows, directory)]
    print(f"results  {'  '.join(files)}")
    print(f"look     tensorboard --logdir {shlex.quote(runs.short(directory))}")
    failed = [row for row in rows if row.state == "failed"]
    if failed:
        print(f"failed   {len(failed)}: error.txt in each; the same command tries them again")
    return bool(failed or failures)


def start_fork_server() -> None:
    """Start the process that workers are forked from; it imports torch while jobs are composed."""
    from multiprocessing import forkserver

    FORKING.set_forkserver_preload(["experiments.worker"])
    forkserver.ensure_running()


def worker_main(pipe: Connection, device: int | None) -> None:
    """What a worker process runs; named here so that the parent need not import worker.py."""
    from experiments.worker import main

    main(pipe, device)


def place(directory: Path, composed: DictConfig, number: int) -> Job:
    """The directory of a job in its sweep, and what is left to do there.

    Its name comes from the overrides. A run there with another config (a file of conf/ was
    changed) is left alone, and a name with a suffix taken.
    """
    config = schema.validate(composed)
    text = runs.config_text(config)
    name = schema.run_name(composed.hydra.job.override_dirname)
    suffix = 1
    while True:
        path = directory / (name if suffix == 1 else f"{name}-{suffix}")
        saved = path / "config.yaml"
        if not saved.exists() or saved.read_bytes() == text:
            break
        suffix += 1
    with open_dict(composed):
        composed.hydra.job.num, composed.hydra.job.id = number, str(number)
        composed.hydra.sweep.dir, composed.hydra.sweep.subdir = str(directory), path.name
    job = Job(path.name, path, composed, monitor=config["trainer"]["monitor"])
    if (path / "run.json").exists():
        record = runs.read_record(path)
        if record["state"] in runs.OVER:
            job.state, job.reused = record["state"], True
            job.value = record.get("metrics", {}).get("best", {}).get(job.monitor)
    return job


def death(exit_code: int | None) -> str:
    """How a worker died, in words."""
    if exit_code is None or exit_code >= 0:
        return f"the worker left with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return f"the worker was killed by {name}{hint}"


def result(job: Job, overrides: list[str]) -> JobReturn:
    """What Hydra's sweeper is told of a job."""
    told = JobReturn(
        overrides=list(filter_overrides(overrides)),
        working_dir=str(job.path),
        status=JobStatus.COMPLETED,
    )
    worst = math.inf if job.monitor.startswith("loss") else -math.inf
    if job.value is not None:
        told.return_value = job.value
    else:
        told.return_value = worst if job.state == "diverged" else math.nan
    return told
