"""The entry point: `python -m experiments [flags] [overrides]`."""

import atexit
import contextlib
import gc
import os
import re
import shlex
import signal
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

# Objects made at start-up stay alive, and collecting garbage among them takes 25 % of start-up.
gc.disable()
atexit.register(gc.freeze)

import hydra  # noqa: E402
from hydra._internal.utils import get_args_parser  # noqa: E402
from hydra.core.override_parser.types import Override  # noqa: E402
from hydra.core.plugins import Plugins  # noqa: E402
from hydra.types import RunMode  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from experiments import stdio  # noqa: E402
from experiments.config import resolvers  # noqa: E402
from experiments.config.compose import (  # noqa: E402
    CONF,
    compose,
    compose_unresolved,
    config_directories,
    enter,
    validate,
)
from experiments.config.grid import (  # noqa: E402
    first_values,
    override_parser,
    parse_grid,
    reject_repeated,
    shared_config,
    sweeper_params,
    with_params,
)
from experiments.config.names import quote_value  # noqa: E402
from experiments.config.schema import check_value, rule_for  # noqa: E402
from experiments.config.search_path import make_conf_importable, set_entries  # noqa: E402
from experiments.config.slips import CONFIG_ERRORS, explain, list_options  # noqa: E402
from experiments.errors import (  # noqa: E402
    Diverged,
    Interrupted,
    UsageError,
    exit_with_usage_error,
)

IN_SWEEP = "hydra.mode=MULTIRUN"

HELP = """\
experiments: PyTorch experiments from YAML, each in a directory of its own.

  python -m experiments                                    the default experiment
  python -m experiments optimizer.lr=0.1 model=mlp_wide    with other values and options
  python -m experiments experiment=tutorial                with a file of overrides
  python -m experiments -m optimizer.lr=0.01,0.1 seed=0,1  every combination, on all cores
  python -m experiments --cfg job optimizer=adam           show the config, run nothing

Groups, chosen by group=option; a key of an option is set by group.key=value:

{groups}

  resume=RUN_DIR     continue an interrupted run
  --config-dir DIR   add your own options: DIR/model/mine.yaml becomes model=mine
  --config-name F    start from DIR/F.yaml instead of the built-in config.yaml
  --resolvers MODULE import a module that registers OmegaConf resolvers of your own
  --cfg job          print the composed config; --resolve resolves its references
  -m, --multirun     run every combination of values given as a,b,c, on all cores
  sweep=NAME         with -m, the sweep's directory, outputs/NAME; the same command continues it
  --keep-changed     keep a sweep's finished runs although code, data or packages have changed
  --shell-completion install=bash|zsh|fish   of the command `experiments`: eval "$(...)"
  --hydra-help       the flags of Hydra, which composes the config
  --version          print the version

Run directories, each command with a --help of its own:

  python -m experiments.compare DIR...      a ranked table and curves of all runs in DIR...
  python -m experiments.evaluate RUN_DIR    metrics, figures for each class, confusion matrix
  python -m experiments.reproduce RUN_DIR   run it again and compare every number
"""


def main() -> None:
    """Run the command line; a usage error is printed in one line, with exit code 2."""
    stdio.protect()
    # otherwise Hydra prints errors itself and exits with code 1
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        directory = working_directory()
        if directory not in sys.path:
            sys.path.insert(0, directory)  # as `python -m` does, for the user's models and data
        if "--version" in sys.argv[1:]:
            from importlib import metadata

            print(f"experiments {metadata.version('experiments')}")
            return
        dispatch(parse_arguments())
        sys.stdout.flush()
    except UsageError as error:
        exit_with_usage_error("experiments", str(error))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        from experiments.interrupt import stdout_closed

        if not stdout_closed():
            raise
        sys.exit(128 + signal.SIGPIPE)
    except Diverged as error:
        print(f"experiments: diverged: {error}", file=sys.stderr)
        sys.exit(1)


def working_directory() -> str:
    """The working directory. Raises UsageError if it has been removed."""
    try:
        return str(Path.cwd())
    except OSError as error:
        raise UsageError(
            f"the working directory does not exist any more ({error.strerror}); cd to another one"
        ) from None


