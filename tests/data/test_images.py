"""data=images: a folder for each class, in memory or as a Dataset."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from saved_runs import SMALL, call, go_on, record

from experiments import evaluate, job
from experiments.data import Missing, Split
from experiments.data.images import Form, ImageFolder, load
from experiments.data.loaders import TorchLoader
from experiments.errors import UsageError


def save(folder: Path, count: int = 10, size: tuple[int, int] = (4, 6), first: int = 0) -> str:
    """So many images of two classes, each with pixels of its own."""
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            value = first + number + 100 * (label == "dog")
            pixels = np.full((*size, 3), value, np.uint8)
            pixels[0, 0] = (255, 0, 0)
            Image.fromarray(pixels).save(folder / label / f"{number:02}.png")
    return str(folder)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return save(tmp_path / "pets")


def test_images_in_memory_are_bytes_with_the_channels_first(folder: str) -> None:
    data = load(folder, memory=True)
    assert [len(split) for split in data.splits.values()] == [16, 2, 2]
    assert data.train.x.shape == (16, 3, 4, 6)
    assert data.train.x.dtype == torch.uint8
    assert data.train.pixels
    assert data.train.x[0, :, 0, 0].tolist() == [255, 0, 0]
    assert data.train.y.bincount().tolist() == [8, 8]
    assert torch.equal(data.train.y == 1, data.train.x[:, 0, 1, 1] >= 100)
    assert data.statistics == {"classes": ["cat", "dog"]}
    assert data.sizes["num_classes"] == 2
    assert data.sizes["in_channels"] == 3
    assert load(folder, grayscale=True).sizes["in_channels"] == 1


def test_a_dataset_has_the_same_rows_as_memory(folder: str) -> None:
    kept, read = load(folder, memory=True), load(folder)
    for one, other in zip(kept.splits.values(), read.splits.values(), strict=True):
        assert isinstance(one, Split)
        assert isinstance(other, ImageFolder)
        rows = [other[row] for row in range(len(other))]
        assert torch.equal(torch.stack([x for x, _ in rows]), one.x / 255)
        assert [y for _, y in rows] == one.y.tolist()


def test_the_fingerprint_is_of_the_files_and_their_classes(folder: str) -> None:
    before = load(folder).fingerprints
    assert load(folder).fingerprints == before
    file = Path(folder) / "cat" / "00.png"
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(file)
    after = load(folder).fingerprints
    assert sum(before[name] != after[name] for name in before) == 1
    assert load(folder, grayscale=True).fingerprints["train"] != after["train"]


def test_only_training_images_are_transformed(folder: str) -> None:
    data: Any = load(folder, transform=[lambda x: x.flip(2), lambda x: x.float()])
    assert data.train[0][0][:, 0, -1].tolist() == [255, 0, 0]
    assert data.valid[0][0][:, 0, 0].tolist() == [1, 0, 0]


def test_a_folder_for_each_split_is_taken_as_it_is_and_the_rest_is_divided(tmp_path: Path) -> None:
    save(tmp_path / "pets" / "train")
    path = str(Path(save(tmp_path / "pets" / "test", count=3, first=50)).parent)
    data = load(path, memory=True)
    assert [len(split) for split in data.splits.values()] == [18, 2, 6]
    assert data.test.x[:, 0, 1, 1].tolist() == [50, 51, 52, 150, 151, 152]


def test_a_test_folder_can_be_read_without_the_training_images(tmp_path: Path) -> None:
    path = str(Path(save(tmp_path / "pets" / "test", count=3)).parent)
    with pytest.raises(UsageError, match="has no folder train beside test; add it"):
        load(path)
    data = load(path, memory=True, statistics={"classes": ["bird", "cat", "dog"]})
    assert data.test.y.tolist() == [1, 1, 1, 2, 2, 2]
    assert isinstance(data.train, Missing)


def test_grey_and_resized_images(folder: str) -> None:
    data = load(folder, resize=[8, 2], grayscale=True, memory=True)
    assert data.train.x.shape == (16, 1, 8, 2)


def test_jpeg_and_palette_images_have_three_channels(folder: str) -> None:
    image = Image.fromarray(np.full((4, 6, 3), 77, np.uint8))
    image.save(Path(folder) / "cat" / "a.JPEG")
    image.convert("P").save(Path(folder) / "cat" / "b.png")
    assert load(folder, memory=True).train.x.shape[1:] == (3, 4, 6)


def other_size(folder: Path) -> None:
    Image.new("RGB", (9, 9)).save(folder / "dog" / "x.png")


def truncated(folder: Path) -> None:
    file = folder / "dog" / "00.png"
    file.write_bytes(file.read_bytes()[:60])


def sixteen_bits(folder: Path) -> None:
    Image.fromarray(np.full((4, 6), 1000, np.uint16)).save(folder / "dog" / "x.png")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (other_size, r"x\.png: is of 9 x 9 pixels .*of 4 x 6; resize them, data\.resize=\[4,6\]"),
        (truncated, r"00\.png: (cannot be decoded|is no PNG or JPEG image) .*copy it again"),
        (sixteen_bits, r"x\.png: has I;16 pixels, not bytes"),
        (lambda path: (path / "dog" / "x.txt").write_text(""), r"x\.txt: is no PNG or JPEG file"),
        (lambda path: (path / "dog" / "x.png").write_text("no"), r"x\.png: is no PNG or JPEG ima"),
        (lambda path: (path / "bird").mkdir(), "bird: holds no images; remove it"),
        (lambda path: (path / "list.csv").write_text(""), r"list\.csv: is no folder of a class"),
    ],
)
def test_what_is_no_image_of_the_set_is_named(
    damage: Callable[[Path], None], words: str, folder: str
) -> None:
    damage(Path(folder))
    with pytest.raises(UsageError, match=words):
        load(folder, memory=True, split="random")


def noise(file: Path) -> bytes:
    """A larger image, saved to a file."""
    pixels = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file.read_bytes()


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("kept", [0.5, 0.97])
def test_a_file_whose_end_is_missing_is_found_before_training(
    kept: float, kind: str, tmp_path: Path
) -> None:
    for number in range(24):
        label = tmp_path / "pets" / "ab"[number % 2]
        label.mkdir(parents=True, exist_ok=True)
        noise(label / f"{number:02}.{kind}")
    path = str(tmp_path / "pets")
    load(path)
    file = tmp_path / "pets" / "b" / f"15.{kind}"
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(UsageError, match=rf"15\.{kind}: cannot be decoded .*; copy it again"):
        load(path)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_file_with_something_behind_its_end_is_fine(kind: str, folder: str) -> None:
    file = Path(folder) / "cat" / f"00.{kind}"
    content = noise(file)
    file.write_bytes(content + b"\0 a comment")
    load(folder, resize=[4, 6])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_is_damaged_inside_is_told_in_one_line_when_it_is_read(
    num_workers: int, tmp_path: Path
) -> None:
    content = bytearray(noise(tmp_path / "a.png"))
    content[len(content) // 2] ^= 1
    (tmp_path / "a.png").write_bytes(content)
    images: Any = ImageFolder([tmp_path / "a.png"], [0], Form(None, False))
    loader = TorchLoader(images, batch_size=1, num_workers=num_workers)
    with pytest.raises(UsageError, match=r"a\.png: cannot be decoded .*; copy it again") as told:
        list(loader.batches())
    assert "\n" not in str(told.value)


def test_a_class_that_only_the_test_has_is_named(tmp_path: Path) -> None:
    save(tmp_path / "pets" / "train")
    path = Path(save(tmp_path / "pets" / "test", count=3)).parent
    (path / "test" / "dog").rename(path / "test" / "horse")
    with pytest.raises(UsageError, match="the class horse is in the test images and in no train"):
        load(str(path))


def test_transforms_of_images_in_memory_are_refused(folder: str) -> None:
    with pytest.raises(UsageError, match=r"use data\.memory=false with loader=torch"):
        load(folder, memory=True, transform=torch.flip)
    with pytest.raises(UsageError, match=r"data\.path=null: there is no such folder"):
        load(None)


@pytest.mark.parametrize("memory", [True, False])
def test_a_run_on_images_is_evaluated_as_it_was_tested(
    memory: bool, folder: str, tmp_path: Path, compose: Callable[[list[str]], dict[str, Any]]
) -> None:
    config = compose([
        *SMALL, "data=images", f"data.path={folder}", f"data.memory={memory}".lower(),
        "loader=torch", "loader.batch_size=4", "model=linear", "model.in_features=6",
        "model.out_features=2",
    ][2:])  # fmt: skip
    config["model"] = {"_target_": "torch.nn.Sequential", "_args_": [
        {"_target_": "torch.nn.Flatten"},
        {"_target_": "torch.nn.Linear", "in_features": 72, "out_features": 2},
    ]}  # fmt: skip
    assert go_on(tmp_path / "run", config, job.load_data(config)) == "finished"
    assert call(evaluate.main, tmp_path / "run", "--checkpoint", "last", "--split", "test") == 0
    [report] = (tmp_path / "run").glob("evaluation-*.json")
    logged = record(tmp_path / "run")["metrics"]["test"]["loss/test"]
    assert f'"loss": {logged!r}' in report.read_text()


def test_a_file_that_is_no_image_is_named_without_a_buffer(folder: str) -> None:
    Path(folder, "cat", "00.png").write_text("hello")
    with pytest.raises(UsageError, match=r"00\.png: is no PNG or JPEG image; copy it again$"):
        load(folder)
