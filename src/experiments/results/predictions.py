"""Writes a model's outputs for the rows of a split, with their targets. Imports no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.errors import UsageError

if TYPE_CHECKING:  # not needed by a command line that is refused
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


def check_file(file: Path) -> None:
    """Raise UsageError for a file that predictions cannot be written to; before they are made."""
    if file.suffix not in (".npy", ".parquet"):
        raise UsageError(f"--predictions {file}: expected a name that ends in .npy or .parquet")
    if not file.parent.is_dir():
        raise UsageError(f"--predictions {file}: there is no folder {file.parent}; create it")
    if file.suffix == ".parquet":
        require_polars(file)


def require_polars(file: Path) -> Any:
    """The library that writes Parquet. Raises UsageError where it is not installed."""
    try:
        import polars
    except ImportError:
        raise UsageError(
            f"--predictions {file}: Parquet needs polars; pip install 'experiments[tables]', or "
            "use a name that ends in .npy"
        ) from None
    return polars


def write(file: Path, outputs: "Array", targets: "Array") -> None:
    """Write a record for each row: its number, its target and its output.

    A .npy file holds a structured array with the fields row, target and output, a .parquet file
    these columns, the last as a list where an output has several numbers.

    outputs: (rows, ...), targets: (rows, ...)
    """
    import numpy as np

    rows = np.arange(len(outputs))
    if file.suffix == ".npy":
        fields = [("row", np.int64), ("target", targets.dtype, targets.shape[1:]),
                  ("output", outputs.dtype, outputs.shape[1:])]  # fmt: skip
        records = np.empty(len(rows), dtype=fields)
        records["row"], records["target"], records["output"] = rows, targets, outputs
        np.save(file, records)
        return
    polars = require_polars(file)
    columns = {"row": rows, "target": targets, "output": outputs}
    series = {name: polars.Series(name, part) for name, part in columns.items()}
    polars.DataFrame(series).write_parquet(file)
