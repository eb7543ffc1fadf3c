"""What a command line asks for: resume a run, print something, train, or sweep."""

import contextlib
import sys
from argparse import Namespace
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.config.arguments import reject_sweep_flags, resumed_directory
from experiments.config.compose import (
    CONFIG_ERRORS,
    compose_unresolved,
    enter,
    explained,
    validate,
)
from experiments.config.hydra_versions import VERSION_BASE
from experiments.config.search_path import (
    CONF,
    config_directories,
    make_conf_importable,
    set_entries,
)
from experiments.errors import UsageError

# Each branch imports what it needs: `--cfg` and a mistake in an override are answered at once.


def launch(args: Namespace) -> None:
    """Do what the command line asks for: resume, print something, sweep, or run."""
    if args.experimental_rerun:
        raise UsageError(
            "--experimental-rerun unpickles a file, which can execute code; use resume=RUN_DIR"
        )
    config_directories(args)  # which raises UsageError for one that does not exist
    if args.resolvers:
        from experiments.config.resolvers import load_modules

        load_modules(args.resolvers)
    directory = resumed_directory(args)
    if directory is not None:
        from experiments import job

        job.resume(directory, args.trust)
    elif args.cfg or args.info or args.shell_completion or args.hydra_help:
        if args.resolve:
            from experiments.config import resolvers, secrets

            Plugins.instance()  # first, since a plugin may register resolvers of the user's
            resolvers.register()
            secrets.mask()
        if args.cfg and args.config_dir and not args.multirun:
            compose_unresolved(args, args.overrides)  # which tells of a hidden option
            GlobalHydra.instance().clear()
        run_hydra_main(args)
    elif args.multirun or (composed := compose_single(args)) is None:
        from experiments.sweeps.launch import launch_sweep

        launch_sweep(args)
    else:
        enter(composed)
        config = validate(composed)
        with explained(args, args.overrides):
            name = composed.hydra.run.dir  # resolved here, so that a mistake is explained
        from experiments.config.secrets import reject_in_directory

        reject_in_directory(config, "hydra.run.dir", name)
        reject_sweep_flags(args)
        from experiments import job  # imports torch, so only after the config is validated

        job.run_single(composed, config)


def compose_single(args: Namespace) -> DictConfig | None:
    """The composed config of a single run; None if `hydra.mode` asks for a sweep.

    Raises UsageError if it cannot be composed.
    """
    try:
        composed = compose_unresolved(args, args.overrides)
    except UsageError:
        if not any(set(word) & set(",(") for word in args.overrides):
            raise
        from experiments.config.grid import first_values, parse_grid

        # several values for a key are no mistake where the config asks for a sweep
        with contextlib.suppress(UsageError, *CONFIG_ERRORS):
            grid = parse_grid(args, args.overrides)
            swept = any(values for _, values in grid)
            if swept and asks_for_sweep(compose_unresolved(args, first_values(grid))):
                return None
        raise
    return None if asks_for_sweep(composed) else composed


def asks_for_sweep(composed: DictConfig) -> bool:
    """Whether `hydra.mode` says MULTIRUN, in a file or on the command line."""
    return bool(composed.hydra.mode == RunMode.MULTIRUN)


def run_hydra_main(args: Namespace) -> None:
    """Run Hydra's main for the flags that print something, as `--cfg`."""
    set_entries(args.config_dir, args.config_path)
    make_conf_importable()
    flags = [("--cfg", args.cfg), ("--info", args.info), ("--package", args.package)]
    flags += [("--config-name", args.config_name), ("--config-dir", args.config_dir)]
    # Hydra takes a relative one as relative to this file
    flags += [("--config-path", args.config_path and str(Path(args.config_path).absolute()))]
    for name in ("resolve", "run", "multirun", "shell_completion", "hydra_help"):
        flags += [(f"--{name.replace('_', '-')}", "")] if getattr(args, name) else []
    words = [word for name, value in flags if value is not None for word in (name, value) if word]
    typed = sys.argv
    sys.argv = [typed[0], *args.overrides, *words]
    try:
        with explained(args, args.overrides):
            hydra.main(config_path=str(CONF), config_name="config", **VERSION_BASE)(_nothing)()
    finally:
        sys.argv = typed


def _nothing(config: DictConfig) -> None:
    """The task of Hydra's main, which the flags that print something do not run."""
