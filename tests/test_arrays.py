"""data=arrays: memory-mapped .npy files, shuffled in blocks and never loaded as a whole."""

import re
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from saved_runs import SMALL, STEPS, assert_same_run, call, go_on, lines, record, stop_after

from experiments import __main__ as entrypoint
from experiments import job, reproduce
from experiments.data import Data, Split, arrays
from experiments.data.arrays import MappedSplit, load
from experiments.data.loaders import Batch, BatchRows, TensorLoader, TorchLoader
from experiments.directory import fingerprint as fingerprint_module
from experiments.errors import UsageError

Arrays = dict[str, NDArray[Any]]
Completed = subprocess.CompletedProcess[str]
ROWS = {"train": 23, "valid": 7, "test": 5}

orders = st.fixed_dictionaries({
    "rows": st.integers(1, 300),
    "batch_size": st.integers(1, 70),
    "shuffle": st.booleans(),
    "drop_last": st.booleans(),
    "seed": st.integers(0, 2**63 - 1),
    "block": st.integers(1, 40),
    "window": st.integers(1, 6),
})  # fmt: skip
epochs = st.integers(0, 1000)


def some_arrays(rows: int = ROWS["train"], **changed: NDArray[Any]) -> Arrays:
    """A small complete data set with `rows` training rows."""
    found: Arrays = {}
    for split, count in (ROWS | {"train": rows}).items():
        found[f"{split}_x"] = np.arange(count * 6, dtype=np.float32).reshape(count, 2, 3)
        found[f"{split}_y"] = np.arange(count)
    return found | changed


def save(folder: Path, found: Arrays) -> str:
    folder.mkdir(exist_ok=True)
    for name, array in found.items():
        np.save(folder / f"{name}.npy", array)
    return str(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a complete data set, for a test to damage."""
    return Path(save(tmp_path / "arrays", some_arrays()))


@pytest.fixture(scope="module")
def blocks() -> Any:
    """Small blocks, so that a small file has many windows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "BLOCK_BYTES", 300)
        yield


def in_memory(split: Split) -> Split:
    return Split(split.x.clone(), split.y.clone())


