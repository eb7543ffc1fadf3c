"""The command line: Hydra's flags and overrides, and the flags of ours."""

import re
import shlex
from argparse import Namespace
from functools import partial
from pathlib import Path

from hydra._internal.utils import get_args_parser

from experiments.config.names import quote_value
from experiments.errors import UsageError, exit_with_usage_error


def parse_arguments(words: list[str]) -> Namespace:
    """Parse a command line with Hydra's parser, flags of ours and `sweep=NAME`; overrides and
    flags may stand in any order. Raises UsageError.
    """
    parser = get_args_parser()
    parser.usage = ""  # else intermixed parsing formats one, which imports four modules
    parser.error = partial(exit_with_usage_error, "experiments")  # type: ignore[method-assign]
    parser.add_argument("--trust", action="append", default=[])
    parser.add_argument("--keep-changed", action="store_true")
    parser.add_argument("--resolvers", action="append", default=[], metavar="MODULE")
    args = parser.parse_intermixed_args(words)
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
