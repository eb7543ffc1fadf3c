"""The pool of worker processes of a sweep. Imports no torch."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

from omegaconf import DictConfig

from experiments.config.compose import validate, written_overrides
from experiments.config.cuda import cuda_devices
from experiments.config.monitoring import mode_of
from experiments.directory import record
from experiments.errors import UsageError
from experiments.interrupt import STOP_SIGNALS, Interrupt
from experiments.sweeps.fork_server import FORKING, worker_main
from experiments.sweeps.jobs import Job
from experiments.sweeps.view import View

POLL_SECONDS = 0.2
FORK_SERVER_DIED = 255  # the exit code that multiprocessing then reports of every worker


@dataclass
class Worker:
    """A worker process, the pipe to it and its current job.

    stop_requested: SIGTERM was sent to stop a run; the signal may arrive in the next run, before
        that run has installed its signal handlers.
    """

    process: Any
    pipe: Connection
    device: int | None
    job: Job | None = None
    stop_requested: bool = False


def never_prune(job: Job, epoch: int, value: float) -> bool:
    """The pruner of a sweep without pruning."""
    return False


@dataclass
class Pool:
    """A pool of worker processes, each of which runs one job after the other.

    size: maximum number of workers.
    should_prune: called with a job, its number of finished epochs and its monitored value; returns
        whether to stop the job.
    on_job_end: called with each job when it has ended.
    """

    size: int
    should_prune: Callable[[Job, int, float], bool] = never_prune
    on_job_end: Callable[[Job], None] = lambda job: None
    workers: list[Worker] = field(default_factory=list)
    retry_queue: list[Job] = field(default_factory=list)  # jobs to run again
    stopping: bool = False
    data_read: dict[str, dict[str, str]] = field(default_factory=dict)  # by the data's config
    interrupt: Interrupt | None = None

    def run(self, waiting: Iterator[Job], view: View, interrupt: Interrupt) -> None:
        """Keep all workers busy until every job has ended or a signal has stopped them all."""
        self.interrupt = interrupt
        next_job = next(waiting, None)
        while next_job is not None or any(worker.job for worker in self.workers):
            if self.interrupted and not self.stopping:
                self.stopping, waiting, next_job = True, iter(()), None
                self.retry_queue.clear()
                self.terminate()
            if next_job is not None and next_job.state != "waiting":
                self.on_job_end(next_job)
                next_job = next(waiting, None)
                continue
            idle = [worker for worker in self.workers if worker.job is None]
            if next_job is not None and (idle or len(self.workers) < self.size):
                self.assign(next_job, idle[0] if idle else self.add_worker(next_job.composed))
                # compose and place the next job while this one runs
                next_job = self.retry_queue.pop() if self.retry_queue else next(waiting, None)
                continue
            busy = {worker.pipe: worker for worker in self.workers if worker.job is not None}
            for pipe in connection.wait(list(busy), timeout=POLL_SECONDS):
                self.receive(busy[pipe])  # type: ignore[index]
            next_job = next_job or (self.retry_queue.pop() if self.retry_queue else None)
            view.refresh()

    @property
    def interrupted(self) -> bool:
        """Whether a signal has arrived, although `run` may not have noticed it yet."""
        return self.interrupt is not None and self.interrupt.number is not None

    def add_worker(self, composed: DictConfig) -> Worker:
        """Start a worker, on the CUDA device with the fewest workers if the run may use CUDA."""
        devices = 0 if composed.trainer.device == "cpu" else cuda_devices()
        taken = [worker.device for worker in self.workers]
        device = min(range(devices), key=taken.count) if devices > 1 else None
        parent_end, worker_end = FORKING.Pipe()
        # not a daemon process: a run's DataLoader may start processes of its own
        process = FORKING.Process(target=worker_main, args=(worker_end, device))
        process.start()
        worker_end.close()
        self.workers.append(Worker(process, parent_end, device))
        return self.workers[-1]

    def assign(self, job: Job, worker: Worker) -> None:
        """Send a job to a worker; if the worker has just died, the job goes to the retry queue."""
        try:
            worker.pipe.send(("run", job.composed))
        except OSError:
            self.workers.remove(worker)
            self.retry_queue.append(job)
            return
        worker.job = job
        job.state, job.started = "running", time.monotonic()

    def read_data(self, composed: DictConfig) -> dict[str, str]:
        """Have a worker read a job's data; returns the fingerprint of each split, {} if it cannot.

        The worker keeps the data for its next job.
        """
        key = json.dumps(validate(composed, allow_unused=True)["data"])
        if key not in self.data_read:
            idle = [worker for worker in self.workers if worker.job is None]
            worker = idle[0] if idle else self.add_worker(composed)
            try:
                worker.pipe.send(("fingerprints", composed))
                self.data_read[key] = worker.pipe.recv()
            except (EOFError, OSError):  # the job itself will fail, and say why
                self.workers.remove(worker)
                self.data_read[key] = {}
        return self.data_read[key]

    def receive(self, worker: Worker) -> None:
        """Handle one message from a worker, or its death."""
        job = worker.job
        assert job is not None
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            message = self.handle_death(worker, job)
        if message[0] == "progress":
            job.done, job.loss, job.metric = message[1:]
        elif message[0] == "epoch":
            epoch, metrics = message[1:]
            # an epoch may end before the first validation
            judged = job.done < 1 and job.monitor in metrics
            should_prune = judged and self.should_prune(job, epoch, metrics[job.monitor])
            if should_prune and not job.pruned:
                job.pruned = worker.stop_requested = True
                worker.process.terminate()
        else:
            worker.job = None
            self.end(job, *message[1:])

    def end(self, job: Job, state: str, value: float | None, error: str | None) -> None:
        """Store how a job ended; a job that was stopped by mistake goes to the retry queue."""
        job.state, job.value, job.error = state, value, error
        job.seconds = time.monotonic() - job.started
        if job.maximize is None and state in ("finished", "diverged"):
            job.maximize = mode_of(record.read_record(job.path))
        if job.state == "interrupted" and job.pruned:
            job.state = "pruned"
            try:
                record.record_end(job.path, "pruned")
            except UsageError as problem:  # the next command resumes it
                job.error = str(problem)
        elif job.state == "interrupted" and not self.interrupted:
            # the signal was meant for the worker's previous run
            job.state = "waiting"
            self.retry_queue.append(job)
            return
        self.on_job_end(job)

    def handle_death(self, worker: Worker, job: Job) -> tuple[Any, ...]:
        """Remove a dead worker and record its run; returns the end message that it did not send."""
        worker.process.join()
        self.workers.remove(worker)
        code = worker.process.exitcode
        # before the run had installed its signal handlers
        if code == -signal.SIGTERM and worker.stop_requested:
            return ("end", *record_interruption(job))
        # a signal to the whole process group reaches workers and fork server, too
        if self.interrupted and code in (FORK_SERVER_DIED, *(-number for number in STOP_SIGNALS)):
            return ("end", *record_interruption(job))
        return ("end", *record_death(job, exit_reason(code)))

    def terminate(self) -> None:
        """Send SIGTERM to all workers."""
        for worker in self.workers:
            worker.process.terminate()

    def kill(self) -> None:
        """Kill all workers; their runs can be resumed."""
        for worker in self.workers:
            worker.process.kill()

    def close(self) -> None:
        """Close the pipes; each worker exits when its run has ended."""
        for worker in self.workers:
            worker.pipe.close()
        self.workers.clear()


def default_size() -> int:
    """One worker for each core available to this process."""
    return len(os.sched_getaffinity(0))


def record_death(job: Job, error: str) -> tuple[str, float | None, str | None]:
    """Record a run whose worker died; returns its state, value and error. A run that had already
    ended keeps its state; a run without a record gets one.
    """
    try:
        if not (job.path / "run.json").exists():
            job.path.mkdir(parents=True, exist_ok=True)
            overrides = written_overrides(job.composed.hydra)
            record.start(job.path, validate(job.composed, allow_unused=True), overrides).end(
                "failed", error
            )
        saved = record.record_end(job.path, "failed", error)
    except UsageError:  # run.json is unreadable, or a child of the dead worker holds the lock
        return "failed", None, error
    return recorded_end(job, saved)


def record_interruption(job: Job) -> tuple[str, float | None, str | None]:
    """Record a run whose worker was ended by a signal before the run could handle it; as
    `record_death`, but a run without a record gets none.
    """
    try:
        return recorded_end(job, record.record_end(job.path, "interrupted"))
    except UsageError:  # there is no run.json yet, or it is unreadable
        return "interrupted", None, None


def recorded_end(job: Job, saved: dict[str, Any]) -> tuple[str, float | None, str | None]:
    """The state, value and error of a run from its record."""
    if saved["state"] == "finished":
        return "finished", saved["metrics"]["best"][job.monitor], None
    return saved["state"], None, saved.get("error")


def exit_reason(exit_code: int | None) -> str:
    """The reason of a worker's death, for the error message."""
    if exit_code is None or exit_code >= 0:
        return f"the worker exited with code {exit_code}"
    name = signal.Signals(-exit_code).name
    hint = ", possibly out of memory" if name == "SIGKILL" else ""
    return f"the worker was killed by {name}{hint}"
