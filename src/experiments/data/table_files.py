"""Reads CSV and Parquet files with polars, which nothing imports before it is used."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

from experiments.errors import UsageError

if TYPE_CHECKING:
    import polars as pl

SEPARATORS = {".csv": ",", ".tsv": "\t"}
# What polars would decompress, to any size: gzip, zstd and zlib.
COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x78\x01", b"\x78\x9c", b"\x78\xda")
CSV_FACTOR = 3  # memory that reading a CSV file takes, to its size
VALUE_BYTES = 16  # of a value in memory, a generous mean


def polars() -> ModuleType:
    """polars. Raises UsageError that names the extra where it is not installed."""
    try:
        import polars as pl
    except ImportError:
        raise UsageError(
            "data: tables are read with polars, which is not installed; "
            "pip install 'experiments[tables]'"
        ) from None
    return pl


def read(subject: str, name: str, texts: Collection[str] = ()) -> pl.DataFrame:
    """A table. Column types of a CSV file are those that all its rows fit.

    subject: key and value, for messages
    texts: columns that are texts, even if this file's could be read as numbers

    Raises UsageError if the file is missing, too large for this machine's memory or damaged.
    """
    file = Path(name)
    if file.suffix not in (*SEPARATORS, ".parquet"):
        raise UsageError(f"{subject}: expected a file that ends with .csv, .tsv or .parquet")
    if not file.is_file():
        raise UsageError(f"{subject}: there is no such file; name a table")
    library = polars()
    try:
        if file.suffix == ".parquet":
            found = read_parquet(subject, file)
        else:
            found = read_csv(subject, file, texts)
    except (OSError, library.exceptions.PolarsError, library.exceptions.PanicException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{subject}: cannot be read ({reason}); save it again") from None
    if len(found) == 0:
        raise UsageError(f"{subject}: has no rows; give it some")
    return found


def read_csv(subject: str, file: Path, texts: Collection[str]) -> pl.DataFrame:
    """A file of separated values with a header."""
    library = polars()
    with file.open("rb") as opened:
        if opened.read(4).startswith(COMPRESSED):
            raise UsageError(f"{subject}: is compressed; unpack it")
    check_memory(subject, file.stat().st_size * CSV_FACTOR)
    options = {"separator": SEPARATORS[file.suffix], "glob": False}
    names = library.read_csv(file, n_rows=0, **options).columns
    double = next((name for name in names if "_duplicated_" in name), None)
    if double is not None:
        column = double.partition("_duplicated_")[0]
        raise UsageError(f"{subject}: has two columns {column}; rename one")
    check_separator(subject, names)
    overrides = {name: library.String for name in texts if name in names}
    return cast(
        "pl.DataFrame",
        library.read_csv(file, infer_schema_length=None, schema_overrides=overrides, **options),
    )


def check_separator(subject: str, names: list[str]) -> None:
    """Raise UsageError for a header that is one name with another separator in it."""
    found = next((mark for mark in ";\t|" if len(names) == 1 and mark in names[0]), None)
    if found is not None:
        shown = "tabs" if found == "\t" else found
        remedy = "name it .tsv" if found == "\t" else "save it with commas, and points in numbers"
        raise UsageError(f"{subject}: its columns are separated by {shown}, not commas; {remedy}")


def read_parquet(subject: str, file: Path) -> pl.DataFrame:
    """A Parquet file, whose footer tells the number of values beforehand."""
    library = polars()
    lazy = library.scan_parquet(file, glob=False, hive_partitioning=False)
    rows = lazy.select(library.len()).collect().item()
    check_memory(subject, rows * len(lazy.collect_schema()) * VALUE_BYTES)
    return cast("pl.DataFrame", lazy.collect())


def check_memory(subject: str, needed: int) -> None:
    """Raise UsageError for a table that takes more bytes than this machine's memory has."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise UsageError(
            f"{subject}: takes about {needed / 1e9:.0f} GB in memory, and this machine has "
            f"{memory / 1e9:.0f}; make .npy files of it for data=arrays"
        )


def refuse_numbers(table: pl.DataFrame, name: str) -> None:
    """Raise UsageError for a column of texts most of which are numbers: one word in it, or commas
    for points, would make categories of all of them.
    """
    library = polars()
    column = table[name].drop_nulls()
    if column.dtype != library.String:
        return
    commas = column.str.contains(r"^\s*[+-]?\d+,\d+\s*$")
    if commas.sum() > len(column) / 2:
        raise UsageError(
            f"data: the column {name} holds numbers with a comma, such as "
            f"{column.filter(commas)[0]}; write them with a point, or name the column in "
            "data.categories"
        )
    words = column.cast(library.Float64, strict=False).is_null() | column.is_in(["nan", "NaN"])
    if 0 < int(words.sum()) < len(column) / 2:
        raise UsageError(
            f"data: the column {name} holds numbers and texts, such as {column.filter(words)[0]}; "
            "correct these (a missing value is an empty field), or name the column in "
            "data.categories"
        )
