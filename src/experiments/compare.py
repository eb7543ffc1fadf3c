"""Compare run directories in a table and a plot: `python -m experiments.compare DIR...`.

Of exactly two runs it prints the differences side by side. Imports no torch.
"""

import argparse
import json
from functools import partial
from pathlib import Path

from experiments import stdio
from experiments.directory.paths import display_path
from experiments.errors import UsageError, exit_with_usage_error
from experiments.results.rows import collect, read
from experiments.results.tables import as_json, save, side_by_side, table, write


def main() -> None:
    """Parse the command line and compare."""
    stdio.protect(ignore_closed_pipes=True)
    parser = argparse.ArgumentParser("python -m experiments.compare", description=__doc__)
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR",
                        help="runs, or directories that contain runs")  # fmt: skip
    parser.add_argument("--into", type=Path, metavar="DIR",
                        help="where the results go; default: DIR, if it is one")  # fmt: skip
    parser.add_argument("--export", type=Path, metavar="FILE", help="write all rows as JSON")
    parser.error = partial(exit_with_usage_error, "experiments.compare")  # type: ignore[method-assign]
    args = parser.parse_args()
    try:
        rows = collect(args.directories)
        if not rows:
            raise UsageError(f"{args.directories[0]}: contains no run")
        if args.export:
            write(args.export, json.dumps([as_json(row) for row in rows], indent=2).encode())
        runs_given = [read(path) for path in args.directories if (path / "run.json").exists()]
        pair = len(args.directories) == len(rows) == len(runs_given) == 2
        print(side_by_side(*runs_given) if pair else table(rows))
        into = args.into or (args.directories[0] if len(args.directories) == 1 else None)
        if into is not None and not (into / "run.json").exists():
            print("\n".join(map(display_path, save(rows, into))))
    except UsageError as error:
        exit_with_usage_error("experiments.compare", str(error))


if __name__ == "__main__":
    main()
