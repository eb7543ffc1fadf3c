"""The jobs of a sweep: config, directory and progress of each. Imports no torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from omegaconf import DictConfig, open_dict

from experiments.config.compose import validate
from experiments.config.names import run_name
from experiments.directory.identity import differences, identify
from experiments.directory.paths import display_path
from experiments.directory.record import (
    COMPLETED,
    config_text,
    has_checkpoint,
    read_record,
    same_config,
)


@dataclass
class Job:
    """One run of a sweep: its directory and its progress.

    state: waiting, running, or a final state: one of run.json's, or `duplicate` of another job.
    """

    name: str
    path: Path
    composed: DictConfig
    state: str = "waiting"
    monitor: str = "loss/valid"
    done: float = 0.0  # fraction of its epochs that are done
    loss: float = math.nan
    accuracy: float = math.nan
    value: float | None = None  # the best of trainer.monitor
    error: str | None = None
    started: float = 0.0  # time.monotonic()
    seconds: float = 0.0
    reused: bool = False  # it had ended before this command started
    pruned: bool = False  # the pruner has requested its stop


@dataclass
class Continuation:
    """What decides whether a run that a sweep finds in a directory is still the same run.

    read_data: the fingerprints of a job's rows by split, as a worker reads them; {} if they
        cannot be read.
    keep_changed: keep runs although code, data or versions have changed.
    """

    read_data: Callable[[DictConfig], dict[str, str]]
    keep_changed: bool = False

    def changes(self, path: Path, config: dict[str, Any], composed: DictConfig) -> list[str]:
        """What has changed since the run in a directory, which has this config, a phrase each."""
        if not (path / "run.json").exists():
            return []
        record = read_record(path)
        if record["state"] not in COMPLETED and not has_checkpoint(path):
            return []  # it starts anew
        now = identify(config)
        if record.get("data"):
            now = {**now, "data": self.read_data(composed)}
        return differences(record, now)


def place_job(
    directory: Path, composed: DictConfig, number: int, continuation: Continuation
) -> tuple[Job, list[str]]:
    """Assign a job its directory in the sweep and read the state of the run in it, if any; returns
    the job, and a line for each run that is not the same any more.

    The directory is named after the overrides. If it holds a run with another config (a file in
    conf/ was changed), or of other code, data or versions, that run is left alone and the name
    gets a suffix.
    """
    config = validate(composed)
    name = run_name(composed.hydra.job.override_dirname)
    text = config_text(config)
    suffix, notices = 1, list[str]()
    while True:
        path = directory / (name if suffix == 1 else f"{name}-{suffix}")
        saved = path / "config.yaml"
        if not saved.exists():
            break
        if same_config(saved, text):
            changes = continuation.changes(path, config, composed)
            if changes:
                action = "kept all the same" if continuation.keep_changed else "run again beside it"
                notices.append(f"{display_path(path)}: {', '.join(changes)}; {action}")
            if not changes or continuation.keep_changed:
                break
        suffix += 1
    with open_dict(composed):
        composed.hydra.job.num, composed.hydra.job.id = number, str(number)
        composed.hydra.sweep.dir, composed.hydra.sweep.subdir = str(directory), path.name
    job = Job(path.name, path, composed, monitor=config["trainer"]["monitor"])
    if (path / "run.json").exists():
        if not continuation.keep_changed:
            notices.clear()  # it was run again before
        record = read_record(path)
        if record["state"] in COMPLETED:
            job.state, job.reused = record["state"], True
            job.value = record.get("metrics", {}).get("best", {}).get(job.monitor)
    return job, notices


def job_return(job: Job, overrides: list[str]) -> JobReturn:
    """The result of a job for Hydra's sweeper: the best value, NaN for a failed job, plus or minus
    infinity, whichever is worse, for a diverged one.
    """
    returned = JobReturn(
        overrides=list(filter_overrides(overrides)),
        working_dir=str(job.path),
        status=JobStatus.COMPLETED,
    )
    worst = math.inf if job.monitor.startswith("loss") else -math.inf
    if job.value is not None:
        returned.return_value = job.value
    else:
        returned.return_value = worst if job.state == "diverged" else math.nan
    return returned


class CachedConfigLoader:
    """Hydra's config loader with a cache: a sweeper composes every job to validate it, and the
    launcher composes it once more.
    """

    def __init__(self, loader: ConfigLoader) -> None:
        self._loader = loader
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def load_sweep_config(
        self, master_config: DictConfig, sweep_overrides: list[str]
    ) -> DictConfig:
        composed = self._loader.load_sweep_config(master_config, sweep_overrides)
        self._composed[tuple(sweep_overrides)] = composed
        return composed

    def pop(self, master_config: DictConfig, overrides: list[str]) -> DictConfig:
        """The composed config of a job, removed from the cache if it is there."""
        cached = self._composed.pop(tuple(overrides), None)
        return cached or self._loader.load_sweep_config(master_config, overrides)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
