"""Batches out of a split. Which rows a batch holds is a pure function of (seed, epoch, batch).

So any epoch can be entered at any batch without replaying what came before, and both loaders
here give the same batches in the same order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.utils.data
from torch import Tensor

from experiments.data import Split
from experiments.streams import derive

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class BatchRows:
    """Which rows make each batch of each epoch; `len` is the number of batches in one."""

    rows: int
    batch_size: int
    shuffle: bool = False
    drop_last: bool = False
    seed: int = 0

    def __len__(self) -> int:
        return self.rows // self.batch_size if self.drop_last else -(-self.rows // self.batch_size)

    def of(self, epoch: int) -> Sequence[Tensor]:
        """The row numbers of each batch of an epoch: int64 (batch,) each."""
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive(self.seed, "shuffle", epoch))
            order = torch.randperm(self.rows, generator=generator)
        else:
            order = torch.arange(self.rows)
        return cast(Sequence[Tensor], order.split(self.batch_size)[: len(self)])


class TensorLoader:
    """Whole batches gathered by index from tensors that lie on the device.

    options: batch_size, shuffle, drop_last, seed, as in BatchRows.
    """

    def __init__(self, split: Split, *, device: str = "cpu", **options: Any) -> None:
        self.x, self.y = split.x.to(device), split.y.to(device)
        self.rows = BatchRows(len(split), **options)

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """xb: x's dtype (batch, ...), yb: y's dtype (batch, ...), from batch number `start` on."""
        size = self.rows.batch_size
        if not self.rows.shuffle:
            # slices share memory with the tensors: nothing is gathered
            for first in range(start * size, len(self) * size, size):
                yield self.x[first : first + size], self.y[first : first + size]
            return
        for index in self.rows.of(epoch)[start:]:
            index = index.to(self.x.device)
            yield self.x.index_select(0, index), self.y.index_select(0, index)


class TorchLoader:
    """The same batches through `torch.utils.data.DataLoader`, row by row.

    For data sets that must be read sample by sample: `split` may be any map-style Dataset of
    (x, y) pairs with a length. Workers cannot change what a batch holds, only when it is read.

    options: batch_size, shuffle, drop_last, seed, as in BatchRows.
    """

    def __init__(
        self,
        split: Split | torch.utils.data.Dataset[Batch],
        *,
        num_workers: int = 0,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        self.rows = BatchRows(len(split), **options)  # type: ignore[arg-type]
        self.dataset = (
            torch.utils.data.TensorDataset(split.x, split.y) if isinstance(split, Split) else split
        )
        self.num_workers, self.device = num_workers, device

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """xb: x's dtype (batch, ...), yb: y's dtype (batch, ...), from batch number `start` on."""
        loader = torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=[index.tolist() for index in self.rows.of(epoch)[start:]],
            num_workers=self.num_workers,
            # without a generator of its own it draws from the global one, and dropout would move
            generator=torch.Generator().manual_seed(derive(self.rows.seed, "workers", epoch)),
            pin_memory=self.device != "cpu",
        )
        for xb, yb in loader:
            yield xb.to(self.device, non_blocking=True), yb.to(self.device, non_blocking=True)
