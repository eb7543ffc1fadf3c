"""Models for a config's `model._target_`, which may also name any other `torch.nn.Module`."""

from collections.abc import Mapping, Sequence

from torch import nn

ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
NORMALIZATIONS: Mapping[str, type[nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


def mlp(
    in_features: int,
    hidden: Sequence[int],
    out_features: int,
    dropout: float = 0.0,
    activation: str = "relu",
    normalization: str | None = None,
) -> nn.Sequential:
    """Linear layers with an activation between them. Before each activation a normalization, if
    one is named, and after it dropout, if it is above zero.

    activation: of ACTIVATIONS. normalization: of NORMALIZATIONS, or None
    x: float32 (batch, in_features) -> logits: float32 (batch, out_features)
    """
    layers: list[nn.Module] = []
    for width_in, width_out in zip([in_features, *hidden], hidden):  # noqa: B905 (one is longer)
        layers.append(nn.Linear(width_in, width_out))
        if normalization is not None:
            layers.append(NORMALIZATIONS[normalization](width_out))
        layers.append(ACTIVATIONS[activation]())
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear([in_features, *hidden][-1], out_features))


def dropout_layer(probability: float) -> nn.Module:
    """Dropout, or nothing at all where its probability is zero."""
    return nn.Dropout(probability) if probability > 0 else nn.Identity()
