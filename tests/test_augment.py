"""Augmentation of whole batches."""

from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.data import augment
from experiments.errors import UsageError


def batch(rows: int = 64) -> tuple[Tensor, Tensor]:
    """Images of one bright pixel in the middle, (rows, 2, 9, 9), and two classes."""
    x = torch.zeros(rows, 2, 9, 9)
    x[:, :, 4, 4] = 1.0
    return x, torch.arange(rows) % 2


def test_a_shift_moves_each_image_by_at_most_so_many_pixels_both_channels_alike() -> None:
    torch.manual_seed(0)
    x, _ = augment.shift(batch(), pixels=2)
    assert torch.equal(x[:, 0], x[:, 1])
    places = x[:, 0].flatten(1).argmax(1)
    offsets = torch.stack([places // 9 - 4, places % 9 - 4])
    assert int(offsets.abs().max()) == 2
    assert len({tuple(offset) for offset in offsets.T.tolist()}) > 10


def test_a_flip_mirrors_about_half_of_the_images() -> None:
    torch.manual_seed(0)
    x = torch.rand(64, 1, 4, 4)
    flipped, _ = augment.flip((x, x))
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, x, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(flipped, x, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 16 < sum(mirrored) < 48


def test_a_crop_keeps_the_size_of_the_images_and_only_their_values() -> None:
    torch.manual_seed(0)
    x, _ = augment.crop(batch(), size=6)
    assert x.shape == (64, 2, 9, 9)
    assert set(x.unique().tolist()) <= {0.0, 1.0}


def test_mixup_mixes_rows_and_targets_with_one_weight() -> None:
    torch.manual_seed(0)
    x = torch.arange(8.0)[:, None]
    mixed, targets = augment.mixup((x, torch.arange(8)), alpha=1.0, classes=8)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    torch.testing.assert_close(targets @ torch.arange(8.0), mixed[:, 0])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("shift", {}, "use data.images=true"),
        ("mixup", {}, "augment.mixup.classes=null"),
        ("mixup", {"alpha": 3.0, "classes": 2}, "augment.mixup.alpha=3.0"),
    ],
)
def test_what_it_cannot_augment_is_refused_in_one_line(
    name: str, options: dict[str, Any], message: str
) -> None:
    flat = torch.rand(6, 5), torch.arange(6) % 2
    with pytest.raises(UsageError, match=message):
        getattr(augment, name)(flat, **options)
