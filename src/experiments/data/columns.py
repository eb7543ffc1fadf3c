"""The columns of a table as tensors: categories as codes, numbers standardised, all as the training
rows say. What they say is a JSON value, the statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experiments.config.names import suggest
from experiments.data.table_files import refuse_numbers
from experiments.errors import UsageError

if TYPE_CHECKING:
    import polars as pl
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Some rows of a table.

    source: key and value that messages begin with
    rows: int64 (rows,) their numbers in the file
    """

    table: pl.DataFrame
    source: str
    rows: NDArray[np.int64]

    def at(self, row: int) -> str:
        """A row, as messages begin."""
        return f"{self.source}: row {self.rows[row]}"


UNKNOWN = 0  # the code of a category that no training row has
MISSING = 1  # the code of no value, where missing ones are filled; categories begin after it


def chosen(
    table: pl.DataFrame,
    numbers: Sequence[str] | None,
    categories: Sequence[str] | None,
    apart: Sequence[str],
) -> tuple[list[str], list[str]]:
    """The names of the columns of numbers and of categories; None stands for all others of their
    type: integers and floats, or texts and booleans.

    apart: columns that are no inputs, the target and the groups

    Raises UsageError for a column that is missing, named twice or of neither type.
    """
    for key, names in (("numbers", numbers or ()), ("categories", categories or ())):
        for name in names:
            require(name, table.columns, f"data.{key}")
            if name == apart[0]:
                raise UsageError(f"data.{key}: {name} is the target; leave it out")
    both = sorted(set(numbers or ()) & set(categories or ()))
    if both:
        raise UsageError(f"data.numbers: {both[0]} is also in data.categories; leave one out")
    named = {*(numbers or ()), *(categories or ()), *apart}
    found: dict[str, list[str]] = {"numbers": [], "categories": []}
    for name, dtype in table.schema.items():
        if name in named:
            continue
        if dtype.is_numeric():
            found["numbers"].append(name)
        elif is_category(dtype):
            if categories is None:
                refuse_numbers(table, name)
            found["categories"].append(name)
        elif numbers is None or categories is None:
            raise UsageError(
                f"data: the column {name} holds {dtype}, neither numbers nor categories; name the "
                "columns to use in data.numbers and data.categories"
            )
    of_numbers = found["numbers"] if numbers is None else list(numbers)
    of_categories = found["categories"] if categories is None else list(categories)
    if not of_numbers and not of_categories:
        raise UsageError("data: there is no column besides the target; name data.numbers")
    return of_numbers, of_categories


def is_category(dtype: Any) -> bool:
    """Whether a polars dtype is one of texts or booleans."""
    return str(dtype).partition("(")[0] in ("String", "Boolean", "Categorical", "Enum")


def require(name: str, names: Sequence[str], key: str) -> None:
    """Raise UsageError unless a table has a column; `key` names it."""
    if name not in names:
        raise UsageError(f"{key}: there is no column {name}{suggest(name, names)}")


