"""The idx format: a big-endian header of magic, dimensions and sizes, then bytes.

Format: Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits".
Imports no torch.
"""

import hashlib
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


def parse(path: Path, gzipped: bytes, dimensions: int) -> Idx:
    """Unpack a gzipped idx file of bytes (`path` only names it) and check its header and length.

    Raises UsageError saying what was expected and what was found.
    """
    try:
        raw = zlib.decompress(gzipped, GZIP)
    except zlib.error as error:
        raise UsageError(f"{path}: not a whole gzip file ({error}); copy it again") from None
    header = 4 + 4 * dimensions
    if len(raw) < header or raw[:4] != bytes((0, 0, UINT8, dimensions)):
        raise UsageError(
            f"{path}: its idx header is {raw[:4].hex()}, expected 0000{UINT8:02x}{dimensions:02x} "
            f"(bytes in {dimensions} dimensions)"
        )
    shape = struct.unpack(f">{dimensions}I", raw[4:header])
    expected = 1
    for size in shape:
        expected *= size
    if len(raw) - header != expected:
        raise UsageError(
            f"{path}: holds {len(raw) - header} bytes, its header says {shape}; copy it again"
        )
    return Idx(shape, memoryview(raw)[header:])
