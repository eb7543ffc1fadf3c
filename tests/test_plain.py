from enum import Enum
from pathlib import Path

import pytest
from hydra.utils import instantiate

from experiments.config.plain import plain
from experiments.directory.allow_list import allowed
from experiments.errors import UsageError


class Act(Enum):
    RELU = 1
    NESTED = (1, 2)


def test_a_part_of_the_users_is_built_with_the_same_enum_and_path() -> None:
    node = plain({"_target_": "builtins.dict", "act": Act.RELU, "at": [Path("x")]}, "model")
    assert instantiate(node, _convert_="all", **allowed(node, "model")) == {
        "act": Act.RELU,
        "at": [Path("x")],
    }


def test_elsewhere_an_enum_is_its_name_and_a_path_its_text() -> None:
    assert plain({"a": Act.RELU, "b": [Path("x")]}, "extra") == {"a": "RELU", "b": ["x"]}
    ours = {"_target_": "experiments.data.mnist.load", "path": Path("x")}
    assert plain(ours, "data") == {**ours, "path": "x"}


@pytest.mark.parametrize("value", [b"bytes", Act.NESTED])
def test_a_value_that_cannot_be_saved_is_refused_by_its_key(value: object) -> None:
    with pytest.raises(UsageError, match=r"^model\.net\.0=.*cannot be saved with the run"):
        plain({"_target_": "own.Model", "net": [value]}, "model")


def test_an_enum_of_a_part_that_builds_its_own_parts_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^model\.act="):
        plain({"_target_": "own.Model", "_recursive_": False, "act": Act.RELU}, "model")
