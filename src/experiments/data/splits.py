"""Splits: the rows of a data set for training, validation or the test."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from experiments.data.nests import map_tensors, row_count

if TYPE_CHECKING:  # so that a damaged file is reported before torch is imported
    from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Inputs and their targets, in memory; `arrays.MappedSplit` has them in memory-mapped files.

    A batch of it is (x, y), or x alone where y is None.

    x: float32 or uint8 (rows, ...), or a nest of tensors: tuples, lists and dicts of them
    y: int64 (rows,) for classes, or any other tensor or nest of tensors; None: there are no targets
    pixels: whether uint8 x is scaled to float32 in [0, 1] by the loaders; False for codes, which
        reach the model as they are. None scales, but a run says so, and refuses small bytes. An
        exported model takes pixels as bytes, also those that the split holds scaled already.
    """

    x: Any
    y: Any = None
    pixels: bool | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return row_count(self.tensors)

    @property
    def tensors(self) -> Any:
        """The nest of tensors that batches are gathered from: (x, y), or x alone."""
        return self.x if self.y is None else (self.x, self.y)

    def gather(self, index: Tensor, tensors: Any = None) -> Any:
        """The batch of the rows `index`, int64 (batch,), which shares no memory with the split.

        tensors: those to gather from, in the form of `self.tensors`; None: the split's own
        """
        nest = self.tensors if tensors is None else tensors
        return self.scaled(map_tensors(lambda t: t.index_select(0, index), nest))

    def scaled(self, batch: Any) -> Any:
        """A batch of the split's tensors, with x's bytes scaled if they are pixels."""
        if self.pixels is False:
            return batch
        if self.y is None:
            return map_tensors(scale_bytes, batch)
        x, y = batch
        return map_tensors(scale_bytes, x), y

    @property
    def block(self) -> int | None:
        """Neighbouring rows that the shuffle moves together; None: rows are shuffled one by one."""
        return None

    def to(self, device: str) -> Split:
        """The same split with its tensors on a device; they are copied if they are on another."""
        x, y = (map_tensors(lambda t: t.to(device), part) for part in (self.x, self.y))
        return replace(self, x=x, y=y)

    def prefetched(self, windows: Iterable[Sequence[Tensor]]) -> Iterator[Tensor]:
        """The row numbers of each batch, int64 (batch,), given those of each shuffle window. A
        memory-mapped split prefetches the next window's rows.
        """
        return chain.from_iterable(windows)

    def release(self) -> None:
        """Release pages that can be read again from their file. In memory there are none."""


def scale_bytes(x: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [0, 1]; other dtypes are returned unchanged."""
    import torch

    return x / 255 if x.dtype == torch.uint8 else x


def reads_samples(split: object) -> bool:
    """Whether a split is read row by row through its own __getitem__, as map-style Datasets are."""
    return hasattr(type(split), "__getitem__")
