"""What a data set must be, whatever model is trained on it: checked when it is loaded."""

import sys
from typing import Any

import torch
import torch.utils.data
from torch import Tensor

from experiments.data import Data, Split, reads_samples
from experiments.data.nests import named_leaves
from experiments.data.samples import Samples, preserved_generators
from experiments.data.scan import as_row, sample_leaves
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
    """Raise UsageError unless x and y are tensors, or nests of them, with the same number of rows,
    at least one.
    """
    leaves = [*named_leaves(split.x, f"{subject}.x")]
    leaves += [] if split.y is None else [*named_leaves(split.y, f"{subject}.y")]
    for name, value in leaves:
        if not isinstance(value, Tensor):
            raise UsageError(
                f"{name} is a {type(value).__name__}, expected a tensor; "
                "torch.from_numpy or torch.tensor makes one"
            )
        if value.ndim == 0:
            raise UsageError(f"{name} is one number, expected one entry for each row")
    if not leaves:
        raise UsageError(f"{subject}.x has no tensors; give it some")
    (first, rows), *others = [(name, len(value)) for name, value in leaves]
    for name, count in others:
        if count != rows:
            what = first.removeprefix(f"{subject}."), name.removeprefix(f"{subject}.")
            raise UsageError(
                f"{subject} has {rows} rows of {what[0]} and {count} of {what[1]}; "
                "give each row its target"
            )
    if len(split) == 0:
        raise UsageError(f"{subject} has no rows; give it some of another split's")
    for name, value in leaves:
        if value.dtype == torch.uint8 and split.pixels is None and name.startswith(f"{subject}.x"):
            check_bytes(value, subject)


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
    """Raise UsageError unless a Dataset gives samples that hold a tensor, an array or a number, the
    same whenever a row is read with the same draws from the global generators.
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
        first = [leaves_of(samples.read(row), row, subject) for row in rows]
        # in another order, so that a generator of its own stands elsewhere at each row
        again = [leaves_of(samples.read(row), row, subject) for row in reversed(rows)][::-1]
    for row, before, after in zip(rows, first, again, strict=True):
        same = before.keys() == after.keys()
        if not same or not all(equal_leaves(value, after[name]) for name, value in before.items()):
            raise UsageError(
                f"{subject}: row {row} differs when it is read again, so its Dataset keeps a "
                "generator or a count of its own, which no checkpoint holds; draw from "
                "random, np.random or torch, which are seeded for each row"
            )


def leaves_of(sample: Any, row: int, subject: str) -> dict[str, Any]:
    """The leaves of a sample by name: a batch of one row for each tensor, array or number, which
    shares no memory with it; other leaves as texts. Raises UsageError if it has only such.
    """
    found = {name: (leaf, as_row(leaf)) for name, leaf in sample_leaves(sample)}
    if not any(value is not None for _, value in found.values()):
        raise UsageError(
            f"{subject}[{row}] is a {type(sample).__name__} without a tensor, an array or a "
            "number; return a pair (x, y), or a tuple, list or dict of them"
        )
    for name, (leaf, value) in found.items():
        if name in ("x", "y") and value is None and isinstance(leaf, str | bytes | None):
            raise UsageError(
                f"{subject}[{row}] has a {type(leaf).__name__} for {name}, expected a tensor, "
                "an array or a number"
            )
    return {
        name: repr(leaf) if value is None else value.clone()
        for name, (leaf, value) in found.items()
    }


def equal_leaves(one: Any, other: Any) -> bool:
    """Whether two leaves of a sample are the same, to the bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return same_bits(one, other)
    return type(one) is type(other) and one == other


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes; NaN equals itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat, other_flat = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(flat, other_flat)
