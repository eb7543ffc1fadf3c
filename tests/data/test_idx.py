import gzip
import hashlib
import struct
from math import prod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data.idx import parse, read_bytes
from experiments.errors import UsageError

PATH = Path("somewhere/labels.gz")


def idx(shape: tuple[int, ...], values: bytes, kind: int = 8) -> bytes:
    return bytes((0, 0, kind, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + values


def zipped(shape: tuple[int, ...], values: bytes) -> bytes:
    return gzip.compress(idx(shape, values), mtime=0)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_any_array_of_bytes_comes_back_with_its_shape(sizes: list[int]) -> None:
    shape = tuple(sizes)
    values = bytes(i * 37 % 256 for i in range(prod(shape)))
    found = parse(PATH, zipped(shape, values), len(shape))
    assert found.shape == shape
    assert bytes(found.values) == values


@given(st.data())
def test_a_damaged_byte_is_reported_with_the_file_or_harmless(data: st.DataObject) -> None:
    """Harmless bytes are in gzip's header, such as the time, or pad the last byte of its data."""
    shape, values = (5, 4), bytes(range(20))
    content = bytearray(zipped(shape, values))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    message = ""
    try:
        found = parse(PATH, bytes(content), 2)
    except UsageError as error:
        message = str(error)
    else:
        assert (found.shape, bytes(found.values)) == (shape, values)
    assert message == "" or message.startswith(f"{PATH}: ")


@given(st.integers(0, 10_000))
def test_a_truncated_file_is_reported_with_its_name_and_the_remedy(cut: int) -> None:
    content = zipped((5, 4), bytes(range(20)))
    with pytest.raises(UsageError, match=r"labels\.gz: not a complete gzip file.* copy it again"):
        parse(PATH, content[: cut % len(content)], 2)


def test_a_file_that_is_not_gzipped_is_refused() -> None:
    with pytest.raises(UsageError, match=r"labels\.gz: not a complete gzip file"):
        parse(PATH, idx((3,), b"abc"), 1)


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (idx((3,), b"abc", kind=0x0D), "00000d01"),
        (idx((3, 1), b"abc"), "00000802"),
        (b"\x00\x00\x08", "000008"),
        (b"PK\x03\x04 and more", "504b0304"),
        (b"", ""),
    ],
)
def test_a_wrong_header_is_reported_with_what_was_found_and_expected(
    raw: bytes, found: str
) -> None:
    with pytest.raises(UsageError) as error:
        parse(PATH, gzip.compress(raw), 1)
    assert str(error.value).startswith(f"{PATH}: its idx header is {found}, expected 00000801")


@pytest.mark.parametrize("values", [b"ab", b"abcd"])
def test_a_length_that_differs_from_the_header_is_reported_with_both(values: bytes) -> None:
    with pytest.raises(UsageError) as error:
        parse(PATH, zipped((3,), values), 1)
    found = f"its header gives the shape (3,), its gzip trailer {len(values)} bytes"
    assert str(error.value) == f"{PATH}: not a complete gzip file: {found}; copy it again"


def test_read_bytes_returns_a_file_with_the_expected_sha256(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    assert read_bytes(file) == b"content"
    assert read_bytes(file, hashlib.sha256(b"content").hexdigest()) == b"content"


def test_read_bytes_refuses_another_sha256_and_shows_both(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"contenT")
    expected = hashlib.sha256(b"content").hexdigest()
    found = hashlib.sha256(b"contenT").hexdigest()
    with pytest.raises(UsageError) as error:
        read_bytes(file, expected)
    for part in (str(file), "damaged", found[:12], expected[:12], "copy it again"):
        assert part in str(error.value)


def test_read_bytes_names_a_missing_file_and_the_key_that_names_its_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        read_bytes(tmp_path / "none")
    assert str(error.value).startswith(f"{tmp_path / 'none'}: there is no such file; data.path")


def test_read_bytes_names_a_path_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        read_bytes(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: cannot be read (Is a directory)")
