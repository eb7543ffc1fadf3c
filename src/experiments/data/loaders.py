"""Batches of a split. The rows of a batch are a pure function of (seed, epoch, batch number).

Any epoch can thus be resumed at any batch without replaying earlier ones, and both loaders yield
the same batches in the same order.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, cast

import torch
import torch.utils.data
from torch import Tensor

from experiments.data import Split, reads_samples
from experiments.data.nests import map_tensors, tensors_of
from experiments.data.samplers import EpochRows, MakeSampler
from experiments.data.samples import Collate, Samples
from experiments.data.streams import derive
from experiments.errors import UsageError
from experiments.interrupt import start_loader_worker, starting_loader_workers

Batch = Any  # a nest of tensors, rows first; (x, y) of most data sets

# The batch size of an evaluation, unless rows are so large that a batch has too many elements.
EVAL_BATCH_ROWS = 256
EVAL_BATCH_ELEMENTS = 2**18


class Loader(Protocol):
    """Batches of a split, by epoch and by number in the epoch; `len` is the batches per epoch."""

    def __len__(self) -> int: ...
    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class BatchRows:
    """The row numbers of each batch of each epoch; `len` is the number of batches per epoch.

    The shuffle permutes blocks of `block` neighbouring rows, then permutes all rows within each
    window of `window` consecutive permuted blocks. With block None, all rows are one block.

    sampler: gives the row numbers of an epoch, int64 (rows,), in place of the shuffle
    """

    rows: int
    batch_size: int
    shuffle: bool = False
    drop_last: bool = False
    seed: int = 0
    block: int | None = None
    window: int = 128
    sampler: Callable[[int], Tensor] | None = None

    def __len__(self) -> int:
        return self.rows // self.batch_size if self.drop_last else -(-self.rows // self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """The row numbers of each batch of an epoch from batch `start` on: int64 (batch,) each."""
        return chain.from_iterable(self.windows(epoch, start))

    def windows(self, epoch: int, start: int = 0, group: int = 1) -> Iterator[Sequence[Tensor]]:
        """The same per shuffle window, `group` batches concatenated. A group that spans two windows
        belongs to the second; the remainder of the epoch comes last.
        """
        size = group * self.batch_size
        pending, skip = torch.empty(0, dtype=torch.int64), start * self.batch_size
        for order in self.window_orders(epoch):
            pending = torch.cat([pending, order[skip:]])
            skip = max(0, skip - len(order))
            complete = len(pending) - len(pending) % size
            if complete:
                yield cast(Sequence[Tensor], pending[:complete].split(size))
            pending = pending[complete:]
        if self.drop_last:
            pending = pending[: len(pending) - len(pending) % self.batch_size]
        if len(pending):
            yield [pending]

    def window_orders(self, epoch: int) -> Iterator[Tensor]:
        """The row numbers of each shuffle window, in order: int64 (rows,) each."""
        if self.sampler is not None:
            yield self.sampler(epoch)
            return
        order = permutation if self.shuffle else lambda n, seed: torch.arange(n)
        seed, block = derive(self.seed, "shuffle", epoch), self.block
        if block is None:
            yield order(self.rows, seed)
            return
        blocks = order(-(-self.rows // block), derive(self.seed, "blocks", epoch))
        for first in range(0, len(blocks), self.window):
            # ascending, so that the last block, which may be short, ends its window, and a single
            # window of all rows has the order of a split in memory
            window = blocks[first : first + self.window].sort().values
            offsets = block * (window - torch.arange(len(window)))
            rows = order(min(block * len(window), self.rows - int(offsets[-1])), seed + first)
            yield rows + offsets[rows // block]


def batch_rows(split: Any, sampler: MakeSampler | None, **options: Any) -> BatchRows:
    """The batches of a split, with the rows that a sampler draws, if there is one.

    options: batch_size, shuffle, drop_last, seed, as in BatchRows.
    """
    block = split.block if isinstance(split, Split) and not reads_samples(split) else None
    if sampler is None:
        return BatchRows(len(split), block=block, **options)
    drawn = EpochRows(sampler, split, options.get("seed", 0))
    return BatchRows(drawn.count, **{**options, "shuffle": True}, sampler=drawn)


def permutation(n: int, seed: int) -> Tensor:
    """0..n-1 in a random order: int64 (n,)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


