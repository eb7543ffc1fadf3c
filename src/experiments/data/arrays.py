"""Data larger than memory: memory-mapped .npy files, read batch by batch.

A shuffled epoch reads them in blocks of `MappedSplit.block` rows, see `loaders.BatchRows`.
"""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.data import Data, Split
from experiments.data.classes import check_covered
from experiments.data.partition import MAX_CLASSES, Rows, Rule, Share, partition
from experiments.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

SPLITS = ("train", "valid", "test")
# Smaller blocks are slow on a disk that seeks between them. A process holds a shuffle window of
# blocks, and more, since the kernel maps its page cache in pieces of up to 2 MB: 128 blocks of 1 MB
# take 128 to 384 MB.
BLOCK_BYTES = 1 << 20
INDEX_BYTES = 32  # memory per row number during the shuffle; bounds the block size of tiny rows


@dataclass(frozen=True)
class MappedArray:
    """A memory-mapped .npy file: its values, in row-major order, start at byte `offset`."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    mapping: mmap.mmap
    offset: int

    @property
    def row_bytes(self) -> int:
        """The size of a row in bytes."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def tensor(self) -> Tensor:
        """The array as a tensor that shares the mapping, which must not be written to."""
        import torch

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            flat = torch.frombuffer(
                self.mapping,
                dtype=getattr(torch, self.dtype.name),
                count=math.prod(self.shape),
                offset=self.offset,
            )
        return flat.view(self.shape)

    def part(self, first: int, last: int) -> MappedArray:
        """The rows `first` up to `last`, in the same mapping."""
        offset = self.offset + first * self.row_bytes
        return replace(self, shape=(last - first, *self.shape[1:]), offset=offset)

    def prefetch(self, first: int, last: int) -> None:
        """Have the kernel prefetch rows `first` up to `last`, without waiting for it."""
        begin = self.offset + first * self.row_bytes
        begin -= begin % mmap.PAGESIZE
        end = self.offset + min(last, self.shape[0]) * self.row_bytes
        self.mapping.madvise(mmap.MADV_WILLNEED, begin, end - begin)


