"""The entrypoint: `python -m experiments [flags] [overrides]`, config in, run directory out."""

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

# Start-up makes objects that stay alive: garbage collection of them takes a quarter of start-up.
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
  python -m experiments experiment=tutorial                with a file of differences
  python -m experiments -m optimizer.lr=0.01,0.1 seed=0,1  every combination, on all cores
  python -m experiments --cfg job optimizer=adam           show the config, run nothing

Groups, chosen by group=option; a key of an option is set by group.key=value:

{groups}

  resume=RUN_DIR     go on with a run that was interrupted
  --config-dir DIR   add your own options: DIR/model/mine.yaml becomes model=mine
  --cfg job          print the composed config; --resolve fills in its references
  -m, --multirun     run every combination of values given as a,b,c, on all cores
  sweep=NAME         the directory of a sweep, outputs/NAME: the same command goes on in it
  --shell-completion install=bash|zsh|fish   of the command `experiments`: eval "$(...)"
  --hydra-help       the flags of Hydra, which composes the config
"""


def main() -> None:
    """Run the command line; a mistake in it is told in one line, with exit code 2."""
    # without it Hydra prints and leaves by itself, with exit code 1
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does, for one's own models and data
    parser = get_args_parser()
    parser.error = partial(exit_with_usage_error, "experiments")  # type: ignore[method-assign]
    parser.add_argument("--trust", action="append", default=[])
    # sweep=NAME is short for a directory below outputs/, where a sweep can be found again
    sys.argv = [re.sub(r"^sweep=(?=.)", "hydra.sweep.dir=outputs/", word) for word in sys.argv]
    args = parser.parse_args()
    try:
        if args.experimental_rerun:
            raise UsageError("--experimental-rerun executes what a file says; use resume=RUN_DIR")
        if args.config_dir and not Path(args.config_dir).is_dir():
            raise UsageError(f"--config-dir {args.config_dir}: there is no such directory")
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
            from experiments import job  # only now: a slip need not wait for it

            job.run_single(composed, config)
    except UsageError as error:
        exit_with_usage_error("experiments", str(error))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        from experiments.interrupt import reader_left

        if not reader_left():
            raise
        sys.exit(128 + signal.SIGPIPE)
    except Diverged as error:
        print(f"experiments: diverged: {error}", file=sys.stderr)
        sys.exit(1)


def resumed_directory(args: Namespace) -> Path | None:
    """The directory that `resume=RUN_DIR` names, which must stand alone: the run has its config."""
    named = [override for override in args.overrides if override.startswith("resume=")]
    if not named:
        if args.trust:
            raise UsageError(f"--trust {args.trust[0]}: goes with resume=RUN_DIR alone")
        return None
    others = [override for override in args.overrides if override not in named[:1]]
    if others or args.multirun:
        raise UsageError(
            f"{' '.join(others) or '-m'}: a resumed run goes on as it is; leave it out"
        )
    return Path(named[0].partition("=")[2])


def list_groups(args: Namespace) -> str:
    """A line for each group with its options, the default one marked by a star."""
    defaults = (CONF / "config.yaml").read_text()
    lines = []
    for group, options in list_options(config_directories(args)).items():
        marked = (f"{name}*" if f"- {group}: {name}\n" in defaults else name for name in options)
        lines.append(f"  {group:12} {', '.join(marked)}")
    return "\n".join(lines)


def run_sweep(args: Namespace) -> None:
    """Check every swept value, claim a sweep directory, and let Hydra's launcher run the jobs."""
    try:
        overrides = OverridesParser.create().parse_overrides(args.overrides)
    except CONFIG_ERRORS as error:
        raise explain(error, config_directories(args), args.overrides) from error
    first: list[str] = []
    options: list[list[str]] = []
    for override in overrides:
        if not override.is_sweep_override():
            first.append(str(override.input_line))
            continue
        swept: Any = override.value()
        ends = (swept.start, swept.end) if override.is_interval_sweep() else ()
        values = [f"{override.key_or_group}={v}" for v in ends or override.sweep_string_iterator()]
        first.append(values[0])
        options += [[value] for value in values[1:]]
    composed, _ = compose(args, first)
    for option in options:
        key = option[0].partition("=")[0]
        if key in SCHEMA:
            check_value(key, OverridesParser.create().parse_override(option[0]).value())
        else:
            compose(args, [*(old for old in first if old.partition("=")[0] != key), *option])
    from experiments import job
    from experiments.directory.claim import claim
    from experiments.directory.paths import display_path
    from experiments.sweeps import sweep
    from experiments.sweeps.pool import start_fork_server

    directory = Path(composed.hydra.sweep.dir)
    if not any(override.startswith("hydra.sweep.dir=") for override in args.overrides):
        directory = claim(directory, exact=False)
        sys.argv.append(f"hydra.sweep.dir={directory}")
    # every launcher names a run as ours does; here, since each start would pay for it in the YAML
    if not any(override.startswith("hydra.sweep.subdir=") for override in args.overrides):
        sys.argv.append("hydra.sweep.subdir='${run_name:${hydra.job.override_dirname}}'")
    GlobalHydra.instance().clear()
    gc.freeze()
    gc.enable()  # every composed config is a heap of cycles
    stopped_by = 0
    with sweep.locked(directory):
        chosen = composed.hydra.runtime.choices
        if (chosen["hydra/launcher"], chosen["hydra/sweeper"]) == ("workers", "basic"):
            start_fork_server()  # early: it takes longer than all that Hydra does before
        try:
            run_hydra_main(args, job.run_in_sweep)
        except Interrupted as interrupted:
            stopped_by = interrupted.signal_number
        except KeyboardInterrupt:
            stopped_by = signal.SIGINT
        failed = sweep.report_results(directory)
    if stopped_by:
        name = f"hydra.sweep.dir={display_path(directory)}"
        print(f"interrupted; the same command with {name} goes on", file=sys.stderr)
        sys.exit(128 + stopped_by)
    sys.exit(1 if failed else 0)


def run_hydra_main(args: Namespace, task: Callable[[DictConfig], float] = lambda config: 0) -> None:
    """Leave a sweep of `task`, or a question about the config, to Hydra's own main."""
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()
    except CONFIG_ERRORS as error:
        raise explain(error, config_directories(args), args.overrides) from error


def command() -> None:
    """What the shell starts: `main`, and after a mistake no time spent on taking Python down."""
    try:
        main()
    except SystemExit as leaving:
        if leaving.code != 2:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)


if __name__ == "__main__":
    command()
