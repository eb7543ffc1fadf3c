"""The first commands of somebody new, or of one whose home cannot be written to: nothing is told of
fonts and folders that are none of theirs.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PATIENCE, FinishedRun

pytestmark = pytest.mark.long

Module = Callable[..., list[str]]


@pytest.fixture(params=["empty", "unwritable", "unwritable MPLCONFIGDIR"])
def module(request: pytest.FixtureRequest, tmp_path: Path) -> Module:
    """`python -m` in the test's own directory with such a home; the lines that it printed."""
    home, file = tmp_path / "home", tmp_path / "file"
    home.mkdir()
    file.touch()  # below it nobody, not even root, makes a folder
    surroundings = {
        "HOME": str(file / "home") if request.param == "unwritable" else str(home),
        "MPLCONFIGDIR": str(file / "mpl") if "MPLCONFIGDIR" in request.param else "",
        **dict.fromkeys(("XDG_CACHE_HOME", "XDG_CONFIG_HOME"), ""),
    }

    def module(*arguments: str) -> list[str]:
        completed = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=tmp_path,
            env=os.environ | surroundings,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert (completed.returncode, completed.stderr) == (0, "")
        return completed.stdout.splitlines()

    return module


def test_a_sweep_prints_its_runs_and_nothing_else(module: Module, small_mnist_dir: Path) -> None:
    printed = module(
        "experiments", "-m", f"data.path={small_mnist_dir}", "trainer.epochs=1", "seed=0", "sweep=s"
    )
    words = [line.split()[0] for line in printed if line]
    assert words == ["sweep", "[1/1]", "rank", "1", "results", "look"]


def test_compare_prints_its_table_and_nothing_else(
    module: Module, finished_run: FinishedRun, tmp_path: Path
) -> None:
    shutil.copytree(finished_run.path, tmp_path / "runs" / "one")
    words = [line.split()[0] for line in module("experiments.compare", "runs")]
    assert words == ["rank", "1", "runs/results.csv", "runs/results.png"]


def test_evaluate_prints_its_figures_and_nothing_else(
    module: Module, finished_run: FinishedRun, tmp_path: Path
) -> None:
    shutil.copytree(finished_run.path, tmp_path / "run")
    words = [line.split()[0] for line in module("experiments.evaluate", "run")]
    files = [f"run/evaluation-best-valid.{kind}" for kind in ("json", "png")]
    assert words == ["best", "class", *map(str, range(10)), *files]
