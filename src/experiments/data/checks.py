"""What a data set must be, whatever model is trained on it: checked when it is loaded."""

import sys
from typing import Any, cast

import torch
import torch.utils.data
from torch import Tensor

from experiments.data import Data, Split, reads_samples
from experiments.data.samples import Samples, check_shapes, preserved_generators
from experiments.errors import UsageError

# Bytes that are all below this are rather codes than pixels.
DARK = 128
# The rows of a Dataset that are read twice, to find draws that no stream owns.
REPEATED_ROWS = 8


def check_data(data: object, target: str) -> None:
    """Raise UsageError if what a data function returned is no data set that a run can use.

    target: the function's name, for the message.
    """
    subject = f"data._target_={target}"
    if not isinstance(data, Data):
        raise UsageError(
            f"{subject}: returned a {type(data).__name__}; "
            "return experiments.data.Data(train, valid, test)"
        )
    for name, split in data.splits.items():
        if reads_samples(split):
            check_samples(split, f"{subject}: {name}")
        elif isinstance(split, Split):
            check_tensors(split, f"{subject}: {name}")
        else:
            kind = type(split).__name__
            raise UsageError(
                f"{subject}: {name} is a {kind}, which has no rows by number; give a "
                "Split(x, y), or a Dataset with __len__ and __getitem__ for loader=torch"
            )


def check_tensors(split: Split, subject: str) -> None:
    """Raise UsageError unless x and y are tensors with the same number of rows, at least one."""
    for name, value in (("x", split.x), ("y", split.y)):
        if not isinstance(value, Tensor):
            raise UsageError(
                f"{subject}.{name} is a {type(value).__name__}, expected a tensor; "
                "torch.from_numpy or torch.tensor makes one"
            )
        if value.ndim == 0:
            raise UsageError(f"{subject}.{name} is one number, expected one entry for each row")
    if len(split.x) != len(split.y):
        raise UsageError(
            f"{subject} has {len(split.x)} rows of x and {len(split.y)} of y; "
            "give each row its target"
        )
    if len(split) == 0:
        raise UsageError(f"{subject} has no rows; give it some of another split's")
    if split.x.dtype == torch.uint8 and split.pixels is None:
        check_bytes(split.x, subject)


def check_bytes(x: Tensor, subject: str) -> None:
    """Raise UsageError if undeclared bytes look like codes; say that others are scaled."""
    largest = int(x.max())
    if largest < DARK:
        raise UsageError(
            f"{subject}.x holds bytes up to {largest}, which may be codes or dark pixels; say "
            "which: Split(x, y, pixels=False) leaves them as they are, pixels=True scales to [0, 1]"
        )
    if subject.endswith(": train"):
        print(
            f"{subject}.x holds bytes, taken for pixels and scaled to [0, 1]; "
            "Split(x, y, pixels=False) leaves them as they are",
            file=sys.stderr,
        )


def check_samples(dataset: Any, subject: str) -> None:
    """Raise UsageError unless a Dataset gives (x, y) pairs, the same whenever a row is read with
    the same draws from the global generators.
    """
    if isinstance(dataset, dict | str | Tensor) or not hasattr(dataset, "__len__"):
        raise UsageError(
            f"{subject} is a {type(dataset).__name__}; give a Split(x, y), or a Dataset with "
            "__len__ and __getitem__ for loader=torch"
        )
    if len(dataset) == 0:
        raise UsageError(f"{subject} has no rows; give it some of another split's")
    samples = Samples(dataset)
    rows = list(range(min(REPEATED_ROWS, len(dataset))))
    with preserved_generators():
        first = [collated(samples.read(row), row, subject) for row in rows]
        # in another order, so that a generator of its own stands elsewhere at each row
        again = [collated(samples.read(row), row, subject) for row in reversed(rows)][::-1]
    for row, sample in zip(rows, first, strict=True):
        check_shapes(subject, row, sample, first[0])
    for row, before, after in zip(rows, first, again, strict=True):
        if not all(same_bits(a, b) for a, b in zip(before, after, strict=True)):
            raise UsageError(
                f"{subject}: row {row} differs when it is read again, so its Dataset keeps a "
                "generator or a count of its own, which no checkpoint holds; draw from "
                "random, np.random or torch, which are seeded for each row"
            )


def collated(sample: Any, row: int, subject: str) -> tuple[Tensor, Tensor]:
    """A sample as a batch of one. Raises UsageError if it is no pair that makes tensors."""
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        kind = type(sample).__name__
        size = f" of {len(sample)}" if isinstance(sample, tuple | list) else ""
        raise UsageError(f"{subject}[{row}] is a {kind}{size}, expected a pair (x, y)")
    batch = torch.utils.data.default_collate([tuple(sample)])
    for name, part in zip(("x", "y"), batch, strict=True):
        if not isinstance(part, Tensor):
            raise UsageError(
                f"{subject}[{row}] has a {type(part).__name__} for {name}, expected a tensor, "
                "an array or a number"
            )
    x, y = cast(tuple[Tensor, Tensor], batch)
    return x.clone(), y.clone()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes; NaN equals itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat, other_flat = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(flat, other_flat)
