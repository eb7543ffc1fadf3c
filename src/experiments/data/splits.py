"""Splits: the rows of a data set for training, validation or the test."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that a damaged file is reported before torch is imported
    from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Inputs and their targets, in memory; `arrays.MappedSplit` has them in memory-mapped files.

    x: float32 (rows, ...), or uint8
    y: int64 (rows,) for classes
    pixels: whether uint8 x is scaled to float32 in [0, 1] by the loaders; False for codes, which
        reach the model as they are. None scales, but a run says so, and refuses small bytes.
    """

    x: Tensor
    y: Tensor
    pixels: bool | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.y)

    @property
    def block(self) -> int | None:
        """Neighbouring rows that the shuffle moves together; None: rows are shuffled one by one."""
        return None

    def to(self, device: str) -> Split:
        """The same split with its tensors on a device; they are copied if they are on another."""
        return replace(self, x=self.x.to(device), y=self.y.to(device))

    def prefetched(self, windows: Iterable[Sequence[Tensor]]) -> Iterator[Tensor]:
        """The row numbers of each batch, int64 (batch,), given those of each shuffle window. A
        memory-mapped split prefetches the next window's rows.
        """
        return chain.from_iterable(windows)

    def release(self) -> None:
        """Release pages that can be read again from their file. In memory there are none."""


def reads_samples(split: object) -> bool:
    """Whether a split is read row by row through its own __getitem__, as map-style Datasets are."""
    return hasattr(type(split), "__getitem__")
