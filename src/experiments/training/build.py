"""Build the parts of an experiment, each from the `_target_` of its config group."""

import functools
import inspect
import os
import sysconfig
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import hydra
from hydra.errors import InstantiationException
from hydra.utils import instantiate

import experiments
from experiments.config.secrets import redact, require
from experiments.directory.allow_list import allowed, explain_refusal
from experiments.directory.trust import locate
from experiments.errors import UsageError

# Errors whose message suffices where torch or this package raised them about a config's values.
ABOUT_VALUES = (ImportError, RuntimeError, TypeError, ValueError)


def build(config: dict[str, Any], group: str, *args: Any, **kwargs: Any) -> Any:
    """Instantiate the `_target_` of a config group; if arguments are given, it is a partial and is
    called with them.

    Raises UsageError if the target cannot be found or does not accept its arguments; an error from
    inside the user's own code is raised as it is, with its traceback.
    """
    require(config[group], group)
    try:
        part = instantiate(config[group], _convert_="all", **allowed(config[group], group))
        return part(*args, **kwargs) if args or kwargs else part
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UsageError):
            raise cause from None
        if (raised := raised_by_user(cause)) is not None:
            if raised is error:
                raise
            raise raised from None
        if isinstance(cause, (InstantiationException, *ABOUT_VALUES)):
            reason = redact(explain_refusal(" ".join(str(cause).split())))
            raise UsageError(f"{group}._target_={config[group]['_target_']}: {reason}") from None
        if cause is error:
            raise
        raise cause from None


def build_callable(name: str, node: dict[str, Any], **offered: Any) -> Any:
    """Build a part that is called: an object of a class, or a function with its other arguments.

    The `_target_` of a class is constructed, with those of the offered arguments that it takes; one
    of a function becomes a partial of it. So neither needs `_partial_`. name: the dotted key.
    """
    target = locate(str(node["_target_"]))  # instantiating takes 3 ms
    if not inspect.isclass(target):
        if target is not None and node.keys() <= {"_target_", "_partial_"}:
            return target
        return build({name: {**node, "_partial_": True}}, name)
    given = {key: value for key, value in offered.items() if takes(target, key)}
    return build({name: {**node, "_partial_": bool(given)}}, name, **given)


def takes(function: Any, name: str) -> bool:
    """Whether a function, class or object can be called with a parameter of this name."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of some that are written in C
        return False
    return name in parameters


def raised_by_user(error: BaseException) -> BaseException | None:
    """The first error of a chain of causes that was raised inside code of the user's, if any."""
    chain: BaseException | None = error
    while chain is not None:
        if passes_through_user_code(chain.__traceback__):
            return chain
        chain = chain.__cause__
    return None


def passes_through_user_code(trace: TracebackType | None) -> bool:
    """Whether a traceback has a frame of the user's code."""
    return any(map(_is_user_code, _files(trace)))


def ends_in_user_code(trace: TracebackType | None) -> bool:
    """Whether the last frame of a traceback, where the error was raised, is of the user's code."""
    files = _files(trace)
    return bool(files) and _is_user_code(files[-1])


def user_line(trace: TracebackType | None) -> str:
    """Where the user's code called what raised, as `, at FILE, line N`; empty if nowhere."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(trace)]
    place = next((frame for frame in reversed(frames) if _is_user_code(frame[0])), None)
    return "" if place is None else f", at {place[0]}, line {place[1]}"


def _files(trace: TracebackType | None) -> list[str]:
    return [frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace)]


def _is_user_code(file: str) -> bool:
    """Whether a source file is neither Python's, nor of an installed package, nor of this one."""
    return not file.startswith(("<", *_installed()))


@functools.cache
def _installed() -> tuple[str, ...]:
    """The folders of Python's library, of installed packages and of this package."""
    folders = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    own = Path(experiments.__file__).parent
    return tuple(f"{folder}{os.sep}" for folder in (*folders, own, Path(hydra.__file__).parents[1]))
