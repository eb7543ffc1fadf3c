"""Image folders: a folder for each class, with PNG and JPEG files, decoded by Pillow."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from experiments.data import Data, Missing, Split
from experiments.data.classes import check_covered
from experiments.data.partition import SPLITS, Rule, Share, partition
from experiments.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg")
MAX_PIXELS = 100_000_000  # of one image; a small file can claim any number
MAX_BYTES = 1 << 30  # of one file
ENDS = (b"IEND\xaeB`\x82", b"\xff\xd9")  # of a complete PNG and JPEG file


@dataclass(frozen=True)
class Form:
    """What images become: (height, width) if they are resized, with one channel if grayscale."""

    resize: Sequence[int] | None
    grayscale: bool


@dataclass
class ImageFolder:
    """Images as a map-style Dataset for loader=torch, decoded whenever a row is read.

    Its rows are float32 (channels, height, width) in [0, 1] and a class number.

    transforms: functions of uint8 (channels, height, width), which may draw from random, np.random
        and torch
    fingerprint: the sha256 of the files and classes, so that they need not be decoded for it
    """

    pixels: ClassVar[bool] = True  # x is bytes, scaled to [0, 1]
    files: list[Path]
    classes: list[int]
    form: Form
    transforms: list[Callable[[Any], Any]] = field(default_factory=list)
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        x: Any = decoded(self.files[row], read(self.files[row]), self.form)
        for transform in self.transforms:
            x = transform(x)
        return (x if x.is_floating_point() else x / 255), self.classes[row]


def load(
    path: str | None,
    resize: Sequence[int] | None = None,
    grayscale: bool = False,
    memory: bool = False,
    transform: Any = None,
    valid: Share = None,
    test: Share = None,
    split: str = "stratified",
    split_seed: int = 0,
    folds: int | None = None,
    fold: int = 0,
    statistics: Any = None,
) -> Data:
    """The images below path/CLASS, divided by a rule; or below path/train/CLASS, path/valid/CLASS
    and path/test/CLASS, where what is not there is taken from train by the rule.

    x: float32 (rows, channels, height, width) in [0, 1]; y: int64 (rows,), in the order of the
        names of the classes

    resize: (height, width), for images that have not all one size
    memory: decode all at once, to bytes, for any loader; otherwise for loader=torch only
    transform: a function, or a list, for training images: of uint8 (channels, height, width)
    valid to fold: see `partition.Rule`
    statistics: the names of the classes, as an earlier call found them

    Raises UsageError naming a file or folder that does not fit.
    """
    if path is None or not Path(path).is_dir():
        raise UsageError(
            f"data.path={path or 'null'}: there is no such folder; name one with a folder for "
            "each class"
        )
    transforms = transform if isinstance(transform, list) else [transform] * (transform is not None)
    if memory and transforms:
        raise UsageError(
            "data.memory=true: decodes images once, so that data.transform would draw once; use "
            "data.memory=false with loader=torch"
        )
    found = images_by_split(path, may_lack_train=statistics is not None)
    names = class_names(found, statistics, path)
    parts: dict[str, Any] = {
        name: [(file, names.index(label)) for file, label in files] for name, files in found.items()
    }
    if "train" in parts:
        rule = Rule(split, valid, test, split_seed, folds, fold)
        parts |= divided(parts["train"], rule, set(found) - {"train"})
        check(f"data.path={path}", parts, names)
    form = Form(resize, grayscale)
    shapes: dict[tuple[int, ...], Path] = {}
    gone = Missing(f"data.path={path}: has no folder train any more; put it back")
    splits: list[Any] = [
        gone if name not in parts
        else as_split(parts[name], form, memory, transforms if name == "train" else [], shapes)
        for name in SPLITS
    ]  # fmt: skip
    sizes = {"num_classes": len(names), "out_features": len(names)}
    sizes["in_channels"] = 1 if grayscale else 3
    return Data(*splits, sizes=sizes, statistics={"classes": names})


def images_by_split(path: str, may_lack_train: bool) -> dict[str, list[tuple[Path, str]]]:
    """The images of each split that has a folder; all are of train if no split has one."""
    own = {name: Path(path) / name for name in SPLITS if (Path(path) / name).is_dir()}
    if not own:
        return {"train": listed(Path(path))}
    if "train" not in own and not may_lack_train:
        raise UsageError(f"data.path={path}: has no folder train beside {', '.join(own)}; add it")
    return {name: listed(folder) for name, folder in own.items()}


def listed(folder: Path) -> list[tuple[Path, str]]:
    """The images below a folder with their classes, in the order of their names. Hidden files do
    not count. Raises UsageError for other files, and for a class without images.
    """
    found = []
    for label in visible(folder):
        if not label.is_dir():
            raise UsageError(f"{label}: is no folder of a class; move it out of {folder}")
        files = visible(label)
        if not files:
            raise UsageError(f"{label}: holds no images; remove it or give it some")
        for file in files:
            if file.suffix.lower() not in SUFFIXES or not file.is_file():
                raise UsageError(f"{file}: is no PNG or JPEG file; move it out of {label}")
        found += [(file, label.name) for file in files]
    if not found:
        raise UsageError(f"{folder}: holds no folders of classes; give it some")
    return found


def visible(folder: Path) -> list[Path]:
    """What is in a folder, but for hidden files, in the order of the names."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def class_names(found: dict[str, list[tuple[Path, str]]], statistics: Any, path: str) -> list[str]:
    """The names of the classes: those of the training images, or of the statistics. Raises
    UsageError for another one.
    """
    if statistics is None:
        names = sorted({label for _, label in found["train"]})
    else:
        saved = statistics.get("classes") if isinstance(statistics, dict) else None
        if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
            raise UsageError("statistics: hold no classes; copy statistics.json again")
        names = saved
    for split, files in found.items():
        other = next((file for file, label in files if label not in names), None)
        if other is not None:
            raise UsageError(
                f"data.path={path}: the class {other.parent.name} is in the {split} images and in "
                "no training image; leave it out, or give it some"
            )
    return names


