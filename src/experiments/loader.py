"""Batches out of a split. Which rows a batch holds is a pure function of (seed, epoch, batch).

So any epoch can be entered at any batch without replaying what came before, and both loaders
here give the same batches in the same order.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.utils.data
from torch import Tensor

from experiments.data import Split
from experiments.streams import derive

Batch = tuple[Tensor, Tensor]


def epoch_rows(
    rows: int, batch_size: int, *, shuffle: bool, drop_last: bool, seed: int, epoch: int
) -> Sequence[Tensor]:
    """The row numbers of each batch of an epoch: int64 (batch,) each."""
    if shuffle:
        generator = torch.Generator().manual_seed(derive(seed, "shuffle", epoch))
        order = torch.randperm(rows, generator=generator)
    else:
        order = torch.arange(rows)
    batches: tuple[Tensor, ...] = order.split(batch_size)
    return batches[:-1] if drop_last and rows % batch_size else batches


class TensorLoader:
    """Whole batches gathered by index from tensors that lie on the device.

    `batches(epoch, start)` yields xb: x's dtype (batch, ...), yb: y's dtype (batch, ...)
    from batch number `start` of that epoch on; `len` is the number of batches an epoch.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.x, self.y = split.x.to(device), split.y.to(device)
        self.batch_size, self.shuffle, self.drop_last = batch_size, shuffle, drop_last
        self.seed = seed

    def __len__(self) -> int:
        return batch_count(len(self.y), self.batch_size, self.drop_last)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        if not self.shuffle:
            # slices share memory with the tensors: nothing is gathered
            for first in range(
                start * self.batch_size, len(self) * self.batch_size, self.batch_size
            ):
                yield (
                    self.x[first : first + self.batch_size],
                    self.y[first : first + self.batch_size],
                )
            return
        rows = epoch_rows(
            len(self.y),
            self.batch_size,
            shuffle=True,
            drop_last=self.drop_last,
            seed=self.seed,
            epoch=epoch,
        )
        for index in rows[start:]:
            index = index.to(self.x.device)
            yield self.x.index_select(0, index), self.y.index_select(0, index)


class TorchLoader:
    """The same batches through `torch.utils.data.DataLoader`, row by row.

    For data sets that must be read sample by sample: `split` may be any map-style Dataset of
    (x, y) pairs with a length. Workers cannot change what a batch holds, only when it is read.
    """

    def __init__(
        self,
        split: Split | torch.utils.data.Dataset[Batch],
        *,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.dataset = (
            torch.utils.data.TensorDataset(split.x, split.y) if isinstance(split, Split) else split
        )
        self.rows = len(split)  # type: ignore[arg-type]
        self.batch_size, self.shuffle, self.drop_last = batch_size, shuffle, drop_last
        self.num_workers, self.seed, self.device = num_workers, seed, device

    def __len__(self) -> int:
        return batch_count(self.rows, self.batch_size, self.drop_last)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        rows = epoch_rows(
            self.rows,
            self.batch_size,
            shuffle=self.shuffle,
            drop_last=self.drop_last,
            seed=self.seed,
            epoch=epoch,
        )
        loader = torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=[index.tolist() for index in rows[start:]],
            num_workers=self.num_workers,
            # without a generator of its own it draws from the global one, and dropout would move
            generator=torch.Generator().manual_seed(derive(self.seed, "workers", epoch)),
            pin_memory=self.device != "cpu",
        )
        for xb, yb in loader:
            yield xb.to(self.device, non_blocking=True), yb.to(self.device, non_blocking=True)


def batch_count(rows: int, batch_size: int, drop_last: bool) -> int:
    """Number of batches in an epoch."""
    return rows // batch_size if drop_last else -(-rows // batch_size)
