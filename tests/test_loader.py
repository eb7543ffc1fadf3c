import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset

from experiments.data import Data, Split
from experiments.loader import Batch, TensorLoader, TorchLoader

Loader = TensorLoader | TorchLoader
LOADERS = (TensorLoader, TorchLoader)

loaders = st.sampled_from(LOADERS)
seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 1000)
shapes = st.fixed_dictionaries({
    "rows": st.integers(1, 200),
    "batch_size": st.integers(1, 70),
    "shuffle": st.booleans(),
    "drop_last": st.booleans(),
})  # fmt: skip


def numbered(rows: int) -> Split:
    """Rows that tell their own number, in x and in y."""
    return Split(torch.arange(rows).float().view(rows, 1).repeat(1, 3), torch.arange(rows))


def make(kind: Callable[..., Loader], rows: int, seed: int = 0, **settings: Any) -> Loader:
    return kind(numbered(rows), seed=seed, **settings)


def visited(loader: Loader, epoch: int = 0, start: int = 0) -> list[list[int]]:
    """The row numbers of each batch; x and y must agree."""
    batches = list(loader.batches(epoch, start))
    for xb, yb in batches:
        assert torch.equal(xb, yb.float().view(-1, 1).repeat(1, 3))
    return [yb.tolist() for _, yb in batches]


def equal(one: list[Batch], other: list[Batch]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


@settings(max_examples=60)
@given(loaders, shapes, seeds, epochs)
def test_an_epoch_visits_each_row_once_but_for_a_dropped_last_batch(
    kind: Callable[..., Loader], shape: dict[str, Any], seed: int, epoch: int
) -> None:
    batches = visited(make(kind, **shape, seed=seed), epoch)
    rows = [row for batch in batches for row in batch]
    whole = shape["rows"] - (shape["rows"] % shape["batch_size"] if shape["drop_last"] else 0)
    assert len(rows) == len(set(rows)) == whole
    assert set(rows) <= set(range(shape["rows"]))


@settings(max_examples=60)
@given(loaders, shapes)
def test_length_is_the_number_of_batches_all_full_but_the_last(
    kind: Callable[..., Loader], shape: dict[str, Any]
) -> None:
    loader = make(kind, **shape)
    sizes = [len(batch) for batch in visited(loader)]
    assert len(loader) == len(sizes)
    assert all(size == shape["batch_size"] for size in sizes[:-1])
    assert all(0 < size <= shape["batch_size"] for size in sizes)


@settings(max_examples=60)
@given(loaders, shapes, seeds, epochs, st.data())
def test_entering_an_epoch_at_a_batch_gives_exactly_the_rest(
    kind: Callable[..., Loader], shape: dict[str, Any], seed: int, epoch: int, data: st.DataObject
) -> None:
    loader = make(kind, **shape, seed=seed)
    start = data.draw(st.integers(0, len(loader)))
    assert visited(loader, epoch, start) == visited(loader, epoch)[start:]


@settings(max_examples=40)
@given(loaders, seeds, st.lists(epochs, max_size=3), epochs)
def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone(
    kind: Callable[..., Loader], seed: int, before: list[int], epoch: int
) -> None:
    """Neither on what was read before nor on the global generator."""
    fresh, used = (make(kind, 50, seed=seed, batch_size=8, shuffle=True) for _ in range(2))
    for earlier in before:
        visited(used, earlier)
    torch.manual_seed(epoch)
    assert visited(used, epoch) == visited(fresh, epoch)


@given(seeds, seeds, epochs, epochs)
def test_epochs_and_seeds_have_different_orders(a: int, b: int, i: int, j: int) -> None:
    orders = {
        (seed, epoch): visited(
            make(TensorLoader, 100, seed=seed, batch_size=100, shuffle=True), epoch
        )
        for seed in (a, b)
        for epoch in (i, j)
    }
    distinct = {str(order) for order in orders.values()}
    assert len(distinct) == len(orders)


def test_without_shuffle_rows_come_in_their_order_in_every_epoch() -> None:
    for kind in LOADERS:
        loader = make(kind, 10, batch_size=4)
        assert visited(loader, 0) == visited(loader, 3) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_shuffle_moves_rows_across_batches() -> None:
    first = visited(make(TensorLoader, 1000, batch_size=100, shuffle=True))[0]
    assert len({row // 100 for row in first}) > 5


@settings(max_examples=40)
@given(shapes, seeds, epochs)
def test_both_loaders_give_equal_batches(shape: dict[str, Any], seed: int, epoch: int) -> None:
    one, other = (make(kind, **shape, seed=seed) for kind in LOADERS)
    assert equal(list(one.batches(epoch)), list(other.batches(epoch)))


def test_workers_change_no_batch(tiny: Data) -> None:
    one = TensorLoader(tiny.train, batch_size=50, shuffle=True, seed=3)
    other = TorchLoader(tiny.train, batch_size=50, shuffle=True, seed=3, num_workers=2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert equal(list(one.batches(1, 2)), list(other.batches(1, 2)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_no_global_generator_is_touched(kind: Callable[..., Loader], shuffle: bool) -> None:
    loader = make(kind, 50, batch_size=8, shuffle=shuffle)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    visited(loader, 1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert str(np.random.get_state()) == str(before[2])


class CountCalls(TorchDispatchMode):
    """Counts torch's operations while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_are_gathered_whole_with_no_work_per_row(shuffle: bool) -> None:
    """Ten batches take as many operations with a hundred rows each as with one."""

    def calls(batch_size: int) -> Counter[str]:
        loader = make(TensorLoader, 10 * batch_size, batch_size=batch_size, shuffle=shuffle)
        counter = CountCalls()
        with counter:
            assert len(list(loader.batches())) == 10
        return counter.calls

    assert calls(100) == calls(1)
    assert sum(calls(100).values()) <= 50


def test_an_unshuffled_batch_is_a_view_of_the_data() -> None:
    loader = TensorLoader(numbered(10), batch_size=4)
    storage = loader.x.untyped_storage().data_ptr()
    assert all(xb.untyped_storage().data_ptr() == storage for xb, _ in loader.batches())


class Squares(Dataset[tuple[Tensor, Tensor]]):
    """A data set that is read sample by sample."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return torch.tensor([float(row**2)]), torch.tensor(row)


def test_any_map_style_dataset_can_be_loaded() -> None:
    batches = list(TorchLoader(Squares(), batch_size=3).batches())
    assert [xb.flatten().tolist() for xb, _ in batches] == [[0, 1, 4], [9, 16, 25], [36]]
