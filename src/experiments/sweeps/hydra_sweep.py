"""A sweep through Hydra's sweeper and launcher: directory, names, run. Imports no torch.

As Hydra's own main does it, but from a config that is already composed.
"""

import math
from pathlib import Path
from typing import Any, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, configure_log
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments.config.compose import enter, without_hydra, written_overrides
from experiments.config.hydra_versions import DIRNAME
from experiments.config.names import quote_value
from experiments.config.references import Reference, references, referred_roots, resolvers_used
from experiments.config.resolvers import BUILT_IN
from experiments.directory.allow_list import config_callbacks
from experiments.directory.claim import claim
from experiments.errors import UsageError

HYDRAS_NAMES = "${hydra.job.num}"  # Hydra's default of hydra.sweep.subdir
OUR_NAMES = f"${{run_name:{DIRNAME}}}"


def name_runs(shared: DictConfig) -> None:
    """Set the names of the runs' directories in the shared config, for every launcher, unless the
    user chose others. Raises UsageError for names outside of the sweep's directory.
    """
    overrides = written(shared.hydra.overrides)["hydra"]
    path = Path(names(shared))
    outside = path.is_absolute() or ".." in path.parts or not path.parts
    if outside and shared.hydra.runtime.choices["hydra/launcher"] == "workers":
        raise UsageError(f"hydra.sweep.subdir={path}: expected a path below the sweep's directory")
    if names(shared) == HYDRAS_NAMES and "hydra.sweep.subdir=" not in " ".join(overrides):
        # set here: in the YAML it would slow down every start
        with open_dict(shared):
            shared.hydra.sweep.subdir = OUR_NAMES
            shared.hydra.overrides.hydra = [*overrides, f"hydra.sweep.subdir='{OUR_NAMES}'"]


def written(node: object) -> dict[str, Any]:
    """A node with its references: reading them from the config would resolve those."""
    return cast(dict[str, Any], OmegaConf.to_container(node))


def names(shared: DictConfig) -> str:
    """`hydra.sweep.subdir` as it was written, with its references."""
    return str(written(shared.hydra.sweep)["subdir"])


def choose_directory(shared: DictConfig) -> Path:
    """The sweep's directory, a new one unless the user chose one, and set in the shared config.
    Raises UsageError if it lies in a single run's directory.
    """
    directory = Path(shared.hydra.sweep.dir)
    for folder in (directory, *directory.absolute().parents):
        if (folder / "run.json").exists():
            raise UsageError(
                f"hydra.sweep.dir={directory}: {folder} holds a single run, which would hide the "
                "sweep's; choose another directory"
            )
    overrides = written(shared.hydra.overrides)["hydra"]
    others = [word for word in overrides if not word.lstrip("+").startswith("hydra.sweep.dir=")]
    if others == overrides and not is_constant(shared):
        directory = claim(directory, exact=False)
    with open_dict(shared):
        shared.hydra.mode = RunMode.MULTIRUN
        shared.hydra.sweep.dir = str(directory)
        # each launcher composes the jobs with these: a reference to a swept key must not lead
        # them to several directories
        shared.hydra.overrides.hydra = [*others, quote_value(f"hydra.sweep.dir={directory}")]
    return directory


def is_constant(shared: DictConfig) -> bool:
    """Whether `hydra.sweep.dir` names the same directory each time: without `${now:...}`, and
    without resolvers that are not known, also in variables that it may refer to.
    """
    text = str(written(shared.hydra.sweep)["dir"])
    found = [Reference(("hydra", "sweep", "dir"), text)]
    if referred_roots(found) - {"hydra"}:
        found += references(OmegaConf.to_container(without_hydra(shared)))
    return resolvers_used(found) <= {"hydra", "oc.env", "oc.select", *BUILT_IN}


def reject_intervals(shared: DictConfig, overrides: list[Override]) -> None:
    """Raise UsageError for an interval that Hydra's basic sweeper is to enumerate."""
    for override in overrides:
        if (
            override.is_interval_sweep()
            and shared.hydra.runtime.choices["hydra/sweeper"] == "basic"
        ):
            raise UsageError(
                f"{override.input_line}: an interval needs hydra/sweeper=tpe; give values as a,b,c"
            )


def reject_shared_directories(shared: DictConfig, overrides: list[Override]) -> None:
    """Raise UsageError if two jobs of a grid would have one directory, where a launcher of Hydra's
    names them. The sweep's own launcher gives the second a suffix.
    """
    choices = shared.hydra.runtime.choices
    if choices["hydra/launcher"] == "workers" or choices["hydra/sweeper"] != "basic":
        return
    excluded = list(shared.hydra.job.config.override_dirname.exclude_keys)
    if names(shared) == OUR_NAMES and not excluded:
        return
    loader = GlobalHydra.instance().config_loader()
    task = [override for override in overrides if not override.is_hydra_override()]
    placed: dict[str, list[str]] = {}
    for number, job in enumerate(BasicSweeper.split_arguments(task, None)[0]):
        composed = loader.load_sweep_config(shared, list(job))
        enter(composed, number)
        other = placed.setdefault(str(composed.hydra.sweep.subdir), job)
        if other != job:
            one, two = next((a, b) for a, b in zip(other, job, strict=True) if a != b)
            cause = (
                f"hydra.job.config.override_dirname.exclude_keys=[{','.join(excluded)}]"
                if names(shared) == OUR_NAMES
                else f"hydra.sweep.subdir={names(shared)}"
            )
            raise UsageError(
                f"{cause}: the runs of {one} and {two} would share a directory; let it differ, or "
                "use hydra/launcher=workers, which numbers them"
            )
    enter(shared)


def run(shared: DictConfig, task: TaskFunction) -> bool:
    """Run the jobs of `shared.hydra.overrides.task`; returns whether any has failed.

    task: runs a job from its composed config; returns NaN for a failed one.
    """
    configure_log(shared.hydra.hydra_logging, shared.hydra.verbose)
    callbacks = config_callbacks(shared)
    callbacks.on_multirun_start(config=shared, config_name=shared.hydra.job.config_name)
    sweeper = Plugins.instance().instantiate_sweeper(
        config=shared,
        hydra_context=HydraContext(GlobalHydra.instance().config_loader(), callbacks),
        task_function=task,
    )
    batches = sweeper.sweep(written_overrides(shared.hydra))
    callbacks.on_multirun_end(config=shared, config_name=shared.hydra.job.config_name)
    returned = [job for batch in batches or () if isinstance(batch, list | tuple) for job in batch]
    return any(
        isinstance(job.return_value, float) and math.isnan(job.return_value)
        for job in returned
        if isinstance(job, JobReturn)
    )
