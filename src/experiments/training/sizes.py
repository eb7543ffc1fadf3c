"""Sizes that the data determines, for keys that are `auto` in a config's parts."""

from collections.abc import Mapping
from typing import Any

from experiments.config.names import flatten
from experiments.data import Data, Split, reads_samples
from experiments.data.loaders import inputs, select
from experiments.data.nests import is_tensor
from experiments.errors import UsageError

AUTO = "auto"
# The sizes that are found in the splits; a data set may tell others.
NAMES = (
    *("in_features", "in_channels", "out_features", "num_classes", "classes", "num_labels"),
    *("vocabulary", "numbers", "cardinalities", "target_scale"),
)
# The groups whose keys are filled.
GROUPS = ("model", "loss", "step", "metrics", "augment")


def sizes_of(data: Data) -> dict[str, Any]:
    """Sizes by the name of the key that takes them: what the data set says, and, where x is one
    tensor, in_features (the last dimension of a row) and in_channels (the first of an image);
    where y holds classes, out_features and num_classes, their number; where y is one tensor of
    numbers, out_features, its last dimension.
    """
    found: dict[str, Any] = {}
    x = inputs(select(data.train, [0])) if isinstance(data.train, Split) else None
    if is_tensor(x):
        found["in_features"] = x.shape[-1] if x.ndim > 1 else 1
        if x.ndim == 4:
            found["in_channels"] = x.shape[1]
    highest = data.scans["train"].highest
    y: Any = None if reads_samples(data.train) else data.train.y
    if highest is not None and (y is None or y.ndim == 1):
        found |= dict.fromkeys(("out_features", "num_classes", "classes"), highest + 1)
    elif is_tensor(y) and y.is_floating_point():
        found["out_features"] = y.shape[-1] if y.ndim > 1 else 1
    return found | dict(data.sizes)


def with_sizes(config: dict[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """A config in which keys that are `auto` and have the name of a size have its value."""
    image = config["model"].get("image")
    if isinstance(image, list) and image:  # flat rows that a model takes for images
        sizes = {**sizes, "in_channels": image[0]}

    def filled(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        return {
            key: sizes[key] if value == AUTO and key in sizes else filled(value)
            for key, value in node.items()
        }

    return {key: filled(node) if key in GROUPS else node for key, node in config.items()}


def auto_keys(config: Mapping[str, Any]) -> list[str]:
    """The dotted keys of the parts that are `auto`."""
    parts = {group: config[group] for group in GROUPS}
    return [key for key, value in flatten(parts) if value == AUTO]


def check_sizes(config: Mapping[str, Any]) -> None:
    """Raise UsageError for a size that is `auto` and that the data does not tell."""
    for key in auto_keys(config):
        if key.rpartition(".")[2] in NAMES:
            remedy = "give a value"
            if key == "model.in_channels":  # rows are no images, or flat ones
                remedy = "use data.images=true, or model.image=[channels,height,width]"
            raise UsageError(f"{key}=auto: the data does not say what it is; {remedy}")
