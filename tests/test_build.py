import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.errors import UsageError
from experiments.training.build import build

OWN = """
from torch import nn

def raising(kind):
    raise {"value": ValueError, "type": TypeError, "key": KeyError}[kind]("an argument of mine")

def through_torch():
    return nn.Linear(784)

def optimizer(params, lr):
    raise ValueError("mine")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's own, which is importable by this name."""
    (tmp_path / "own_parts_to_build.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("import there_is_no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_parts_to_build"
    sys.modules.pop("own_parts_to_build", None)


def part(target: str, **arguments: Any) -> dict[str, Any]:
    return {"model": {"_target_": target, **arguments}}


@pytest.mark.parametrize(
    ("kind", "expected"), [("value", ValueError), ("type", TypeError), ("key", KeyError)]
)
def test_an_error_raised_by_ones_own_code_keeps_its_kind_and_traceback(
    kind: str, expected: type[Exception], own: str
) -> None:
    with pytest.raises(expected, match="an argument of mine") as error:
        build(part(f"{own}.raising", kind=kind), "model")
    assert Path(error.traceback[-1].path).name == f"{own}.py"


def test_an_error_that_torch_raises_inside_ones_own_code_keeps_its_traceback(own: str) -> None:
    with pytest.raises(TypeError, match="out_features") as error:
        build(part(f"{own}.through_torch"), "model")
    assert Path(error.traceback[-1].path).name == f"{own}.py"


def test_an_error_of_a_partial_of_ones_own_keeps_its_traceback(own: str) -> None:
    with pytest.raises(ValueError, match="mine") as error:
        build(part(f"{own}.optimizer", _partial_=True, lr=1), "model", [])
    assert Path(error.traceback[-1].path).name == f"{own}.py"


def test_a_module_of_ones_own_that_lacks_a_package_keeps_its_traceback(own: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module") as error:
        build(part("own_broken.Model"), "model")
    assert Path(error.traceback[-1].path).name == "own_broken.py"


@pytest.mark.parametrize(
    ("target", "arguments", "reason"),
    [
        ("{}.raising", {"sort": 3}, "unexpected keyword argument 'sort'"),
        ("{}.raising", {}, "missing 1 required positional argument: 'kind'"),
        ("{}.raisin", {"kind": "key"}, "Error loading"),
        ("no_such_module_at_all.Model", {}, "Error loading"),
        ("torch.nn.Linear", {"in_features": 784}, "out_features"),
        ("torch.nn.Dropout", {"p": 2}, "between 0 and 1"),
    ],
)
def test_what_the_config_says_wrong_is_one_line(
    target: str, arguments: dict[str, Any], reason: str, own: str
) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        build(part(target.format(own), **arguments), "model")
    assert str(error.value).startswith(f"model._target_={target.format(own)}: ")
    assert "\n" not in str(error.value)
