"""The entry point: `python -m experiments [flags] [overrides]`."""

import atexit
import gc
import os
import re
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Objects made at start-up stay alive, and collecting garbage among them takes 25 % of start-up.
gc.disable()
atexit.register(gc.freeze)

import hydra  # noqa: E402
from hydra._internal.utils import get_args_parser  # noqa: E402
from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from experiments.config.compose import CONF, compose, config_directories  # noqa: E402
from experiments.config.schema import SCHEMA, check_value  # noqa: E402
from experiments.config.slips import CONFIG_ERRORS, explain, list_options  # noqa: E402
from experiments.errors import (  # noqa: E402
    Diverged,
    Interrupted,
    UsageError,
    exit_with_usage_error,
)

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
  --cfg job          print the composed config; --resolve resolves its references
  -m, --multirun     run every combination of values given as a,b,c, on all cores
  sweep=NAME         the directory of a sweep, outputs/NAME; the same command continues it
  --keep-changed     keep a sweep's finished runs although code, data or packages have changed
  --shell-completion install=bash|zsh|fish   of the command `experiments`: eval "$(...)"
  --hydra-help       the flags of Hydra, which composes the config
"""


def main() -> None:
    """Run the command line; a usage error is printed in one line, with exit code 2."""
    # otherwise Hydra prints errors itself and exits with code 1
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does, for the user's models and data
    args = parse_arguments()
    try:
        dispatch(args)
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


def parse_arguments() -> Namespace:
    """Parse sys.argv with Hydra's parser, `--trust` and `sweep=NAME`."""
    parser = get_args_parser()
    parser.error = partial(exit_with_usage_error, "experiments")  # type: ignore[method-assign]
    parser.add_argument("--trust", action="append", default=[])
    parser.add_argument("--keep-changed", action="store_true")
    # sweep=NAME abbreviates a fixed directory under outputs/, so that a sweep can be continued
    sys.argv = [re.sub(r"^sweep=(?=.)", "hydra.sweep.dir=outputs/", word) for word in sys.argv]
    return parser.parse_args()


def dispatch(args: Namespace) -> None:
    """Do what the command line asks for: resume, show something, sweep, or run."""
    if args.experimental_rerun:
        raise UsageError(
            "--experimental-rerun unpickles a file, which can execute code; use resume=RUN_DIR"
        )
    if args.config_dir and not Path(args.config_dir).is_dir():
        raise UsageError(f"--config-dir {args.config_dir}: no such directory")
    directory = resumed_directory(args)
    if directory is not None:
        from experiments import job

        job.resume(directory, args.trust)
    elif args.help:
        print(HELP.format(groups=list_groups(args)), end="")
    elif args.cfg or args.info or args.shell_completion or args.hydra_help:
        run_hydra_main(args)
    elif args.multirun or "hydra.mode=MULTIRUN" in args.overrides:
        run_sweep(args)
    else:
        composed, config = compose(args, args.overrides)
        from experiments import job  # imports torch, so only after the config is validated

        job.run_single(composed, config)


def resumed_directory(args: Namespace) -> Path | None:
    """The directory of `resume=RUN_DIR`, None without it. Raises UsageError for other overrides."""
    resumes = [override for override in args.overrides if override.startswith("resume=")]
    if args.keep_changed and not args.multirun:
        raise UsageError("--keep-changed: only valid with a sweep; add -m")
    if not resumes:
        if args.trust:
            raise UsageError(f"--trust {args.trust[0]}: only valid with resume=RUN_DIR")
        return None
    others = [override for override in args.overrides if override not in resumes[:1]]
    if others or args.multirun:
        raise UsageError(
            f"{' '.join(others) or '-m'}: a resumed run keeps its config; leave it out"
        )
    return Path(resumes[0].partition("=")[2])


def list_groups(args: Namespace) -> str:
    """A line for each group with its options, the default marked with a star."""
    defaults = (CONF / "config.yaml").read_text()
    lines = []
    for group, options in list_options(config_directories(args)).items():
        marked = (f"{name}*" if f"- {group}: {name}\n" in defaults else name for name in options)
        lines.append(f"  {group:12} {', '.join(marked)}")
    return "\n".join(lines)


