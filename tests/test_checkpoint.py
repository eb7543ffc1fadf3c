"""Checkpoints: saved atomically, verified when loaded, never unpickled."""

import hashlib
import json
import math
import pickle
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_durable import die, disk_full, failing, in_a_child
from torch import Tensor

from experiments.directory.checkpoint_files import NAME
from experiments.directory.checkpoints import Checkpoints, deserialize, serialize
from experiments.directory.fingerprint import fingerprint
from experiments.errors import UsageError


def content(step: int) -> dict[str, Any]:
    return {"step": step, "weight": torch.full((100,), float(step))}


def checkpoints_with(directory: Path, *steps: int, keep: int = 5) -> Checkpoints:
    checkpoints = Checkpoints(directory / "checkpoints", keep=keep)
    for step in steps:
        checkpoints.save(step, 0, content(step))
    return checkpoints


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(file.name for file in checkpoints.directory.iterdir())


# Serialising.

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """A tensor of any dtype and shape, including 0-dimensional, empty, transposed, strided."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    size = math.prod(shape)
    raw = draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    tensor = torch.frombuffer(bytearray(raw or b"\0" * 8), dtype=dtype)[:size].reshape(shape)
    changed = draw(st.sampled_from(["", "transposed", "strided", "expanded"]))
    if changed == "transposed" and tensor.ndim > 1:
        return tensor.transpose(0, -1)
    if changed == "strided" and tensor.ndim:
        return tensor[::2]
    if changed == "expanded":
        return tensor.expand(3, *tensor.shape)
    return tensor


def nested() -> st.SearchStrategy[Any]:
    """Anything that a checkpoint may hold."""
    leaves = st.one_of(
        *(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text()),
        tensors(),
    )
    keys = st.one_of(st.text(), st.integers())
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(keys, inner, max_size=3),
        ),
        max_leaves=12,
    )


def same(before: Any, after: Any) -> bool:
    """Whether two nested values are equal in type and in every bit."""
    if type(before) is not type(after):
        return False
    if isinstance(before, Tensor):
        if (before.dtype, before.shape) != (after.dtype, after.shape):
            return False
        plain = torch.contiguous_format
        flat = [tensor.clone(memory_format=plain).reshape(-1) for tensor in (before, after)]
        # an empty tensor cannot always be viewed
        return len(flat[0]) == 0 or torch.equal(*(part.view(torch.uint8) for part in flat))
    if isinstance(before, dict):
        return list(before) == list(after) and all(same(before[key], after[key]) for key in before)
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(map(same, before, after))
    if isinstance(before, float):
        return math.isnan(after) if math.isnan(before) else before.hex() == after.hex()
    return bool(before == after)


@given(st.dictionaries(st.text(), nested(), max_size=4))
def test_what_is_serialised_comes_back_in_every_bit(content: dict[str, Any]) -> None:
    assert same(content, deserialize(serialize(content)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1 + 0.2])
def test_a_float_keeps_every_bit(value: float) -> None:
    back = deserialize(serialize({"value": value, "tensor": torch.tensor(value)}))
    assert same(back["value"], value)
    assert same(back["tensor"], torch.tensor(value))


def test_integer_keys_stay_integers() -> None:
    before = {"state": {0: {"step": 1}, "0": 2}}
    assert deserialize(serialize(before)) == before


def test_tied_and_overlapping_tensors_come_back() -> None:
    base = torch.arange(10.0)
    before = {"a": base, "b": base, "tail": base[4:], "odd": base[1::2], "two": base.view(2, 5).T}
    assert same(before, deserialize(serialize(before)))


def test_names_with_dots_do_not_meet() -> None:
    before = {"a": {"b.c": torch.zeros(1)}, "a.b": {"c": torch.ones(1)}}
    assert same(before, deserialize(serialize(before)))


def test_string_and_integer_keys_do_not_meet() -> None:
    before = {"a": {0: torch.zeros(1), "0": torch.ones(1)}}
    assert same(before, deserialize(serialize(before)))


def test_a_tensor_may_have_any_name() -> None:
    before = {"__metadata__": torch.ones(2), "": torch.zeros(1), "a'": torch.ones(1)}
    assert same(before, deserialize(serialize(before)))


def test_what_cannot_be_kept_is_refused_by_its_path() -> None:
    with pytest.raises(TypeError, match=r"model\.1\.x: a complex cannot be checkpointed"):
        serialize({"model": [0, {"x": 1j}]})


@given(st.binary(max_size=300))
def test_bytes_that_are_no_checkpoint_raise_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a checkpoint"):
        deserialize(data)


@pytest.mark.parametrize(
    "tree",
    [
        *("[]", "{", "1", '{"a": {}}', '{"a": {"tensor": "b"}}', '{"a": {"tensor": []}}'),
        *('{"a": {"dict": 1}}', '{"a": {"dict": [[[], 1]]}}', '{"a": {"list": null}}'),
        *('{"a": {"b": [], "c": []}}', '{"a":' + '{"list":[' * 5000 + "]}" * 5000 + "}"),
    ],
)
def test_a_header_that_was_made_up_raises_value_error(tree: str) -> None:
    data = safetensors.torch.save({}, metadata={"tree": tree})
    with pytest.raises(ValueError, match="not a checkpoint"):
        deserialize(data)


# Saving and loading.


def test_the_last_and_the_best_come_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    assert checkpoints.load() is None
    for step, best in ((1, True), (2, True), (3, False), (4, False)):
        checkpoints.save(step, step, content(step), best=best)
    last, best_one = checkpoints.load("last"), checkpoints.load("best")
    assert last is not None
    assert best_one is not None
    assert (last["step"], best_one["step"]) == (4, 2)
    assert same(last, content(4))
    assert [(entry.step, entry.epochs, entry.best) for entry in checkpoints.entries()] == [
        (2, 2, True),
        (4, 4, False),
    ]


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_newest_stay_and_the_others_go(keep: int, tmp_path: Path) -> None:
    checkpoints = checkpoints_with(tmp_path, 1, 2, 3, 4, 5, keep=keep)
    assert [entry.step for entry in checkpoints.entries()] == [1, 2, 3, 4, 5][-keep:]
    assert len(names(checkpoints)) == keep


def test_the_checkpoint_at_an_epochs_end_is_newer_than_one_of_the_same_step(
    tmp_path: Path,
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(5, 0, {"when": "after the step"})
    checkpoints.save(5, 1, {"when": "after the epoch"})
    assert checkpoints.load() == {"when": "after the epoch"}


@given(st.data())
def test_any_flipped_bit_is_noticed(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:  # a new one for each example
        checkpoints = checkpoints_with(Path(folder), 1, 2)
        file = checkpoints.entries()[-1].file
        damaged = bytearray(file.read_bytes())
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match=f"{file.name} is damaged .*using the one before it"):
            loaded = checkpoints.load()
        assert same(loaded, content(1))


@pytest.mark.parametrize("size", [0, 1, 8, 100, -1])
def test_a_checkpoint_cut_short_is_noticed(size: int, tmp_path: Path) -> None:
    checkpoints = checkpoints_with(tmp_path, 1, 2)
    file = checkpoints.entries()[-1].file
    file.write_bytes(file.read_bytes()[:size])
    with pytest.warns(UserWarning, match="is damaged"):
        assert same(checkpoints.load(), content(1))


def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    checkpoints = checkpoints_with(tmp_path, 1, 2)
    file = checkpoints.entries()[-1].file
    file.unlink()
    file.mkdir()
    with pytest.warns(UserWarning, match="is damaged"):
        assert same(checkpoints.load(), content(1))


def test_with_all_damaged_there_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    checkpoints = checkpoints_with(tmp_path, 1, 2)
    for entry in checkpoints.entries():
        entry.file.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(UsageError, match="every checkpoint is damaged"),
    ):
        checkpoints.load()


def test_going_on_from_an_older_one_gives_up_the_damaged_future(tmp_path: Path) -> None:
    checkpoints = checkpoints_with(tmp_path, 1, 2, 8)
    checkpoints.save(3, 0, content(3))
    assert [entry.step for entry in checkpoints.entries()] == [1, 2, 3]


def test_a_file_of_another_name_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = checkpoints_with(tmp_path, 1)
    for name in ("step-5.safetensors", "step-000000009-epoch-00000-best.pt", "notes.txt"):
        (checkpoints.directory / name).write_bytes(b"x")
    assert [entry.step for entry in checkpoints.entries()] == [1]


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def plant(checkpoints: Checkpoints, data: bytes, step: int = 9) -> Path:
    """Write data to a file with a valid checkpoint name and digest."""
    digest = hashlib.sha256(data).hexdigest()[:16]
    file = checkpoints.directory / f"step-{step:09d}-epoch-00000-best-{digest}.safetensors"
    assert NAME.fullmatch(file.name)
    checkpoints.directory.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("saved_by", ["pickle", "torch"])
def test_a_pickle_with_the_right_name_and_digest_is_not_executed(
    saved_by: str, tmp_path: Path
) -> None:
    mark = tmp_path / "executed"
    data = pickle.dumps({"model": Bomb(mark)})
    if saved_by == "torch":
        torch.save({"model": Bomb(mark)}, tmp_path / "bomb")
        data = (tmp_path / "bomb").read_bytes()
    checkpoints = checkpoints_with(tmp_path, 1)
    plant(checkpoints, data)
    with pytest.warns(UserWarning, match="not a checkpoint"):
        assert same(checkpoints.load(), content(1))
    assert not mark.exists()


def test_a_header_that_claims_more_than_there_is_takes_no_memory(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    checkpoints = checkpoints_with(tmp_path, 1)
    plant(checkpoints, struct.pack("<Q", len(header)) + header.encode())
    with pytest.warns(UserWarning, match="not a checkpoint"):
        assert same(checkpoints.load(), content(1))


# Disk failures.


# create, write, fsync, replace, open, fsync, and unlink of the oldest one
CALLS = 7


def test_a_save_flushes_the_new_before_it_removes_the_old(tmp_path: Path) -> None:
    checkpoints = checkpoints_with(tmp_path, 1, 2, keep=2)
    with failing(-1, disk_full) as calls:
        checkpoints.save(3, 0, content(3))
    assert calls == ["create", "write", "fsync", "replace", "open", "fsync", "unlink"]
    assert len(calls) == CALLS


@pytest.mark.parametrize("number", range(CALLS))
def test_a_full_disk_at_any_call_of_a_save_leaves_a_checkpoint_that_loads(
    number: int, tmp_path: Path
) -> None:
    checkpoints = checkpoints_with(tmp_path, 1, 2, keep=2)
    with failing(number, disk_full), pytest.raises(OSError, match="No space left"):
        checkpoints.save(3, 0, content(3))
    loaded = checkpoints.load()
    assert loaded is not None
    assert same(loaded, content(loaded["step"]))
    assert loaded["step"] in (2, 3)
    assert all(NAME.fullmatch(name) for name in names(checkpoints))
    checkpoints.save(4, 0, content(4))
    assert same(checkpoints.load(), content(4))
    assert len(names(checkpoints)) == 2


@pytest.mark.parametrize("number", range(CALLS))
def test_a_crash_at_any_call_of_a_save_leaves_a_checkpoint_that_loads(
    number: int, tmp_path: Path
) -> None:
    checkpoints = checkpoints_with(tmp_path, 1, 2, keep=2)

    def crash() -> None:
        with failing(number, die):
            checkpoints.save(3, 0, content(3))

    assert in_a_child(crash) == 77
    loaded = checkpoints.load()
    assert loaded is not None
    assert same(loaded, content(loaded["step"]))
    assert loaded["step"] in (2, 3)
    # the next save removes what the crash left
    checkpoints.save(4, 0, content(4))
    assert same(checkpoints.load(), content(4))
    assert len(names(checkpoints)) == 2
    assert all(NAME.fullmatch(name) for name in names(checkpoints))


@pytest.mark.parametrize("number", range(3))
def test_a_crash_at_the_first_save_of_all_leaves_none_that_is_damaged(
    number: int, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")

    def crash() -> None:
        with failing(number, die):
            checkpoints.save(1, 0, content(1))

    assert in_a_child(crash) == 77
    assert checkpoints.load() is None
    checkpoints.save(1, 0, content(1))
    assert same(checkpoints.load(), content(1))


# When a checkpoint is due.


def test_one_is_due_every_so_many_steps(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every_steps=3)
    assert [step for step in range(1, 10) if checkpoints.due(step)] == [3, 6, 9]


def test_one_is_due_so_many_seconds_after_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    checkpoints = Checkpoints(tmp_path / "checkpoints", every_seconds=60)
    now = 159.0
    assert not checkpoints.due(1)
    now = 160.0
    assert checkpoints.due(2)
    checkpoints.save(2, 0, content(2))
    assert not checkpoints.due(3)


def test_none_is_due_unless_asked_for(tmp_path: Path) -> None:
    assert not any(Checkpoints(tmp_path).due(step) for step in range(1, 1000))


# Fingerprints.


def test_a_fingerprint_does_not_depend_on_order_or_layout() -> None:
    a, b = torch.randn(4, 6), torch.arange(3)
    assert fingerprint({"a": a, "b": b}) == fingerprint({"b": b, "a": a.T.contiguous().T})


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(6)},
        {"a": torch.zeros(5)},
        {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(6, dtype=torch.int32)},
        {"a": torch.tensor([0.0, 0, 0, 0, 0, 5e-45])},
        {"a": torch.tensor([0.0, 0, 0, 0, 0, -0.0])},
        {"a": torch.zeros(6), "b": torch.zeros(0)},
        {},
    ],
)
def test_a_fingerprint_tells_name_shape_dtype_and_every_bit(other: dict[str, Tensor]) -> None:
    assert fingerprint(other) != fingerprint({"a": torch.zeros(6)})


def test_a_copied_directory_loads_the_same(tmp_path: Path) -> None:
    checkpoints = checkpoints_with(tmp_path, 1, 2)
    shutil.copytree(checkpoints.directory, tmp_path / "copy")
    assert same(Checkpoints(tmp_path / "copy").load(), checkpoints.load())
