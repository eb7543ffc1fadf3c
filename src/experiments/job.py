"""Executes one run: from a validated config to a finished run directory."""

import contextlib
import functools
import gc
import json
import math
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import run_job
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.config import resolvers
from experiments.config.compose import validate, written_overrides
from experiments.config.monitoring import maximizes, monitored_first
from experiments.config.secrets import redact, redact_logs, require
from experiments.data import Data
from experiments.directory import record
from experiments.directory.allow_list import config_callbacks
from experiments.directory.claim import claim
from experiments.directory.identity import check_source, differences, identify, keep_changed
from experiments.directory.paths import display_path
from experiments.directory.trust import resume_command
from experiments.errors import Diverged, Interrupted, UsageError
from experiments.interrupt import Interrupt
from experiments.training.build import build

if TYPE_CHECKING:
    from experiments.training.progress import Progress

    # arguments: number of epochs, number of batches per epoch
    ProgressMaker = Callable[[int, int, str], Progress]

MAX_SHOWN = 4  # numbers of a split in a line
_warm = False  # whether a run of this process has ended


def run_single(composed: DictConfig, config: dict[str, Any]) -> None:
    """Claim a directory and run the job in it, with the callbacks and files of Hydra's own main.

    composed: the config with its `hydra` node. config: without it, resolved and validated.
    """
    chosen_by_user = any(o.startswith("hydra.run.dir=") for o in composed.hydra.overrides.hydra)
    requested = Path(composed.hydra.run.dir)
    if chosen_by_user and any(requested.glob("*/run.json")):
        raise UsageError(
            f"hydra.run.dir={requested}: holds the runs of a sweep, which this one would hide; "
            "choose another directory"
        )
    missing = [folder for folder in requested.parents if not folder.exists()]
    directory = claim(requested, exact=chosen_by_user)
    try:
        check_source(config)
        load_data(config)
    except BaseException:  # also after Ctrl-C: remove the empty directories
        with contextlib.suppress(OSError):
            for folder in (directory, *missing):
                folder.rmdir()
        raise
    composed.hydra.run.dir = str(directory)
    composed.hydra.mode = RunMode.RUN
    context = HydraContext(GlobalHydra.instance().config_loader(), config_callbacks(composed))
    context.callbacks.on_run_start(config=composed, config_name="config")
    result = run_job(run, composed, "hydra.run.dir", None, context)
    context.callbacks.on_run_end(config=composed, config_name="config", job_return=result)
    error = result._return_value
    if isinstance(error, UsageError | Diverged):
        raise error  # result.return_value would print an additional line
    _ = result.return_value


def load_data(config: dict[str, Any]) -> Data:
    """The data set of a config; the last one is cached for the next run in this process, unless
    something has written to its rows.

    Raises UsageError if it is no data set that a run can use.
    """
    node = json.dumps(config["data"])
    data, versions = _load_data(node)
    if data.versions() != versions:
        _load_data.cache_clear()
        data, versions = _load_data(node)
    return data


@functools.lru_cache(maxsize=1)
def _load_data(node: str) -> tuple[Data, list[int]]:
    config = json.loads(node)
    data = build({"data": config}, "data")
    from experiments.data.checks import check_data  # imports torch, which the data has done

    check_data(data, config["_target_"])
    return data, data.versions()


def run(config: DictConfig, progress: "ProgressMaker | None" = None) -> float:
    """Execute a run from its composed config; returns the best value of `trainer.monitor`.

    If a sweep's job finds the same run in its directory, it resumes it, or returns its result if
    it has ended in a state that a sweep keeps. Raises UsageError, Diverged, SystemExit after a
    signal, or any other exception; run.json records each.
    """
    redact_logs()
    settings = HydraConfig.get()
    path = Path(settings.runtime.output_dir)
    with where_typed():
        resolved = validate(config, allow_unused=True)  # checked where it was composed
    if not OmegaConf.is_missing(settings.job, "num") and (path / "run.json").exists():
        saved_text, text = (path / "config.yaml").read_bytes(), record.config_text(resolved)
        if record.built_part(saved_text) != record.built_part(text):
            raise UsageError(
                f"{path}: holds a run with another config; use another hydra.sweep.dir"
            )
        reject_changes(path, resolved)
        try:
            run_directory = record.reopen(path, keep=record.COMPLETED)
        except record.Completed as completed:
            return earlier_result(completed.record, resolved["trainer"]["monitor"])
    else:
        overrides = written_overrides(settings)
        with where_typed():
            run_directory = record.start(path, resolved, overrides)
    best = execute(run_directory, resolved, progress=progress)
    print(summary(run_directory))
    return best


def where_typed() -> contextlib.AbstractContextManager[None]:
    """A context in the directory in which the command was typed: with `hydra.job.chdir=true` a job
    is in its own, where a relative path would mean something else.
    """
    if HydraConfig.initialized() and HydraConfig.get().job.chdir:
        return contextlib.chdir(HydraConfig.get().runtime.cwd)
    return contextlib.nullcontext()


def reject_changes(path: Path, config: dict[str, Any]) -> None:
    """Raise UsageError if code, data or versions have changed since a run, except for a run that
    starts anew or with --keep-changed.
    """
    saved = record.read_record(path)
    anew = saved["state"] not in record.COMPLETED and not record.has_checkpoint(path)
    if anew or keep_changed():
        return
    changes = differences(saved, {**identify(config), "data": load_data(config).fingerprints})
    if changes:
        raise UsageError(
            f"{path}: {', '.join(changes)} since this run; use another sweep= or --keep-changed"
        )


