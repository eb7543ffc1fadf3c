"""The first rows of MNIST in its own format, for runs that last a moment: `data.path=FOLDER`."""

import gzip
import struct
from pathlib import Path

from experiments.data import mnist


def write(folder: Path, train_rows: int, test_rows: int) -> None:
    """Write the four files, with as many rows to validate as the data set always has."""
    folder.mkdir()
    for name in mnist.FILES:
        rows = test_rows if name.startswith("t10k") else mnist.VALID_ROWS + train_rows
        header = 16 if "images" in name else 8
        with gzip.open(Path(mnist.__file__).parent / name) as file:
            content = file.read(header + rows * (784 if header == 16 else 1))
        content = content[:4] + struct.pack(">I", rows) + content[8:]
        (folder / name).write_bytes(gzip.compress(content, compresslevel=1))
