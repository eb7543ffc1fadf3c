import gzip
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import experiments.data.mnist as module
from experiments.data import Data
from experiments.data.idx import parse
from experiments.errors import UsageError

FOLDER = Path(module.__file__).parent


@pytest.fixture
def copied(small_mnist_dir: Path, tmp_path: Path) -> Path:
    """A copy of the folder, for a test to damage."""
    return Path(shutil.copytree(small_mnist_dir, tmp_path / "copied"))


def test_there_are_50000_training_10000_validation_and_10000_test_rows(mnist: Data) -> None:
    assert [len(split) for split in (mnist.train, mnist.valid, mnist.test)] == [
        50_000,
        10_000,
        10_000,
    ]


def test_rows_are_784_floats_between_0_and_1_with_a_class_from_0_to_9(mnist: Data) -> None:
    for split in (mnist.train, mnist.valid, mnist.test):
        assert split.x.shape == (len(split), 784)
        assert split.x.dtype == torch.float32
        assert split.x.is_contiguous()
        assert (split.x.min().item(), split.x.max().item()) == (0, 1)
        assert split.y.shape == (len(split),)
        assert split.y.dtype == torch.int64
        assert split.y.unique().tolist() == list(range(10))


def test_the_first_labels_are_those_of_the_canonical_file(mnist: Data) -> None:
    assert mnist.train.y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]


def test_validation_is_the_end_of_the_training_file_pixel_for_pixel(mnist: Data) -> None:
    labels = gzip.decompress((FOLDER / "train-labels-idx1-ubyte.gz").read_bytes())[8:]
    images = gzip.decompress((FOLDER / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    assert mnist.train.y.tolist() == list(labels[:-10_000])
    assert mnist.valid.y.tolist() == list(labels[-10_000:])
    for row, start in ((0, 784 * 50_000), (-1, 784 * 59_999)):
        pixels = torch.tensor(list(images[start : start + 784]), dtype=torch.uint8)
        assert torch.equal((mnist.valid.x[row] * 255).round().byte(), pixels)


def test_every_pixel_is_its_byte_over_255(mnist: Data) -> None:
    assert torch.equal(mnist.test.x.unique(), torch.arange(256) / 255)


def test_the_bundled_files_decompress_to_the_canonical_sha256() -> None:
    source = (FOLDER / "SOURCE.md").read_text()
    canonical = {
        name: digest for digest, name in re.findall(r"^ +([0-9a-f]{64})  (\S+)$", source, re.M)
    }
    assert {f"{name}.gz" for name in canonical} == set(module.FILES)
    for name, sha256 in canonical.items():
        content = gzip.decompress((FOLDER / f"{name}.gz").read_bytes())
        assert hashlib.sha256(content).hexdigest() == sha256


@pytest.mark.parametrize("name", module.FILES)
def test_a_bundled_file_of_another_sha256_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.FILES, name, "0" * 64)
    with pytest.raises(UsageError, match=rf"{name}: damaged, .*expected 000000000000"):
        module.load()


def test_another_folder_may_hold_other_rows_of_the_same_format(
    small_mnist_dir: Path, mnist: Data
) -> None:
    small = load(small_mnist_dir)
    assert [len(split) for split in (small.train, small.valid, small.test)] == [600, 10_000, 200]
    assert torch.equal(small.train.x, mnist.train.x[:600])
    assert torch.equal(small.valid.y, mnist.train.y[600:10_600])


@pytest.mark.parametrize("name", module.FILES)
def test_a_missing_file_is_named(name: str, copied: Path) -> None:
    (copied / name).unlink()
    with pytest.raises(UsageError, match=rf"^{copied / name}: there is no such file"):
        load(copied)


@pytest.mark.parametrize("name", module.FILES)
def test_a_file_with_one_flipped_byte_is_named(name: str, copied: Path) -> None:
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(UsageError, match=rf"^{copied / name}: .*copy it again"):
        load(copied)


def test_a_truncated_file_is_named(copied: Path) -> None:
    file = copied / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UsageError, match=rf"^{file}: not a complete gzip file"):
        load(copied)


