"""Starts a model from other weights: those of a run, or of a safetensors file. Executes nothing."""

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from experiments.config.names import format_value
from experiments.directory.checkpoint_files import NAME
from experiments.directory.checkpoints import deserialize
from experiments.directory.initial import source_file, source_name
from experiments.errors import UsageError
from experiments.training.callbacks import averaged_weights
from experiments.training.parameter_groups import fits, listed, words_of


@dataclass(frozen=True)
class Initial:
    """Weights to start from.

    name: of what they are from, with the key of the config. sha256: of the file. weights: entries
    of a state_dict. match, exclude: names of the model's to take, and not to take
    """

    name: str
    sha256: str
    weights: Mapping[str, Any]
    match: list[str] | None
    exclude: list[str]


def read_initial(init: Mapping[str, Any]) -> Initial | None:
    """The weights that a config's `init` names; None if it names none.

    Of a run these are the averages, where it has some, as those that were evaluated. Raises
    UsageError if they cannot be read, or are damaged.
    """
    name = source_name(init)
    if not name:
        return None
    file = source_file(init)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{name}: cannot be read ({error.strerror})") from None
    digest = hashlib.sha256(data).hexdigest()
    published = NAME.fullmatch(file.name)
    if published and not digest.startswith(published[4]):
        raise UsageError(f"{name}: {file.name} is damaged; use another checkpoint or run")
    try:
        weights = weights_of(data)
    except ValueError as error:
        raise UsageError(f"{name}: is no safetensors file ({error})") from None
    match, exclude = init["match"], init["exclude"]
    return Initial(
        name,
        digest,
        weights,
        None if match is None else words_of("init.match", match),
        [] if exclude is None else words_of("init.exclude", exclude),
    )


def weights_of(data: bytes) -> dict[str, Any]:
    """The model's state_dict in a checkpoint of this package, or the tensors of any other
    safetensors file, by name. Raises ValueError for other bytes.
    """
    try:
        content = deserialize(data)
    except ValueError:
        try:
            return safetensors.torch.load(data)
        except safetensors.SafetensorError as error:
            raise ValueError(str(error)) from None
    if not isinstance(content.get("model"), dict):
        raise ValueError("a checkpoint without a model")
    return {**content["model"], **averaged_weights(content)}


def load_initial(model: nn.Module, initial: Initial) -> None:
    """Give a model the chosen weights. Raises UsageError unless names and shapes fit, and for
    parameters that are not finite.
    """
    own, weights = model.state_dict(), initial.weights
    chosen = {name for name in own if is_chosen(name, initial)}
    for key, patterns in (("match", initial.match or []), ("exclude", initial.exclude)):
        known = own if key == "match" else {**own, **weights}
        for pattern in patterns:
            if not any(fits(name, pattern) for name in known):
                raise UsageError(
                    f"init.{key}={pattern}: no weight has such a name; there is {listed([*own])}"
                )
    wrong = [
        name for name in chosen if name in weights and not same_shape(own[name], weights[name])
    ]
    missing = [name for name in chosen if name not in weights]
    strange = [name for name in weights if name not in own and is_chosen(name, initial)]
    strange = strange if initial.match is None else []
    if wrong or missing or strange:
        raise UsageError(explained(initial, own, chosen, wrong, missing, strange))
    if not chosen:
        raise UsageError(
            f"init.exclude={format_value(initial.exclude)}: leaves nothing of {initial.name} to "
            "start from"
        )
    refuse_infinite(model, initial, chosen)
    dtypes = {(weights[n].dtype, own[n].dtype) for n in chosen if isinstance(own[n], Tensor)}
    for dtype, becomes in sorted((d for d in dtypes if d[0] != d[1]), key=str):
        print(f"{initial.name}: {dtype} becomes {becomes}", file=sys.stderr)
    model.load_state_dict({name: weights[name] for name in own if name in chosen}, strict=False)


def refuse_infinite(model: nn.Module, initial: Initial, chosen: set[str]) -> None:
    """Raise UsageError for a parameter that is NaN or infinite, or becomes so in the model's dtype;
    a buffer, such as a mask, may be.
    """
    for name, parameter in model.named_parameters():
        if name in chosen and not initial.weights[name].to(parameter.dtype).isfinite().all():
            raise UsageError(
                f"{initial.name}: {name} holds NaN or infinite numbers, from which nothing can be "
                "trained; use other weights, or leave it out with "
                f"init.exclude={format_value([*initial.exclude, name])}"
            )


def is_chosen(name: str, initial: Initial) -> bool:
    """Whether a weight is among those to take."""
    taken = initial.match is None or any(fits(name, word) for word in initial.match)
    return taken and not any(fits(name, word) for word in initial.exclude)


def same_shape(own: Any, weight: Any) -> bool:
    """Whether a weight fits the model's; one that gets its shape from the first batch takes any."""
    if not isinstance(own, Tensor) or not isinstance(weight, Tensor):
        return isinstance(own, Tensor) is isinstance(weight, Tensor)
    return is_lazy(own) or own.shape == weight.shape


def explained(
    initial: Initial,
    own: Mapping[str, Any],
    chosen: set[str],
    wrong: list[str],
    missing: list[str],
    strange: list[str],
) -> str:
    """What does not fit, in one line, with the patterns that leave it out."""
    reasons = [
        f"{name} is {shape_of(initial.weights[name])} there and {shape_of(own[name])} in the model"
        for name in own
        if name in wrong
    ][:3]
    missing = [name for name in own if name in missing]
    reasons += [f"there is no {listed(missing, 3)}"] if missing else []
    reasons += [f"the model has no {listed(strange, 3)}"] if strange else []
    remedy = "are they of another model?"
    if len(wrong) + len(missing) < len(chosen):
        modules = {name.rpartition(".")[0] or name for name in [*wrong, *missing, *strange]}
        kept = [n for n in chosen if not any(fits(n, module) for module in modules)]
        words = sorted(modules) if kept else sorted([*wrong, *missing, *strange])
        left_out = dict.fromkeys([*initial.exclude, *words])
        remedy = f"leave them out with init.exclude={format_value([*left_out])}"
    return f"{initial.name}: {'; '.join(reasons)}; {remedy}"


def shape_of(value: Any) -> str:
    """A tensor's shape."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
