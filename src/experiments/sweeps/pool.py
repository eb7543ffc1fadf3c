"""The pool of worker processes of a sweep. Imports no torch."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

from experiments.config.compose import validate
from experiments.config.cuda import cuda_devices
from experiments.directory import record
from experiments.errors import UsageError
from experiments.interrupt import Interrupt
from experiments.sweeps.jobs import Job
from experiments.sweeps.view import View

POLL_SECONDS = 0.2
FORKING = multiprocessing.get_context("forkserver")


@dataclass
class Worker:
    """A worker process, the pipe to it and its current job.

    stop_requested: it was asked to stop a run; the signal may reach the next run before that one
        listens to signals.
    """

    process: Any
    pipe: Connection
    device: int | None
    job: Job | None = None
    stop_requested: bool = False


def never(job: Job, epoch: int, value: float) -> bool:
    """Prunes nothing."""
    return False


@dataclass
class Pool:
    """Worker processes that take job after job.

    size: workers at most. should_prune: is given a job, the epochs it has done and its monitored
    number, and says whether to stop it. on_job_end: is given each job when it has ended.
    """

    size: int
    should_prune: Callable[[Job, int, float], bool] = never
    on_job_end: Callable[[Job], None] = lambda job: None
    workers: list[Worker] = field(default_factory=list)
    retry_queue: list[Job] = field(default_factory=list)  # their worker could not run them
    stopping: bool = False

    def run(self, waiting: Iterator[Job], view: View, interrupt: Interrupt) -> None:
        """Keep every worker busy until no job is left, or until a signal has stopped them all."""
        next_job = next(waiting, None)
        while next_job is not None or any(worker.job for worker in self.workers):
            if interrupt.number is not None and not self.stopping:
                self.stopping, waiting, next_job = True, iter(()), None
                self.terminate()
            if next_job is not None and next_job.state != "waiting":
                self.on_job_end(next_job)
                next_job = next(waiting, None)
                continue
            idle = [worker for worker in self.workers if worker.job is None]
            if next_job is not None and (idle or len(self.workers) < self.size):
                self.assign(next_job, idle[0] if idle else self.add_worker(next_job))
                # the next one is composed and placed while this one runs
                next_job = self.retry_queue.pop() if self.retry_queue else next(waiting, None)
                continue
            busy = {worker.pipe: worker for worker in self.workers if worker.job is not None}
            for pipe in connection.wait(list(busy), timeout=POLL_SECONDS):
                self.receive(busy[pipe])  # type: ignore[index]
            next_job = next_job or (self.retry_queue.pop() if self.retry_queue else None)
            view.refresh()

    def add_worker(self, job: Job) -> Worker:
        """Start a worker; each gets one of the CUDA devices, in turn, where the run may use one."""
        devices = 0 if job.composed.trainer.device == "cpu" else cuda_devices()
        taken = [worker.device for worker in self.workers]
        device = min(range(devices), key=taken.count) if devices > 1 else None
        ours, theirs = FORKING.Pipe()
        # no daemon: a run's DataLoader may have processes of its own
        process = FORKING.Process(target=worker_main, args=(theirs, device))
        process.start()
        theirs.close()
        self.workers.append(Worker(process, ours, device))
        return self.workers[-1]

    def assign(self, job: Job, worker: Worker) -> None:
        """Send a job to a worker; it is retried where the worker has just died."""
        try:
            worker.pipe.send(job.composed)
        except OSError:
            self.workers.remove(worker)
            self.retry_queue.append(job)
            return
        worker.job = job
        job.state, job.started = "running", time.monotonic()

    def receive(self, worker: Worker) -> None:
        """Receive one message of a worker, or that it has died."""
        job = worker.job
        assert job is not None
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            message = self.after_death(worker, job)
        if message[0] == "progress":
            job.done, job.loss, job.accuracy = message[1:]
        elif message[0] == "epoch":
            should_prune = job.done < 1 and self.should_prune(
                job, message[1], message[2][job.monitor]
            )
            if should_prune and not job.pruned:
                job.pruned = worker.stop_requested = True
                worker.process.terminate()
        else:
            worker.job = None
            self.end(job, *message[1:])

    def end(self, job: Job, state: str, value: float | None, error: str | None) -> None:
        """Take in how a job ended; one that was stopped by mistake is retried."""
        job.state, job.value, job.error = state, value, error
        job.seconds = time.monotonic() - job.started
        if job.state == "interrupted" and job.pruned:
            job.state = "pruned"
            record.record_end(job.path, "pruned")
        elif job.state == "interrupted" and not self.stopping:
            # by a signal that was meant for the run before it
            job.state = "waiting"
            self.retry_queue.append(job)
            return
        self.on_job_end(job)

    def after_death(self, worker: Worker, job: Job) -> tuple[Any, ...]:
        """Remove a dead worker and record its run; returns the message that it did not send."""
        worker.process.join()
        self.workers.remove(worker)
        code = worker.process.exitcode
        if code == -signal.SIGTERM and (self.stopping or worker.stop_requested):
            # before the run listened to signals
            return ("end", "interrupted", None, None)
        return ("end", *record_death(job, exit_reason(code)))

    def terminate(self) -> None:
        """Ask all workers to stop."""
        for worker in self.workers:
            worker.process.terminate()

    def close(self) -> None:
        """Release the workers; each leaves when its run has ended."""
        for worker in self.workers:
            worker.pipe.close()
        self.workers.clear()


def start_fork_server() -> None:
    """Start the process that workers are forked from; it imports torch while jobs are composed."""
    from multiprocessing import forkserver

    FORKING.set_forkserver_preload(["experiments.sweeps.worker"])
    forkserver.ensure_running()


def worker_main(pipe: Connection, device: int | None) -> None:
    """What a worker process runs; named here so that the parent need not import worker.py."""
    from experiments.sweeps.worker import main

    main(pipe, device)


def default_size() -> int:
    """One worker per core that this process may use."""
    return len(os.sched_getaffinity(0))


def record_death(job: Job, error: str) -> tuple[str, float | None, str | None]:
    """Record a run whose worker died; returns its state, value and error. A run that had ended by
    then keeps its state, and one without a record gets one.
    """
    try:
        if not (job.path / "run.json").exists():
            job.path.mkdir(exist_ok=True)
            overrides = [str(override) for override in job.composed.hydra.overrides.task]
            record.start(job.path, validate(job.composed), overrides).end("failed", error)
        saved = record.record_end(job.path, "failed", error)
    except UsageError:  # it cannot be read, or a child of the dead worker holds the lock
        return "failed", None, error
    if saved["state"] == "finished":
        return "finished", saved["metrics"]["best"][job.monitor], None
    return saved["state"], None, saved.get("error")


def exit_reason(exit_code: int | None) -> str:
    """How a worker died, in words."""
    if exit_code is None or exit_code >= 0:
        return f"the worker left with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return f"the worker was killed by {name}{hint}"
