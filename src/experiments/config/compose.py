"""Composes, resolves and validates the config of a command line."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from experiments.config.names import rename_moved_targets, run_name
from experiments.config.schema import check
from experiments.config.slips import CONFIG_ERRORS, explain

PACKAGE = Path(__file__).parents[1]
# A wheel has conf/ inside the package; a clone or an editable install has it at the top level.
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parents[1] / "conf"

# OmegaConf looks its loader up by this name; libyaml's is the same in C.
yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # type: ignore[misc]
# used in hydra.sweep.subdir, so that every launcher gives runs the same names
OmegaConf.register_new_resolver("run_name", run_name, replace=True)


def config_directories(args: Namespace) -> list[Path]:
    """The config search path: conf/, then --config-dir."""
    return [CONF, *([Path(args.config_dir).absolute()] if args.config_dir else [])]


def initialize(args: Namespace) -> None:
    """Initialize Hydra with the search path of a command line, unless it is already."""
    if not GlobalHydra.instance().is_initialized():
        folder = str(Path(args.config_path or CONF).absolute())
        hydra.initialize_config_dir(folder, "experiments", version_base="1.3")


def compose(
    args: Namespace, overrides: list[str], *, number: int | None = None
) -> tuple[DictConfig, dict[str, Any]]:
    """The config of a command line: as composed by Hydra, including the `hydra` node, and without
    that node, resolved and validated.

    number: of a sweep's job; None for a single run.

    Raises UsageError if the config cannot be composed or violates the schema.
    """
    config = compose_unchecked(args, overrides)
    enter(config, number)
    return config, validate(config)


def compose_unchecked(args: Namespace, overrides: list[str]) -> DictConfig:
    """The config of a command line as composed by Hydra, including the `hydra` node. Raises
    UsageError if it cannot be composed.
    """
    if args.config_dir:
        # as an override, so that .hydra/ records it
        overrides = [*overrides, f"hydra.searchpath=[file://{Path(args.config_dir).absolute()}]"]
    try:
        initialize(args)
        return hydra.compose(args.config_name or "config", overrides, return_hydra_config=True)
    except CONFIG_ERRORS as error:
        raise explain(error, config_directories(args), overrides) from error


def enter(config: DictConfig, number: int | None = None) -> None:
    """Let `${hydra:...}` resolve in a config with its `hydra` node, before a job runs it.

    number: of a sweep's job; None for a single run.
    """
    if number is not None:
        with open_dict(config):
            config.hydra.job.num, config.hydra.job.id = number, str(number)
    HydraConfig.instance().cfg = config  # type: ignore[assignment]


def validate(job: DictConfig) -> dict[str, Any]:
    """Resolve a composed config without its `hydra` node and check it against the schema.

    Returns plain dicts, lists and scalars: the config that a run saves and is built from. Raises
    UsageError for the first value that violates a rule.
    """
    job = OmegaConf.masked_copy(job, [str(key) for key in job if key != "hydra"])
    try:
        config = OmegaConf.to_container(job, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise explain(error, [], []) from None
    checked = check(rename_moved_targets(config))
    if checked["data"].get("path") is not None:
        # so that the saved config is valid in any working directory
        checked["data"]["path"] = str(Path(checked["data"]["path"]).absolute())
    return checked