def check_grid(args: Namespace) -> DictConfig:
    """Validate every swept value; returns the composed config of the first job.

    Each value is checked on its own, with the first values of the other keys: against the schema
    if its key is there, else by composing the config. Raises UsageError.
    """
    parser = OverridesParser.create()
    try:
        overrides = parser.parse_overrides(args.overrides)
    except CONFIG_ERRORS as error:
        raise explain(error, config_directories(args), args.overrides) from error
    first_job: list[str] = []
    other_values: list[str] = []
    for override in overrides:
        if not override.is_sweep_override():
            first_job.append(str(override.input_line))
            continue
        sweep: Any = override.value()
        bounds = (sweep.start, sweep.end) if override.is_interval_sweep() else ()
        values = bounds or override.sweep_string_iterator()
        first, *others = [f"{override.key_or_group}={value}" for value in values]
        first_job.append(first)
        other_values += others
    composed, _ = compose(args, first_job)
    for assignment in other_values:
        key = assignment.partition("=")[0]
        if key in SCHEMA:
            check_value(key, parser.parse_override(assignment).value())
        else:
            unchanged = [other for other in first_job if other.partition("=")[0] != key]
            compose(args, [*unchanged, assignment])
    return composed


def choose_sweep_directory(args: Namespace, composed: DictConfig) -> Path:
    """The sweep's directory, claimed unless the user chose it; completes sys.argv for Hydra."""
    from experiments.directory.claim import claim

    directory = Path(composed.hydra.sweep.dir)
    if not any(override.startswith("hydra.sweep.dir=") for override in args.overrides):
        directory = claim(directory, exact=False)
        sys.argv.append(f"hydra.sweep.dir={directory}")
    # run names for launchers other than ours; in the YAML it would slow down every start
    if not any(override.startswith("hydra.sweep.subdir=") for override in args.overrides):
        sys.argv.append("hydra.sweep.subdir='${run_name:${hydra.job.override_dirname}}'")
    return directory


def run_sweep(args: Namespace) -> None:
    """Check the grid, choose a directory, let Hydra's launcher run the jobs, report the results.

    Exits with 1 if a run failed, with 128 + the signal's number after a signal, else with 0.
    """
    composed = check_grid(args)
    from experiments import job
    from experiments.directory.identity import KEEP_CHANGED
    from experiments.directory.paths import display_path
    from experiments.sweeps import sweep
    from experiments.sweeps.pool import start_fork_server

    if args.keep_changed:
        os.environ[KEEP_CHANGED] = "1"
        sys.argv.remove("--keep-changed")  # Hydra parses the rest again
    directory = choose_sweep_directory(args, composed)
    GlobalHydra.instance().clear()
    gc.freeze()
    gc.enable()  # composed configs are full of reference cycles
    signal_number = 0
    with sweep.locked(directory):
        choices = composed.hydra.runtime.choices
        if (choices["hydra/launcher"], choices["hydra/sweeper"]) == ("workers", "basic"):
            start_fork_server()  # early: it takes longer than Hydra's start-up
        try:
            run_hydra_main(args, job.run_in_sweep)
        except Interrupted as interrupted:
            signal_number = interrupted.signal_number
        except KeyboardInterrupt:
            signal_number = signal.SIGINT
        failed = sweep.report_results(directory)
    if signal_number:
        name = f"hydra.sweep.dir={display_path(directory)}"
        print(f"interrupted; the same command with {name} goes on", file=sys.stderr)
        sys.exit(128 + signal_number)
    sys.exit(1 if failed else 0)


def run_hydra_main(args: Namespace, task: Callable[[DictConfig], float] = lambda config: 0) -> None:
    """Run Hydra's main, for a sweep of `task` or for flags that print something, as `--cfg`."""
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()
    except CONFIG_ERRORS as error:
        raise explain(error, config_directories(args), args.overrides) from error


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
