"""Data sets as tensors: each module here has a `load` that a config's `data._target_` names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that a damaged file is told before torch is imported
    from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Rows of inputs and their targets.

    x: float32 (rows, ...)
    y: int64 (rows,) for classes
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Data:
    """What a data set gives: rows to train on, rows to choose by, rows to report on."""

    train: Split
    valid: Split
    test: Split

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """A sha256 of each split, by name; computed once, though many runs may ask."""
        from experiments.fingerprint import fingerprint

        splits = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: fingerprint(vars(split)) for name, split in splits.items()}
