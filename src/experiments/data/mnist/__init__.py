"""MNIST from the copy inside the package (source and licence: SOURCE.md beside this file)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.data import Data, Split
from experiments.data.idx import Idx, check, parse, read_bytes
from experiments.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

VALID_ROWS = 10_000

# fmt: off
FILES = {  # sha256
    "train-images-idx3-ubyte.gz":
        "0b367032e93c5d0cea0925647cfdb18614af8ee15f83e6f2fc2ad904a6835971",
    "train-labels-idx1-ubyte.gz":
        "1787548bbe0bff1ec2ecdc0ef292b02df999e2d1a6002d27500982c652b17203",
    "t10k-images-idx3-ubyte.gz":
        "1a1a05eab793c14bb050b398624a11b0ffd1a2953baed553b1b9bd079e2a20be",
    "t10k-labels-idx1-ubyte.gz":
        "b91679a0acfe4ba0e50a2437a903084cba1f5f92592b016a25a7dfd00455798b",
}
# fmt: on


def load(path: str | None = None, as_bytes: bool = False) -> Data:
    """The canonical training file as 50,000 rows to train on and its last 10,000 to validate,
    and the 10,000 rows of the test file.

    x: float32 (rows, 784) in [0, 1], or uint8 as the loaders scale it; y: int64 (rows,) in 0..9

    path: a folder with the four gzipped files; the copy inside the package where it is None.
        It may hold other rows in the same format (Fashion-MNIST does); a file of exactly the
        size of the package's own is taken for a copy of it, whose sha256 is checked.
    as_bytes: keep x as uint8.

    Raises UsageError naming the file that is missing or damaged, before torch is imported where
    that shows without unpacking it: in sha256, header or length.
    """
    own = Path(__file__).parent
    folder = own if path is None else Path(path)
    contents = {}
    for (name, sha256), dimensions in zip(FILES.items(), (3, 1, 3, 1), strict=True):
        file = folder / name
        copied = file.exists() and file.stat().st_size == (own / name).stat().st_size
        content = read_bytes(file, sha256 if copied or path is None else None)
        check(file, content, dimensions)
        contents[file] = (content, dimensions)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor() as pool:
        futures = [
            pool.submit(parse, file, content, dimensions)
            for file, (content, dimensions) in contents.items()
        ]
        # zlib works outside the interpreter's lock, so this import, needed anyway, hides it
        import torch  # noqa: F401

        unpacked = [future.result() for future in futures]
    del futures  # they hold the bytes, each of which goes when it is no longer needed
    test = split(folder, as_bytes, labels=unpacked.pop(), images=unpacked.pop())
    train = split(folder, as_bytes, labels=unpacked.pop(), images=unpacked.pop())
    if len(train) <= VALID_ROWS:
        raise UsageError(
            f"data.path={folder}: {len(train)} training rows, expected more than {VALID_ROWS}"
        )
    return Data(
        train=Split(train.x[:-VALID_ROWS], train.y[:-VALID_ROWS]),
        valid=Split(train.x[-VALID_ROWS:], train.y[-VALID_ROWS:]),
        test=test,
    )


def split(folder: Path, as_bytes: bool, *, images: Idx, labels: Idx) -> Split:
    """Images flattened, scaled from 0..255 to [0, 1] but for bytes; labels as class numbers."""
    rows, height, width = images.shape
    if labels.shape != (rows,):
        raise UsageError(f"data.path={folder}: {rows} images but {labels.shape[0]} labels")
    pixels, classes = tensor(images).view(rows, height * width), tensor(labels)
    # in place, since uint8.div(255) would first make a float copy beside its result
    return Split(pixels if as_bytes else pixels.float().div_(255), classes.long())


def tensor(array: Idx) -> Tensor:
    """Its values as a tensor, uint8 (n,), that shares their memory."""
    import torch

    with warnings.catch_warnings():
        # Python takes bytes for unchangeable; nobody else holds these
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(array.values, dtype=torch.uint8)
