"""MNIST, bundled with the package (source and licence: SOURCE.md beside this file)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.data import Data, Split
from experiments.data.idx import Idx, check_header, parse, read_bytes
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


# Where Debian's package dataset-fashion-mnist installs its files.
DEBIAN = Path("/usr/share/datasets")


def load(path: str | None = None, as_bytes: bool = False, images: bool = False) -> Data:
    """The canonical training file as 50,000 training rows and, its last 10,000, validation rows;
    the 10,000 rows of the test file.

    x: float32 (rows, 784) in [0, 1], or uint8, which the loaders scale; with `images` (rows, 1, 28,
        28). y: int64 (rows,) in 0..9

    path: a folder with the four files, gzipped or without .gz; None for the bundled ones. It may
        hold another data set in the same format, such as Fashion-MNIST; a gzipped file of exactly
        the size of the bundled one is assumed to be a copy of it, and its sha256 is checked.
    as_bytes: keep x as uint8.
    images: keep the two dimensions of an image, after one for its channel.

    Raises UsageError naming the file that is missing or damaged; before torch is imported if
    sha256, header or length show it without decompressing the file.
    """
    bundled = Path(__file__).parent
    folder = bundled if path is None else Path(path)
    contents = {}
    for (name, sha256), dimensions in zip(FILES.items(), (3, 1, 3, 1), strict=True):
        file = folder / name
        if not file.exists():
            file = file.with_suffix("") if file.with_suffix("").exists() else installed(file)
        is_copy = file.exists() and file.stat().st_size == (bundled / name).stat().st_size
        known = file.name == name and (is_copy or path is None)
        content = read_bytes(file, sha256 if known else None)
        check_header(file, content, dimensions)
        contents[file] = (content, dimensions)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor() as pool:
        futures = [
            pool.submit(parse, file, content, dimensions)
            for file, (content, dimensions) in contents.items()
        ]
        # zlib releases the GIL, so decompression overlaps with this import, needed anyway
        import torch  # noqa: F401

        arrays = [future.result() for future in futures]
    del futures  # they keep the decompressed bytes alive
    # pop, so that each array is freed as soon as it is converted
    test = make_split(folder, as_bytes, labels=arrays.pop(), pictures=arrays.pop(), images=images)
    train = make_split(folder, as_bytes, labels=arrays.pop(), pictures=arrays.pop(), images=images)
    if len(train) <= VALID_ROWS:
        raise UsageError(
            f"data.path={folder}: {len(train)} training rows, expected more than {VALID_ROWS}"
        )
    return Data(
        train=Split(train.x[:-VALID_ROWS], train.y[:-VALID_ROWS], pixels=True),
        valid=Split(train.x[-VALID_ROWS:], train.y[-VALID_ROWS:], pixels=True),
        test=test,
    )


def installed(file: Path) -> Path:
    """The file, or UsageError if it is missing where a package of Debian's should have put it."""
    if file.parent.parent == DEBIAN and not file.exists():
        raise UsageError(
            f"{file}: there is no such file; apt-get install dataset-{file.parent.name}, or name "
            "its folder with data.path"
        )
    return file


def make_split(folder: Path, as_bytes: bool, *, pictures: Idx, labels: Idx, images: bool) -> Split:
    """Pictures flattened, or with a dimension for their channel if `images`, to float32 in [0, 1],
    or to uint8 if `as_bytes`; labels as class numbers.
    """
    rows, height, width = pictures.shape
    if labels.shape != (rows,):
        raise UsageError(f"data.path={folder}: {rows} images but {labels.shape[0]} labels")
    shape = (rows, 1, height, width) if images else (rows, height * width)
    pixels, classes = to_tensor(pictures).view(shape), to_tensor(labels)
    # in place, since uint8.div(255) would allocate a float copy besides its result
    x = pixels if as_bytes else pixels.float().div_(255)
    return Split(x, classes.long(), pixels=True)


def to_tensor(array: Idx) -> Tensor:
    """The values of an array, uint8 (n,), without a copy."""
    import torch

    with warnings.catch_warnings():
        # Python's bytes are read-only, but nothing else refers to these
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(array.values, dtype=torch.uint8)