def same(one: list[Batch], other: list[Batch]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


# The order of an epoch


@given(orders, epochs)
def test_an_epoch_has_each_row_once_but_for_a_dropped_last_batch(
    order: dict[str, Any], epoch: int
) -> None:
    rows = BatchRows(**order)
    batches = [batch.tolist() for batch in rows.batches(epoch)]
    visited = sorted(row for batch in batches for row in batch)
    assert len(batches) == len(rows)
    assert all(len(batch) == order["batch_size"] for batch in batches[:-1])
    if order["drop_last"]:
        assert len(set(visited)) == len(visited) == len(rows) * order["batch_size"]
    else:
        assert visited == list(range(order["rows"]))


@given(orders, epochs, st.data())
def test_an_epoch_entered_at_a_batch_has_exactly_the_rest(
    order: dict[str, Any], epoch: int, data: st.DataObject
) -> None:
    rows = BatchRows(**order)
    start = data.draw(st.integers(0, len(rows)))
    rest = [batch.tolist() for batch in rows.batches(epoch, start)]
    assert rest == [batch.tolist() for batch in rows.batches(epoch)][start:]


@given(orders, epochs)
def test_each_window_has_all_rows_of_its_blocks_and_only_the_last_has_fewer_blocks(
    order: dict[str, Any], epoch: int
) -> None:
    rows, block = BatchRows(**order), order["block"]
    found = [window.tolist() for window in rows.window_orders(epoch)]
    count = -(-order["rows"] // block)
    assert len(found) == -(-count // order["window"])
    met: set[int] = set()
    for number, window in enumerate(found):
        chosen = {row // block for row in window}
        last = count - order["window"] * number
        assert len(chosen) == min(order["window"], last)
        assert met.isdisjoint(chosen)
        met |= chosen


@given(orders, epochs)
def test_a_batch_that_spans_two_windows_belongs_to_the_second(
    order: dict[str, Any], epoch: int
) -> None:
    rows = BatchRows(**order)
    ends = np.cumsum([len(window) for window in rows.window_orders(epoch)])
    windows, done = list(rows.windows(epoch)), 0
    assert all(len(window) for window in windows)
    for window in windows:
        # all its batches end in the same shuffle window
        lasts = done + np.cumsum([len(batch) for batch in window])
        assert len(set(np.searchsorted(ends, lasts).tolist())) == 1
        done = lasts[-1]
    assert done == sum(len(batch) for batch in rows.batches(epoch))


@given(orders, epochs, st.integers(1, 9), st.data())
def test_grouped_batches_are_the_same_batches(
    order: dict[str, Any], epoch: int, group: int, data: st.DataObject
) -> None:
    rows = BatchRows(**order)
    start = data.draw(st.integers(0, len(rows)))
    pieces = [piece for window in rows.windows(epoch, start, group) for piece in window]
    assert all(len(piece) == group * order["batch_size"] for piece in pieces[:-1])
    batches = [batch.tolist() for piece in pieces for batch in piece.split(order["batch_size"])]
    assert batches == [batch.tolist() for batch in rows.batches(epoch, start)]


@given(orders, epochs)
def test_rows_that_fit_in_one_window_have_the_order_that_they_have_in_memory(
    order: dict[str, Any], epoch: int
) -> None:
    order = order | {"block": max(order["block"], -(-order["rows"] // order["window"]))}
    mapped, memory = BatchRows(**order), BatchRows(**order | {"block": None})
    assert [batch.tolist() for batch in mapped.batches(epoch)] == [
        batch.tolist() for batch in memory.batches(epoch)
    ]


def test_the_rows_of_a_window_are_mixed_completely() -> None:
    """A batch of 100 rows meets about 63 of 100 blocks, as in a shuffle of single rows."""
    rows = BatchRows(10_000, 100, shuffle=True, block=20, window=100)
    for batch in next(rows.windows(0)):
        assert 50 < len({row // 20 for row in batch.tolist()}) < 76


def test_each_window_is_mixed_in_its_own_way() -> None:
    one, other = BatchRows(2000, 10, shuffle=True, block=10, window=100).window_orders(0)
    assert not torch.equal(one.argsort(), other.argsort())


def test_the_blocks_of_a_window_come_from_all_over_the_file_and_differ_between_epochs() -> None:
    rows = BatchRows(10_000, 100, shuffle=True, block=10, window=50)
    firsts = [set((next(rows.window_orders(epoch)) // 10).tolist()) for epoch in range(2)]
    assert len(firsts[0] & firsts[1]) < 10
    assert len({block // 100 for block in firsts[0]}) == 10


def test_without_shuffle_rows_come_in_their_order() -> None:
    rows = BatchRows(10, 4, block=3, window=2)
    assert [batch.tolist() for batch in rows.batches(1)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_the_order_of_a_large_file_is_never_whole_in_memory() -> None:
    rows = BatchRows(10**12, 64, shuffle=True, block=10**6, window=1)
    assert all(0 <= row < 10**12 for row in next(rows.batches(0)).tolist())


# Loaders


@pytest.fixture(scope="module")
def mapped(blocks: None, tmp_path_factory: pytest.TempPathFactory) -> MappedSplit:
    """900 rows in 225 blocks: two windows."""
    path = save(tmp_path_factory.mktemp("mapped"), some_arrays(900))
    split = load(path).train
    assert isinstance(split, MappedSplit)
    return split


@settings(max_examples=40)
@given(st.integers(1, 70), st.booleans(), st.booleans(), epochs, st.data())
def test_both_loaders_give_the_same_batches_of_a_mapped_split(
    mapped: MappedSplit,
    batch_size: int,
    shuffle: bool,
    drop_last: bool,
    epoch: int,
    data: st.DataObject,
) -> None:
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "shuffle": shuffle,
        "drop_last": drop_last,
        "seed": 3,
    }
    one, other = TensorLoader(mapped, **options), TorchLoader(mapped, **options)
    start = data.draw(st.integers(0, len(one)))
    whole = list(one.batches(epoch))
    assert len(one) == len(other) == len(whole)
    assert same(list(one.batches(epoch, start)), whole[start:])
    assert same(list(other.batches(epoch, start)), whole[start:])


@pytest.mark.parametrize("kind", [TensorLoader, TorchLoader])
def test_a_batch_of_a_mapped_split_has_the_rows_with_its_numbers(
    kind: type[TensorLoader] | type[TorchLoader], mapped: MappedSplit
) -> None:
    loader = kind(mapped, batch_size=32, shuffle=True, seed=1)
    for xb, yb in loader.batches(2):
        assert torch.equal(xb, in_memory(mapped).x[yb])


def test_workers_change_no_batch_of_a_mapped_split(mapped: MappedSplit) -> None:
    options: dict[str, Any] = {"batch_size": 50, "shuffle": True, "seed": 3}
    one = TensorLoader(mapped, **options)
    other = TorchLoader(mapped, num_workers=2, **options)
    assert same(list(one.batches(1, 2)), list(other.batches(1, 2)))


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_mapped_split_of_one_window_gives_the_batches_that_it_gives_in_memory(
    shuffle: bool, folder: Path
) -> None:
    split = load(str(folder)).train
    one, other = (
        TensorLoader(rows, batch_size=4, shuffle=shuffle) for rows in (split, in_memory(split))
    )
    assert same(list(one.batches(5)), list(other.batches(5)))


@pytest.mark.parametrize("kind", [TensorLoader, TorchLoader])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_batch_can_be_written_to_and_the_file_stays(
    kind: type[TensorLoader] | type[TorchLoader], shuffle: bool, folder: Path
) -> None:
    for xb, yb in kind(load(str(folder)).train, batch_size=4, shuffle=shuffle).batches():
        xb.fill_(-1), yb.fill_(-1)
    assert np.array_equal(np.load(folder / "train_x.npy"), some_arrays()["train_x"])


# Loading


def test_the_splits_are_what_was_saved(folder: Path) -> None:
    data = load(str(folder))
    for name, array in some_arrays().items():
        split, _, kind = name.partition("_")
        assert torch.equal(getattr(getattr(data, split), kind), torch.from_numpy(array))


def test_loading_warns_of_nothing(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    load(str(folder))
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"])
def test_integer_targets_of_any_size_become_int64(kind: str, tmp_path: Path) -> None:
    y = np.array([3, 0, 1, 127], kind)
    path = save(tmp_path / "arrays", some_arrays(4, train_y=y))
    assert torch.equal(load(path).train.y, torch.tensor([3, 0, 1, 127]))


def test_float_targets_stay_float32_with_their_shape(tmp_path: Path) -> None:
    targets: Any = {f"{name}_y": np.ones((n, 2), "f4") for name, n in ROWS.items()}
    data = load(save(tmp_path / "arrays", some_arrays(**targets)))
    assert (data.train.y.dtype, data.train.y.shape) == (torch.float32, (23, 2))


@pytest.mark.parametrize("kind", [TensorLoader, TorchLoader])
def test_bytes_are_mapped_as_they_are_and_scaled_in_batches(
    kind: type[TensorLoader] | type[TorchLoader], tmp_path: Path
) -> None:
    pixels: Any = {
        f"{name}_x": np.arange(3 * n, dtype="u1").reshape(n, 3) for name, n in ROWS.items()
    }
    train = load(save(tmp_path / "arrays", some_arrays(**pixels))).train
    assert train.x.dtype == torch.uint8
    for xb, yb in kind(train, batch_size=3, shuffle=True).batches():
        assert torch.equal(xb, train.x.div(255)[yb])


def test_fingerprints_are_those_of_the_same_rows_in_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load(str(folder))
    memory = Data(in_memory(data.train), in_memory(data.valid), in_memory(data.test))
    expected = memory.fingerprints
    monkeypatch.setattr(fingerprint_module, "PIECE", 7)
    assert data.fingerprints == expected


# Errors


def error_of(path: str | None) -> str:
    """The message, without its key and value, for a folder that cannot be loaded."""
    with pytest.raises(UsageError) as error:
        load(path)
    line = str(error.value)
    assert line.startswith(f"data.path={path or 'null'}: ")
    assert "\n" not in line
    return line.partition(": ")[2]


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    assert error_of(str(tmp_path / "none")).startswith("there is no such folder")
    assert error_of(None).startswith("there is no such folder")


@pytest.mark.parametrize("name", some_arrays())
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / f"{name}.npy").unlink()
    assert error_of(str(folder)) == f"{name}.npy is missing; save it there with numpy.save"


def test_a_path_that_is_no_file_is_named(folder: Path) -> None:
    (folder / "test_y.npy").unlink()
    (folder / "test_y.npy").mkdir()
    assert error_of(str(folder)).startswith("test_y.npy cannot be read (Is a directory)")


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_objects_are_refused_and_never_unpickled(folder: Path, tmp_path: Path) -> None:
    planted = np.array([Planted(tmp_path / "executed")] * 23, dtype=object)
    np.save(folder / "train_y.npy", planted, allow_pickle=True)
    assert error_of(str(folder)).startswith(
        "train_y.npy holds object, expected integers or float32"
    )
    (folder / "train_y.npy").write_bytes(planted.dumps())
    assert error_of(str(folder)).startswith("train_y.npy is not a complete .npy file")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "array", "line"),
    [
        ("train_x", np.zeros((23, 2, 3)), "train_x.npy holds float64, expected float32 or uint8"),
        ("valid_x", np.zeros((7, 2, 3), ">f4"), "valid_x.npy holds >f4, expected float32 or uint8"),
        ("test_y", np.zeros(5), "test_y.npy holds float64, expected integers or float32"),
        ("test_y", np.zeros(5, ">i8"), "test_y.npy holds >i8, expected integers or float32"),
        ("test_y", np.zeros(5, bool), "test_y.npy holds bool, expected integers or float32"),
        ("train_y", np.zeros(23, "f4,i4"), "train_y.npy holds [('f0', '<f4'), ('f1', '<i4')], "),
        ("train_y", np.array(["a"] * 23), "train_y.npy holds <U1, expected integers or float32"),
        ("train_y", np.zeros(22, int), "train_x.npy has 23 rows, train_y.npy 22; "),
        ("train_x", np.zeros((23, 2), "f4"), "a row of valid_x.npy is float32 (2, 3), one of "),
        ("test_x", np.zeros((5, 2, 3), "u1"), "a row of test_x.npy is uint8 (2, 3), one of "),
        ("valid_y", np.zeros(7, "f4"), "a row of valid_y.npy is float32 (), one of train_y.npy "),
        ("train_x", np.asfortranarray(np.ones((23, 2, 3), "f4")), "train_x.npy is in Fortran "),
        ("train_x", np.zeros((0, 2, 3), "f4"), "train_x.npy has the shape (0, 2, 3), expected "),
        ("train_y", np.array(3), "train_y.npy has the shape (), expected at least one row"),
    ],
)  # fmt: skip
def test_an_array_of_unsupported_dtype_or_shape_is_named(
    name: str, array: NDArray[Any], line: str, folder: Path
) -> None:
    np.save(folder / f"{name}.npy", array)
    assert error_of(str(folder)).startswith(line)


@given(st.integers(0, 10_000))
def test_a_truncated_file_is_named(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = Path(save(tmp_path_factory.getbasetemp() / "cut", some_arrays()))
    file = folder / "valid_x.npy"
    content = file.read_bytes()
    file.write_bytes(content[: cut % len(content)])
    line = error_of(str(folder))
    assert line.startswith("valid_x.npy ")
    assert line.endswith(("; save it again", "; copy it again"))


@settings(max_examples=300)
@given(st.integers(0, 127), st.integers(0, 255))
def test_a_damaged_header_is_reported_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    folder = Path(save(tmp_path_factory.getbasetemp() / "damaged", some_arrays()))
    content = bytearray((folder / "valid_x.npy").read_bytes())
    content[place] = value
    (folder / "valid_x.npy").write_bytes(content)
    line = ""
    try:
        found = load(str(folder)).valid.x
    except UsageError as error:
        line = str(error)
    else:
        assert found.shape == (7, 2, 3)
    assert line == "" or re.match(rf"data.path={folder}: .*valid_x.npy", line)


def test_errors_are_reported_before_torch_is_imported(folder: Path) -> None:
    np.save(folder / "test_y.npy", np.zeros(4, int))
    script = (
        "import sys; from experiments.data.arrays import load; from experiments.errors import *\n"
        "try: load(sys.argv[1])\n"
        "except UsageError as error: print(error, 'torch' in sys.modules)"
    )
    completed = subprocess.run(
        [sys.executable, "-c", script, folder], capture_output=True, text=True, check=True
    )
    line = "test_x.npy has 5 rows, test_y.npy 4; save a target for each row"
    assert completed.stdout == f"data.path={folder}: {line} False\n"


# Memory

EPOCH = """
import sys
import torch
from experiments.data.arrays import load
from experiments.data.loaders import {kind}

def peak():  # MB; getrusage would include the parent process's peak
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM:")]
    return int(line.split()[1]) // 1024

torch.set_num_threads(1)
data = load(sys.argv[1])
torch.randperm(10**6).unique()  # torch's one-time allocations
before = peak()
rows = 0
for shuffle in (True, False):
    for xb, yb in {kind}(data.train, batch_size=256, shuffle=shuffle, window=8).batches():
        assert torch.equal(xb[:, 0].long(), yb)
        rows += len(yb)
data.fingerprints
print(rows, peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a file of 200 MB; each row begins with its number."""
    folder = tmp_path_factory.mktemp("large")
    x = np.zeros((50_000, 1000), np.float32)
    x[:, 0] = np.arange(50_000)
    found: Arrays = {f"{name}_x": x[:1] for name in arrays.SPLITS}
    found |= {f"{name}_y": np.arange(1) for name in arrays.SPLITS}
    save(folder, found | {"train_x": x, "train_y": np.arange(50_000)})
    yield folder
    (folder / "train_x.npy").unlink()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", ["TensorLoader", "TorchLoader"])
def test_an_epoch_holds_a_window_of_the_file_and_no_more(kind: str, large: Path) -> None:
    """8 blocks of 1 MB take up to 24 MB, while the file has 200."""
    completed = subprocess.run(
        [sys.executable, "-c", EPOCH.format(kind=kind), large],
        capture_output=True,
        text=True,
        check=True,
    )
    rows, growth = map(int, completed.stdout.split())
    assert rows == 100_000
    assert growth < 60


# Runs


@pytest.fixture(scope="module")
def overrides(tiny: Data, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run over MNIST rows in files, with dropout and a smaller last batch."""
    found = {f"{name}_{kind}": getattr(getattr(tiny, name), kind).numpy()
             for name in arrays.SPLITS for kind in "xy"}  # fmt: skip
    path = save(tmp_path_factory.mktemp("runs"), found)
    return ["data=arrays", f"data.path={path}", *SMALL, "model.dropout=0.2"]


def test_a_run_over_files_of_one_window_is_the_run_over_memory(
    overrides: list[str],
    compose: Callable[[list[str]], dict[str, Any]],
    cli: Callable[..., Completed],
    tiny: Data,
    tmp_path: Path,
) -> None:
    completed = cli(*overrides, "hydra.run.dir=mapped")
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr == ""
    go_on(tmp_path / "memory", compose(overrides), tiny)
    assert_same_run(tmp_path / "mapped", tmp_path / "memory")
    assert record(tmp_path / "mapped")["data"] == record(tmp_path / "memory")["data"]


def test_a_missing_path_is_reported(cli: Callable[..., Completed]) -> None:
    completed = cli("data=arrays")
    assert completed.returncode == 2
    assert (
        completed.stderr
        == "experiments: data.path=null: there is no such folder; name the one with train_x.npy\n"
    )


def test_a_run_over_many_windows_is_resumed_and_reproduced_with_the_same_bits(
    overrides: list[str],
    compose: Callable[[list[str]], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job._load_data.cache_clear()
    # one row per block, 128 per window, so that windows end within batches and vice versa
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 1)
    config = compose(overrides)
    data = job.load_data(config)
    go_on(tmp_path / "unbroken", config, data)
    one_window = tmp_path / "one-window"
    go_on(one_window, config, Data(in_memory(data.train), data.valid, data.test))
    assert lines(one_window) != lines(tmp_path / "unbroken")
    for step in range(1, STEPS):
        run = tmp_path / str(step)
        assert go_on(run, config, data, stop_after(step)) == "interrupted"
        assert call(entrypoint.main, f"resume={run}") == 0
        assert_same_run(run, tmp_path / "unbroken")
    assert call(reproduce.main, tmp_path / "5", "--into", tmp_path / "again") == 0
    assert "identical" in capsys.readouterr().out


# One file for all rows, divided by a rule


@pytest.fixture
def pair(tmp_path: Path) -> str:
    """x.npy and y.npy of 20 rows, whose inputs are their number, of two classes."""
    rows = np.arange(20, dtype=np.float32)
    return save(tmp_path / "pair", {"x": np.stack([rows, rows], 1), "y": np.arange(20) % 2})


def test_the_last_rows_of_one_file_stay_mapped(pair: str) -> None:
    data = load(pair, valid=3, test=0.2)
    assert all(isinstance(split, MappedSplit) for split in data.splits.values())
    assert data.valid.x[:, 0].tolist() == [13, 14, 15]
    assert data.test.x[:, 0].tolist() == [16, 17, 18, 19]
    assert data.test.y.tolist() == [0, 1, 0, 1]
    assert len(data.train) == 13


def test_a_part_of_a_mapped_file_is_read_as_rows_in_memory_are(pair: str) -> None:
    data = load(pair, valid=3, test=4)
    mapped = TensorLoader(data.valid, batch_size=2, seed=1)
    copied = TensorLoader(in_memory(data.valid), batch_size=2, seed=1)
    assert same(list(mapped.batches(0)), list(copied.batches(0)))


@pytest.mark.parametrize("split", ["random", "stratified"])
def test_drawn_rows_are_each_in_one_split(pair: str, split: str) -> None:
    data = load(pair, split, split_seed=4)
    found = [part.x[:, 0].int().tolist() for part in data.splits.values()]
    assert sorted(chain.from_iterable(found)) == list(range(20))
    assert all((part.x[:, 0] % 2 == part.y).all() for part in data.splits.values())


def test_folds_of_one_file_are_each_row_once(pair: str) -> None:
    found = [load(pair, test=2, folds=3, fold=fold).valid.x[:, 0].tolist() for fold in range(3)]
    assert sorted(chain.from_iterable(found)) == list(range(18))


def test_a_class_that_no_training_row_has_is_named(tmp_path: Path) -> None:
    found = {"x": np.zeros((20, 2), np.float32), "y": np.array([0, 1] * 9 + [7, 1])}
    with pytest.raises(UsageError, match="the class 7 is in the test rows and in no training row"):
        load(save(tmp_path / "pair", found))


def test_a_rule_for_a_folder_with_a_file_for_each_split_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no x\.npy to divide by data\.split=random"):
        load(str(folder), "random")