def earlier_result(saved: dict[str, Any], monitor: str) -> float:
    """The best value of a run that had ended before, NaN if it has none; raises Diverged if it
    diverged.
    """
    if saved["state"] == "diverged":
        raise Diverged(saved.get("error", "in an earlier command"))
    return float(saved.get("metrics", {}).get("best", {}).get(monitor, math.nan))


def run_in_sweep(config: DictConfig) -> float:
    """Execute a run, printing the traceback of a failure, so that the sweep continues.

    Returns the best value of `trainer.monitor`, NaN for a failed run, plus or minus infinity,
    whichever is worse, for a diverged one.
    """
    resolvers.load_modules()
    value = _value_of(config)
    collect_garbage()
    return value


def _value_of(config: DictConfig) -> float:
    try:
        return run(config)
    except Diverged:
        # resolved, but not the rest, which may refer to secrets
        nodes = {
            key: OmegaConf.to_container(config[key], resolve=True)
            for key in ("trainer", "metrics")
            if key in config
        }
        return -math.inf if maximizes(nodes) else math.inf
    except UsageError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return math.nan
    except Exception:
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
        return math.nan


def resume(path: Path, trust: Sequence[str]) -> None:
    """Resume the run in a directory from its newest checkpoint.

    Raises UsageError if there is no run to resume, or if its config has a `_target_` outside
    experiments, torch and the modules of `trust`.
    """
    from experiments.directory.saved_config import read_config
    from experiments.directory.trust import check_objects

    config = read_config(path, trust)
    already_finished = f"{display_path(path)}: already finished"
    if record.read_record(path)["state"] == "finished":
        print(already_finished)
        return
    check_objects(config, trust)
    require(config, "")
    try:
        run_directory = record.reopen(path)
    except record.Completed:  # meanwhile, in another process
        print(already_finished)
        return
    execute(run_directory, config)
    print(summary(run_directory))


def execute(
    run_directory: record.Run,
    config: dict[str, Any],
    *,
    epochs: int | None = None,
    progress: "ProgressMaker | None" = None,
) -> float:
    """Train in a locked run directory, from its checkpoint if it has one, and record the outcome.

    epochs: stop after this many epochs, if fewer than the config's.
    progress: makes the progress reporter; None selects one that suits standard output.
    """
    exempt_startup()
    try:
        with Interrupt() as interrupt:
            data = load_data(config)
            # imported here, so that earlier errors are reported without waiting for it
            from experiments.train import train
            from experiments.training.progress import make_progress

            best = train(
                config,
                data,
                run_directory,
                lambda: interrupt.number,
                epochs,
                progress or make_progress,
                lambda: interrupt.number,
            )
    except (Interrupted, KeyboardInterrupt) as interruption:
        run_directory.end("interrupted")
        with where_typed():
            command = resume_command(run_directory.path, config)
        print(f"interrupted; resume with: {command}", file=sys.stderr)
        number: int = signal.SIGINT
        if isinstance(interruption, Interrupted):
            number = interruption.signal_number
        sys.exit(128 + number)
    except (UsageError, Diverged) as error:
        run_directory.end(
            "diverged" if isinstance(error, Diverged) else "failed", error=redact(str(error))
        )
        raise
    except BaseException:
        run_directory.end("failed", error=redact(traceback.format_exc()))
        raise
    run_directory.end("finished")
    return best


def exempt_startup() -> None:
    """Exempt the objects from start-up from garbage collection if it is off, see __main__."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def collect_garbage() -> None:
    """Free what a run that has ended left in reference cycles, such as the model that a failed
    one's exception refers to. The first call exempts the rest from later ones: what that run has
    imported and cached. Exempted during a run, its cycles would stay for ever.
    """
    global _warm
    gc.collect()
    if not _warm:
        gc.freeze()
        _warm = True


def tested_weights(run_directory: record.Run) -> str:
    """Which weights the test was of, in words."""
    metrics, trainer = run_directory.record["metrics"], run_directory.record["config"]["trainer"]
    if trainer["test"] == "best" and metrics["best"] != metrics["last"]:
        return "best epoch"
    return "last epoch"


def summary(run_directory: record.Run) -> str:
    """The last lines of a run's output: its results, its directory and how to view it."""
    best, test = run_directory.record["metrics"]["best"], run_directory.record["metrics"]["test"]
    monitor = run_directory.record["config"]["trainer"]["monitor"]
    with where_typed():
        path = shlex.quote(display_path(run_directory.path))

    def numbers(metrics: dict[str, float], split: str) -> str:
        tags = monitored_first((tag for tag in metrics if tag.endswith(f"/{split}")), monitor)
        return ", ".join(f"{tag} {metrics[tag]:.4f}" for tag in tags[:MAX_SHOWN])

    tested = numbers(test, "test").replace("/test", "")
    return (
        f"best  {numbers(best, 'valid')} (epoch {best['epoch']})\n"
        f"test  {tested} ({tested_weights(run_directory)})\n"
        f"run   {path}\n"
        f"look  tensorboard --logdir {path}"
    )
