"""Samplers: epochs that draw other rows than each one once."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from experiments.data import Split
from experiments.data.loaders import TensorLoader, TorchLoader
from experiments.data.samplers import balanced
from experiments.errors import UsageError


def rare(rows: int = 200) -> Split:
    """One row of twenty is of class 1."""
    return Split(torch.arange(float(rows))[:, None], (torch.arange(rows) % 20 == 0).long())


@pytest.mark.parametrize("kind", [TensorLoader, TorchLoader])
def test_balanced_draws_each_class_about_as_often(kind: Any) -> None:
    loader = kind(rare(), batch_size=32, sampler=balanced, seed=3)
    drawn = torch.cat([y for _, y in loader.batches(0)])
    assert len(drawn) == 200
    assert 0.35 < float(drawn.double().mean()) < 0.65


@pytest.mark.parametrize("kind", [TensorLoader, TorchLoader])
def test_an_epoch_entered_at_a_batch_goes_on_with_the_same_rows(kind: Any) -> None:
    loader = kind(rare(), batch_size=32, sampler=balanced, seed=3)
    whole = [x for x, _ in loader.batches(1)]
    torch.rand(5)
    rest = [x for x, _ in loader.batches(1, 4)]
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))
    assert not torch.equal(whole[0], next(iter(loader.batches(2)))[0])


class OfItsOwn:
    """Draws from a generator of its own."""

    def __init__(self, split: Any) -> None:
        self.rows, self.generator = len(split), torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.rows, generator=self.generator).tolist()


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (OfItsOwn, "draws other rows for the same epoch"),
        (lambda split: [0, 200], "draws row 200, and the split has the rows 0 to 199"),
        (lambda split: [], "draws no row"),
    ],
)
def test_a_sampler_that_no_resumed_run_can_follow_is_refused(sampler: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TensorLoader(rare(), batch_size=32, sampler=sampler)


def test_to_balance_what_has_no_classes_is_refused() -> None:
    with pytest.raises(UsageError, match="y is not one class number for each row"):
        TensorLoader(Split(torch.rand(4, 2), torch.rand(4)), batch_size=2, sampler=balanced)
