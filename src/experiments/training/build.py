"""Build the parts of an experiment, each from the `_target_` of its config group."""

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from experiments.errors import UsageError


def build(config: dict[str, Any], group: str, *args: Any, **kwargs: Any) -> Any:
    """Instantiate the `_target_` of a config group; if arguments are given, it is a partial and is
    called with them.

    Raises UsageError if the target cannot be found or does not accept its arguments; an error from
    inside it keeps its traceback.
    """
    try:
        part = instantiate(config[group], _convert_="all")
        return part(*args, **kwargs) if args or kwargs else part
    except (InstantiationException, TypeError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if isinstance(cause, UsageError):
            raise cause from None
        if isinstance(cause, TypeError) and "argument" not in str(cause):
            raise
        if isinstance(cause, InstantiationException | ImportError | TypeError | ValueError | None):
            reason = " ".join(str(cause or error).split())
            raise UsageError(f"{group}._target_={config[group]['_target_']}: {reason}") from None
        raise
