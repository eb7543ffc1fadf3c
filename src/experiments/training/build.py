"""Build the parts of an experiment, each from the `_target_` of its config group."""

import functools
import os
import sysconfig
from pathlib import Path
from types import TracebackType
from typing import Any

import hydra
from hydra.errors import InstantiationException
from hydra.utils import instantiate

import experiments
from experiments.config.secrets import redact, require
from experiments.errors import UsageError

# Errors whose message suffices where torch or this package raised them about a config's values.
ABOUT_VALUES = (ImportError, TypeError, ValueError)


def build(config: dict[str, Any], group: str, *args: Any, **kwargs: Any) -> Any:
    """Instantiate the `_target_` of a config group; if arguments are given, it is a partial and is
    called with them.

    Raises UsageError if the target cannot be found or does not accept its arguments; an error from
    inside the user's own code is raised as it is, with its traceback.
    """
    require(config[group], group)
    try:
        part = instantiate(config[group], _convert_="all")
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
            reason = redact(" ".join(str(cause).split()))
            raise UsageError(f"{group}._target_={config[group]['_target_']}: {reason}") from None
        if cause is error:
            raise
        raise cause from None


def raised_by_user(error: BaseException) -> BaseException | None:
    """The first error of a chain of causes that was raised inside code of the user's, if any."""
    chain: BaseException | None = error
    while chain is not None:
        if passes_through_user_code(chain.__traceback__):
            return chain
        chain = chain.__cause__
    return None


def passes_through_user_code(trace: TracebackType | None) -> bool:
    """Whether a traceback has a frame of a file that is neither Python's, nor of an installed
    package, nor of this one.
    """
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(("<", *_installed())):
            return True
        trace = trace.tb_next
    return False


@functools.cache
def _installed() -> tuple[str, ...]:
    """The folders of Python's library, of installed packages and of this package."""
    folders = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    own = Path(experiments.__file__).parent
    return tuple(f"{folder}{os.sep}" for folder in (*folders, own, Path(hydra.__file__).parents[1]))