def test_labels_in_place_of_images_are_recognized_by_their_header(copied: Path) -> None:
    file = copied / "t10k-images-idx3-ubyte.gz"
    shutil.copy(copied / "t10k-labels-idx1-ubyte.gz", file)
    with pytest.raises(
        UsageError, match=rf"^{file}: its idx header is 00000801, expected 00000803"
    ):
        load(copied)


def test_more_images_than_labels_are_reported_with_both_numbers(copied: Path) -> None:
    shutil.copy(copied / "t10k-labels-idx1-ubyte.gz", copied / "train-labels-idx1-ubyte.gz")
    with pytest.raises(UsageError, match=rf"data.path={copied}: 10600 images but 200 labels"):
        load(copied)


def test_too_few_rows_for_a_validation_split_are_reported_with_their_number(copied: Path) -> None:
    for kind in ("images-idx3", "labels-idx1"):
        shutil.copy(copied / f"t10k-{kind}-ubyte.gz", copied / f"train-{kind}-ubyte.gz")
    with pytest.raises(UsageError, match="200 training rows, expected more than 10000"):
        load(copied)


def test_images_are_the_same_pixels_with_a_channel_and_two_dimensions(
    small_mnist_dir: Path,
) -> None:
    flat, images = load(small_mnist_dir), module.load(str(small_mnist_dir), images=True)
    for split in ("train", "valid", "test"):
        rows, pictures = getattr(flat, split), getattr(images, split)
        assert pictures.x.shape == (len(rows), 1, 28, 28)
        assert torch.equal(pictures.x.flatten(1), rows.x)
        assert torch.equal(pictures.y, rows.y)
    kept = module.load(str(small_mnist_dir), as_bytes=True, images=True)
    assert kept.test.x.dtype == torch.uint8
    assert kept.test.x.shape == (200, 1, 28, 28)


def test_files_that_are_not_gzipped_give_the_same_bits(copied: Path) -> None:
    zipped = load(copied)
    for name in module.FILES:
        file = copied / name
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    plain = load(copied)
    assert plain.fingerprints == zipped.fingerprints


def test_a_truncated_file_without_gzip_is_named(copied: Path) -> None:
    file = copied / "t10k-labels-idx1-ubyte"
    file.write_bytes(gzip.decompress(file.with_suffix(".gz").read_bytes())[:-1])
    file.with_suffix(".gz").unlink()
    with pytest.raises(UsageError, match=rf"^{file}: holds 199 bytes, its header says \(200,\)"):
        load(copied)


def test_a_file_that_unpacks_to_more_than_its_header_says_is_cut_there(tmp_path: Path) -> None:
    content = bytes((0, 0, 8, 1, 0, 0, 0, 3)) + bytes(3 + 2**20)
    packed = gzip.compress(content)[:-4] + (11).to_bytes(4, "little")
    with pytest.raises(UsageError, match="holds 4 bytes, its header says"):
        parse(tmp_path / "labels.gz", packed, 1)


def test_a_pipe_in_place_of_a_file_is_refused(copied: Path) -> None:
    file = copied / "t10k-labels-idx1-ubyte.gz"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UsageError, match=rf"^{file}: is no file"):
        load(copied)


def test_fashion_mnist_has_as_many_rows_as_mnist(compose: Callable[..., dict[str, Any]]) -> None:
    node = compose(["data=fashion_mnist"])["data"]
    if not Path(node["path"]).exists():
        with pytest.raises(UsageError, match="apt-get install dataset-fashion-mnist, or name"):
            load(Path(node["path"]))
        return
    data = module.load(node["path"], node["as_bytes"], node["images"])
    assert [len(split) for split in (data.train, data.valid, data.test)] == [50_000, 10_000, 10_000]
    assert data.train.y[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]


def load(folder: Path) -> Data:
    return module.load(str(folder))
