"""Batches of a split. The rows of a batch are a pure function of (seed, epoch, batch number).

Any epoch can thus be resumed at any batch without replaying earlier ones, and both loaders yield
the same batches in the same order.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, cast

import torch
import torch.utils.data
from torch import Tensor

from experiments.data import Split, reads_samples
from experiments.data.samples import Samples
from experiments.data.streams import derive
from experiments.errors import UsageError
from experiments.interrupt import start_loader_worker, starting_loader_workers

Batch = tuple[Tensor, Tensor]

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


def permutation(n: int, seed: int) -> Tensor:
    """0..n-1 in a random order: int64 (n,)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


class TensorLoader:
    """Batches gathered by index from tensors on the device or in memory-mapped files.

    options: batch_size, shuffle, drop_last, seed, as in BatchRows.

    Raises UsageError for a split that must be read sample by sample.
    """

    # whether unshuffled batches are copies, for a model that writes to its input, and not views
    copies = False

    def __init__(self, split: Split, *, device: str = "cpu", **options: Any) -> None:
        if not isinstance(split, Split) or reads_samples(split):
            raise UsageError(
                f"loader=tensors: gathers whole batches from a Split's x and y, and a "
                f"{type(split).__name__} is read sample by sample; use loader=torch"
            )
        self.split, self.device = split.to(device), device
        self.x, self.y = self.split.x, self.split.y
        self.pixels = split.pixels is not False
        self.rows = BatchRows(len(split), block=split.block, **options)

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """xb: float32 if x is uint8 pixels, else x's dtype, (batch, ...), yb: y's dtype
        (batch, ...), from batch number `start` on.

        Raises UsageError after a batch that is a view and that was written to.
        """
        size = self.rows.batch_size
        if not self.rows.shuffle and self.split.block is None:
            # slices are views: nothing is copied
            written = self.versions()
            for first in range(start * size, len(self) * size, size):
                xb, yb = self.x[first : first + size], self.y[first : first + size]
                if self.copies:
                    xb, yb = xb.clone(), yb.clone()
                yield scale_bytes(xb) if self.pixels else xb, yb
                if self.versions() != written:
                    raise UsageError(
                        "model: it wrote to the rows of the data, which it had not done when that "
                        "was checked; compute a new tensor, as x.sub(1) does and x.sub_(1) does not"
                    )
            return
        for index in self.indices(epoch, start):
            xb, yb = gather(self.x, self.y, index, self.pixels)
            yield xb.to(self.device), yb.to(self.device)

    def versions(self) -> tuple[int, int]:
        """Numbers that change when something writes to x or y."""
        x, y = self.x, self.y
        return (0, 0) if x.is_inference() or y.is_inference() else (x._version, y._version)

    def indices(self, epoch: int = 0, start: int = 0, group: int = 1) -> Iterator[Tensor]:
        """The row numbers of `group` batches at a time: int64 (rows,), on x's device."""
        for index in self.split.prefetched(self.rows.windows(epoch, start, group)):
            yield index.to(self.x.device)


def evaluation_options(
    split: Split | torch.utils.data.Dataset[Any], batch_size: int
) -> dict[str, Any]:
    """Loader options for an evaluation: each row once, in order. Without a backward pass
    activations are not kept, so batches have at least twice the rows of training batches.
    """
    x = select(split, [0])[0] if reads_samples(split) else cast(Split, split).x[:1]
    default = min(EVAL_BATCH_ROWS, EVAL_BATCH_ELEMENTS // max(1, x.numel()))
    return {"batch_size": max(2 * batch_size, default), "shuffle": False, "drop_last": False}


def select(split: Split | torch.utils.data.Dataset[Any], rows: list[int]) -> Batch:
    """A batch of some rows of any split, which shares no memory with it."""
    if reads_samples(split):
        xb, yb = torch.utils.data.default_collate(Samples(split).__getitems__(rows))
        return xb, yb
    split = cast(Split, split)
    return gather(split.x, split.y, torch.tensor(rows), split.pixels is not False)


def gather(x: Tensor, y: Tensor, index: Tensor, pixels: bool = True) -> Batch:
    """The rows `index`, int64 (batch,), of x, with bytes scaled if they are pixels, and of y."""
    xb = x.index_select(0, index)
    return scale_bytes(xb) if pixels else xb, y.index_select(0, index)


def scale_bytes(x: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [0, 1]; other dtypes are returned unchanged."""
    return x / 255 if x.dtype == torch.uint8 else x


def start_method() -> str | None:
    """How to start a DataLoader's processes where the default cannot: inside joblib's processes it
    is joblib's own method, which takes only joblib's own kind of process. None is the default.
    """
    methods = multiprocessing.get_all_start_methods()
    current = multiprocessing.get_start_method(allow_none=True)
    return None if current is None or current in methods else methods[0]


class TorchLoader:
    """The same batches through `torch.utils.data.DataLoader`, sample by sample.

    For data sets that must be read sample by sample: `split` may be any map-style Dataset of
    (x, y) pairs with a length, also a Split with a __getitem__ of its own. What reading a row draws
    from the global generators is a function of (seed, epoch, row), see `samples.Samples`. Worker
    processes affect when a batch is read, not what it holds.

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
        self.split = split if isinstance(split, Split) and not reads_samples(split) else None
        self.dataset: torch.utils.data.Dataset[Any] = (
            split if self.split is None else torch.utils.data.TensorDataset(split.x, split.y)  # type: ignore[union-attr,assignment]
        )
        block = None if self.split is None else self.split.block
        self.rows = BatchRows(len(split), block=block, **options)  # type: ignore[arg-type]
        self.num_workers, self.device = num_workers, device

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches that TensorLoader gives for the same split, from batch number `start` on."""
        windows = self.rows.windows(epoch, start)
        indices = (
            chain.from_iterable(windows) if self.split is None else self.split.prefetched(windows)
        )
        dataset = self.dataset
        if self.split is None:
            dataset = Samples(dataset, self.rows.seed, epoch)
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=(index.tolist() for index in indices),
            num_workers=self.num_workers,
            worker_init_fn=start_loader_worker,
            multiprocessing_context=start_method() if self.num_workers else None,
            # by default it draws from the global generator, which would change dropout
            generator=torch.Generator().manual_seed(derive(self.rows.seed, "workers", epoch)),
            pin_memory=self.device != "cpu",
        )
        with starting_loader_workers():
            batches = iter(loader)
        for xb, yb in batches:
            xb, yb = (part.to(self.device, non_blocking=True) for part in (xb, yb))
            scaled = self.split is not None and self.split.pixels is not False
            yield scale_bytes(xb) if scaled else xb, yb