def learn(
    part: Part, numbers: Sequence[str], categories: Sequence[str], missing: str
) -> dict[str, Any]:
    """The statistics of training rows: mean and standard deviation of each column of numbers (1 if
    it is constant), and what fills missing ones, their median; the values of each column of
    categories, sorted, in the order of their codes.

    missing: refuse or fill

    Raises UsageError as `number_values` and `texts` do, and for a column without any value.
    """
    of_numbers = {}
    for name in numbers:
        values = number_values(part, name)
        values = values[~np.isnan(values)]
        if len(values) == 0:
            raise UsageError(
                f"data: the column {name} has no value in the training rows; leave it out of "
                "data.numbers"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            mean, scale = float(values.mean()), float(values.std()) or 1.0
        if not np.isfinite([mean, scale]).all():
            raise UsageError(
                f"data: the column {name} holds numbers up to {np.abs(values).max():.3g}, whose "
                "standard deviation is not finite; scale them down, or leave it out of data.numbers"
            )
        of_numbers[name] = {"mean": mean, "scale": scale, "fill": float(np.median(values))}
    of_categories = {
        name: sorted(texts(part, name).drop_nulls().unique().to_list()) for name in categories
    }
    return {"missing": missing, "numbers": of_numbers, "categories": of_categories}


def cardinalities(statistics: Mapping[str, Any]) -> list[int]:
    """The number of codes of each column of categories, as embeddings need it."""
    first = first_code(statistics)
    return [len(values) + first for values in statistics["categories"].values()]


def check_statistics(statistics: Any) -> None:
    """Raise UsageError unless a value, which may be a stranger's, has the form that `learn` and
    `learn_target` give it.
    """
    try:
        numbers = [learnt[key] for learnt in statistics["numbers"].values()
                   for key in ("mean", "scale", "fill")]  # fmt: skip
        known = [*statistics["categories"].values(), statistics["texts"]]
        classes = statistics["target"]["classes"]
        fits = (
            all(isinstance(number, int | float) for number in numbers)
            and all(isinstance(text, str) for texts in known for text in texts)
            and all(isinstance(value, str | int) for value in classes or ())
            and isinstance(statistics["target"]["name"], str)
            and isinstance(statistics["missing"], str)
        )
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise UsageError("statistics: are not those of a table; copy statistics.json again")


def first_code(statistics: Mapping[str, Any]) -> int:
    """The code of the first category: after UNKNOWN and, where values are filled, MISSING."""
    return MISSING + 1 if statistics["missing"] == "fill" else UNKNOWN + 1


def encode_part(part: Part, statistics: Mapping[str, Any]) -> Tensor | dict[str, Tensor]:
    """Rows as a model takes them: `numbers` float32 (rows, n) and `categories` int64 (rows, m) in a
    dict, or the numbers alone where there are no columns of categories.

    Raises UsageError for a missing column or, unless they are filled, a missing value.
    """
    columns = []
    for name, learnt in statistics["numbers"].items():
        values = inputs_of(part, name, statistics)
        values[np.isnan(values)] = learnt["fill"]
        columns.append(((values - learnt["mean"]) / learnt["scale"]).astype(np.float32))
    return with_categories(stacked(columns, len(part.rows), np.float32), part, statistics)


def raw_part(part: Part, statistics: Mapping[str, Any]) -> Tensor | dict[str, Tensor]:
    """The same rows with their numbers as the file has them, float64 (rows, n), NaN for a missing
    one that is to be filled: what an exported model takes.
    """
    columns = [inputs_of(part, name, statistics) for name in statistics["numbers"]]
    return with_categories(stacked(columns, len(part.rows), np.float64), part, statistics)


def inputs_of(part: Part, name: str, statistics: Mapping[str, Any]) -> NDArray[np.float64]:
    """A column of numbers, as `number_values`, whose missing values are refused unless filled."""
    values = number_values(part, name)
    refuse_missing(statistics, part, name, np.isnan(values))
    return values


def with_categories(
    numbers: NDArray[Any], part: Part, statistics: Mapping[str, Any]
) -> Tensor | dict[str, Tensor]:
    """The numbers of rows with the codes of their categories, if there are columns of them."""
    import torch

    if not statistics["categories"]:
        return torch.from_numpy(numbers)
    codes = []
    for name, known in statistics["categories"].items():
        column = texts(part, name)
        gaps = column.is_null().to_numpy()
        refuse_missing(statistics, part, name, gaps)
        codes.append(np.where(gaps, MISSING, coded(column, known, first_code(statistics))))
    return {
        "numbers": torch.from_numpy(numbers),
        "categories": torch.from_numpy(stacked(codes, len(part.rows), np.int64)),
    }


def coded(
    column: pl.Series, known: Sequence[str], first: int, unknown: int = UNKNOWN
) -> NDArray[np.int64]:
    """The code of each text, int64 (rows,): from `first` on in the order of `known`, else
    `unknown`.
    """
    import polars as pl

    if not known:
        return np.full(len(column), unknown, np.int64)
    codes = pl.Series(range(first, first + len(known)), dtype=pl.Int64)
    found = column.replace_strict(
        pl.Series(known, dtype=pl.String), codes, default=unknown, return_dtype=pl.Int64
    )
    return found.fill_null(unknown).to_numpy()


def stacked(columns: list[NDArray[Any]], rows: int, dtype: Any) -> NDArray[Any]:
    """Columns side by side, (rows, columns), in row-major order."""
    found = np.empty((rows, len(columns)), dtype)
    for number, column in enumerate(columns):
        found[:, number] = column
    return found


def refuse_missing(
    statistics: Mapping[str, Any], part: Part, name: str, gaps: NDArray[np.bool_]
) -> None:
    """Raise UsageError for the first missing value of a column, unless they are filled."""
    if statistics["missing"] != "fill" and gaps.any():
        raise UsageError(
            f"{part.at(int(gaps.argmax()))} has no {name}, as {int(gaps.sum())} in all; "
            "data.missing=fill takes the training median, and a code of its own for categories"
        )


def number_values(part: Part, name: str) -> NDArray[np.float64]:
    """A column of numbers, float64 (rows,), NaN where there is none. Raises UsageError if it holds
    others, or an infinite one.
    """
    import polars as pl

    require(name, part.table.columns, part.source)
    column = part.table[name]
    if not column.dtype.is_numeric() and column.dtype not in (pl.Boolean, pl.Null):
        raise UsageError(
            f"{part.source}: the column {name} holds {column.dtype}, not numbers; "
            "name it in data.categories, or correct it"
        )
    values = column.cast(pl.Float64).fill_null(np.nan).to_numpy().copy()
    infinite = np.isinf(values)
    if infinite.any():
        raise UsageError(f"{part.at(int(infinite.argmax()))} has an infinite {name}; correct it")
    return values


def texts(part: Part, name: str) -> pl.Series:
    """A column of categories as texts: integers and booleans as they are written. Raises UsageError
    for numbers with fractions.
    """
    import polars as pl

    require(name, part.table.columns, part.source)
    column = part.table[name]
    if not (is_category(column.dtype) or column.dtype.is_integer() or column.dtype == pl.Null):
        raise UsageError(
            f"{part.source}: the column {name} holds {column.dtype}, no categories; name it in "
            "data.numbers, or make it text"
        )
    return column.cast(pl.String)
