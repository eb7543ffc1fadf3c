"""The target column of a table: class numbers, in the order of the sorted classes, or numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.data.columns import Part, coded, is_category, number_values, require
from experiments.data.partition import MAX_CLASSES
from experiments.errors import UsageError

if TYPE_CHECKING:
    import polars as pl
    from torch import Tensor


def learn_target(part: Part, target: str, classes: bool | None) -> dict[str, Any]:
    """The statistics of the target of training rows: its name and classes, None of numbers.

    classes: whether it is one of classes; None for texts, booleans and integers
    """
    if not of_classes(part, target, classes):
        return {"name": target, "classes": None}
    found = labels(part, target).drop_nulls().unique().to_list()
    whole = part.table[target].dtype.is_numeric()
    if whole and classes is None and len(found) > MAX_CLASSES:
        raise UsageError(
            f"data.target={target}: has {len(found)} different integers; say whether they are "
            "numbers, data.classes=false, or classes, data.classes=true"
        )
    return {"name": target, "classes": sorted(map(int, found)) if whole else sorted(found)}


def of_classes(part: Part, target: str, classes: bool | None) -> bool:
    """Whether the target is one of classes. Raises UsageError if it cannot be what is said."""
    dtype = part.table[target].dtype
    if is_category(dtype):
        if classes is False:
            raise UsageError(
                f"data.classes=false: the target {target} holds {dtype}, not numbers; "
                "leave it null, or correct the column"
            )
        return True
    if not dtype.is_numeric():
        raise UsageError(
            f"data.target={target}: holds {dtype}, neither classes nor numbers; choose another"
        )
    return dtype.is_integer() if classes is None else classes


def labels(part: Part, target: str) -> pl.Series:
    """The classes of rows as texts. Raises UsageError for numbers with fractions."""
    import polars as pl

    column = part.table[target]
    if column.dtype.is_float():
        values = number_values(part, target)
        broken = (values != np.round(values)) & ~np.isnan(values)
        if broken.any():
            raise UsageError(
                f"{part.at(int(broken.argmax()))} has the {target} {values[broken][0]:g}, which "
                "is no class; use data.classes=false"
            )
        column = column.fill_nan(None).cast(pl.Int64)
    return column.cast(pl.String)


def encode_target(part: Part, learnt: Mapping[str, Any]) -> Tensor:
    """The targets of rows: class numbers, int64 (rows,), or numbers, float32 (rows, 1).

    Raises UsageError for a missing target, and for a class that no training row has.
    """
    import torch

    name = learnt["name"]
    require(name, part.table.columns, part.source)
    if learnt["classes"] is None:
        values = number_values(part, name)
        refuse_without(part, name, np.isnan(values))
        return torch.from_numpy(values.astype(np.float32)[:, None])
    column = labels(part, name)
    refuse_without(part, name, column.is_null().to_numpy())
    codes = coded(column, [str(label) for label in learnt["classes"]], 0, unknown=-1)
    unseen = codes < 0
    if unseen.any():
        row = int(unseen.argmax())
        raise UsageError(
            f"{part.at(row)} has the {name} {column[row]}, a class that no training row has; "
            "divide the rows with data.split=stratified, or leave that class out"
        )
    return torch.from_numpy(codes.copy())


def refuse_without(part: Part, name: str, gaps: Any) -> None:
    """Raise UsageError for a row without a target."""
    if gaps.any():
        raise UsageError(
            f"{part.at(int(gaps.argmax()))} has no {name}, the target, as {int(gaps.sum())} in "
            "all; drop such rows"
        )