@dataclass(frozen=True)
class MappedSplit(Split):
    """A split in memory-mapped files. Pages that were read count as the process's memory until they
    are released; the kernel keeps them in its page cache as long as there is room.
    """

    arrays: tuple[MappedArray, MappedArray] = field(kw_only=True)

    @property
    def block(self) -> int:
        row_bytes = sum(array.row_bytes for array in self.arrays) + INDEX_BYTES
        return max(1, BLOCK_BYTES // row_bytes)

    def to(self, device: str) -> Split:
        """The split itself, since it may not fit on the device; the loaders move each batch."""
        return self

    def prefetched(self, windows: Iterable[Sequence[Tensor]]) -> Iterator[Tensor]:
        """The row numbers of each batch, int64 (batch,). The next window is prefetched while one is
        used; the pages of a used window are released.
        """
        prefetching = map(self.prefetch, windows)
        following = next(prefetching, None)
        while following is not None:
            window, following = following, next(prefetching, None)
            yield from window
            self.release()

    def prefetch(self, window: Sequence[Tensor]) -> Sequence[Tensor]:
        """Have the kernel prefetch the blocks of a window; returns the window."""
        import torch

        blocks = (torch.cat(list(window)) // self.block).unique()
        for block in blocks.tolist():
            for array in self.arrays:
                array.prefetch(block * self.block, (block + 1) * self.block)
        return window

    def release(self) -> None:
        for array in self.arrays:
            array.mapping.madvise(mmap.MADV_DONTNEED)


def load(
    path: str | None,
    split: str = "last",
    valid: Share = None,
    test: Share = None,
    split_seed: int = 0,
    folds: int | None = None,
    fold: int = 0,
) -> Data:
    """Memory-map train_x.npy, train_y.npy, valid_x.npy, valid_y.npy, test_x.npy and test_y.npy; or
    x.npy and y.npy, whose rows are divided by a rule, see `partition.Rule`.

    x: float32 or uint8 (rows, ...); y: int64 or float32 (rows, ...); other integer dtypes are
    copied into memory as int64

    path: the folder with the files, which must not change during a run.
    split and the others: the rule. Splits of neighbouring rows (first and last) stay in the files;
        others are copied into memory.

    Raises UsageError naming the file that is missing, damaged or inconsistent with the others,
    before torch is imported.
    """
    if path is None or not Path(path).is_dir():
        raise UsageError(
            f"data.path={path or 'null'}: there is no such folder; name the one with train_x.npy"
        )
    rule = Rule(split, valid, test, split_seed, folds, fold)
    if (Path(path) / "x.npy").exists() and not (Path(path) / "train_x.npy").exists():
        return divided(path, rule)
    if rule != Rule("last"):
        raise UsageError(
            f"data.path={path}: there is no x.npy to divide by data.split={split}; save all rows "
            "as x.npy and y.npy, or leave out data.split, valid, test, folds and fold"
        )
    arrays = {name: map_file(Path(path), name) for split in SPLITS for name in array_names(split)}
    for split in SPLITS:
        x, y = (arrays[name] for name in array_names(split))
        if x.shape[0] != y.shape[0]:
            raise UsageError(
                f"data.path={path}: {x.name}.npy has {x.shape[0]} rows, {y.name}.npy {y.shape[0]}; "
                "save a target for each row"
            )
        train = (arrays[name] for name in array_names("train"))
        for array, first in zip((x, y), train, strict=True):
            same_kind = (array.dtype.kind == "f") == (first.dtype.kind == "f")
            if array.shape[1:] != first.shape[1:] or not same_kind:
                raise UsageError(
                    f"data.path={path}: a row of {array.name}.npy is {array.dtype} "
                    f"{array.shape[1:]}, one of {first.name}.npy {first.dtype} {first.shape[1:]}; "
                    "save them with the same row shape and kind of dtype"
                )
    return Data(*(
        mapped_split(*(arrays[name] for name in array_names(split))) for split in SPLITS
    ))  # fmt: skip


def divided(path: str, rule: Rule) -> Data:
    """The rows of x.npy and y.npy, divided by a rule."""
    x, y = map_file(Path(path), "x"), map_file(Path(path), "y")
    if x.shape[0] != y.shape[0]:
        raise UsageError(
            f"data.path={path}: x.npy has {x.shape[0]} rows, y.npy {y.shape[0]}; "
            "save a target for each row"
        )
    classes = None
    if y.dtype.kind in "iu" and len(y.shape) == 1:
        classes = np.frombuffer(y.mapping, y.dtype, y.shape[0], y.offset)
    rows = partition(x.shape[0], rule, None if rule.split == "grouped" else classes)
    if classes is not None and len(np.unique(classes)) <= MAX_CLASSES:
        check_covered(f"data.path={path}", {name: classes[part] for name, part in rows.items()})
    return Data(*(selected(x, y, rows[split]) for split in SPLITS))


def selected(x: MappedArray, y: MappedArray, rows: Rows) -> Split:
    """Some rows, ascending: mapped if they are neighbours, else copied into memory."""
    import torch

    first, last = int(rows[0]), int(rows[-1]) + 1
    if last - first == len(rows):
        return mapped_split(x.part(first, last), y.part(first, last))
    whole, index = mapped_split(x, y), torch.from_numpy(rows)
    return Split(whole.x[index], whole.y[index], pixels=whole.pixels)


def array_names(split: str) -> tuple[str, str]:
    """The names of a split's files, without .npy."""
    return f"{split}_x", f"{split}_y"


def mapped_split(x: MappedArray, y: MappedArray) -> MappedSplit:
    """Inputs and targets as a split."""
    targets = y.tensor()
    if not targets.is_floating_point():
        targets = targets.long()  # no copy if it is int64 already
    return MappedSplit(x.tensor(), targets, arrays=(x, y), pixels=x.dtype == np.uint8)


def map_file(folder: Path, name: str) -> MappedArray:
    """Memory-map a file after checking its header. Nothing is ever unpickled.

    Raises UsageError if it is not a complete .npy file with a shape and dtype for a split.
    """
    file = folder / f"{name}.npy"
    subject = f"data.path={folder}: {name}.npy"
    try:
        with file.open("rb") as opened:
            version = np.lib.format.read_magic(opened)
            if version == (1, 0):
                header = np.lib.format.read_array_header_1_0(opened)
            else:
                header = np.lib.format.read_array_header_2_0(opened)
            offset = opened.tell()
            mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise UsageError(f"{subject} is missing; save it there with numpy.save") from None
    except OSError as error:
        raise UsageError(f"{subject} cannot be read ({error.strerror}); save it again") from None
    except Exception as error:  # numpy raises many classes for invalid headers
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{subject} is not a complete .npy file ({reason}); save it again"
        ) from None
    shape, fortran, dtype = header
    if name.endswith("x"):
        supported, expected = dtype in (np.float32, np.uint8), "float32 or uint8"
    else:
        supported = dtype == np.float32 or (dtype.kind in "iu" and dtype.isnative)
        expected = "integers or float32"
    if not supported:
        raise UsageError(f"{subject} holds {dtype}, expected {expected}; save it with .astype(...)")
    if not shape or min(shape) < 1:
        raise UsageError(
            f"{subject} has the shape {shape}, expected at least one row; save it again"
        )
    if fortran:
        raise UsageError(
            f"{subject} is in Fortran order; save it with numpy.ascontiguousarray(...)"
        )
    size = offset + math.prod(shape) * dtype.itemsize
    if len(mapping) != size:
        raise UsageError(
            f"{subject} has {len(mapping)} bytes, its header says {size}; copy it again"
        )
    return MappedArray(name, shape, dtype, mapping, offset)
