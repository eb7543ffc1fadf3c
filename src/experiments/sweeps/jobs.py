"""The jobs of a sweep: config, directory and progress of each. Imports no torch."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any, cast

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from experiments.config.compose import enter, validate, without_hydra
from experiments.config.hydra_versions import override_dirname, written_dirname
from experiments.config.monitoring import maximizes, mode_of
from experiments.config.names import flatten, format_value, run_name
from experiments.config.references import RESOLVER, references, resolvers_used
from experiments.config.secrets import reject_in_directory
from experiments.directory.identity import differences, identify
from experiments.directory.paths import display_path
from experiments.directory.record import (
    COMPLETED,
    built_part,
    config_text,
    counts_since,
    has_checkpoint,
    keep,
    read_record,
)
from experiments.errors import UsageError
from experiments.results.rows import run_directories


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
    maximize: bool | None = False  # whether more of it is better; None until its record says
    done: float = 0.0  # fraction of its epochs that are done
    loss: float = math.nan
    metric: tuple[str, float] = ("", math.nan)  # the first one besides the loss
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
    configs: what is built from config.yaml, for each directory that was looked at, or that a job
        was assigned.
    """

    read_data: Callable[[DictConfig], dict[str, str]]
    keep_changed: bool = False
    configs: dict[Path, bytes] = field(default_factory=dict)
    _earlier: list[Path] | None = None

    def config(self, path: Path) -> bytes | None:
        """What the run is built from that a directory holds or is going to hold; None if free."""
        if path not in self.configs and (path / "config.yaml").exists():
            self.configs[path] = built_part((path / "config.yaml").read_bytes())
        return self.configs.get(path)

    def earlier_runs(self, directory: Path) -> list[Path]:
        """The runs that were in a sweep's directory when this command began."""
        if self._earlier is None:
            self._earlier = list(run_directories(directory))
        return self._earlier

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

    The directory is named by `hydra.sweep.subdir`, which is after the overrides unless the user
    chose otherwise. If it belongs to another config (a file in conf/ was changed, or the names
    leave a swept key out), or holds a run of other code, data or versions, that run is left alone
    and the name gets a suffix.
    """
    enter(composed, number)
    config, text = validated(composed)
    has_settings = refers_to_settings(composed)
    first = directory / str(composed.hydra.sweep.subdir)
    reject_in_directory(config, "hydra.sweep.subdir", composed.hydra.sweep.subdir)
    path, others, notices = None, list[Path](), list[str]()
    for place in places(directory, composed, continuation):
        if has_settings:  # the name of the directory, say
            name_job(composed, directory, place)
            config, text = validated(composed)
        saved = continuation.config(place)
        if saved is None:
            path = path or place
        elif saved == text:
            changes = continuation.changes(place, config, composed)
            if changes:
                action = "kept all the same" if continuation.keep_changed else "run again beside it"
                notices.append(f"{display_path(place)}: {', '.join(changes)}; {action}")
            if not changes or continuation.keep_changed:
                path = place
                break
        else:
            others.append(place)
    assert path is not None
    name_job(composed, directory, path)
    if has_settings:
        config, text = validated(composed)
    continuation.configs[path] = text
    name = str(path.relative_to(directory))
    job = Job(name, path, composed, monitor=config["trainer"]["monitor"],
              maximize=maximizes(config))  # fmt: skip
    if not (path / "run.json").exists():
        notices += changed_references(others, config, composed)
    else:
        if not continuation.keep_changed:
            notices.clear()  # it was run again before
        record = read_record(path)
        if record["state"] in COMPLETED:
            job.state, job.reused = record["state"], True
            job.maximize = mode_of(record)
            job.value = record.get("metrics", {}).get("best", {}).get(job.monitor)
            supersede_later_runs(record, job.path, first, continuation)
    return job, notices


def validated(composed: DictConfig) -> tuple[dict[str, Any], bytes]:
    """A job's checked config, and the text of what the run is built from."""
    config = validate(composed, allow_unused=True)
    return config, built_part(config_text(config))