def parse_arguments() -> Namespace:
    """Parse sys.argv with Hydra's parser, flags of ours and `sweep=NAME`; overrides and flags
    may stand in any order. Raises UsageError.
    """
    parser = get_args_parser()
    parser.error = partial(exit_with_usage_error, "experiments")  # type: ignore[method-assign]
    parser.add_argument("--trust", action="append", default=[])
    parser.add_argument("--keep-changed", action="store_true")
    parser.add_argument("--resolvers", action="append", default=[], metavar="MODULE")
    args = parser.parse_intermixed_args()
    args.sweeps = [word for word in args.overrides if word.startswith("sweep=")]
    if args.config_name is None:
        # the default config has `experiment: null`, so Hydra takes experiment=x alone
        args.overrides = [re.sub(r"^\+experiment=", "experiment=", word) for word in args.overrides]
    args.overrides = [
        word if word.startswith("resume=") else quote_value(sweep_directory(word))
        for word in args.overrides
    ]
    return args


def sweep_directory(word: str) -> str:
    """An override `sweep=NAME` written out: a directory below outputs/, or NAME itself if it
    begins with that or is absolute. Others are returned unchanged. Raises UsageError.
    """
    if not word.startswith("sweep="):
        return word
    name = Path(word.removeprefix("sweep="))
    if not name.parts:
        raise UsageError("sweep=: expected a name, as in sweep=first")
    complete = name.is_absolute() or (name.parts[0] == "outputs" and len(name.parts) > 1)
    return f"hydra.sweep.dir={name if complete else 'outputs' / name}"


def dispatch(args: Namespace) -> None:
    """Do what the command line asks for: resume, show something, sweep, or run."""
    if args.experimental_rerun:
        raise UsageError(
            "--experimental-rerun unpickles a file, which can execute code; use resume=RUN_DIR"
        )
    if args.config_dir and not Path(args.config_dir).is_dir():
        raise UsageError(f"--config-dir {args.config_dir}: no such directory")
    if args.help:
        print(HELP.format(groups=list_groups(args)), end="")
        return
    resolvers.load_modules(args.resolvers)
    directory = resumed_directory(args)
    if directory is not None:
        from experiments import job

        job.resume(directory, args.trust)
    elif args.cfg or args.info or args.shell_completion or args.hydra_help:
        if args.resolve:
            Plugins.instance()  # first, since a plugin may register resolvers of the user's
            resolvers.register()
        run_hydra_main(args)
    elif args.multirun or (composed := compose_single(args)) is None:
        run_sweep(args)
    else:
        enter(composed)
        config = validate(composed)
        try:
            _ = composed.hydra.run.dir  # resolved here, so that a mistake in it is explained
        except CONFIG_ERRORS as error:
            raise explain(error, config_directories(args), args.overrides) from error
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


def reject_sweep_flags(args: Namespace) -> None:
    """Raise UsageError for a flag or override of a single run's that only a sweep has."""
    if args.keep_changed:
        raise UsageError("--keep-changed: only valid with a sweep; add -m")
    if args.sweeps:
        raise UsageError(
            f"{args.sweeps[0]}: names the directory of a sweep; add -m, or name this run's by "
            f"hydra.run.dir={shlex.quote(sweep_directory(args.sweeps[0]).partition('=')[2])}"
        )


def resumed_directory(args: Namespace) -> Path | None:
    """The directory of `resume=RUN_DIR`, None without it. Raises UsageError for other overrides."""
    resumes = [override for override in args.overrides if override.startswith("resume=")]
    if not resumes:
        if args.trust:
            raise UsageError(f"--trust {args.trust[0]}: only valid with resume=RUN_DIR")
        return None
    if args.cfg or args.info:
        raise UsageError(f"{resumes[0]}: runs; the config of a run is in its config.yaml")
    others = [override for override in args.overrides if override not in resumes[:1]]
    if others or args.multirun:
        raise UsageError(
            f"{' '.join(others) or '-m'}: a resumed run keeps its config; leave it out"
        )
    if args.keep_changed:
        reject_sweep_flags(args)
    return Path(resumes[0].partition("=")[2])


