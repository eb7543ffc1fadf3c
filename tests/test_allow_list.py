"""What Hydra may call for a config: the targets that it names, and no more than with Hydra 1.3."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from experiments.config.hydra_versions import BEFORE_1_4
from experiments.directory.allow_list import allow_list, allowed
from experiments.errors import UsageError
from experiments.training.build import build

OWN = """
import logging
import shutil
from shutil import rmtree as tidy
from torch import nn

class Net(nn.Module):
    def __init__(self, inner=None, activation=None):
        super().__init__()
        self.inner, self.activation = inner, activation

def factory(width=3):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU())

def late():
    from imported_late import Late
    return Late()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's own, which is importable by this name."""
    (tmp_path / "own_parts_to_allow.py").write_text(OWN)
    (tmp_path / "imported_late.py").write_text("class Late:\n    def __call__(self): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_parts_to_allow"
    for name in ("own_parts_to_allow", "imported_late"):
        sys.modules.pop(name, None)


def part(target: str, **arguments: Any) -> dict[str, Any]:
    return {"model": {"_target_": target, **arguments}}


next_hydra = pytest.mark.skipif(BEFORE_1_4, reason="Hydra 1.3 has no allow-list")


@next_hydra
def test_exactly_the_classes_that_a_config_names_are_allowed(own: str) -> None:
    node = {"_target_": f"{own}.Net", "inner": [{"_target_": "torch.nn.ReLU"}]}
    assert set(allow_list(node, "model")) == {
        f"{own}.Net", "torch.nn.ReLU", "torch.nn.modules.activation.ReLU",
    }  # fmt: skip


@pytest.mark.skipif(not BEFORE_1_4, reason="Hydra 1.4 has an allow-list")
def test_hydra_before_1_4_is_given_no_allow_list() -> None:
    assert allowed({"_target_": "torch.nn.ReLU"}, "model") == {}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["Net", "factory"])
def test_a_class_and_a_function_of_ones_own_make_a_model_without_a_warning(
    name: str, own: str
) -> None:
    assert isinstance(build(part(f"{own}.{name}"), "model"), nn.Module)


@pytest.mark.filterwarnings("error")
def test_parts_inside_a_part_are_built_without_a_warning(own: str) -> None:
    inner = {"_target_": f"{own}.factory", "width": 2}
    model = build(part(f"{own}.Net", inner=inner), "model")
    assert isinstance(model.inner, nn.Sequential)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("function", "path"), [("get_class", "torch.nn.GELU"), ("get_method", "math.sqrt")]
)
def test_hydras_own_functions_look_up_a_name_of_the_config(
    function: str, path: str, own: str
) -> None:
    found = {"_target_": f"hydra.utils.{function}", "path": path}
    model = build(part(f"{own}.Net", activation=found), "model")
    assert model.activation.__name__ == path.rpartition(".")[2]


@pytest.mark.parametrize(
    "target", ["shutil.rmtree", "{}.tidy", "{}.shutil.rmtree", "{}.logging.os.system"]
)
def test_what_hydra_blocks_is_not_called_under_any_name(
    target: str, own: str, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    with pytest.raises(UsageError) as error:
        build(part(target.format(own), _args_=[str(kept)]), "model")
    assert kept.exists()
    assert "\n" not in str(error.value)
    assert target.format(own) in str(error.value)


@next_hydra
def test_a_name_that_hydra_would_look_up_is_not_called_if_it_is_blocked(own: str) -> None:
    found = {"_target_": "hydra.utils.get_method", "path": "shutil.rmtree"}
    with pytest.raises(UsageError, match=r"^model\.activation\.path=shutil\.rmtree: Hydra does"):
        build(part(f"{own}.Net", activation=found), "model")


@next_hydra
def test_a_result_of_a_package_that_is_imported_late_is_told_with_what_makes_it_known(
    own: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as error:
        build(part(f"{own}.late"), "model")
    assert str(error.value) == (
        f"model._target_={own}.late: returns imported_late.Late, which Hydra allows if its "
        "package is imported before; write import imported_late at the top of the target's module"
    )
    file = tmp_path / f"{own}.py"
    file.write_text("import imported_late\n" + file.read_text())
    sys.modules.pop(own)
    sys.modules.pop("imported_late")
    assert callable(build(part(f"{own}.late"), "model"))
