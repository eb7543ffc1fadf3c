"""The prices of 53,940 diamonds (source and licence: SOURCE.md beside this file)."""

from pathlib import Path
from typing import Any

from experiments.data import Data, tables


def load(target: str, split_seed: int = 0, statistics: Any = None) -> Data:
    """A tenth of the rows for validation, and another for the test.

    x: {"numbers": float32 (rows, n), "categories": int64 (rows, m)}, as `tables.load` makes them

    target: `price`, a number, or one of the columns of classes: `cut`, `color`, `clarity`
    """
    file = str(Path(__file__).with_name("diamonds.parquet"))
    split = "random" if target == "price" else "stratified"
    return tables.load(
        file,
        target,
        classes=target != "price",
        split=split,
        split_seed=split_seed,
        statistics=statistics,
    )