def name_job(composed: DictConfig, directory: Path, path: Path) -> None:
    """Set the directory that a job has, or may have, in the sweep's directory."""
    with read_write(composed), open_dict(composed):
        composed.hydra.sweep.dir = str(directory)
        composed.hydra.sweep.subdir = str(path.relative_to(directory))


def refers_to_settings(composed: DictConfig) -> bool:
    """Whether what a run is built from has `${hydra:...}` in it."""
    job = OmegaConf.to_container(without_hydra(composed))
    return "hydra" in resolvers_used(references(job))


def supersede_later_runs(
    record: dict[str, Any], kept: Path, first: Path, continuation: Continuation
) -> None:
    """Let a run that is kept count, and not a later one of the same config: its code, data or
    versions were changed, and changed back.

    record: the run.json of the run in `kept`. first: the directory that it would have without
        other runs.
    """
    for path in (first, *numbered(first).values()):
        same = path != kept and continuation.config(path) == continuation.config(kept)
        if not same or not (path / "run.json").exists():
            continue
        if counts_since(read_record(path)) > counts_since(record):
            keep(kept)
            return


def places(directory: Path, composed: DictConfig, continuation: Continuation) -> Iterator[Path]:
    """The directories that a job may have: that of its name, those with a suffix, other runs of
    the sweep if its name is the user's choice or may be another one each time, and a free one.

    Raises UsageError for a name that leads out of the sweep's directory.
    """
    name = Path(str(composed.hydra.sweep.subdir))
    if name.is_absolute() or ".." in name.parts or not name.parts:
        raise UsageError(f"hydra.sweep.subdir={name}: expected a path below the sweep's directory")
    first = directory / name
    stable = not re.search(RESOLVER, written_dirname(composed))
    by_overrides = stable and run_name(override_dirname(composed)) == str(name)
    if by_overrides and continuation.config(first) is None and not first.exists():
        yield first
        return
    suffixed = numbered(first)
    tried = [first, *suffixed.values()]
    yield from tried
    if not by_overrides:
        yield from (run for run in continuation.earlier_runs(directory) if run not in tried)
    number = 2
    while continuation.config(free := first.with_name(f"{name.name}-{number}")) is not None:
        if number not in suffixed:  # assigned, but not begun
            yield free
        number += 1
    yield free


def numbered(first: Path) -> dict[int, Path]:
    """The directories that have a directory's name with a number behind it."""
    found = {entry.name[len(first.name) + 1 :]: entry
             for entry in first.parent.glob(f"{escape(first.name)}-*")}  # fmt: skip
    return {int(end): found[end] for end in sorted(filter(str.isdecimal, found), key=int)}


def changed_references(
    others: Sequence[Path], config: dict[str, Any], composed: DictConfig
) -> list[str]:
    """A line for a run of `others` whose config differs only in what resolves to another value
    each time, such as `${now:%S}`; else [].
    """
    if not others:
        return []
    written = {
        key: value
        for key, value in flatten(cast(dict[str, Any], OmegaConf.to_container(composed)))
        if isinstance(value, str) and "${" in value
    }
    now = dict(flatten(config))
    for path in others if written.keys() & now.keys() else ():
        if not (path / "run.json").exists():
            continue
        before = dict(flatten(read_record(path)["config"]))
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        resolved = any(re.search(RESOLVER, written.get(key, "")) for key in keys)
        if resolved and written.keys() >= set(keys):
            changes = (
                f"{key}={written[key]} was {format_value(before.get(key))}, "
                f"is {format_value(now[key])}"
                for key in keys
            )
            return [f"{display_path(path)}: {', '.join(changes)}; run again beside it"]
    return []


def job_return(job: Job, overrides: list[str]) -> JobReturn:
    """The result of a job for Hydra's sweeper: the best value, NaN for a failed job, plus or minus
    infinity, whichever is worse, for a diverged one.
    """
    returned = JobReturn(
        overrides=list(filter_overrides(overrides)),
        working_dir=str(job.path),
        status=JobStatus.COMPLETED,
    )
    worst = -math.inf if job.maximize else math.inf
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
