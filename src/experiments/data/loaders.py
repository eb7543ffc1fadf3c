"""Batches out of a split. Which rows a batch holds is a pure function of (seed, epoch, batch).

So any epoch can be entered at any batch without replaying what came before, and both loaders
here give the same batches in the same order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, cast

import torch
import torch.utils.data
from torch import Tensor

from experiments.data import Split
from experiments.data.streams import derive

Batch = tuple[Tensor, Tensor]

# An evaluation takes small rows in batches of this many, and of no more than so many numbers.
EVALUATED_ROWS = 256
EVALUATED_NUMBERS = 2**18


class Loader(Protocol):
    """Batches of a split, by epoch and by number within the epoch; `len` counts them."""

    def __len__(self) -> int: ...
    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class BatchRows:
    """Which rows make each batch of each epoch; `len` is the number of batches in one.

    A shuffle puts blocks of `block` neighbouring rows in a random order, and mixes the rows of
    each `window` consecutive blocks of that order completely. None: all rows are one block.
    """

    rows: int
    batch_size: int
    shuffle: bool = False
    drop_last: bool = False
    seed: int = 0
    block: int | None = None
    window: int = 128

    def __len__(self) -> int:
        return self.rows // self.batch_size if self.drop_last else -(-self.rows // self.batch_size)

    def of(self, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """The row numbers of each batch of an epoch from batch `start` on: int64 (batch,) each."""
        return chain.from_iterable(self.windows(epoch, start))

    def windows(self, epoch: int, start: int = 0, at_once: int = 1) -> Iterator[Sequence[Tensor]]:
        """The same window by window, `at_once` batches concatenated. A batch that spans two windows
        comes with the second; the rest of the epoch comes last.
        """
        size = at_once * self.batch_size
        left, passed = torch.empty(0, dtype=torch.int64), start * self.batch_size
        for order in self.orders(epoch):
            left = torch.cat([left, order[passed:]])
            passed = max(0, passed - len(order))
            whole = len(left) - len(left) % size
            if whole:
                yield cast(Sequence[Tensor], left[:whole].split(size))
            left = left[whole:]
        if self.drop_last:
            left = left[: len(left) - len(left) % self.batch_size]
        if len(left):
            yield [left]

    def orders(self, epoch: int) -> Iterator[Tensor]:
        """The row numbers of each window in their order: int64 (rows,) each."""
        order = permutation if self.shuffle else lambda n, seed: torch.arange(n)
        seed, block = derive(self.seed, "shuffle", epoch), self.block
        if block is None:
            yield order(self.rows, seed)
            return
        blocks = order(-(-self.rows // block), derive(self.seed, "blocks", epoch))
        for first in range(0, len(blocks), self.window):
            # ascending: the last block, which may be short, ends its window, and where one window
            # has all rows their order is the one that they would have in memory
            chosen = blocks[first : first + self.window].sort().values
            moved = block * (chosen - torch.arange(len(chosen)))
            rows = order(min(block * len(chosen), self.rows - int(moved[-1])), seed + first)
            yield rows + moved[rows // block]


def permutation(n: int, seed: int) -> Tensor:
    """0..n-1 in a random order: int64 (n,)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


class TensorLoader:
    """Whole batches gathered by index, from tensors that lie on the device or in mapped files.

    options: batch_size, shuffle, drop_last, seed, as in BatchRows.
    """

    def __init__(self, split: Split, *, device: str = "cpu", **options: Any) -> None:
        self.split, self.device = split.to(device), device
        self.x, self.y = self.split.x, self.split.y
        self.rows = BatchRows(len(split), block=split.block, **options)

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """xb: x's dtype, of bytes float32, (batch, ...), yb: y's dtype (batch, ...), from batch
        number `start` on.
        """
        size = self.rows.batch_size
        if not self.rows.shuffle and self.split.block is None:
            # slices share memory with the tensors: nothing is gathered
            for first in range(start * size, len(self) * size, size):
                yield scaled(self.x[first : first + size]), self.y[first : first + size]
            return
        for index in self.indices(epoch, start):
            xb, yb = gather(self.x, self.y, index)
            yield xb.to(self.device), yb.to(self.device)

    def indices(self, epoch: int = 0, start: int = 0, at_once: int = 1) -> Iterator[Tensor]:
        """The row numbers of those batches, `at_once` in one: int64 (rows,), on x's device."""
        for index in self.split.prefetched(self.rows.windows(epoch, start, at_once)):
            yield index.to(self.x.device)


def evaluation_options(split: Split, batch_size: int) -> dict[str, Any]:
    """The options of a loader for an evaluation: each row once, in order. No gradients are kept, so
    its batches have at least twice the rows of the training batches.
    """
    small = min(EVALUATED_ROWS, EVALUATED_NUMBERS // max(1, split.x[:1].numel()))
    return {"batch_size": max(2 * batch_size, small), "shuffle": False, "drop_last": False}


def gather(x: Tensor, y: Tensor, index: Tensor) -> Batch:
    """The rows of a batch: of x, bytes scaled, and of y, by number, int64 (batch,)."""
    return scaled(x.index_select(0, index)), y.index_select(0, index)


def scaled(x: Tensor) -> Tensor:
    """Bytes, 0..255, as float32 in [0, 1]; anything else as it is."""
    return x / 255 if x.dtype == torch.uint8 else x


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
        self.split = split if isinstance(split, Split) else None
        self.dataset: torch.utils.data.Dataset[Any] = (
            torch.utils.data.TensorDataset(split.x, split.y) if isinstance(split, Split) else split
        )
        block = None if self.split is None else self.split.block
        self.rows = BatchRows(len(split), block=block, **options)  # type: ignore[arg-type]
        self.num_workers, self.device = num_workers, device

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """What TensorLoader gives of the same split, from batch number `start` on."""
        windows = self.rows.windows(epoch, start)
        numbers = (
            chain.from_iterable(windows) if self.split is None else self.split.prefetched(windows)
        )
        loader = torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=(index.tolist() for index in numbers),
            num_workers=self.num_workers,
            # without a generator of its own it draws from the global one, and dropout would move
            generator=torch.Generator().manual_seed(derive(self.rows.seed, "workers", epoch)),
            pin_memory=self.device != "cpu",
        )
        for xb, yb in loader:
            xb, yb = (part.to(self.device, non_blocking=True) for part in (xb, yb))
            yield xb if self.split is None else scaled(xb), yb
