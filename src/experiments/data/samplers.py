"""Samplers: which rows an epoch draws, where that is not each row once."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import WeightedRandomSampler

from experiments.data.nests import is_tensor
from experiments.data.samples import Samples, preserved_generators, seed_generators
from experiments.data.splits import Split, reads_samples
from experiments.data.streams import derive
from experiments.errors import UsageError

# Makes a sampler of a split: torch's, or anything else that can be iterated anew for each epoch.
MakeSampler = Callable[[Any], Iterable[int]]


def balanced(split: Any) -> WeightedRandomSampler:
    """As many rows as the split has, drawn with replacement, with each class as likely as any
    other.

    split: its batches are (x, y), y: integers (rows,). Raises UsageError for other targets.
    """
    targets = class_numbers(split)
    counts = targets.bincount().clamp(min=1)
    return WeightedRandomSampler((1.0 / counts[targets]).tolist(), len(targets))


def class_numbers(split: Any) -> Tensor:
    """The class of each row of a split, int64 (rows,), from 0. Raises UsageError if it has none."""
    if reads_samples(split):
        samples = Samples(split)
        with preserved_generators():
            pairs = [samples.read(row) for row in range(len(split))]
        try:
            targets: Any = torch.tensor([int(pair[1]) for pair in pairs])
        except (TypeError, ValueError, IndexError, KeyError):
            targets = None
    else:
        targets = split.y if isinstance(split, Split) else None
    whole = is_tensor(targets) and not (targets.is_floating_point() or targets.is_complex())
    if not whole or targets.ndim != 1 or int(targets.min()) < 0:
        raise UsageError(
            "loader.sampler: balances classes, and y is not one class number for each row; use a "
            "sampler of your own"
        )
    numbers: Tensor = targets.long()
    return numbers


class EpochRows:
    """The rows that a sampler draws in an epoch, a function of (seed, epoch).

    Raises UsageError for a sampler that draws from a generator of its own, or rows that the split
    does not have.
    """

    def __init__(self, make: MakeSampler, split: Any, seed: int) -> None:
        self.sampler, self.rows, self.seed = make(split), len(split), seed
        first = self(0)
        self.count = len(first)
        if not torch.equal(first, self(0)):
            raise UsageError(
                "loader.sampler: draws other rows for the same epoch, from a generator of its own, "
                "say, which no checkpoint holds; draw from random, np.random or torch"
            )

    def __call__(self, epoch: int) -> Tensor:
        """The row numbers of an epoch: int64 (rows,)."""
        with preserved_generators():
            seed_generators(derive(self.seed, "sampler", epoch))
            rows = torch.tensor([int(row) for row in self.sampler], dtype=torch.int64)
        count = getattr(self, "count", len(rows))
        if len(rows) != count:
            raise UsageError(
                f"loader.sampler: draws {len(rows)} rows in epoch {epoch + 1} and {count} in the "
                "first; draw as many in each"
            )
        if not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= self.rows:
            drawn = f"row {int(rows.max())}" if len(rows) else "no row"
            raise UsageError(
                f"loader.sampler: draws {drawn}, and the split has the rows 0 to {self.rows - 1}"
            )
        return rows
