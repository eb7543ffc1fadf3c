"""The entry point: `python -m experiments [flags] [overrides]`."""

import atexit
import gc
import os
import signal
import sys
from pathlib import Path

# Objects made at start-up stay alive, and collecting garbage among them takes 25 % of start-up.
gc.disable()
atexit.register(gc.freeze)

from experiments import stdio  # noqa: E402
from experiments.errors import Diverged, UsageError, exit_with_usage_error  # noqa: E402

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
  python -m experiments.evaluate RUN_DIR    metrics, figures of classes or residuals, a picture
  python -m experiments.export RUN_DIR      the model as a file that needs only torch
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
        run(sys.argv[1:])
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


def run(words: list[str]) -> None:
    """Print the version or the help, which need no Hydra, or launch what the words ask for."""
    if "--version" in words:
        from importlib import metadata

        print(f"experiments {metadata.version('experiments')}")
    elif "--help" in words or "-h" in words:
        print_help(words)
    else:
        from experiments.config.arguments import parse_arguments
        from experiments.launch import launch

        args = parse_arguments(words)
        if args.help:  # abbreviated, as in `-mh`
            print_help(words)
        else:
            launch(args)


def print_help(words: list[str]) -> None:
    """Print the help, with a line for each group and its options, the default marked with a star.
    Raises UsageError.
    """
    from argparse import ArgumentParser
    from shutil import get_terminal_size
    from textwrap import wrap

    from experiments.config.search_path import CONF, config_directories, list_options

    parser = ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--config-path", "-cp", nargs="?")
    parser.add_argument("--config-dir", "-cd", nargs="?")
    directories = config_directories(parser.parse_known_args(words)[0])
    defaults = (CONF / "config.yaml").read_text()
    lines, width = [], get_terminal_size((100, 0)).columns
    for group, options in list_options(directories).items():
        chosen = (f"- {group}: {{}}\n", f"- {group}: [{{}}]")  # one option, or a list of one
        marked = (
            f"{name}*" if any(line.format(name) in defaults for line in chosen) else name
            for name in options
        )
        text = f"{group:12} {', '.join(marked)}"
        lines += wrap(text, width, initial_indent="  ", subsequent_indent=" " * 15)
    print(HELP.format(groups="\n".join(lines)), end="")


def working_directory() -> str:
    """The working directory. Raises UsageError if it has been removed."""
    try:
        return str(Path.cwd())
    except OSError as error:
        raise UsageError(
            f"the working directory does not exist any more ({error.strerror}); cd to another one"
        ) from None


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
