"""Data sets as tensors. `mnist` and `arrays` have a `load` function for `data._target_`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that a damaged file is reported before torch is imported
    from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Inputs and their targets, in memory; `arrays.MappedSplit` has them in memory-mapped files.

    x: float32 (rows, ...), or uint8, which the loaders scale to float32 in [0, 1]
    y: int64 (rows,) for classes
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    @property
    def block(self) -> int | None:
        """Neighbouring rows that the shuffle moves together; None: rows are shuffled one by one."""
        return None

    def to(self, device: str) -> Split:
        """A copy on a device."""
        return Split(self.x.to(device), self.y.to(device))

    def prefetched(self, windows: Iterable[Sequence[Tensor]]) -> Iterator[Tensor]:
        """The row numbers of each batch, int64 (batch,), given those of each shuffle window. A
        memory-mapped split prefetches the next window's rows.
        """
        return chain.from_iterable(windows)

    def release(self) -> None:
        """Release pages that can be read again from their file. In memory there are none."""


@dataclass(frozen=True)
class Data:
    """The splits of a data set: for training, for model selection and for the final result."""

    train: Split
    valid: Split
    test: Split

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """The sha256 of each split, by name; computed once, also if several runs share the data."""
        from experiments.directory.fingerprint import fingerprint

        splits = {"train": self.train, "valid": self.valid, "test": self.test}
        return {
            name: fingerprint({"x": split.x, "y": split.y}, split.release)
            for name, split in splits.items()
        }