def divided(
    images: list[tuple[Path, int]], rule: Rule, elsewhere: set[str]
) -> dict[str, list[tuple[Path, int]]]:
    """Images for each split that has no folder of its own."""
    labels = None if rule.split == "grouped" else np.array([label for _, label in images])
    rows = partition(len(images), rule, labels, elsewhere)
    return {name: [images[row] for row in part] for name, part in rows.items()}


def check(subject: str, parts: dict[str, list[tuple[Path, int]]], names: list[str]) -> None:
    """Raise UsageError for a class that only validation or test images have."""
    labels = {name: np.array([label for _, label in part]) for name, part in parts.items()}
    check_covered(subject, labels, names)


def as_split(
    images: list[tuple[Path, int]],
    form: Form,
    memory: bool,
    transforms: list[Callable[[Any], Any]],
    shapes: dict[tuple[int, ...], Path],
) -> Split | ImageFolder:
    """Images as a split, all of one size.

    shapes: the shapes met so far, each with its first file

    Raises UsageError for a file that is no image or has another size.
    """
    import torch

    digest = hashlib.sha256(repr(form).encode())
    pixels = []
    for file, label in images:
        content = read(file)
        digest.update(f"{label} {len(content)}\n".encode())
        digest.update(content)
        shapes.setdefault(shape_of(file, content, form), file)
        if len(shapes) > 1:
            (one, first), (other, second) = shapes.items()
            raise UsageError(
                f"{second}: is of {other[0]} x {other[1]} pixels (rows x columns), {first} of "
                f"{one[0]} x {one[1]}; resize them, data.resize=[{one[0]},{one[1]}]"
            )
        if memory:
            pixels.append(decoded(file, content, form))
        elif not content.endswith(ENDS):
            decoded(file, content, form)  # it is truncated, or has something behind its end
    files, labels = [file for file, _ in images], [label for _, label in images]
    if memory:
        return Split(torch.stack(pixels), torch.tensor(labels), pixels=True)
    return ImageFolder(files, labels, form, transforms, digest.hexdigest())


def read(file: Path) -> bytes:
    """The bytes of an image file."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise UsageError(f"{file}: is larger than {MAX_BYTES} bytes; make it smaller")
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror}); copy it again") from None


def opened(file: Path, content: bytes) -> Any:
    """An image whose header is read. Raises UsageError if it is none, too large or of 16 bits."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
    except UnidentifiedImageError:  # its text names a buffer in memory
        raise UsageError(f"{file}: is no PNG or JPEG image; copy it again") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{file}: is no PNG or JPEG image ({error}); copy it again") from None
    if image.width * image.height > MAX_PIXELS:
        raise UsageError(f"{file}: claims {image.width} x {image.height} pixels; make it smaller")
    if image.mode.startswith(("I", "F")):
        raise UsageError(f"{file}: has {image.mode} pixels, not bytes; save it with 8 bits")
    return image


def shape_of(file: Path, content: bytes, form: Form) -> tuple[int, ...]:
    """The height and width that an image has, or is resized to."""
    image = opened(file, content)
    return (image.height, image.width) if form.resize is None else tuple(form.resize)


def decoded(file: Path, content: bytes, form: Form) -> Tensor:
    """An image, uint8 (channels, height, width)."""
    import torch
    from PIL import Image

    image = opened(file, content)
    try:
        image = image.convert("L" if form.grayscale else "RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{file}: cannot be decoded ({error}); copy it again") from None
    if form.resize is not None:
        height, width = form.resize
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if form.grayscale else pixels.permute(2, 0, 1).contiguous()
