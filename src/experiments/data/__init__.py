"""Data sets as tensors: each module here has a `load` that a config's `data._target_` names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that a damaged file is told before torch is imported
    from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Rows of inputs and their targets, in memory; `arrays.MappedSplit` has them in files.

    x: float32 (rows, ...), or uint8, which the loaders scale to float32 in [0, 1]
    y: int64 (rows,) for classes
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    @property
    def block(self) -> int | None:
        """The number of neighbouring rows that a shuffle moves as one; None: it need not."""
        return None

    def to(self, device: str) -> Split:
        """The rows on a device."""
        return Split(self.x.to(device), self.y.to(device))

    def prefetched(self, windows: Iterable[Sequence[Tensor]]) -> Iterator[Tensor]:
        """The row numbers of each batch, int64 (batch,), out of those of each window. A split in
        files reads the rows of the next window meanwhile.
        """
        return chain.from_iterable(windows)

    def release(self) -> None:
        """Give back the memory of what was read and can be read again: here nothing."""


@dataclass(frozen=True)
class Data:
    """What a data set gives: rows to train on, rows to choose by, rows to report on."""

    train: Split
    valid: Split
    test: Split

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """A sha256 of each split, by name; computed once, though many runs may ask."""
        from experiments.directory.fingerprint import fingerprint

        splits = {"train": self.train, "valid": self.valid, "test": self.test}
        return {
            name: fingerprint({"x": split.x, "y": split.y}, split.release)
            for name, split in splits.items()
        }
