"""Overrides with several values to a key, on the command line and in `hydra.sweeper.params`."""

from collections.abc import Iterable, Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser


def expand(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """The overrides of a grid's first job, and an assignment for each further value of each key.

    Raises what Hydra raises for a text that is no override.
    """
    first_job: list[str] = []
    other_values: list[str] = []
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        if not override.is_sweep_override():
            first_job.append(str(override.input_line))
            continue
        sweep: Any = override.value()
        bounds = (sweep.start, sweep.end) if override.is_interval_sweep() else ()
        values = bounds or override.sweep_string_iterator()
        first, *others = [f"{override.key_or_group}={value}" for value in values]
        first_job.append(first)
        other_values += others
    return first_job, other_values


def with_params(params: Mapping[Any, Any] | None, arguments: list[str]) -> list[str]:
    """The overrides of a sweep: the `hydra.sweeper.params` of its config, as Hydra's basic sweeper
    reads them, then those of the command line, which win.
    """
    if not params:
        return arguments
    given = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    return [f"{key}={value}" for key, value in params.items()
            if str(key).lstrip("+") not in given] + arguments  # fmt: skip
