"""The folders are the architecture: imports point down only, and never in a circle."""

import importlib.util
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("floors", ROOT / "docs" / "floors.py")
assert spec is not None
assert spec.loader is not None
floors = importlib.util.module_from_spec(spec)
spec.loader.exec_module(floors)

GRAPH = floors.graph()
# what has no place in a name, since it says nothing about the contents
VAGUE = {"utils", "util", "helpers", "base", "manager", "common", "misc"}


def upward(graph: dict[str, set[str]]) -> list[str]:
    """The imports of a graph that point to a higher floor."""
    return [
        f"{module} imports {other}"
        for module, imported in graph.items()
        for other in imported
        if floors.floor_of(other) < floors.floor_of(module)
    ]


def test_every_module_has_a_floor() -> None:
    assert len(GRAPH) > 30
    for module in GRAPH:
        floors.floor_of(module)


def test_imports_point_down_only() -> None:
    assert upward(GRAPH) == []


def test_an_import_upward_is_found() -> None:
    assert upward({"data.loaders": {"training.fit"}}) == ["data.loaders imports training.fit"]


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter(GRAPH).prepare()  # raises CycleError


def test_imports_inside_functions_and_for_types_count(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from experiments.data import Split\n"
        "def late():\n    from experiments.training.fit import fit\n"
        "    from experiments import job\n"
    )
    assert set(floors.imports(file)) == {"data.__init__", "training.fit", "job"}


def test_the_picture_shows_the_imports_of_now() -> None:
    assert floors.PICTURE.read_text() == floors.draw(), "run python docs/floors.py"


def test_the_architecture_page_names_every_floor() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for name, members in floors.FLOORS:
        assert all(f"`{member}" in page for member in members if member[0] != "_"), name


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [module for module in GRAPH if not VAGUE.isdisjoint(module.split("."))] == []


@pytest.mark.parametrize(
    "module",
    [
        "compare",
        "export",
        "directory.record",
        "results.pictures",
        "sweeps.search",
        "config.compose",
    ],
)
def test_what_needs_no_tensor_imports_no_torch(module: str) -> None:
    program = f"import sys, experiments.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("experiments.loader", "experiments.data.loaders"),
        ("experiments.models", "experiments.training.models"),
        ("experiments.schedulers", "experiments.training.schedules"),
        ("experiments.checkpoint", "experiments.directory.checkpoints"),
        ("experiments.fit", "experiments.training.fit"),
        ("experiments.streams", "experiments.data.streams"),
    ],
)
def test_a_module_that_moved_is_the_same_under_its_old_name(old: str, new: str) -> None:
    program = (
        f"import {old} as old, {new} as new; assert old is new; assert new.__name__ == '{new}'"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
