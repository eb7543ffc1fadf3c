"""Composes, resolves and validates the config of a command line."""

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from experiments.config.hydra_versions import VERSION_BASE, register_resolver
from experiments.config.names import format_value, run_name
from experiments.config.search_path import CONF as CONF  # re-exported
from experiments.config.search_path import config_directories, make_conf_importable, set_entries
from experiments.errors import UsageError

if TYPE_CHECKING:
    from hydra.conf import HydraConf

    from experiments.config.references import Reference

# what composing and resolving a config raise (ValueError: for an override such as "=3")
CONFIG_ERRORS = (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError)

# OmegaConf looks its loader up by this name; libyaml's is the same in C.
yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # type: ignore[misc]
# used in hydra.sweep.subdir, so that every launcher gives runs the same names
register_resolver("run_name", run_name, replace=True)


def initialize(args: Namespace) -> None:
    """Initialize Hydra with the search path of a command line, unless it is already."""
    if not GlobalHydra.instance().is_initialized():
        set_entries(args.config_dir, args.config_path)
        make_conf_importable()
        folder = str(Path(args.config_path or CONF).absolute())
        hydra.initialize_config_dir(folder, "experiments", **VERSION_BASE)


def compose(
    args: Namespace, overrides: list[str], *, number: int | None = None
) -> tuple[DictConfig, dict[str, Any]]:
    """The config of a command line: as composed by Hydra, including the `hydra` node, and without
    that node, resolved and validated.

    number: of a sweep's job; None for a single run.

    Raises UsageError if the config cannot be composed or violates the schema.
    """
    config = compose_unresolved(args, overrides)
    enter(config, number)
    return config, validate(config)


def compose_unresolved(args: Namespace, overrides: list[str]) -> DictConfig:
    """The config of a command line as composed by Hydra, including the `hydra` node. Raises
    UsageError if it cannot be composed.
    """
    with explained(args, overrides):
        initialize(args)
        composed = hydra.compose(args.config_name or "config", overrides, return_hydra_config=True)
        reject_hidden_options(args, composed)
        return composed


def reject_hidden_options(args: Namespace, composed: DictConfig) -> None:
    """Raise UsageError if --config-dir has a chosen option that Hydra does not take from there,
    since the package has another one of that name.
    """
    if not args.config_dir or args.config_path:
        return
    choices = composed.hydra.runtime.choices.items()
    chosen = [f"{str(group).partition('@')[0]}/{option}" for group, option in choices]
    for name in (args.config_name or "config", *chosen):
        theirs, ours = (Path(folder) / f"{name}.yaml" for folder in (args.config_dir, CONF))
        if theirs.is_file() and ours.is_file() and theirs.read_bytes() != ours.read_bytes():
            kind, remedy = "option", "rename it"
            if name not in chosen:
                kind, remedy = "primary config", f"use --config-path {args.config_dir}"
            raise UsageError(
                f"{theirs}: hidden by the {kind} of that name that comes with the package; {remedy}"
            )


@contextlib.contextmanager
def explained(args: Namespace, overrides: list[str]) -> Iterator[None]:
    """Convert what composing or resolving a config raises to a UsageError of one line."""
    try:
        yield
    except CONFIG_ERRORS as error:
        from experiments.config.slips import explain

        raise explain(error, config_directories(args), overrides) from error


def enter(config: DictConfig, number: int | None = None) -> None:
    """Let `${hydra:...}` resolve in a config with its `hydra` node, before a job runs it.

    number: of a sweep's job; None for a single run.
    """
    if number is not None:
        with read_write(config), open_dict(config):
            config.hydra.job.num, config.hydra.job.id = number, str(number)
    HydraConfig.instance().cfg = config  # type: ignore[assignment]


