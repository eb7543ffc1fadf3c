"""Augmentation of whole training batches (x, y), on the batch's device.

They draw from torch's generator, whose state a checkpoint holds, and consist of tensor operations
alone, so that a compiled step contains them. Images: float (batch, channels, height, width).
"""

import torch
from torch import Tensor
from torch.nn import functional

from experiments.errors import UsageError

Pair = tuple[Tensor, Tensor]


def flip(batch: Pair, probability: float = 0.5) -> Pair:
    """Each image mirrored left to right with a probability."""
    x, y = images(batch, "flip"), batch[1]
    mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < probability
    return torch.where(mirrored, x.flip(3), x), y


def shift(batch: Pair, pixels: int = 2) -> Pair:
    """Each image moved by up to `pixels` in both directions; zeros come in at its edges."""
    x, y = images(batch, "shift"), batch[1]
    padded = functional.pad(x, (pixels,) * 4)
    return windows(padded, x.shape[2], x.shape[3]), y


def crop(batch: Pair, size: int) -> Pair:
    """A random square of `size` pixels of each image, enlarged to the image's size."""
    x, y = images(batch, "crop"), batch[1]
    if size > min(x.shape[2:]):
        raise UsageError(f"augment.crop.size={size}: images have {x.shape[2]} by {x.shape[3]}")
    part = windows(x, size, size)
    # interpolate has no deterministic gradient on CUDA; these rows need none
    rows = torch.arange(x.shape[2], device=x.device) * size // x.shape[2]
    columns = torch.arange(x.shape[3], device=x.device) * size // x.shape[3]
    return part.index_select(2, rows).index_select(3, columns), y


def noise(batch: Pair, std: float = 0.1) -> Pair:
    """Gaussian noise of a standard deviation added to x, float (batch, ...)."""
    x, y = batch
    return x + std * torch.randn_like(x), y


def mixup(batch: Pair, alpha: float = 0.2, classes: int | None = None) -> Pair:
    """Each row mixed with another one, and its target with the other's.

    The weight is drawn from Beta(alpha, alpha), one for each batch (Zhang et al., "mixup: Beyond
    Empirical Risk Minimization", 2018).

    classes: of y, int64 (batch,), which becomes probabilities, float32 (batch, classes); None: y is
        float and mixed as it is
    """
    x, y = batch
    if not 0 < alpha <= 2:
        raise UsageError(f"augment.mixup.alpha={alpha}: expected a number above 0, at most 2")
    if classes is None and not y.is_floating_point():
        raise UsageError("augment.mixup.classes=null: y holds classes; say how many there are")
    target = y if classes is None else functional.one_hot(y, classes).to(x.dtype)
    # of two gamma variates, each by the sum of exponential ones' powers (Johnk), one row a draw
    first, second = torch.rand(2, 64, device=x.device).pow(1 / alpha)
    accepted = (first + second <= 1) & (first + second > 0)
    chosen = accepted.to(torch.int64).argmax()
    pair = torch.stack([first, second]).index_select(1, chosen.view(1)).squeeze(1)
    weight = torch.where(accepted.any(), pair[0] / pair.sum().clamp(min=1e-20), torch.ones(()))
    order = torch.rand(len(x), device=x.device).argsort()
    return x * weight + x[order] * (1 - weight), target * weight + target[order] * (1 - weight)


def windows(x: Tensor, height: int, width: int) -> Tensor:
    """A window at a random place of each image: (batch, channels, height, width)."""
    rows, channels = x.shape[:2]
    places = [
        (torch.rand(rows, 1, device=x.device) * (size - part + 1)).long()
        + torch.arange(part, device=x.device)
        for size, part in ((x.shape[2], height), (x.shape[3], width))
    ]
    down = places[0].view(rows, 1, height, 1).expand(rows, channels, height, x.shape[3])
    across = places[1].view(rows, 1, 1, width).expand(rows, channels, height, width)
    return x.gather(2, down).gather(3, across)


def images(batch: Pair, name: str) -> Tensor:
    """The x of a batch. Raises UsageError if it holds no images."""
    x: Tensor = batch[0]
    if x.ndim != 4:
        raise UsageError(
            f"augment.{name}: takes images (rows, channels, height, width), and a row of x has the "
            f"shape {tuple(x.shape[1:])}; use data.images=true, or leave it out"
        )
    return x
