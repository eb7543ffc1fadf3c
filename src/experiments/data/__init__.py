"""Data sets as tensors. `mnist` and `arrays` have a `load` function for `data._target_`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from experiments.data.nests import tensors_of
from experiments.data.splits import Split, reads_samples

if TYPE_CHECKING:
    from experiments.data.scan import Scan

__all__ = ["Data", "Missing", "Split", "reads_samples"]


@dataclass(frozen=True)
class Missing:
    """Stands for a split that saved statistics do without, since its file is gone.

    reason: the line that says so, for whoever asks for the split
    """

    reason: str


@dataclass(frozen=True)
class Data:
    """The splits of a data set: for training, for model selection and for the final result.

    Each is a `Split` or, for loader=torch, any map-style Dataset: it has a length, and its
    `collate_fn`, or else default_collate, makes a batch of its `dataset[row]`. What reading a row
    draws from the generators of Python, NumPy and torch is a function of seed, epoch and row. All
    rows are read once at the start, unless the Dataset has an attribute or method `fingerprint`, a
    text that identifies its rows; then only the first few are checked.

    sizes: numbers, or lists of them, by name (`vocabulary`, `cardinalities`), for the keys of the
        same name that is `auto` in a config
    statistics: a JSON value that was computed on the training split alone (means, categories) and
        that other rows must be encoded with. It is saved in the run directory; a data function with
        a parameter `statistics` is given it back when the run is evaluated.
    """

    train: Split
    valid: Split
    test: Split
    sizes: dict[str, Any] = field(default_factory=dict, kw_only=True)
    statistics: Any = field(default=None, kw_only=True)

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
        splits = [split for split in self.splits.values() if isinstance(split, Split)]
        tensors = [tensor for split in splits for tensor in tensors_of(split.tensors)]
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