def validate(composed: DictConfig, *, allow_unused: bool = False) -> dict[str, Any]:
    """Resolve a composed config without its `hydra` node and check it against the schema.

    allow_unused: also accept root keys that nothing refers to; for the config of a job, whose
        `hydra` node has lost its references.

    Returns plain dicts, lists and scalars: the config that a run saves and is built from. Secrets
    stay references. Raises UsageError for the first value that violates a rule.
    """
    # not needed by `--cfg`, nor by a config that cannot be composed
    from experiments.config import resolvers, secrets
    from experiments.config.names import loss_as_module, rename_moved_targets
    from experiments.config.plain import plain
    from experiments.config.references import references, referred_roots, resolvers_used
    from experiments.config.schema import check, own_roots

    job = without_hydra(composed)
    raw = OmegaConf.to_container(job)
    found = list(references(raw))
    outside = [] if allow_unused else hydra_references(composed)
    used = resolvers_used(found)
    resolvers.register(used | resolvers_used(outside))
    try:
        with hydra_settings(composed) if "hydra" in used else contextlib.nullcontext():
            config = OmegaConf.to_container(job, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        from experiments.config.slips import explain

        raise explain(error, [], []) from None
    assert isinstance(config, dict)
    if variables := secrets.secret_variables(found):
        config = secrets.hide(config, raw, variables)
    config = {key: plain(node, str(key)) for key, node in config.items()}
    roots = None if allow_unused else referred_roots([*found, *outside])
    if roots is not None and own_roots(config) - roots:
        roots |= roots_of_files(composed)
    checked = check(loss_as_module(rename_moved_targets(config)), roots)
    check_init(checked["init"])
    for group, key in (("data", "path"), ("init", "run"), ("init", "file")):
        path = checked[group].get(key)
        if isinstance(path, str) and "://" not in path and not path.startswith("${"):
            # so that the saved config is valid in any working directory
            checked[group][key] = str(Path(path).absolute())
    return checked


def check_init(init: dict[str, Any]) -> None:
    """Raise UsageError if a config names two sources of weights, or chooses from none."""
    if init["run"] and init["file"]:
        raise UsageError(f"init.file={init['file']}: there is init.run, too; choose one of them")
    for key in ("match", "exclude"):
        if init[key] is not None and not (init["run"] or init["file"]):
            raise UsageError(
                f"init.{key}={format_value(init[key])}: there is nothing to choose from; set "
                "init.run or init.file, too"
            )


def without_hydra(composed: DictConfig) -> DictConfig:
    """A composed config without its `hydra` node, unresolved."""
    return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])


def written_overrides(hydra_node: "DictConfig | HydraConf") -> list[str]:
    """The overrides of a job as they were given: resolved, they would hold secrets."""
    return cast(list[str], OmegaConf.to_container(hydra_node.overrides.task))


def roots_of_files(composed: DictConfig) -> set[str]:
    """The root keys that any file on the search path refers to: what is chosen or overridden may
    have taken the place of the only reference to one.
    """
    from experiments.config.references import Reference, referred_roots
    from experiments.config.search_path import option_files

    if "hydra" not in composed:
        return set()
    sources = composed.hydra.runtime.config_sources
    folders = [Path(source.path) for source in sources if source.schema == "file"]
    texts = (file.read_text(errors="replace") for file in option_files(folders))
    return referred_roots(Reference((), text) for text in texts)


def hydra_references(composed: DictConfig) -> "list[Reference]":
    """The interpolations in a composed config's `hydra` node, in a directory's name, say."""
    from experiments.config.references import references

    if "hydra" not in composed:
        return []
    return list(references(OmegaConf.to_container(composed.hydra), ("hydra",)))


@contextlib.contextmanager
def hydra_settings(composed: DictConfig) -> Iterator[None]:
    """Let `${hydra:...}` refer to the composed config's `hydra` node, if it has one, with the
    directory that the run is about to get. Without it, the running job's settings stay.
    """
    if "hydra" not in composed:
        yield
        return
    config = OmegaConf.masked_copy(composed, [str(key) for key in composed])
    node, before = config.hydra, HydraConfig.instance().cfg
    in_sweep = node.mode == RunMode.MULTIRUN
    enter(config, 0 if in_sweep and OmegaConf.is_missing(node.job, "num") else None)
    try:  # the directories may refer to the other settings
        directory = Path(node.sweep.dir) / str(node.sweep.subdir) if in_sweep else node.run.dir
        with read_write(node.runtime), open_dict(node.runtime):
            node.runtime.output_dir = str(Path(directory).absolute())
        yield
    finally:
        HydraConfig.instance().cfg = before  # of a job that is running