class TensorLoader:
    """Batches gathered by index from tensors on the device or in memory-mapped files.

    sampler: makes of the split what draws its rows, in place of the shuffle
    options: batch_size, shuffle, drop_last, seed, as in BatchRows.

    Raises UsageError for a split that must be read sample by sample.
    """

    # whether unshuffled batches are copies, for a model that writes to its input, and not views
    copies = False

    def __init__(
        self,
        split: Split,
        *,
        device: str = "cpu",
        sampler: MakeSampler | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(split, Split) or reads_samples(split):
            raise UsageError(
                f"loader=tensors: gathers whole batches from a Split's x and y, and a "
                f"{type(split).__name__} is read sample by sample; use loader=torch"
            )
        self.split, self.device = split.to(device), device
        self.rows = batch_rows(split, sampler, **options)
        self.index_device = tensors_of(self.split.tensors)[0].device
        # mapped files stay on the CPU
        self.in_place = self.index_device.type == torch.device(device).type

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches from number `start` on: the split's nest of tensors, (batch, ...) each, with
        float32 for x of uint8 pixels.

        Raises UsageError after a batch that is a view and that was written to.
        """
        size = self.rows.batch_size
        if not self.rows.shuffle and self.split.block is None:
            # slices are views: nothing is copied
            written = self.versions()
            for first in range(start * size, len(self) * size, size):
                yield self.rows_from(first, first + size)
                if self.versions() != written:
                    raise UsageError(
                        "model: it wrote to the rows of the data, which it had not done when that "
                        "was checked; compute a new tensor, as x.sub(1) does and x.sub_(1) does not"
                    )
            return
        for index in self.indices(epoch, start):
            batch = self.split.gather(index)
            yield batch if self.in_place else map_tensors(self.moved, batch)

    def rows_from(self, first: int, last: int) -> Batch:
        """The batch of the consecutive rows from `first` up to `last`."""
        copies = self.copies

        def part(tensor: Tensor) -> Tensor:
            return tensor[first:last].clone() if copies else tensor[first:last]

        return self.split.scaled(map_tensors(part, self.split.tensors))

    def moved(self, tensor: Tensor) -> Tensor:
        """A tensor on the loader's device."""
        return tensor.to(self.device)

    def versions(self) -> list[int]:
        """Numbers that change when something writes to a tensor of the split."""
        return [0 if t.is_inference() else t._version for t in tensors_of(self.split.tensors)]

    def indices(self, epoch: int = 0, start: int = 0, group: int = 1) -> Iterator[Tensor]:
        """The row numbers of `group` batches at a time: int64 (rows,), on the split's device."""
        for index in self.split.prefetched(self.rows.windows(epoch, start, group)):
            yield index.to(self.index_device)


def evaluation_options(
    split: Split | torch.utils.data.Dataset[Any], batch_size: int, collate: Collate | None = None
) -> dict[str, Any]:
    """Loader options for an evaluation: each row once, in order. Without a backward pass
    activations are not kept, so batches have at least twice the rows of training batches.
    """
    elements = sum(tensor.numel() for tensor in tensors_of(inputs(select(split, [0], collate))))
    default = min(EVAL_BATCH_ROWS, EVAL_BATCH_ELEMENTS // max(1, elements))
    return {"batch_size": max(2 * batch_size, default), "shuffle": False, "drop_last": False}


def inputs(batch: Batch) -> Any:
    """The first part of a pair; any other batch is its own."""
    return batch[0] if isinstance(batch, tuple | list) and len(batch) == 2 else batch


def select(
    split: Split | torch.utils.data.Dataset[Any], rows: list[int], collate: Collate | None = None
) -> Batch:
    """A batch of some rows of any split, which shares no memory with it.

    collate: makes a batch of samples; None: the Dataset's own `collate_fn`, or default_collate
    """
    if reads_samples(split):
        return Samples(split, collate=collate).__getitems__(rows)
    return cast(Split, split).gather(torch.tensor(rows))


def start_method() -> str | None:
    """How to start a DataLoader's processes where the default cannot: inside joblib's processes it
    is joblib's own method, which takes only joblib's own kind of process. None is the default.
    """
    methods = multiprocessing.get_all_start_methods()
    current = multiprocessing.get_start_method(allow_none=True)
    return None if current is None or current in methods else methods[0]


class TorchLoader:
    """The same batches through `torch.utils.data.DataLoader`, sample by sample.

    For data sets that must be read sample by sample: `split` may be any map-style Dataset with a
    length, also a Split with a __getitem__ of its own. What reading a row draws from the global
    generators is a function of (seed, epoch, row), see `samples.Samples`. Worker processes affect
    when a batch is read, not what it holds.

    collate_fn: makes a batch of a list of samples; None: the Dataset's own `collate_fn`, or else
        default_collate
    sampler: makes of the split what draws its rows, in place of the shuffle
    options: batch_size, shuffle, drop_last, seed, as in BatchRows.
    """

    def __init__(
        self,
        split: Split | torch.utils.data.Dataset[Any],
        *,
        num_workers: int = 0,
        collate_fn: Collate | None = None,
        sampler: MakeSampler | None = None,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        self.split = split if isinstance(split, Split) and not reads_samples(split) else None
        self.dataset: Any = split if self.split is None else Rows(self.split)
        self.collate = collate_fn
        self.rows = batch_rows(split, sampler, **options)
        self.num_workers, self.device = num_workers, device

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches that TensorLoader gives for the same split, from batch number `start` on."""
        windows = self.rows.windows(epoch, start)
        indices = (
            chain.from_iterable(windows) if self.split is None else self.split.prefetched(windows)
        )
        loader = torch.utils.data.DataLoader(
            Samples(self.dataset, self.rows.seed, epoch, self.collate),
            batch_sampler=(index.tolist() for index in indices),
            num_workers=self.num_workers,
            collate_fn=unchanged,
            worker_init_fn=start_loader_worker,
            multiprocessing_context=start_method() if self.num_workers else None,
            # by default it draws from the global generator, which would change dropout
            generator=torch.Generator().manual_seed(derive(self.rows.seed, "workers", epoch)),
            pin_memory=self.device != "cpu",
        )
        with starting_loader_workers():
            batches = iter(loader)
        for batch in batches:
            if isinstance(batch, UsageError):  # of a worker
                raise batch
            moved = map_tensors(lambda t: t.to(self.device, non_blocking=True), batch)
            yield moved if self.split is None else self.split.scaled(moved)


def unchanged(batch: Batch) -> Batch:
    """A batch that `Samples` has collated already."""
    return batch


class Rows(torch.utils.data.Dataset[Any]):
    """The rows of a split as samples."""

    def __init__(self, split: Split) -> None:
        self.tensors = split.tensors

    def __getitem__(self, row: int) -> Any:
        return map_tensors(lambda tensor: tensor[row], self.tensors)
