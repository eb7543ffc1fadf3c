"""Classes that only some splits have: a model that never saw one in training cannot tell it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.errors import UsageError


def check_covered(
    subject: str, targets: Mapping[str, NDArray[Any]], names: Sequence[Any] | None = None
) -> None:
    """Raise UsageError for a class that no training row has, but a validation or test row.

    subject: key and value that the message begins with
    targets: (rows,) of each split
    names: of the classes, if targets are their numbers
    """
    known = np.unique(targets["train"])
    for split in ("valid", "test"):
        unseen = np.setdiff1d(targets[split], known)
        if len(unseen):
            name = unseen[0] if names is None else names[unseen[0]]
            raise UsageError(
                f"{subject}: the class {name} is in the {split} rows and in no training row; "
                "divide the rows with data.split=stratified, or leave that class out"
            )
