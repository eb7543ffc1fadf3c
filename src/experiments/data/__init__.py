"""Data sets as tensors. `mnist` and `arrays` have a `load` function for `data._target_`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # so that a damaged file is reported before torch is imported
    from torch import Tensor

    from experiments.data.scan import Scan


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


@dataclass(frozen=True)
class Data:
    """The splits of a data set: for training, for model selection and for the final result.

    Each is a `Split` or, for loader=torch, any map-style Dataset of (x, y) pairs: it has a length,
    and default_collate makes a batch of its `dataset[row]`. What reading a row draws from the
    generators of Python, NumPy and torch is a function of seed, epoch and row. All rows are read
    once at the start, unless the Dataset has an attribute or method `fingerprint`, a text that
    identifies its rows; then only the first few are checked.
    """

    train: Split
    valid: Split
    test: Split

    @property
    def splits(self) -> dict[str, Any]:
        """The splits by name."""
        return {"train": self.train, "valid": self.valid, "test": self.test}

    @cached_property
    def scans(self) -> dict[str, Scan]:
        """What one pass over each split found; computed once, also if several runs share them."""
        from experiments.data.scan import scan

        return {name: scan(split) for name, split in self.splits.items()}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """The sha256 of each split, or the fingerprint that its Dataset has, by name."""
        return {name: found.fingerprint for name, found in self.scans.items()}

    def versions(self) -> list[int]:
        """Numbers that change when something writes to the rows in memory."""
        tensors = [t for s in self.splits.values() if isinstance(s, Split) for t in (s.x, s.y)]
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def reads_samples(split: object) -> bool:
    """Whether a split is read row by row through its own __getitem__, as map-style Datasets are."""
    return hasattr(type(split), "__getitem__")
