"""One run, from a checked config to a finished directory."""

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
from typing import TYPE_CHECKING, Any, cast

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import run_job
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.config.compose import validate
from experiments.data import Data
from experiments.directory import record
from experiments.directory.claim import claim
from experiments.directory.paths import display_path
from experiments.errors import Diverged, Interrupted, UsageError
from experiments.interrupt import Interrupt
from experiments.training.build import build

if TYPE_CHECKING:
    from experiments.training.progress import Progress

    # given the number of epochs and of batches in each
    ProgressMaker = Callable[[int, int], Progress]


def run_single(composed: DictConfig, config: dict[str, Any]) -> None:
    """Claim a directory and run the job there as Hydra's own main would.

    composed: with Hydra's own node; config: without it, resolved and checked.
    """
    named = any(o.startswith("hydra.run.dir=") for o in composed.hydra.overrides.hydra)
    wanted = Path(composed.hydra.run.dir)
    missing = [folder for folder in wanted.parents if not folder.exists()]
    directory = claim(wanted, exact=named)
    try:
        load_data(config)
    except BaseException:  # Ctrl-C, too, leaves nothing empty behind
        with contextlib.suppress(OSError):
            for folder in (directory, *missing):
                folder.rmdir()
        raise
    composed.hydra.run.dir = str(directory)
    composed.hydra.mode = RunMode.RUN
    context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks(composed))
    context.callbacks.on_run_start(config=composed, config_name="config")
    result = run_job(run, composed, "hydra.run.dir", None, context)
    context.callbacks.on_run_end(config=composed, config_name="config", job_return=result)
    error = result._return_value
    if isinstance(error, UsageError | Diverged):
        raise error  # return_value would first print a line of its own
    _ = result.return_value


def load_data(config: dict[str, Any]) -> Data:
    """The data set that a config names; the last one is kept, for the next run in this process."""
    return _load_data(json.dumps(config["data"]))


@functools.lru_cache(maxsize=1)
def _load_data(node: str) -> Data:
    return cast(Data, build({"data": json.loads(node)}, "data"))


def run(config: DictConfig, progress: "ProgressMaker | None" = None) -> float:
    """One run, from a composed config to a finished directory; returns the monitored number.

    A job of a sweep whose directory holds the same run already goes on with it, or returns what
    it reached. The directory tells how it ended, whatever is raised: UsageError, Diverged,
    SystemExit after a signal, or our own mistake.
    """
    settings = HydraConfig.get()
    path = Path(settings.runtime.output_dir)
    resolved = validate(config)
    if not OmegaConf.is_missing(settings.job, "num") and (path / "run.json").exists():
        if (path / "config.yaml").read_bytes() != record.config_text(resolved):
            raise UsageError(f"{path}: holds a run of another config; name another hydra.sweep.dir")
        saved = record.read_record(path)
        if saved["state"] == "finished":
            return float(saved["metrics"]["best"][resolved["trainer"]["monitor"]])
        if saved["state"] == "diverged":
            raise Diverged(saved["error"])
        owned = record.reopen(path)
    else:
        overrides = [str(override) for override in settings.overrides.task]
        owned = record.start(path, resolved, overrides)
    best = execute(owned, resolved, progress=progress)
    print(summary(owned))
    return best


def run_in_sweep(config: DictConfig) -> float:
    """A run whose failure does not stop the others: it is in the run's directory, and told here.

    Returns the monitored number, NaN for a failed run, the worst there is for a diverged one.
    """
    try:
        return run(config)
    except Diverged:
        return math.inf if config.trainer.monitor.startswith("loss") else -math.inf
    except Exception:
        traceback.print_exc()
        return math.nan


def resume(path: Path, trust: Sequence[str]) -> None:
    """Go on with the run in a directory where its newest checkpoint stands.

    Raises UsageError where there is none to go on with, or where its config names what is
    neither ours, torch's nor in the modules of `trust`.
    """
    from experiments.directory.saved_config import read_config
    from experiments.directory.trust import check_objects

    config = read_config(path, trust)
    if record.read_record(path)["state"] == "finished":
        print(f"{display_path(path)}: finished already")
        return
    check_objects(config, trust)
    owned = record.reopen(path)
    execute(owned, config)
    print(summary(owned))


def execute(
    owned: record.Run,
    config: dict[str, Any],
    *,
    epochs: int | None = None,
    progress: "ProgressMaker | None" = None,
) -> float:
    """Fit in an owned run directory, fresh or from its checkpoint, and record how that ended.

    epochs: end after so many of the config's.
    progress: makes what shows how far the run is; None is what suits standard output.
    """
    # freeze what start-up made out of collection; see __main__
    gc.freeze()
    gc.enable()
    try:
        with Interrupt() as interrupt:
            data = load_data(config)
            # imported here, so that whatever is wrong before it is reported at once
            from experiments.train import train
            from experiments.training.progress import make_progress

            best = train(
                config, data, owned, lambda: interrupt.number, epochs, progress or make_progress
            )
    except (Interrupted, KeyboardInterrupt) as asked:
        owned.end("interrupted")
        path = shlex.quote(display_path(owned.path))
        print(f"interrupted; go on with: python -m experiments resume={path}", file=sys.stderr)
        number = asked.signal_number if isinstance(asked, Interrupted) else signal.SIGINT
        sys.exit(128 + number)
    except (UsageError, Diverged) as error:
        owned.end("diverged" if isinstance(error, Diverged) else "failed", error=str(error))
        raise
    except BaseException:
        owned.end("failed", error=traceback.format_exc())
        raise
    owned.end("finished")
    return best


def summary(owned: record.Run) -> str:
    """The last lines of a run: what it reached, where it lies and how to look at it."""
    best, test = owned.record["metrics"]["best"], owned.record["metrics"]["test"]
    path = shlex.quote(display_path(owned.path))
    return (
        f"best  loss/valid {best['loss/valid']:.4f}, accuracy/valid {best['accuracy/valid']:.4f} "
        f"(epoch {best['epoch']})\n"
        f"test  loss {test['loss/test']:.4f}, accuracy {test['accuracy/test']:.4f} (last epoch)\n"
        f"run   {path}\n"
        f"look  tensorboard --logdir {path}"
    )
