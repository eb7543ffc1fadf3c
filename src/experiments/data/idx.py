"""The idx format: a big-endian header of magic, dimensions and sizes, then bytes.

Format: Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits".
Imports no torch.
"""

import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from experiments.errors import UsageError

UINT8 = 0x08
GZIP = 16 + zlib.MAX_WBITS


@dataclass(frozen=True)
class Idx:
    """An array of unsigned bytes: its shape, and its values in row-major order."""

    shape: tuple[int, ...]
    values: memoryview


def read_bytes(path: Path, sha256: str | None = None) -> bytes:
    """The bytes of a file, whose sha256 must be the given one.

    Raises UsageError naming the file when it is missing, unreadable or not what was expected.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file; data.path names its folder") from None
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({error.strerror}); data.path names its folder"
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise UsageError(
            f"{path}: damaged, sha256 {found[:12]}…, expected {sha256[:12]}…; copy it again"
        )
    return content


def check(path: Path, gzipped: bytes, dimensions: int) -> None:
    """Check the header of a gzipped idx file of bytes (`path` only names it), and that the length
    which the gzip trailer tells is the one that the header promises, without unpacking it.

    Raises UsageError saying what was expected and what was found.
    """
    size = 4 + 4 * dimensions
    try:
        unpacking = zlib.decompressobj(GZIP)
        header = unpacking.decompress(gzipped, size)
        if len(header) < size and not unpacking.eof:
            raise zlib.error("it ends within its header")
    except zlib.error as error:
        raise UsageError(f"{path}: not a whole gzip file ({error}); copy it again") from None
    if len(header) < size or header[:4] != bytes((0, 0, UINT8, dimensions)):
        raise UsageError(
            f"{path}: its idx header is {header[:4].hex()}, "
            f"expected 0000{UINT8:02x}{dimensions:02x} (bytes in {dimensions} dimensions)"
        )
    shape = struct.unpack(f">{dimensions}I", header[4:])
    told = int.from_bytes(gzipped[-4:], "little") - size
    if told % 2**32 != math.prod(shape) % 2**32:
        raise UsageError(
            f"{path}: not a whole gzip file of {shape}, as its header says: its end tells of "
            f"{told} bytes; copy it again"
        )


def parse(path: Path, gzipped: bytes, dimensions: int) -> Idx:
    """Unpack a gzipped idx file of bytes; `path` only names it. Raises UsageError as `check` does,
    and where the file is damaged further on.
    """
    check(path, gzipped, dimensions)
    try:
        raw = zlib.decompress(gzipped, GZIP)
    except zlib.error as error:
        raise UsageError(f"{path}: not a whole gzip file ({error}); copy it again") from None
    size = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", raw[4:size])
    if len(raw) - size != math.prod(shape):
        raise UsageError(
            f"{path}: holds {len(raw) - size} bytes, its header says {shape}; copy it again"
        )
    return Idx(shape, memoryview(raw)[size:])
