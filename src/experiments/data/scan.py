"""One pass over the rows of a split: its fingerprint, and what training would stumble over."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

from experiments.data.nests import named_leaves
from experiments.data.samples import Samples, own_generators, preserved_generators
from experiments.data.splits import Split, reads_samples
from experiments.directory.fingerprint import fingerprint
from experiments.errors import UsageError

# The rows of a Dataset that are read if it brings a fingerprint of its own.
FIRST_ROWS = 8
# Targets that lie further apart are rather numbers, or words, than classes.
MAX_SPAN = 1 << 16


@dataclass
class Scan:
    """What a pass over a split found.

    not_finite: the first row with a NaN or infinity in each tensor that has one, by dotted name:
        `x`, `y`, or `x.image` of a nest
    lowest, highest: the extremes of integer targets, where y is one tensor of integers
    classes: the first row of each integer target of a Dataset
    targets: the integer targets, where each row has one; None if they are not known, or span more
        than MAX_SPAN
    uneven: the first tensor of a Dataset whose shape differs from that in row 0, in words
    """

    fingerprint: str = ""
    not_finite: dict[str, int] = field(default_factory=dict)
    lowest: int | None = None
    highest: int | None = None
    classes: dict[int, int] = field(default_factory=dict)
    uneven: str | None = None
    targets: set[int] | None = None

    def look(self, name: str, values: Tensor, first: int, row_size: int) -> None:
        """Note what some consecutive values hold: flat, of the tensor with this name, the first of
        them number `first` of the split.
        """
        if values.is_floating_point() or values.is_complex():
            # a sum is not finite if a value is not, and is taken at the speed of memory
            if name not in self.not_finite and not values.sum().isfinite():
                found = values.isfinite().logical_not().nonzero()
                if len(found):  # or the finite values have overflown the sum
                    self.not_finite[name] = (first + int(found[0])) // row_size
        elif name == "y" and values.numel() and values.dtype != torch.bool:
            low, high = (int(extreme) for extreme in values.long().aminmax())
            self.lowest = low if self.lowest is None else min(low, self.lowest)
            self.highest = high if self.highest is None else max(high, self.highest)

    def note_targets(self, values: Tensor) -> None:
        """Note the integer targets of some rows, (rows,), which have been looked at."""
        if self.lowest is None or self.highest is None or self.highest - self.lowest > MAX_SPAN:
            self.targets = None
        elif self.targets is not None:
            low = int(values.min())
            counts = torch.bincount(values.long() - low)
            self.targets |= {low + target for target in counts.nonzero().flatten().tolist()}

    def may_contain(self, target: int) -> bool:
        """Whether a target lies between the extremes of the integer targets."""
        if self.lowest is None or self.highest is None:
            return False
        return self.lowest <= target <= self.highest


def scan(split: Split | torch.utils.data.Dataset[Any]) -> Scan:
    """Read all rows of a split once; of a Dataset with a `fingerprint` only the first ones."""
    if reads_samples(split):
        return scan_samples(split)
    split = cast(Split, split)
    found = Scan()
    if one_class_each(split.y):
        found.targets = set()
    named = [*named_leaves(split.x, "x"), *named_leaves(split.y, "y")]
    tensors = {name: tensor for name, tensor in named if tensor is not None}
    sizes = {name: max(1, tensor[:1].numel()) for name, tensor in tensors.items()}

    def look(name: str, values: Tensor, first: int) -> None:
        found.look(name, values, first, sizes[name])
        if name == "y" and found.targets is not None and len(values):
            found.note_targets(values)

    found.fingerprint = fingerprint(tensors, split.release, look)
    return found


def one_class_each(y: object) -> bool:
    """Whether targets are one integer for each row."""
    if not isinstance(y, Tensor) or y.ndim != 1:
        return False
    return not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)


def scan_samples(dataset: Any) -> Scan:
    """Read the rows of a map-style Dataset one by one, with the draws of seed 0 and epoch 0."""
    found, digest = Scan(), hashlib.sha256()
    own = getattr(dataset, "fingerprint", None)
    samples, generators = Samples(dataset), own_generators(dataset)
    rows = len(dataset) if own is None else min(FIRST_ROWS, len(dataset))
    shapes: dict[str, tuple[int, ...]] = {}
    with preserved_generators():
        for row in range(rows):
            for name, leaf in sample_leaves(samples.read(row)):
                value = as_row(leaf)
                if value is None:
                    digest.update(f"{name} {leaf!r}\n".encode())
                    continue
                shape = tuple(value.shape[1:])
                if found.uneven is None and shapes.setdefault(name, shape) != shape:
                    found.uneven = (
                        f"{name} of row {row} has the shape {shape}, of row 0 {shapes[name]}"
                    )
                flat = value.detach().cpu().contiguous().view(-1)
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
                digest.update(flat.view(torch.uint8).numpy().data)
                found.look(name, flat, row * max(1, flat.numel()), max(1, flat.numel()))
                if name == "y" and not flat.is_floating_point():
                    for target in flat.unique().tolist():
                        found.classes.setdefault(target, row)
        drawn_by = None
        if own_generators(dataset) != generators:
            drawn_by = first_drawing_row(samples, rows)
    if drawn_by is not None:
        raise UsageError(
            f"data: reading row {drawn_by} of a Dataset draws from a generator of its own, which "
            "no checkpoint holds; draw from random, np.random or torch, which are seeded for each "
            "row"
        )
    found.fingerprint = digest.hexdigest()
    if own is None and shapes.get("y") == ():
        found.targets = set(found.classes)
    if own is not None:
        found.fingerprint = str(own() if callable(own) else own)
    return found


def sample_leaves(sample: Any) -> Iterator[tuple[str, Any]]:
    """Each leaf of a sample with its dotted name; the two parts of a pair are `x` and `y`."""
    if isinstance(sample, tuple | list) and len(sample) == 2:
        yield from named_leaves(sample[0], "x")
        yield from named_leaves(sample[1], "y")
    else:
        yield from named_leaves(sample, "x")


def as_row(leaf: Any) -> Tensor | None:
    """A tensor, array or number of a sample as a batch of one row; None for anything else."""
    if not isinstance(leaf, Tensor | np.ndarray | np.generic | bool | int | float):
        return None
    row: Tensor = torch.utils.data.default_collate([leaf])
    return row


def first_drawing_row(samples: Samples, rows: int) -> int | None:
    """The first row whose reading moves a generator of the Dataset on; None if each reading that
    draws seeds the generator first, as a function of the row.
    """
    for row in range(rows):
        before = own_generators(samples.dataset)
        samples.read(row)
        after = own_generators(samples.dataset)
        if after != before:
            samples.read(row)
            if own_generators(samples.dataset) != after:
                return row
    return None
