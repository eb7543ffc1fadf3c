"""Convolutional networks for images, which normalize by batch and average over all positions."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from experiments.training.models import dropout_layer


class ConvNet(nn.Module):
    """Stages of two 3x3 convolutions, each of which halves the resolution.

    channels: of each stage. image: the shape (channels, height, width) of rows whose pixels are
        flat; it takes the place of in_channels
    x: float32 (batch, in_channels, height, width), or (batch, pixels) with `image`
        -> logits: float32 (batch, out_features)
    """

    def __init__(
        self,
        in_channels: int | None,
        out_features: int,
        channels: Sequence[int] = (16, 32, 64),
        dropout: float = 0.0,
        image: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.image = None if image is None else tuple(image)
        widths = [channels_of(in_channels, self.image), *channels]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(*convolution(a, b), *convolution(b, b), nn.MaxPool2d(2))
                for a, b in pairwise(widths)
            )
        )
        self.dropout = dropout_layer(dropout)
        self.head = nn.Linear(widths[-1], out_features)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stages(as_images(x, self.image)).mean((2, 3))
        logits: Tensor = self.head(self.dropout(features))
        return logits


class ResNet(nn.Module):
    """The residual network for small images of He et al., "Deep Residual Learning", 2016, section
    4.2; where the width changes, the shortcut is a 1x1 convolution. With three blocks it is
    ResNet-20.

    channels: of each stage; all but the first halve the resolution. blocks: in each stage, of two
        3x3 convolutions. image, x -> logits: as ConvNet's
    """

    def __init__(
        self,
        in_channels: int | None,
        out_features: int,
        channels: Sequence[int] = (16, 32, 64),
        blocks: int = 3,
        image: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.image = None if image is None else tuple(image)
        if not channels:
            raise ValueError("model.channels=[] has no stage: give the channels of each")
        first = channels[0]
        self.stem = nn.Sequential(*convolution(channels_of(in_channels, self.image), first))
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    Residual(a, b, stride=1 if number == 0 else 2),
                    *(Residual(b, b) for _ in range(blocks - 1)),
                )
                for number, (a, b) in enumerate(pairwise([first, *channels]))
            )
        )
        self.head = nn.Linear(channels[-1], out_features)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stages(self.stem(as_images(x, self.image))).mean((2, 3))
        logits: Tensor = self.head(features)
        return logits


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut around them.

    x: float32 (batch, width_in, height, width)
        -> float32 (batch, width_out, ceil(height / stride), ceil(width / stride))
    """

    def __init__(self, width_in: int, width_out: int, stride: int = 1) -> None:
        super().__init__()
        *second, self.activation = convolution(width_out, width_out)
        self.convolutions = nn.Sequential(*convolution(width_in, width_out, stride), *second)
        self.shortcut: nn.Module = nn.Identity()
        if width_in != width_out or stride > 1:
            projection = nn.Conv2d(width_in, width_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width_out))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.convolutions(x) + self.shortcut(x))
        return y


def convolution(width_in: int, width_out: int, stride: int = 1) -> list[nn.Module]:
    """A 3x3 convolution, without the bias that the normalization would take away, and ReLU."""
    convolved = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
    return [convolved, nn.BatchNorm2d(width_out), nn.ReLU()]


def channels_of(in_channels: int | None, image: tuple[int, ...] | None) -> int:
    """The channels of the first layer. Raises ValueError if neither says how many."""
    if image is not None:
        return image[0]
    if in_channels is None:
        raise ValueError("needs model.in_channels, or model.image=[channels,height,width]")
    return in_channels


def as_images(x: Tensor, image: tuple[int, ...] | None) -> Tensor:
    """Rows as images, float32 (batch, channels, height, width). Raises ValueError if they are flat
    and their shape is unknown.
    """
    if image is not None:
        return x.reshape(x.shape[0], *image)
    if x.ndim == 2:
        side = math.isqrt(x.shape[1])
        shape = f"[1,{side},{side}]" if side**2 == x.shape[1] else "[channels,height,width]"
        raise ValueError(f"the pixels of its rows are flat: use model.image={shape}")
    return x
