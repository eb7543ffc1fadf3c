"""A worker process of a sweep: runs one job after the other, with torch imported once.

The fork server preloads this module, so that a worker starts with all of it in memory.
"""

import atexit
import gc
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from functools import partial
from multiprocessing import connection, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.plugins import Plugins
from hydra.core.utils import JobRuntime, JobStatus, run_job, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig

from experiments import job, stdio
from experiments.config import resolvers
from experiments.config.compose import validate
from experiments.config.hydra_versions import set_version_base
from experiments.config.monitoring import monitored_first
from experiments.config.secrets import redact
from experiments.directory.allow_list import config_callbacks
from experiments.directory.record import read_record
from experiments.errors import Diverged, UsageError
from experiments.interrupt import STOP_SIGNALS, ignore_stop_signals
from experiments.train import train  # noqa: F401  (takes a second to import)

if TYPE_CHECKING:
    from torch import Tensor

REPORT_SECONDS = 0.2
# The fork server exits after the parent and keeps the sweep's output open until then; a garbage
# collection pass over torch at exit would take 0.4 s.
atexit.register(gc.freeze)


def main(parent: Connection, cuda_device: int | None) -> None:
    """Run each composed config that the parent sends, and send back its progress and its end.

    Messages to the parent: ("progress", fraction of the run that is done, loss, (name of a
    metric, its value)), ("epoch", number of epochs done, metrics of the last one) and
    ("end", state, best value of trainer.monitor or None, error or None).
    """
    stdio.protect()
    # they reach the whole process group; the parent handles them and sends SIGTERM
    ignore_stop_signals(*set(STOP_SIGNALS) - {signal.SIGTERM})
    threading.Thread(target=exit_with_parent, daemon=True).start()
    if cuda_device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(cuda_device)
    # for a DataLoader's workers: by default they would have a fork server of this worker's, which,
    # if the worker is killed, they keep alive and which keeps them alive
    multiprocessing.set_start_method("fork", force=True)
    os.register_at_fork(after_in_child=parent.close)  # or the parent would not see this one's death
    setup_globals()
    set_version_base()
    JobRuntime.instance().set("name", "experiments")
    Plugins.instance()  # plugins and modules of the user's may register resolvers
    resolvers.load_modules()
    job.exempt_startup()  # in a run, this would exempt the run, too
    while True:
        try:
            request, composed = parent.recv()
        except (EOFError, OSError):  # the sweep has ended
            return
        if request == "fingerprints":
            parent.send(fingerprints(composed))
            continue
        parent.send(("end", *run_in_directory(composed, parent)))
        job.collect_garbage()


def fingerprints(composed: DictConfig) -> dict[str, str]:
    """The fingerprints of a job's rows by split; {} if its data cannot be read."""
    try:
        return job.load_data(validate(composed, allow_unused=True)).fingerprints
    except BaseException:  # the run itself will fail, and say why
        return {}


def exit_with_parent() -> None:
    """Exit at once when the parent dies, as if killed; the run can be resumed."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def run_in_directory(
    composed: DictConfig, parent: Connection
) -> tuple[str, float | None, str | None]:
    """Run one job with its output in `output.txt` of its directory; returns the state, best value
    and error of the end message. Never raises.
    """
    path = Path(composed.hydra.sweep.dir) / composed.hydra.sweep.subdir
    try:
        path.mkdir(parents=True, exist_ok=True)
        with (path / "output.txt").open("ab", buffering=0) as output:
            os.dup2(output.fileno(), sys.stdout.fileno())
            os.dup2(output.fileno(), sys.stderr.fileno())

        def task(config: DictConfig) -> float:
            return job.run(config, partial(ProgressReporter, parent))

        # as Hydra's own launchers do, so that the config's callbacks are called
        context = HydraContext(config_loader=None, callbacks=config_callbacks(composed))  # type: ignore[arg-type]
        result = run_job(task, composed, "hydra.sweep.dir", "hydra.sweep.subdir", context)
        value = result._return_value
        if result.status is JobStatus.COMPLETED:
            return read_record(path)["state"], float(value), None
        if isinstance(value, Diverged):
            return "diverged", None, str(value)
        if isinstance(value, UsageError):
            return "failed", None, redact(str(value))
        return "failed", None, redact("".join(traceback.format_exception_only(value)).strip())
    except SystemExit:  # the run was stopped by a signal
        return "interrupted", None, None
    except BaseException as error:
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
        return "failed", None, redact("".join(traceback.format_exception_only(error)).strip())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class ProgressReporter:
    """Sends the progress of a run to the sweep's parent, every REPORT_SECONDS and at epoch ends."""

    def __init__(self, parent: Connection, epochs: int, batches: int, monitor: str) -> None:
        self.parent, self.epochs, self.batches, self.monitor = parent, epochs, batches, monitor
        self.metric = ("", math.nan)  # the first one besides the loss
        self._sent = 0.0

    def advance(self, epoch: int, batch: int, rows: int, losses: "Tensor") -> None:
        now = time.monotonic()
        if now - self._sent >= REPORT_SECONDS:
            self.send((epoch - 1 + batch / self.batches) / self.epochs, losses.mean().item())
            self._sent = now

    def epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        others = [tag for tag in metrics if tag.endswith("/valid") and tag != "loss/valid"]
        if others:
            first = monitored_first(others, self.monitor)[0]
            self.metric = first.removesuffix("/valid"), metrics[first]
        self.send(epoch / self.epochs, metrics["loss/train_epoch"])
        self.parent.send(("epoch", epoch, dict(metrics)))

    def send(self, done: float, loss: float) -> None:
        self.parent.send(("progress", done, loss, self.metric))

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        """The table shows the numbers of epochs."""

    def close(self) -> None:
        """Does nothing: the pipe is used for the next run."""
