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
    """Read a file and compare its sha256 with the given one.

    Raises UsageError naming the file if it is missing, unreadable or has another sha256.
    """
    try:
        if path.exists() and not (
            path.is_file() or path.is_dir()
        ):  # a device or a pipe may never end
            raise UsageError(f"{path}: is no file; data.path names its folder")
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


def check_header(path: Path, content: bytes, dimensions: int) -> tuple[int, ...]:
    """Check the header of an idx file of bytes, and that the length matches it, which of a gzipped
    file is in its trailer, without decompressing it. Returns the shape.

    path: for messages; a file is gzipped if its name ends with .gz

    Raises UsageError saying what was expected and what was found.
    """
    header_size = 4 + 4 * dimensions
    header = content[:header_size]
    if gzipped := path.suffix == ".gz":
        try:
            decompressor = zlib.decompressobj(GZIP)
            header = decompressor.decompress(content, header_size)
            if len(header) < header_size and not decompressor.eof:
                raise zlib.error("it ends within its header")
        except zlib.error as error:
            raise UsageError(f"{path}: not a complete gzip file ({error}); copy it again") from None
    if len(header) < header_size or header[:4] != bytes((0, 0, UINT8, dimensions)):
        raise UsageError(
            f"{path}: its idx header is {header[:4].hex()}, "
            f"expected 0000{UINT8:02x}{dimensions:02x} (bytes in {dimensions} dimensions)"
        )
    shape = struct.unpack(f">{dimensions}I", header[4:])
    if not gzipped:
        check_length(path, len(content) - header_size, shape)
        return shape
    trailer_bytes = int.from_bytes(content[-4:], "little") - header_size
    if trailer_bytes % 2**32 != math.prod(shape) % 2**32:
        raise UsageError(
            f"{path}: not a complete gzip file: its header gives the shape {shape}, its gzip "
            f"trailer {trailer_bytes} bytes; copy it again"
        )
    return shape


def check_length(path: Path, found: int, shape: tuple[int, ...]) -> None:
    """Raise UsageError unless there are as many bytes as the header's shape says."""
    if found != math.prod(shape):
        raise UsageError(f"{path}: holds {found} bytes, its header says {shape}; copy it again")


def parse(path: Path, content: bytes, dimensions: int) -> Idx:
    """An idx file of bytes, decompressed if the name of `path` ends with .gz, up to the size that
    its header says.

    Raises UsageError as `check_header` does, and if the file is damaged after its header.
    """
    shape = check_header(path, content, dimensions)
    header_size = 4 + 4 * dimensions
    if path.suffix != ".gz":
        return Idx(shape, memoryview(content)[header_size:])
    decompressor = zlib.decompressobj(GZIP)
    try:
        raw = decompressor.decompress(content, header_size + math.prod(shape) + 1)
        more = b"" if decompressor.eof else decompressor.decompress(decompressor.unconsumed_tail, 1)
        if not (more or decompressor.eof):
            raise zlib.error("it ends too early")
    except zlib.error as error:
        raise UsageError(f"{path}: not a complete gzip file ({error}); copy it again") from None
    check_length(path, len(raw) - header_size, shape)
    return Idx(shape, memoryview(raw)[header_size:])
