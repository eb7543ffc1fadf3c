"""The overrides of a sweep: on the command line and in `hydra.sweeper.params`, several values for a
key, and what its jobs share.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any, cast

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments.config import resolvers
from experiments.config.compose import (
    CONFIG_ERRORS,
    compose_unresolved,
    enter,
    explained,
    initialize,
)
from experiments.config.hydra_versions import set_override_dirname
from experiments.config.slips import explain
from experiments.errors import UsageError

SWEEPERS = ("basic", "tpe")  # whose hydra.sweeper.params are read here; others read them


def override_parser(args: Namespace) -> OverridesParser:
    """Hydra's parser for the overrides of a command line, which knows the options of groups."""
    initialize(args)
    return OverridesParser.create(GlobalHydra.instance().config_loader())


def parse_grid(args: Namespace, words: list[str]) -> list[tuple[Override, list[str]]]:
    """Each override with its swept values, as from `swept_values`. Raises UsageError."""
    with explained(args, words):
        overrides = override_parser(args).parse_overrides(words)
        return [(override, swept_values(override)) for override in overrides]


def first_values(grid: list[tuple[Override, list[str]]]) -> list[str]:
    """The overrides of a sweep's first job, which is composed as one of a sweep."""
    return [values[0] if values else str(override.input_line) for override, values in grid]


def swept_values(override: Override) -> list[str]:
    """A swept override as an override for each of its values, or for both bounds of an interval;
    [] if it is not swept. Raises UsageError if it has no value or sweeps a key of Hydra's.
    """
    if not override.is_sweep_override():
        return []
    if override.is_hydra_override():
        raise UsageError(f"{override.input_line}: a key of Hydra's cannot be swept; give one value")
    sweep: Any = override.value()
    bounds = [sweep.start, sweep.end] if override.is_interval_sweep() else None
    values = override.sweep_string_iterator() if bounds is None else bounds
    found = [f"{override.get_key_element()}={value}" for value in values]
    if not found:
        raise UsageError(f"{override.input_line}: has no value to sweep; widen it")
    return found


def reject_repeated(overrides: list[Override]) -> None:
    """Raise UsageError if a swept key is given again, of which Hydra runs the last values alone.

    Without a sweep the last one counts, as everywhere in Hydra.
    """
    swept: dict[tuple[str, str | None], str] = {}
    for override in overrides:
        key, line = (override.key_or_group, override.package), str(override.input_line)
        if key in swept:
            raise UsageError(
                f"{swept[key]} and {line}: {override.key_or_group} is swept once; give all of its "
                "values together, as a,b,c"
            )
        if override.is_sweep_override():
            swept[key] = line


def with_params(params: Mapping[Any, Any] | None, arguments: list[str]) -> list[str]:
    """The overrides of a sweep: the `hydra.sweeper.params` of its config, as Hydra's basic sweeper
    reads them, then those of the command line, which win.
    """
    if not params:
        return arguments
    given = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    return [f"{key}={value}" for key, value in params.items()
            if str(key).lstrip("+") not in given] + arguments  # fmt: skip


def sweeper_params(composed: DictConfig) -> dict[Any, Any]:
    """`hydra.sweeper.params` of a composed config, {} where a sweeper of others reads them. Raises
    UsageError if one cannot be resolved.
    """
    params = composed.hydra.sweeper.get("params")
    if not params or composed.hydra.runtime.choices["hydra/sweeper"] not in SWEEPERS:
        return {}
    resolvers.register()
    try:
        return cast(dict[Any, Any], OmegaConf.to_container(params, resolve=True))
    except CONFIG_ERRORS as error:
        raise explain(error, [], []) from error


def shared_config(args: Namespace, first: DictConfig, overrides: list[Override]) -> DictConfig:
    """The config that a sweep's jobs share, with its `hydra` node: composed without the swept
    keys, as Hydra does, or with the values of the first job if other overrides need those.

    first: the composed config of the first job.
    """
    fixed = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
    try:
        shared = compose_unresolved(args, fixed)
    except UsageError:
        shared = first
    task = [override for override in overrides if not override.is_hydra_override()]
    with open_dict(shared):
        if sweeper_params(shared):  # they are among the overrides
            shared.hydra.sweeper.params = None
            # so that each job has the sweeper of the sweep, as Hydra 1.4 demands
            given = cast(dict[str, Any], OmegaConf.to_container(shared.hydra.overrides))["hydra"]
            shared.hydra.overrides.hydra = [*given, "hydra.sweeper.params=null"]
        shared.hydra.overrides.task = [str(override.input_line) for override in task]
        set_override_dirname(shared, task)
    enter(shared)
    return shared
