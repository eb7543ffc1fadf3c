"""Class weights from the training split, for `loss.weight` and `loss.pos_weight` of `balanced`."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from experiments.data import Data, Split, reads_samples
from experiments.data.nests import is_tensor
from experiments.data.samples import Samples, preserved_generators
from experiments.errors import UsageError

BALANCED = "balanced"
# The losses of torch.nn whose argument may be balanced.
LOSSES = {"weight": ("CrossEntropyLoss", "NLLLoss"), "pos_weight": ("BCEWithLogitsLoss",)}
CHUNK = 1 << 20  # targets that are counted at a time


def balanced_keys(config: Mapping[str, Any]) -> list[str]:
    """The keys of a config's loss that are to be computed.

    Raises UsageError for another word, or for a loss of torch without class weights.
    """
    node = config["loss"]
    module, _, name = str(node["_target_"]).rpartition(".")
    if module != "torch.nn" and not module.startswith("torch.nn.modules"):
        return []
    found = [key for key in LOSSES if isinstance(node.get(key), str)]
    for key in found:
        if node[key] != BALANCED:
            raise UsageError(
                f"loss.{key}={node[key]}: expected balanced, or a list with a number for each class"
            )
        if name not in LOSSES[key]:
            raise UsageError(
                f"loss.{key}=balanced: {node['_target_']} has no classes to balance; use "
                f"torch.nn.{' or torch.nn.'.join(LOSSES[key])}, or leave it out"
            )
    return found


def class_weights(config: Mapping[str, Any], data: Data) -> dict[str, list[float]]:
    """The values of the keys of a config's loss that are `balanced`, from the training targets.

    Raises UsageError if they are no classes, or if one of these has no row.
    """
    keys = balanced_keys(config)
    found = {}
    if "weight" in keys:
        found["weight"] = balanced(data, config["loss"].get("ignore_index", -100))
    if "pos_weight" in keys:
        found["pos_weight"] = balanced_positives(data)
    return found


def with_weights(config: dict[str, Any], weights: Mapping[str, list[float]]) -> dict[str, Any]:
    """The config with these values in its loss."""
    return {**config, "loss": {**config["loss"], **weights}} if weights else config


def saved_weights(config: Mapping[str, Any], loss_state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The values that a checkpoint holds of what is `balanced` in a config."""
    return {key: loss_state[key].tolist() for key in balanced_keys(config) if key in loss_state}


def balanced(data: Data, ignored: int) -> list[float]:
    """n / (classes * count) for each class, with n all targets that are not `ignored`: as
    scikit-learn's class_weight="balanced", after King and Zeng, "Logistic Regression in Rare Events
    Data", 2001.
    """
    counts = torch.zeros(0, dtype=torch.int64)
    for y in targets(data, "weight"):
        if y.is_floating_point() or y.dtype == torch.bool:
            raise UsageError(
                f"loss.weight=balanced: the targets are {y.dtype} and no classes, which are "
                "integers; leave it out"
            )
        counted = y[y != ignored].long()
        if counted.numel() and counted.min() < 0:
            raise UsageError(f"loss.weight=balanced: the target {int(counted.min())} is no class")
        more = counted.bincount(minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing or not len(counts):
        raise UsageError(
            f"loss.weight=balanced: the training split has no row of class {(*missing, 0)[0]}, "
            "whose weight would be infinite; give a list of weights, or merge the classes"
        )
    weights: list[float] = (counts.sum() / (len(counts) * counts.double())).float().tolist()
    return weights


def balanced_positives(data: Data) -> list[float]:
    """negatives / positives, as torch documents pos_weight: of each column of targets (rows,
    columns), of all targets of other shapes together.
    """
    positives = total = torch.zeros(1, dtype=torch.float64)
    for y in targets(data, "pos_weight"):
        if not ((y == 0) | (y == 1)).all():
            raise UsageError(
                "loss.pos_weight=balanced: the targets are not all 0 or 1; give a list of weights"
            )
        columns = y.reshape(len(y), -1) if y.ndim == 2 else y.reshape(-1, 1)
        positives = positives + columns.sum(0, dtype=torch.float64)
        total = total + len(columns)
    for column, (count, rows) in enumerate(zip(positives, total.expand_as(positives), strict=True)):
        if count in (0, rows):
            raise UsageError(
                f"loss.pos_weight=balanced: column {column} of the training targets is "
                f"{'never' if count == 0 else 'always'} 1; give a list of weights"
            )
    weights: list[float] = ((total - positives) / positives).float().tolist()
    return weights


def targets(data: Data, key: str) -> Iterator[Tensor]:
    """The training targets, (rows, ...), in parts. Of a Dataset all rows are read once more.

    Raises UsageError unless they are one tensor.
    """
    split: Any = data.train
    if isinstance(split, Split):
        for y in split.y.split(CHUNK) if is_tensor(split.y) else [split.y]:
            yield as_targets(y, key)
            split.release()
    elif reads_samples(split):
        samples = Samples(split)
        with preserved_generators():
            for row in range(len(split)):
                sample = samples.read(row)
                pair = isinstance(sample, tuple | list) and len(sample) == 2
                y = torch.utils.data.default_collate([sample[1]]) if pair else None
                yield as_targets(y, key)


def as_targets(y: Any, key: str) -> Tensor:
    """A tensor of targets. Raises UsageError for anything else."""
    if not isinstance(y, Tensor):
        raise UsageError(
            f"loss.{key}=balanced: the targets are a {type(y).__name__} and not one tensor; leave "
            "it out"
        )
    return y.detach().cpu()
