"""A model for the rows of a table."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from experiments.training.models import mlp


class TableNet(nn.Module):
    """An embedding of each category beside the numbers, and an MLP.

    numbers: how many columns of numbers. cardinalities: of each column of categories, the number of
        its codes. embedding: the width of each category's. hidden, dropout, activation,
        normalization: as in `mlp`. target_scale: (mean, standard deviation) of a target that is a
        number, by which outputs are scaled; None leaves them as they are
    x: {"numbers": float32 (batch, numbers), "categories": int64 (batch, columns)}, or the numbers
        alone -> float32 (batch, out_features)
    """

    def __init__(
        self,
        numbers: int,
        cardinalities: Sequence[int],
        out_features: int,
        hidden: Sequence[int] = (128, 128),
        embedding: int = 8,
        dropout: float = 0.0,
        activation: str = "relu",
        normalization: str | None = None,
        target_scale: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, embedding) for size in cardinalities)
        width = numbers + embedding * len(self.embeddings)
        self.layers = mlp(width, hidden, out_features, dropout, activation, normalization)
        mean, std = target_scale or (0.0, 1.0)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        self.mean: Tensor
        self.std: Tensor

    def forward(self, x: Mapping[str, Tensor] | Tensor) -> Tensor:
        if isinstance(x, Tensor):
            x = {"numbers": x}
        columns = x["categories"].unbind(1) if self.embeddings else ()
        embedded = [embed(column) for embed, column in zip(self.embeddings, columns, strict=True)]
        outputs: Tensor = self.layers(torch.cat([x["numbers"], *embedded], 1))
        return outputs * self.std + self.mean
