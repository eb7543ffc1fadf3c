"""A model as a module that takes raw rows, and the calls of it that a step makes."""

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from experiments.data.nests import tensors_of
from experiments.data.raw import raw_batch
from experiments.data.samples import Collate, preserved_generators, seed_generators
from experiments.errors import UsageError
from experiments.training.objective import Objective

# Rows in the batches that a program is compared on, besides the one that it is traced on.
COMPARED = (1, 2, 64)


@dataclass(frozen=True)
class Call:
    """A call of the model in a step.

    leaves: of its arguments, the tensors of the step's batch and anything else
    raw: what the files hold in place of each; None where it is the leaf itself
    spec: the form of (args, kwargs)
    rows: of the batch
    """

    leaves: list[Any]
    raw: list[Tensor | None]
    spec: TreeSpec
    rows: int


class Pixels(nn.Module):
    """Bytes as training scales them: uint8 in 0..255 -> float32 in [0, 1]"""

    meaning = "pixels in 0..255"

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float32) / 255


class Standardize(nn.Module):
    """Columns of numbers as training standardises them: float (rows, n) -> float32 (rows, n)

    numbers: mean, scale and fill of each column. filled: whether NaN stands for a missing value,
        and becomes the column's fill
    """

    meaning = "numbers as in the table, not standardised"
    mean: Tensor
    scale: Tensor
    fill: Tensor

    def __init__(self, numbers: Sequence[dict[str, float]], *, filled: bool) -> None:
        super().__init__()
        self.filled = filled
        for key in ("mean", "scale", "fill"):
            values = [column[key] for column in numbers]
            self.register_buffer(key, torch.tensor(values, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.where(x.isnan(), self.fill, x) if self.filled else x
        return ((x - self.mean) / self.scale).to(torch.float32)


class Program(nn.Module):
    """A model that takes raw rows in tuples, lists and dicts, and returns such.

    encoders: of each leaf of the call's arguments
    call: whose arguments have the form that the model takes
    """

    def __init__(self, model: nn.Module, encoders: Sequence[nn.Module], call: Call) -> None:
        super().__init__()
        self.model, self.encoders, self.spec = model, nn.ModuleList(encoders), call.spec
        self.names = argument_names(model, call)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.computed(args, kwargs)

        # torch.export reads the names, and knows no *args and **kwargs at once
        positional = len(arguments(call)[0])
        parameters = [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD
                if number < positional
                else inspect.Parameter.KEYWORD_ONLY,
            )
            for number, name in enumerate(self.names)
        ]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward

    def computed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's outputs for raw arguments."""
        leaves, _ = tree_flatten((args, kwargs))
        encoded = [encode(leaf) for encode, leaf in zip(self.encoders, leaves, strict=True)]
        args, kwargs = tree_unflatten(encoded, self.spec)
        return plain(self.model(*args, **kwargs))


def argument_names(model: nn.Module, call: Call) -> list[str]:
    """The names of a call's arguments: of positional ones those that the model's forward has."""
    args, kwargs = arguments(call)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in kinds]
    names += [f"x{number or ''}" for number in range(len(names), len(args))]
    return [*names[: len(args)], *kwargs]


def plain(nest: Any) -> Any:
    """A nest without classes of one's own, such as named tuples, which its reader lacks."""
    if isinstance(nest, dict):
        return {key: plain(part) for key, part in nest.items()}
    if isinstance(nest, list):
        return [plain(part) for part in nest]
    return tuple(plain(part) for part in nest) if isinstance(nest, tuple) else nest


def model_calls(
    target: str, objective: Objective, split: Any, collate: Collate | None = None
) -> list[Call]:
    """How a step calls its model for some batches of a split; the program is traced on the first.

    target: names the model in messages

    Raises UsageError if the step does not call the model itself.
    """
    # a number of rows that is no other size, so that torch.export does not take the two for one
    first, _ = raw_batch(split, [0], collate)
    sizes = {size for tensor in tensors_of(first) for size in tensor.shape[1:]}
    traced = next(n for n in count(7) if n not in sizes)
    found = []
    for number in (traced, *COMPARED):
        batch, raw = raw_batch(split, [row % len(split) for row in range(number)], collate)
        calls: list[Call] = []
        with (
            recorded_calls(objective.model, raw, number, calls),
            torch.no_grad(),
            repeatable(),
        ):
            objective.eval()(batch)
        if not calls:
            raise UsageError(
                f"{target}: the step calls parts of the model, not the model itself, so it is "
                "not known what a program would take; give it a forward and call that"
            )
        found.append(calls[0])
    if any(call.spec != found[0].spec for call in found):
        raise UsageError(
            f"{target}: takes lists or dicts whose lengths differ between batches, and a program's "
            "arguments have one form; have the step give the model tensors"
        )
    return found


@contextlib.contextmanager
def recorded_calls(
    model: nn.Module, raw: Mapping[int, Tensor], rows: int, calls: list[Call]
) -> Iterator[None]:
    """Append each call of a model to a list, with copies of its tensors, to which it may write."""

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        leaves, spec = tree_flatten((args, kwargs))
        calls.append(Call(copies(leaves), [raw.get(id(leaf)) for leaf in leaves], spec, rows))

    with model.register_forward_pre_hook(record, prepend=True, with_kwargs=True):
        yield


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """The same draws each time, for models that draw in an evaluation, too."""
    with preserved_generators():
        seed_generators(0)
        yield


def encoders_of(calls: Sequence[Call], statistics: Any) -> list[nn.Module]:
    """What turns raw leaves into those that the model takes, for each leaf."""
    encoders: list[nn.Module] = []
    for held in zip(*(call.raw for call in calls), strict=True):
        if any(raw is None for raw in held):
            encoders.append(nn.Identity())
        elif held[0].dtype == torch.uint8:
            encoders.append(Pixels())
        else:
            numbers = [*statistics["numbers"].values()]
            encoders.append(Standardize(numbers, filled=statistics["missing"] == "fill"))
    return encoders


def raw_arguments(call: Call, encoders: Iterable[nn.Module]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a program for a call of its model; they share no memory with the call's."""
    leaves = [
        leaf if isinstance(encoder, nn.Identity) else raw
        for leaf, raw, encoder in zip(call.leaves, call.raw, encoders, strict=True)
    ]
    args, kwargs = plain(tree_unflatten(copies(leaves), call.spec))
    return args, kwargs


def arguments(call: Call) -> tuple[Any, dict[str, Any]]:
    """The arguments of the model for a call, which share no memory with the call's."""
    args, kwargs = tree_unflatten(copies(call.leaves), call.spec)
    return args, kwargs


def copies(leaves: Sequence[Any]) -> list[Any]:
    """Leaves, the tensors as copies."""
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
