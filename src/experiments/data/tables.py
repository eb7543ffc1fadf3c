"""Tables: CSV and Parquet files whose columns are chosen by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.data import Data, Missing, Split
from experiments.data.columns import (
    Part,
    cardinalities,
    check_statistics,
    chosen,
    encode_part,
    is_category,
    learn,
    raw_part,
    require,
)
from experiments.data.partition import SPLITS, Rule, Share, partition
from experiments.data.table_files import polars, read
from experiments.data.targets import encode_target, labels, learn_target, of_classes
from experiments.errors import UsageError

if TYPE_CHECKING:
    import polars as pl
    from torch import Tensor


@dataclass(frozen=True)
class TableSplit(Split):
    """Rows that saved statistics, a parameter of `load`, have encoded, with their table."""

    part: Part = field(kw_only=True)
    statistics: Any = field(kw_only=True)

    def raw_x(self) -> Tensor | dict[str, Tensor]:
        """x with its numbers as the file has them, see `columns.raw_part`."""
        return raw_part(self.part, self.statistics)


def load(
    path: str | None,
    target: str | None,
    numbers: Sequence[str] | None = None,
    categories: Sequence[str] | None = None,
    classes: bool | None = None,
    missing: str = "refuse",
    valid: Share | str = None,
    test: Share | str = None,
    split: str = "random",
    group: str | None = None,
    split_seed: int = 0,
    folds: int | None = None,
    fold: int = 0,
    statistics: Any = None,
) -> Data:
    """The rows of a table, or of one for each split.

    x: {"numbers": float32 (rows, n), "categories": int64 (rows, m)}, or the numbers alone where
        there are no categories; y: class numbers, int64 (rows,), or float32 (rows, 1)

    path: the file of the training rows: .csv, .tsv or .parquet
    target: the column to predict
    numbers, categories: the columns of the inputs; None for all others of their type
    classes: whether the target is one of classes; None for texts, booleans and integers
    missing: what to do with inputs that have no value: refuse, or fill
    valid, test: a file, or how many rows of `path`; `split` to `fold`: see `partition.Rule`
    group: the column of the groups that split=grouped keeps together
    statistics: as an earlier call computed them; files of other splits may be gone then

    Raises UsageError in one line for whatever does not fit.
    """
    if path is None or target is None:
        key, what = ("path", "its file") if path is None else ("target", "the column to predict")
        raise UsageError(f"data.{key}=null: a table needs {what}; set data.{key}")
    if group is not None and split != "grouped":
        raise UsageError(
            f"data.group={group}: data.split={split} keeps no groups together; use "
            "data.split=grouped, or leave data.group null"
        )
    apart = [target] if group is None else [target, group]
    own = {name: file for name, file in (("valid", valid), ("test", test)) if isinstance(file, str)}
    if folds is not None and "valid" in own:
        raise UsageError(f"data.valid={valid}: validation is a fold; leave data.folds null")
    shares = {name: share for name, share in (("valid", valid), ("test", test)) if name not in own}
    rule = Rule(split, split_seed=split_seed, folds=folds, fold=fold, **shares)  # type: ignore[arg-type]
    if is_saved := statistics is not None:
        check_statistics(statistics)
    parts = read_parts({"path": path, **own}, statistics)
    whole = parts.pop("path")
    if isinstance(whole, Part):
        require(target, whole.table.columns, "data.target")
        if statistics is None and (numbers is None or categories is None):
            check_columns(whole, parts)
        parts |= divided(whole, rule, apart, classes, own)
    else:
        parts = {**dict.fromkeys(SPLITS, whole), **parts}
    if statistics is None:
        # read_parts allows a missing file with statistics only
        assert isinstance(whole, Part)
        names = chosen(whole.table, numbers, categories, apart)
        statistics = learn_all(parts["train"], names, missing, target, classes)
    sizes: dict[str, Any] = {
        "numbers": len(statistics["numbers"]),
        "cardinalities": cardinalities(statistics),
    }
    splits: list[Any] = [encoded(parts[name], statistics, keep=is_saved) for name in SPLITS]
    if statistics["target"]["classes"] is None and isinstance(splits[0], Split):
        sizes["target_scale"] = scale_of(splits[0].y)
    return Data(*splits, sizes=sizes, statistics=statistics)


def learn_all(
    train: Part | Missing,
    names: tuple[list[str], list[str]],
    missing: str,
    target: str,
    classes: bool | None,
) -> dict[str, Any]:
    """The statistics of the training rows: of the columns of numbers and of categories, of the
    target, and which columns are texts, even if those of another file could be read as numbers.
    """
    assert isinstance(train, Part)
    statistics = learn(train, *names, missing)
    used = [*names[0], *names[1], target]
    texts = [name for name in used if is_category(train.table.schema[name])]
    return {**statistics, "target": learn_target(train, target, classes), "texts": texts}


def encode(
    columns: Mapping[str, Sequence[Any]] | pl.DataFrame, statistics: Mapping[str, Any]
) -> Tensor | dict[str, Tensor]:
    """New rows as the model of a run takes them: x, see `load`. Columns that are no inputs of it
    are ignored.

    statistics: of that run, `load_run(...).statistics`

    Raises UsageError for a column that is missing or holds something else, and for a missing value
    where the run refused them.
    """
    check_statistics(statistics)
    table = polars().DataFrame(columns)
    return encode_part(Part(table, "rows", np.arange(len(table))), statistics)


def read_parts(files: Mapping[str, str], statistics: Any) -> dict[str, Part | Missing]:
    """The tables of files by their keys; Missing for one that is gone, if there are statistics."""
    parts: dict[str, Part | Missing] = {}
    texts = set() if statistics is None else set(statistics["texts"])
    for key, file in files.items():
        subject = f"data.{key}={file}"
        if statistics is not None and not Path(file).exists():
            parts[key] = Missing(f"{subject}: there is no such file any more; put it back")
            continue
        table = read(subject, file, texts)
        if statistics is None and key == "path":
            texts = {name for name, dtype in table.schema.items() if is_category(dtype)}
        parts[key] = Part(table, subject, np.arange(len(table)))
    return parts


def check_columns(whole: Part, parts: Mapping[str, Part | Missing]) -> None:
    """Raise UsageError if the columns of another file differ from those of the training file."""
    for part in parts.values():
        if not isinstance(part, Part):
            continue
        lacking = [name for name in whole.table.columns if name not in part.table.columns]
        added = [name for name in part.table.columns if name not in whole.table.columns]
        if lacking or added:
            words = [f"without {', '.join(lacking)}"] * bool(lacking)
            words += [f"with {', '.join(added)}"] * bool(added)
            raise UsageError(
                f"{part.source}: its columns are those of {whole.source} {' and '.join(words)}; "
                "name the columns to use in data.numbers and data.categories"
            )


def divided(
    whole: Part, rule: Rule, apart: Sequence[str], classes: bool | None, own: Mapping[str, str]
) -> dict[str, Part]:
    """The parts of a table that a rule gives to each split without a file of its own."""
    by = None
    if rule.split == "grouped" and len(apart) > 1:
        require(apart[1], whole.table.columns, "data.group")
        column = whole.table[apart[1]].cast(polars().String)
        if column.null_count():
            row = int(column.is_null().to_numpy().argmax())
            raise UsageError(f"{whole.at(row)} has no {apart[1]}, its group; drop such rows")
        by = column.to_numpy().astype(str)
    elif rule.split == "stratified" and of_classes(whole, apart[0], classes):
        by = labels(whole, apart[0]).fill_null("").to_numpy().astype(str)
    rows = partition(len(whole.table), rule, by, own)
    return {name: Part(whole.table[part], whole.source, part) for name, part in rows.items()}


def scale_of(y: Tensor) -> list[float]:
    """The mean and the standard deviation of targets, float32 (rows, 1); 1 where they are equal."""
    values = y.double()
    return [float(values.mean()), float(values.std(correction=0)) or 1.0]


def encoded(part: Part | Missing, statistics: Any, *, keep: bool) -> Split | Missing:
    """A part as a split, which keeps the part if it is asked to."""
    if isinstance(part, Missing):
        return part
    x, y = encode_part(part, statistics), encode_target(part, statistics["target"])
    return TableSplit(x, y, part=part, statistics=statistics) if keep else Split(x, y)
