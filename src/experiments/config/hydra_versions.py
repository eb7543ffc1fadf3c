"""Where Hydra 1.3 and 1.4 differ. Each has its own OmegaConf, 2.3 and 2.4."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import hydra
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

BEFORE_1_4 = tuple(int(part) for part in hydra.__version__.split(".")[:2]) < (1, 4)
# the keyword of hydra.main and hydra.initialize_config_dir, which 1.4 wants left out
VERSION_BASE: Mapping[str, Any] = {"version_base": "1.3"} if BEFORE_1_4 else {}
# the overrides as a name; 1.4 warns of `hydra.job.override_dirname`
DIRNAME = "${hydra.job.override_dirname}" if BEFORE_1_4 else "${hydra_override_dirname:}"

if not BEFORE_1_4:
    # Of a formatter of hydra/job_logging that is not Python's, as colorlog's. Hydra asks the
    # program for an allow-list, which would also hold for `instantiate` inside the user's code.
    warnings.filterwarnings("ignore", r"Hydra configured Python logging without an execution")


def set_version_base() -> None:
    """Set the version base in a process where neither hydra.main nor hydra.initialize does."""
    if BEFORE_1_4:
        from hydra import version

        version.setbase("1.3")


def register_resolver(name: str, resolver: Callable[..., Any], *, replace: bool = False) -> None:
    """Register a resolver for `${name:...}`. Raises ValueError if it exists, unless `replace`."""
    if BEFORE_1_4:
        OmegaConf.register_new_resolver(name, resolver, replace=replace)
    else:  # 2.4 would check values against annotations, and warn of builtins without a signature
        register = cast(Any, OmegaConf).register_resolver
        register(name, resolver, replace=replace, annotation_validation="off")


def written_dirname(composed: DictConfig) -> str:
    """`hydra.job.override_dirname` of a composed config, with the references in its overrides."""
    job = cast(dict[str, Any], OmegaConf.to_container(composed.hydra.job))
    if BEFORE_1_4:
        return str(job["override_dirname"])
    from hydra.core.override_parser.overrides_parser import OverridesParser

    written = cast(list[str], OmegaConf.to_container(composed.hydra.overrides.task))
    return dirname(OverridesParser.create().parse_overrides(written), composed)


def override_dirname(composed: DictConfig) -> str:
    """`hydra.job.override_dirname` of a composed config, resolved."""
    if BEFORE_1_4:
        return str(composed.hydra.job.override_dirname)
    from hydra.core import utils

    resolver = cast(Any, utils).hydra_override_dirname
    return str(resolver(_root_=composed, _parent_=composed.hydra.job, _node_=None))


def set_override_dirname(shared: DictConfig, overrides: Sequence[Override]) -> None:
    """Set `hydra.job.override_dirname` after `hydra.overrides.task`, which 1.4 reads by itself."""
    if BEFORE_1_4:
        shared.hydra.job.override_dirname = dirname(overrides, shared)


def dirname(overrides: Sequence[Override], composed: DictConfig) -> str:
    """Overrides as a name, by the settings of `hydra.job.config.override_dirname`."""
    naming = composed.hydra.job.config.override_dirname
    excluded = list(naming.exclude_keys)
    lines = sorted(str(o.input_line) for o in overrides if o.key_or_group not in excluded)
    return str(naming.item_sep).join(lines).replace("=", naming.kv_sep)
