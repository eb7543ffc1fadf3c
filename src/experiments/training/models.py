"""Models for a config's `model._target_`, which may also name any other `torch.nn.Module`."""

from collections.abc import Sequence

from torch import nn


def mlp(
    in_features: int, hidden: Sequence[int], out_features: int, dropout: float = 0.0
) -> nn.Sequential:
    """Linear layers with ReLU between them, and dropout after each ReLU if it is above zero.

    x: float32 (batch, in_features) -> logits: float32 (batch, out_features)
    """
    layers: list[nn.Module] = []
    for width_in, width_out in zip([in_features, *hidden], hidden):  # noqa: B905 (one is longer)
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear([in_features, *hidden][-1], out_features))
