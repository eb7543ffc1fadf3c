"""The overrides of a sweep: several values for a key, and what its jobs share."""

from argparse import Namespace
from typing import Any

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, open_dict

from experiments.config.compose import compose_unchecked, enter
from experiments.errors import UsageError


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


def shared_config(args: Namespace, first: DictConfig, overrides: list[Override]) -> DictConfig:
    """The config that a sweep's jobs share, with its `hydra` node: composed without the swept
    keys, as Hydra does, or with the values of the first job if other overrides need those.

    first: the composed config of the first job.
    """
    fixed = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
    try:
        shared = compose_unchecked(args, fixed)
    except UsageError:
        shared = first
    task = [override for override in overrides if not override.is_hydra_override()]
    naming = shared.hydra.job.config.override_dirname
    with open_dict(shared):
        shared.hydra.overrides.task = [str(override.input_line) for override in task]
        shared.hydra.job.override_dirname = get_overrides_dirname(
            task, list(naming.exclude_keys), naming.item_sep, naming.kv_sep
        )
    enter(shared)
    return shared
