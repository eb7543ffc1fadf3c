"""Images of shapes, made from a seed: which shapes are there, and where."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from experiments.data import Data, Split
from experiments.training.models.images import convolution

SIZE = 32  # pixels of a side
KINDS = ("disc", "square", "cross")


def masks(rows: int = 10_000, seed: int = 0) -> Data:
    """Images and the class of each pixel, of which a tenth is for validation and for the test each.

    x: float32 (rows, 1, 32, 32); y: int64 (rows, 32, 32), 0 for the background, else 1 + kind
    """
    x, layers = draw(rows, seed)
    y = (layers.long() * torch.arange(1, 1 + len(KINDS)).view(1, -1, 1, 1)).amax(1)
    return divide(x, y, {"num_classes": 1 + len(KINDS), "out_features": 1 + len(KINDS)})


def presence(rows: int = 10_000, seed: int = 0) -> Data:
    """The same images, and which kinds of shapes each has.

    y: float32 (rows, 3) of 0 and 1
    """
    x, layers = draw(rows, seed)
    return divide(x, layers.any(3).any(2).float(), {"num_labels": len(KINDS)})


def draw(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images, float32 (rows, 1, 32, 32), and the pixels of each kind, bool (rows, 3, 32, 32).

    Each kind is there with a probability of a half, as large, bright and far from the corner as is
    drawn; where two overlap, the later one hides the other. There is noise on all of it.
    """
    generator = torch.Generator().manual_seed(seed)
    there = torch.rand(rows, 3, 1, 1, generator=generator) < 0.5
    radius = torch.randint(3, 8, (rows, 3, 1, 1), generator=generator)
    places = torch.randint(6, SIZE - 6, (rows, 3, 2, 1, 1), generator=generator)
    brightness = 0.3 + 0.7 * torch.rand(rows, 3, 1, 1, generator=generator)
    down = (torch.arange(SIZE).view(1, 1, -1, 1) - places[:, :, 0]).abs()
    across = (torch.arange(SIZE).view(1, 1, 1, -1) - places[:, :, 1]).abs()
    far = torch.maximum(down, across)
    disc = (down.square() + across.square())[:, 0] <= radius[:, 0].square()
    square = far[:, 1] < radius[:, 1]
    cross = (far[:, 2] <= radius[:, 2]) & (torch.minimum(down, across)[:, 2] <= 1)
    layers = torch.stack([disc, square, cross], 1) & there
    visible = layers & (layers.flip(1).cumsum(1).flip(1) == 1)  # no later one is there
    x = (visible * brightness).sum(1, keepdim=True)
    return x + 0.2 * torch.randn(x.shape, generator=generator), visible


def divide(x: Tensor, y: Tensor, sizes: dict[str, int]) -> Data:
    """The first rows to train on, then a tenth for validation and a tenth for the test."""
    part = len(x) // 10
    return Data(
        Split(x[: -2 * part], y[: -2 * part]),
        Split(x[-2 * part : -part], y[-2 * part : -part]),
        Split(x[-part:], y[-part:]),
        sizes=sizes,
    )


class UNet(nn.Module):
    """Convolutions at ever coarser resolutions and back, with what each resolution saw beside what
    comes up to it (Ronneberger et al., "U-Net", 2015).

    channels: at each resolution, half as fine as the one before
    x: float32 (batch, in_channels, height, width), the last two multiples of 2^(resolutions - 1)
        -> logits: float32 (batch, out_features, height, width)
    """

    def __init__(
        self, in_channels: int, out_features: int, channels: Sequence[int] = (16, 32, 64)
    ) -> None:
        super().__init__()
        widths = [in_channels, *channels]
        self.down = nn.ModuleList(map(stage, widths, channels))
        ups = list(reversed(channels))
        self.up = nn.ModuleList(stage(a + b, b) for a, b in pairwise(ups))
        self.pool, self.enlarge = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        self.head = nn.Conv2d(channels[0], out_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for down in self.down:
            x = down(self.pool(x) if seen else x)
            seen.append(x)
        for up, beside in zip(self.up, reversed(seen[:-1]), strict=True):
            x = up(torch.cat([self.enlarge(x), beside], 1))
        logits: Tensor = self.head(x)
        return logits


def stage(width_in: int, width_out: int) -> nn.Sequential:
    """Two convolutions of one resolution."""
    return nn.Sequential(*convolution(width_in, width_out), *convolution(width_out, width_out))


class MeanIoU:
    """The intersection over the union of the predicted and the true pixels of each class, averaged
    over the classes.

    outputs: logits, float (batch, classes, ...); targets: int64 (batch, ...)
    """

    higher_is_better = True

    def __init__(self, num_classes: int) -> None:
        self.classes = num_classes
        self.counts: list[Tensor] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        pairs = targets * self.classes + outputs.argmax(1)
        self.counts.append(pairs.flatten().bincount(minlength=self.classes**2))

    def compute(self) -> float:
        """The mean, in [0, 1], over the classes that are there."""
        counts = torch.stack(self.counts).sum(0).view(self.classes, self.classes).double()
        both = counts.diagonal()
        either = counts.sum(0) + counts.sum(1) - both
        return float((both / either)[either > 0].mean())
