"""A program through torch.export: traced, written, read back, and compared with its model."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from experiments.data.nests import named_leaves
from experiments.errors import UsageError
from experiments.training.build import user_line
from experiments.training.program import (
    Call,
    Program,
    arguments,
    plain,
    raw_arguments,
    repeatable,
)

# How far a program's outputs may be from the model's: of each, and of the largest of a batch.
RELATIVE, ABSOLUTE = 1e-4, 1e-5
MAX_REASON = 300  # characters of torch's own words in a message


def as_file(target: str, program: Program, calls: Sequence[Call], metadata: str) -> bytes:
    """A program as the content of a .pt2 file, with its metadata as metadata.json. It is traced on
    the first call, for any number of rows, and for any other size in which the calls differ.

    target: names the model in messages

    Raises UsageError with torch's reason if it cannot be traced or written.
    """
    reasons = []
    for strict in (False, True):
        try:
            with quiet(), torch.no_grad(), repeatable():
                found = traced(program, calls, strict=strict)
                file = io.BytesIO()
                torch.export.save(found, file, extra_files={"metadata.json": metadata})
                return file.getvalue()
        except Exception as error:
            reasons.append(f"{reason_of(error)}{user_line(error.__traceback__)}")
    raise UsageError(
        f"{target}: torch.export cannot trace it ({reasons[0]}); compute with tensors alone, "
        "whatever they hold and however many rows there are, as torch.where does in place of if"
    )


def traced(
    program: Program, calls: Sequence[Call], *, strict: bool
) -> torch.export.ExportedProgram:
    """The program as torch.export traces it.

    strict: by reading the model's bytecode, which finds the number of rows in len(x), too, but
        knows less of Python than running the model does
    """
    args, kwargs = raw_arguments(calls[0], program.encoders)
    leaves, _ = tree_flatten((args, kwargs))
    shapes: Any = torch.export.ShapesCollection()
    for leaf, dims in zip(leaves, dynamic_dims(calls), strict=True):
        if isinstance(leaf, Tensor):
            shapes[leaf] = dims
    found = torch.export.export(program, args, kwargs, dynamic_shapes=shapes, strict=strict)
    for node in found.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names files of this machine
    return found


def dynamic_dims(calls: Sequence[Call]) -> list[dict[int, Any]]:
    """The dimensions of each leaf whose size may change: that of the rows, and any in which the
    calls differ.
    """
    rows, counts = torch.export.Dim("rows"), [call.rows for call in calls]
    found = []
    for leaves in zip(*(call.leaves for call in calls), strict=True):
        dims: dict[int, Any] = {}
        if all(isinstance(leaf, Tensor) for leaf in leaves):
            for dim, sizes in enumerate(zip(*(leaf.shape for leaf in leaves), strict=False)):
                if list(sizes) == counts:
                    dims[dim] = rows
                elif len(set(sizes)) > 1:
                    dims[dim] = torch.export.Dim.AUTO
        found.append(dims)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torch.export writes to standard error beside its exception."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def reason_of(error: Exception) -> str:
    """The first sentence of what torch.export says."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Constraints violated"):
        lines = lines[1:]
    sentence = lines[0].partition(". ")[0] if lines else type(error).__name__
    return sentence[:MAX_REASON].rstrip(".")


def check_file(target: str, program: Program, calls: Sequence[Call], content: bytes) -> None:
    """Raise UsageError if the program in a file computes something else than its model, beyond
    rounding, for one of the calls.
    """
    with quiet():
        loaded = torch.export.load(io.BytesIO(content)).module()
    for call in calls:
        taken, named = arguments(call)
        with torch.no_grad(), repeatable():
            expected = plain(program.model(*taken, **named))
        args, kwargs = raw_arguments(call, program.encoders)
        try:
            with torch.no_grad(), repeatable():
                difference = difference_of(loaded(*args, **kwargs), expected)
        except Exception as error:
            difference = f"it fails: {reason_of(error)}"
        if difference is not None:
            raise UsageError(
                f"{target}: the exported program differs from the model for {call.rows} rows "
                f"({difference}); compute in tensors what depends on values or on the number of "
                "rows, since Python's part is traced once"
            )


def difference_of(found: Any, expected: Any) -> str | None:
    """How outputs differ from expected ones beyond rounding, in words; None if they do not."""
    (ours, form), (theirs, other_form) = tree_flatten(found), tree_flatten(expected)
    if form != other_form:
        return "outputs of another form"
    for one, other in zip(ours, theirs, strict=True):
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            if one is not other and one != other:
                return f"{one} instead of {other}"
        elif (one.shape, one.dtype) != (other.shape, other.dtype):
            shapes = tuple(one.shape), tuple(other.shape)
            return f"{one.dtype} {shapes[0]} instead of {other.dtype} {shapes[1]}"
        elif not other.is_floating_point():
            if not torch.equal(one, other):
                return f"{int((one != other).sum())} other values"
        else:
            finite = other[other.isfinite()].abs()
            largest = float(finite.max()) if finite.numel() else 0.0
            if not torch.allclose(one, other, RELATIVE, ABSOLUTE * largest, equal_nan=True):
                return f"by up to {float((one - other).abs().nan_to_num().max()):g}"
    return None


def described(parts: Sequence[Any], names: Sequence[str], rows: int) -> dict[str, Any]:
    """Shape and dtype of each tensor of some nests by its dotted name, with "rows" for a size of
    `rows`.
    """
    leaves = [
        leaf for name, part in zip(names, parts, strict=True) for leaf in named_leaves(part, name)
    ]
    return {
        name: {
            "shape": ["rows" if size == rows else size for size in leaf.shape],
            "dtype": str(leaf.dtype).removeprefix("torch."),
        }
        for name, leaf in leaves
        if isinstance(leaf, Tensor)
    }