def list_groups(args: Namespace) -> str:
    """A line for each group with its options, the default marked with a star."""
    defaults = (CONF / "config.yaml").read_text()
    lines = []
    for group, options in list_options(config_directories(args)).items():
        marked = (f"{name}*" if f"- {group}: {name}\n" in defaults else name for name in options)
        lines.append(f"  {group:12} {', '.join(marked)}")
    return "\n".join(lines)


def check_grid(args: Namespace) -> tuple[DictConfig, list[Override]]:
    """Validate every swept value; returns the config that the jobs share and the overrides.

    Each value is checked on its own, with the first values of the other keys: against the schema
    if its key is there, else by composing the config. Raises UsageError.
    """
    grid = parse_grid(args, args.overrides)
    reject_repeated([override for override, _ in grid])
    composed = compose_unresolved(args, [*first_values(grid), IN_SWEEP])
    if params := sweeper_params(composed):
        grid = parse_grid(args, with_params(params, args.overrides))
        reject_repeated([override for override, _ in grid])
        composed = compose_unresolved(args, [*first_values(grid), IN_SWEEP])
    first_job = [*first_values(grid), IN_SWEEP]
    enter(composed, number=0)
    config = validate(composed)
    parser = override_parser(args)
    for position, (override, values) in enumerate(grid):
        key = override.key_or_group
        for assignment in values[1:]:
            if rule_for(key, config) is not None and not override.package:
                check_value(key, parser.parse_override(assignment).value())
            else:
                job = [*first_job[:position], assignment, *first_job[position + 1 :]]
                compose(args, job, number=0)
    overrides = [override for override, _ in grid] + [parser.parse_override(IN_SWEEP)]
    return shared_config(args, composed, overrides), overrides


def run_sweep(args: Namespace) -> None:
    """Check the grid, choose a directory, have Hydra's launcher run the jobs, report the results.

    Exits with 1 if a run failed, with 128 + the signal's number after a signal, else with 0.
    """
    shared, overrides = check_grid(args)
    from experiments import job
    from experiments.directory.identity import KEEP_CHANGED
    from experiments.directory.paths import display_path
    from experiments.sweeps import hydra_sweep, sweep
    from experiments.sweeps.pool import start_fork_server

    if args.keep_changed:
        os.environ[KEEP_CHANGED] = "1"
    try:
        hydra_sweep.name_runs(shared)
        hydra_sweep.reject_intervals(shared, overrides)
        hydra_sweep.reject_shared_directories(shared, overrides)
        directory = hydra_sweep.choose_directory(shared)
    except CONFIG_ERRORS as error:
        raise explain(error, config_directories(args), args.overrides) from error
    gc.freeze()
    gc.enable()  # composed configs are full of reference cycles
    signal_number = 0
    with sweep.locked(directory):
        choices = shared.hydra.runtime.choices
        if (choices["hydra/launcher"], choices["hydra/sweeper"]) == ("workers", "basic"):
            start_fork_server()  # early: it takes longer than instantiating Hydra's plugins
        failed = False
        try:
            failed = hydra_sweep.run(shared, job.run_in_sweep)
        except CONFIG_ERRORS as error:
            raise explain(error, config_directories(args), args.overrides) from error
        except Interrupted as interrupted:
            signal_number = interrupted.signal_number
        except KeyboardInterrupt:
            signal_number = signal.SIGINT
        failed |= sweep.report_results(directory)
    if signal_number:
        name = shlex.quote(f"hydra.sweep.dir={display_path(directory)}")
        print(f"interrupted; the same command with {name} goes on", file=sys.stderr)
        sys.exit(128 + signal_number)
    sys.exit(1 if failed else 0)


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
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_nothing)()
    except CONFIG_ERRORS as error:
        raise explain(error, config_directories(args), args.overrides) from error
    finally:
        sys.argv = typed


def _nothing(config: DictConfig) -> None:
    """The task of Hydra's main, which the flags that print something do not run."""


def command() -> None:
    """The console script: `main`, skipping the interpreter's shutdown after a usage error."""
    try:
        main()
    except SystemExit as exit_request:
        if exit_request.code != 2:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)


if __name__ == "__main__":
    command()
