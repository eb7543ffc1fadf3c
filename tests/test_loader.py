import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_runs import SMALL, go_on, lines
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset

from experiments.data import Data, Split
from experiments.data.loaders import (
    Batch,
    BatchRows,
    TensorLoader,
    TorchLoader,
    evaluation_options,
)
from experiments.data.mnist import load
from experiments.data.streams import derive

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
    """Rows whose x and y are the row number."""
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
    """Neither on epochs read before nor on the global generator."""
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


@given(st.integers(1, 200), seeds, epochs)
def test_the_shuffle_of_an_epoch_is_torchs_from_the_stream_of_its_name(
    rows: int, seed: int, epoch: int
) -> None:
    """So that runs of earlier versions are reproduced."""
    generator = torch.Generator().manual_seed(derive(seed, "shuffle", epoch))
    expected = torch.randperm(rows, generator=generator).tolist()
    assert (
        torch.cat(list(BatchRows(rows, 7, shuffle=True, seed=seed).batches(epoch))).tolist()
        == expected
    )


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
    """Counts torch operations while active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("numbers", "trained", "evaluated"),
    # small rows: 256 or more; large rows: as many as fit, but at least twice the training batch
    [(784, 16, 256), (784, 1000, 2000), (2**18 // 100, 16, 100), (2**20, 16, 32)],
)
def test_an_evaluations_batches_are_large(numbers: int, trained: int, evaluated: int) -> None:
    split = Split(torch.zeros(1, numbers), torch.zeros(1, dtype=torch.int64))
    options = evaluation_options(split, trained)
    assert options == {"batch_size": evaluated, "shuffle": False, "drop_last": False}


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_are_gathered_whole_with_no_work_per_row(shuffle: bool) -> None:
    """Ten batches take the same number of operations with a hundred rows each as with one."""

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
    storage = loader.split.x.untyped_storage().data_ptr()
    assert all(xb.untyped_storage().data_ptr() == storage for xb, _ in loader.batches())


class Squares(Dataset[tuple[Tensor, Tensor]]):
    """A map-style data set."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return torch.tensor([float(row**2)]), torch.tensor(row)


def test_any_map_style_dataset_can_be_loaded() -> None:
    batches = list(TorchLoader(Squares(), batch_size=3).batches())
    assert [xb.flatten().tolist() for xb, _ in batches] == [[0, 1, 4], [9, 16, 25], [36]]


# Bytes


def pixels(rows: int) -> Split:
    """All byte values, in different rows of 32."""
    x = (torch.arange(rows)[:, None] + 8 * torch.arange(32)).to(torch.uint8)
    return Split(x, torch.arange(rows))


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [1, 7, 300])
def test_batches_of_bytes_equal_those_of_floats_scaled_beforehand(
    kind: Callable[..., Loader], shuffle: bool, batch_size: int
) -> None:
    kept = pixels(256)
    scaled = Split(kept.x.float().div(255), kept.y)
    options = {"batch_size": batch_size, "shuffle": shuffle, "seed": 5}
    one, other = (list(kind(split, **options).batches(1)) for split in (kept, scaled))
    assert {xb.dtype for xb, _ in one} == {torch.float32}
    assert equal(one, other)


def test_gathering_rows_scales_bytes_and_no_other_dtype() -> None:
    kept, index = pixels(256), torch.tensor([3, 255, 3])
    xb, yb = kept.gather(index)
    assert torch.equal(xb, kept.x[index].float() / 255)
    assert torch.equal(yb, index)
    assert torch.equal(Split(kept.y, kept.y).gather(index)[0], index)


def test_bytes_of_a_custom_dataset_are_not_scaled() -> None:
    class Tokens(Squares):
        def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
            return torch.tensor([row], dtype=torch.uint8), torch.tensor(row)

    xb, _ = next(TorchLoader(Tokens(), batch_size=3).batches())
    assert xb.dtype == torch.uint8


def test_mnist_as_bytes_gives_the_batches_of_mnist_bit_for_bit(mnist: Data) -> None:
    kept = load(as_bytes=True)
    for name, split in vars(mnist).items():
        if isinstance(split, Split):
            other: Split = getattr(kept, name)
            assert other.x.dtype == torch.uint8
            one = TensorLoader(split, batch_size=999, shuffle=True)
            assert equal(
                list(one.batches()),
                list(TensorLoader(other, batch_size=999, shuffle=True).batches()),
            )


# prints the megabytes that loading adds at its peak and afterwards
GROWTH = """
import sys
import torch
from experiments.data.mnist import load

def memory(name):
    [line] = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) // 1024

torch.zeros(10).add(1)
before = memory("VmRSS:")
data = load(as_bytes=sys.argv[1] == "true")
print(memory("VmHWM:") - before, memory("VmRSS:") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("as_bytes", "held"), [("true", 55), ("false", 220)])
def test_loading_mnist_peaks_little_above_the_size_of_its_rows(as_bytes: str, held: int) -> None:
    """The rows take 55 MB as bytes and 220 MB as floats; decompression adds a copy of the bytes."""
    completed = subprocess.run(
        [sys.executable, "-c", GROWTH, as_bytes], capture_output=True, text=True, check=True
    )
    peak, stayed = map(int, completed.stdout.split())
    assert held - 5 < stayed < held + 45
    assert peak < held + 100


def test_a_run_on_bytes_has_the_bits_of_the_run_on_floats(
    compose: Callable[[list[str]], dict[str, Any]], tiny: Data, tmp_path: Path
) -> None:
    config = compose(SMALL)

    def as_bytes(split: Split) -> Split:
        return Split((split.x * 255).round().byte(), split.y)

    kept = Data(*(as_bytes(split) for split in (tiny.train, tiny.valid, tiny.test)))
    go_on(tmp_path / "floats", config, tiny)
    go_on(tmp_path / "bytes", config, kept)
    assert lines(tmp_path / "bytes") == lines(tmp_path / "floats")
