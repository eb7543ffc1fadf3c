"""Jobs that are made from MNIST: two inputs in a dict, and few rows of another task."""

import torch
from torch import Tensor, nn

from experiments.data import Data, Split, mnist
from experiments.training.models import mlp


def sums(path: str | None = None, seed: int = 0) -> Data:
    """A digit and a number to add to it; only the last digit of their sum is asked for.

    x: {"image": float32 (rows, 784) in [0, 1], "number": int64 (rows,) in 0..9}; y: int64 (rows,)

    path: as of `mnist.load`
    """
    generator = torch.Generator().manual_seed(seed)

    def added(split: Split) -> Split:
        number = torch.randint(10, (len(split),), generator=generator)
        return Split({"image": split.x, "number": number}, (split.y + number) % 10, pixels=False)

    data = mnist.load(path)
    return Data(*map(added, (data.train, data.valid, data.test)), sizes={"in_features": 784})


class Sum(nn.Module):
    """An MLP of an image and an embedded number.

    x: as `sums` -> logits: float32 (batch, out_features)
    """

    def __init__(self, in_features: int, out_features: int, width: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.layers = mlp(in_features + 16, [width, width], out_features)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        inputs = torch.cat([x["image"], self.embed(x["number"])], 1)
        logits: Tensor = self.layers(inputs)
        return logits


def parity(rows: int = 100, path: str | None = None) -> Data:
    """Whether a digit is odd, with MNIST's first rows alone to train on.

    x: float32 (rows, 1, 28, 28); y: int64 (rows,), 1 for odd digits

    path: as of `mnist.load`
    """
    data = mnist.load(path, images=True)
    train = Split(data.train.x[:rows].clone(), data.train.y[:rows] % 2, pixels=True)
    valid, test = (Split(s.x, s.y % 2, pixels=True) for s in (data.valid, data.test))
    return Data(train, valid, test)
