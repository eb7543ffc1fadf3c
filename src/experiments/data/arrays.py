"""Data larger than memory: .npy files that are mapped, and read as the batches are.

A shuffled epoch reads them in blocks: `loader.BatchRows` says how, `block` how many rows one has.
"""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.data import Data, Split
from experiments.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

SPLITS = ("train", "valid", "test")
# Of a block. With less, a disk that must seek between blocks is slow. A window of blocks is what a
# process holds, and not only they: the kernel maps its cache in pieces of up to 2 MB, so that
# 128 blocks of 1 MB take 128 to 384 MB.
BLOCK_BYTES = 1 << 20
NUMBER_BYTES = 32  # what a row's number takes while it is shuffled; it bounds blocks of tiny rows


@dataclass(frozen=True)
class Mapped:
    """The array in a .npy file: its values, row after row, are `pages` from byte `start` on."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pages: mmap.mmap
    start: int

    @property
    def row_bytes(self) -> int:
        """The size of a row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def tensor(self) -> Tensor:
        """The array as a tensor in the file's pages, which must not be written to."""
        import torch

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            flat = torch.frombuffer(
                self.pages,
                dtype=getattr(torch, self.dtype.name),
                count=math.prod(self.shape),
                offset=self.start,
            )
        return flat.view(self.shape)

    def prefetch(self, first: int, last: int) -> None:
        """Have the kernel read rows `first` up to `last` ahead, without waiting for it."""
        begin = self.start + first * self.row_bytes
        begin -= begin % mmap.PAGESIZE
        end = self.start + min(last, self.shape[0]) * self.row_bytes
        self.pages.madvise(mmap.MADV_WILLNEED, begin, end - begin)


@dataclass(frozen=True)
class MappedSplit(Split):
    """A split in files. What is read of it counts as the process's memory until it is released;
    the kernel keeps it for as long as it has room.
    """

    files: tuple[Mapped, Mapped]

    @property
    def block(self) -> int:
        row_bytes = sum(file.row_bytes for file in self.files) + NUMBER_BYTES
        return max(1, BLOCK_BYTES // row_bytes)

    def to(self, device: str) -> Split:
        """Itself, since it may fit nowhere; the loaders move each batch."""
        return self

    def prefetched(self, windows: Iterable[Sequence[Tensor]]) -> Iterator[Tensor]:
        """The row numbers of each batch, int64 (batch,). While those of one window are used, the
        rows of the next are read; after it, its pages are given back.
        """
        reading = map(self.prefetch, windows)
        ahead = next(reading, None)
        while ahead is not None:
            window, ahead = ahead, next(reading, None)
            yield from window
            self.release()

    def prefetch(self, window: Sequence[Tensor]) -> Sequence[Tensor]:
        """Have the kernel read the blocks of a window ahead; returns the window."""
        import torch

        blocks = (torch.cat(list(window)) // self.block).unique()
        for block in blocks.tolist():
            for file in self.files:
                file.prefetch(block * self.block, (block + 1) * self.block)
        return window

    def release(self) -> None:
        for file in self.files:
            file.pages.madvise(mmap.MADV_DONTNEED)


def load(path: str | None) -> Data:
    """The rows in train_x.npy, train_y.npy, valid_x.npy, valid_y.npy, test_x.npy and test_y.npy.

    x: float32 or uint8 (rows, ...); y: int64 or float32 (rows, ...); of other integers in a file,
    an int64 copy in memory

    path: the folder that holds them; they must not change while a run goes on.

    Raises UsageError naming the file that is missing, damaged or does not go with the others,
    before torch is imported.
    """
    if path is None or not Path(path).is_dir():
        raise UsageError(
            f"data.path={path or 'null'}: there is no such folder; name the one with train_x.npy"
        )
    files = {name: read(Path(path), name) for split in SPLITS for name in names(split)}
    for split in SPLITS:
        x, y = (files[name] for name in names(split))
        if x.shape[0] != y.shape[0]:
            raise UsageError(
                f"data.path={path}: {x.name}.npy has {x.shape[0]} rows, {y.name}.npy {y.shape[0]}; "
                "save a target for each row"
            )
        for file, first in zip((x, y), (files[name] for name in names("train")), strict=True):
            floats = [one.dtype.kind == "f" for one in (file, first)]
            if file.shape[1:] != first.shape[1:] or floats[0] != floats[1]:
                raise UsageError(
                    f"data.path={path}: a row of {file.name}.npy is {file.dtype} {file.shape[1:]}, "
                    f"one of {first.name}.npy {first.dtype} {first.shape[1:]}; save them alike"
                )
    return Data(**{split: mapped(*(files[name] for name in names(split))) for split in SPLITS})


def names(split: str) -> tuple[str, str]:
    """The names of its two files."""
    return f"{split}_x", f"{split}_y"


def mapped(x: Mapped, y: Mapped) -> MappedSplit:
    """Inputs and targets as a split."""
    targets = y.tensor()
    if not targets.is_floating_point():
        targets = targets.long()  # int64 is left where it is
    return MappedSplit(x.tensor(), targets, (x, y))


def read(folder: Path, name: str) -> Mapped:
    """Map a file after a look at its header. Nothing is unpickled, whatever the file says.

    Raises UsageError where it is not a whole .npy file of what a split can hold.
    """
    file = folder / f"{name}.npy"
    told = f"data.path={folder}: {name}.npy"
    try:
        with file.open("rb") as opened:
            version = np.lib.format.read_magic(opened)
            if version == (1, 0):
                header = np.lib.format.read_array_header_1_0(opened)
            else:
                header = np.lib.format.read_array_header_2_0(opened)
            start = opened.tell()
            pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise UsageError(f"{told} is missing; save it there with numpy.save") from None
    except OSError as error:
        raise UsageError(f"{told} cannot be read ({error.strerror}); save it again") from None
    except Exception as error:  # numpy has no one class for all that a header can have wrong
        reason = " ".join(str(error).split())
        raise UsageError(f"{told} is no whole .npy file ({reason}); save it again") from None
    shape, fortran, dtype = header
    if name.endswith("_x"):
        fits, wanted = dtype in (np.float32, np.uint8), "float32 or uint8"
    else:
        fits = dtype == np.float32 or (dtype.kind in "iu" and dtype.isnative)
        wanted = "integers or float32"
    if not fits:
        raise UsageError(f"{told} holds {dtype}, expected {wanted}; save it with .astype(...)")
    if not shape or min(shape) < 1:
        raise UsageError(f"{told} has the shape {shape}, expected at least one row; save it again")
    if fortran:
        raise UsageError(f"{told} is in Fortran order; save it with numpy.ascontiguousarray(...)")
    size = start + math.prod(shape) * dtype.itemsize
    if len(pages) != size:
        raise UsageError(
            f"{told} has {len(pages)} bytes, expected {size} by its header; copy it again"
        )
    return Mapped(name, shape, dtype, pages, start)
