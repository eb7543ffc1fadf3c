"""The parent of a sweep: places each run in a directory, hands it to a worker, shows how it goes.

A sweep's identity is its directory. A run's name in it comes from its overrides, so the same
command on the same directory finds what is there: finished and diverged runs are kept, all
others go on from their checkpoints. Imports no torch.
"""

import contextlib
import hashlib
import math
import multiprocessing
import os
import re
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

FORKING = multiprocessing.get_context("forkserver")
LONGEST_NAME = 200  # bytes; file systems allow 255, and suffixes come to it


@dataclass
class Job:
    """One run of a sweep: where it lies, and how far it is."""

    name: str
    path: Path
    composed: DictConfig | None  # None once it need not run
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


@dataclass
class Sweep:
    """A sweep under way; Hydra's sweepers may launch it in several batches."""

    config: DictConfig
    context: HydraContext
    workers: int | None
    pool: list[Worker] = field(default_factory=list)
    hopeless: Callable[[Job, int, float], bool] = lambda job, epoch, value: False

    def __post_init__(self) -> None:
        self.directory = Path(self.config.hydra.sweep.dir)
        # Hydra's sweeper composes every job to check it, then the launcher does so again
        self.context.config_loader = Remembering(self.context.config_loader)  # type: ignore[assignment]
        start_fork_server()

    def launch(self, batch: list[list[str]], first: int) -> list[JobReturn]:
        """Run a batch of jobs on all workers; returns Hydra's result for each, in order.

        A failed job's value is NaN and a diverged one's the worst there is: an exception would
        make the sweeper drop what is left.
        """

        def jobs(placed: list[Job]) -> Iterator[Job]:
            for number, overrides in enumerate(batch, first):
                composed = self.context.config_loader.load_sweep_config(self.config, overrides)
                try:
                    job = place(self.directory, composed, number)
                except UsageError as error:
                    name = run_name(" ".join(overrides))
                    job = Job(name, self.directory / name, None, "failed", error=str(error))
                if any(job.path == other.path for other in placed):
                    job.state, job.composed, job.reused = "twice", None, True
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
        self.directory.mkdir(parents=True, exist_ok=True)
        placed: list[Job] = []
        shown = view(self.directory, total, placed)
        self.hopeless = hopeless

        def over(job: Job) -> None:
            shown.ended(job)
            ended(job)

        with Interrupt() as interrupt:
            self.keep_busy(jobs(placed), shown, over, interrupt)
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
            if interrupt.number is not None and next_job is not None:
                next_job = None
                for worker in self.pool:
                    os.kill(worker.process.pid, signal.SIGTERM)
            idle = [worker for worker in self.pool if worker.job is None]
            if next_job is not None and next_job.composed is None:
                over(next_job)
                next_job = next(waiting, None)
                continue
            if next_job is not None and (idle or len(self.pool) < count):
                worker = idle[0] if idle else self.add_worker(next_job, len(self.pool))
                worker.job = next_job
                next_job.state, next_job.started = "running", time.monotonic()
                worker.pipe.send(next_job.composed)
                next_job.composed = None
                next_job = next(waiting, None)
                continue
            busy = {worker.pipe: worker for worker in self.pool if worker.job is not None}
            for pipe in connection.wait(list(busy), timeout=0.2):
                self.hear(busy[pipe], over)  # type: ignore[index]
            shown.refresh()

    def add_worker(self, job: Job, number: int) -> Worker:
        """Start a worker; each gets one of the CUDA devices, in turn, where the run may use one."""
        assert job.composed is not None
        devices = 0 if job.composed.trainer.device == "cpu" else schema.cuda_devices()
        device = number % devices if devices > 1 else None
        ours, theirs = FORKING.Pipe()
        process = FORKING.Process(target=worker_main, args=(theirs, device), daemon=True)
        process.start()
        theirs.close()
        self.pool.append(Worker(process, ours, device))
        return self.pool[-1]

    def hear(self, worker: Worker, over: Callable[[Job], None]) -> None:
        """Take in one message of a worker, or that it has died."""
        job = worker.job
        assert job is not None
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            self.pool.remove(worker)
            job.state, job.error = "failed", death(worker.process.exitcode)
            runs.record_end(job.path, "failed", job.error)
        else:
            if message[0] == "at":
                job.done, job.loss, job.accuracy = message[1:]
                return
            if message[0] == "epoch":
                if not job.pruned and self.hopeless(job, message[1], message[2][job.monitor]):
                    job.pruned = True
                    os.kill(worker.process.pid, signal.SIGTERM)
                return
            _, job.state, job.value, job.error = message
            if job.pruned and job.state == "interrupted":
                job.state = "pruned"
                runs.record_end(job.path, "pruned")
        job.seconds = time.monotonic() - job.started
        worker.job = None
        over(job)

    def close(self) -> None:
        """Let the workers go."""
        for worker in self.pool:
            worker.pipe.close()
        self.pool.clear()


class Remembering:
    """Hydra's config loader, which composes each job of a sweep once."""

    def __init__(self, loader: ConfigLoader) -> None:
        self._loader = loader
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def load_sweep_config(
        self, master_config: DictConfig, sweep_overrides: list[str]
    ) -> DictConfig:
        key = tuple(sweep_overrides)
        if key in self._composed:
            return self._composed.pop(key)
        self._composed[key] = self._loader.load_sweep_config(master_config, sweep_overrides)
        return self._composed[key]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


@contextlib.contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Own a sweep's directory for a while. Raises UsageError where another process does."""
    runs.make(directory, "hydra.sweep.dir")
    lock = runs.lock_directory(directory)
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
        return False
    print(f"\n{table(rows)}\n")
    files = [runs.short(file) for file in save(rows, directory)]
    print(f"results  {'  '.join(files)}")
    print(f"look     tensorboard --logdir {shlex.quote(runs.short(directory))}")
    failed = [row for row in rows if row.state == "failed"]
    if failed:
        print(f"failed   {len(failed)}: error.txt in each; the same command tries them again")
    return bool(failed)


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
    name = run_name(composed.hydra.job.override_dirname) or "defaults"
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
            job.state, job.composed, job.reused = record["state"], None, True
            job.value = record.get("metrics", {}).get("best", {}).get(job.monitor)
    return job


def run_name(overrides: str) -> str:
    """A directory's name out of overrides, `loader.batch_size=32,optimizer.lr=0.1`: one level,
    without what a shell or a file system stumbles over, and never the same for two.
    """
    name = re.sub(r"[^\w.,=+\-\[\]]", "_", overrides)
    if name == overrides and len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(overrides.encode()).hexdigest()[:8]
    return f"{name.encode()[:LONGEST_NAME].decode(errors='ignore')}-{digest}"


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
