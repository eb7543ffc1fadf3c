"""The data of a saved run, encoded as its training split was when the run began."""

import inspect
from typing import Any

from experiments.data import Data, Missing
from experiments.data.checks import check_data
from experiments.directory.trust import locate
from experiments.errors import UsageError
from experiments.training.build import build


def load_split(config: dict[str, Any], split: str, statistics: Any) -> Any:
    """A split of a config's data set, encoded with saved statistics if its function has a parameter
    for them; the files of the other splits may be gone then.

    Raises UsageError if it is no split that a run can use.
    """
    node = config["data"]
    if not takes(locate(node["_target_"]), "statistics"):
        data = build(config, "data")
        check_data(data, node["_target_"])
        return getattr(data, split)
    # as an argument: a _target_ inside a node would be built
    data = build({"data": {**node, "_partial_": True}}, "data", statistics=statistics)
    found = getattr(data, split)
    if isinstance(found, Missing):
        raise UsageError(found.reason)
    check_data(Data(found, found, found), node["_target_"])
    return found


def takes(function: object, parameter: str) -> bool:
    """Whether a function has a parameter of that name."""
    try:
        return callable(function) and parameter in inspect.signature(function).parameters
    except ValueError:  # it is not written in Python
        return False
