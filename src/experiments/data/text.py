"""Text files for a character model: windows of codes, and the same one character later."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experiments.data import Data, Missing, Split
from experiments.data.partition import DEFAULT_SHARE, Share, count
from experiments.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

CHARACTER_BYTES = 16  # in memory, of a byte of a file: its code point, its code and what makes them


def load(
    path: str | None,
    length: int = 128,
    valid: Share | str = None,
    test: Share | str = None,
    statistics: Any = None,
) -> Data:
    """The characters of a text as rows of `length`; an incomplete last row of a split is left out.

    x: int64 (rows, length), codes in the order of the sorted characters of the training part
    y: int64 (rows, length), x one character later

    path: a text file in UTF-8
    valid, test: a file each, or how many characters of `path`, its last ones, the test at its end
    statistics: as an earlier call found them; files of other splits may be gone then

    Raises UsageError if a file cannot be read, or a part is too short or has a character that the
    training part has not.
    """
    if path is None:
        raise UsageError("data.path=null: name a text file, data.path=FILE")
    own = {name: file for name, file in (("valid", valid), ("test", test)) if isinstance(file, str)}
    texts: dict[str, NDArray[np.uint32] | Missing] = {
        name: read(f"data.{key}={file}", Path(file), missing_allowed=statistics is not None)
        for name, key, file in (("train", "path", path), *((n, n, f) for n, f in own.items()))
    }
    rest = texts["train"]
    for name, share in (("test", test), ("valid", valid)):
        if isinstance(share, str):
            continue
        if isinstance(rest, Missing):
            texts[name] = rest
            continue
        # of the whole file, of which the test may have been cut off already
        cut = count(name, share, len(characters_of(texts["train"])), "characters")
        if cut >= len(rest):
            share = DEFAULT_SHARE if share is None else share
            raise UsageError(f"data.{name}={share}: leaves no characters to train on; lower it")
        texts[name], rest = rest[-cut:], rest[:-cut]
    texts["train"] = rest
    if statistics is None:
        statistics = {"vocabulary": as_text(np.unique(characters_of(rest)))}
    splits: list[Any] = [
        windows(texts[name], name, length, statistics) for name in ("train", "valid", "test")
    ]
    sizes = {"vocabulary": len(vocabulary_of(statistics))}
    return Data(*splits, sizes=sizes, statistics=statistics)


def encode(text: str, statistics: Mapping[str, Any]) -> Tensor:
    """The codes of a text, int64 (characters,), as the model of a run takes them.

    statistics: of that run, `load_run(...).statistics`

    Raises UsageError for a character that its training part has not.
    """
    import torch

    return torch.from_numpy(codes_of(as_characters(text), "text", statistics))


def decode(codes: Any, statistics: Mapping[str, Any]) -> str:
    """The text that codes, (characters,), stand for."""
    vocabulary = vocabulary_of(statistics)
    return "".join(vocabulary[int(code)] for code in codes)


def read(subject: str, file: Path, *, missing_allowed: bool) -> NDArray[np.uint32] | Missing:
    """The code points of a text file, uint32 (characters,)."""
    if missing_allowed and not file.exists():
        return Missing(f"{subject}: there is no such file any more; put it back")
    if not file.is_file():
        raise UsageError(f"{subject}: there is no such file; name a text")
    needed = file.stat().st_size * CHARACTER_BYTES
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise UsageError(
            f"{subject}: takes about {needed / 1e9:.0f} GB in memory, and this machine has "
            f"{memory / 1e9:.0f}; use a part of it"
        )
    try:
        return as_characters(file.read_bytes().decode())
    except OSError as error:
        raise UsageError(f"{subject}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{subject}: byte {error.start} is not UTF-8; save the text in that encoding"
        ) from None


def windows(
    text: NDArray[np.uint32] | Missing, name: str, length: int, statistics: Mapping[str, Any]
) -> Split | Missing:
    """A text as a split: x and y share one tensor of codes."""
    if isinstance(text, Missing):
        return text
    import torch

    rows = (len(text) - 1) // length
    if rows < 1:
        raise UsageError(
            f"data.length={length}: the {name} part has {len(text)} characters, and a row takes "
            f"{length + 1}; lower it or give that part more"
        )
    codes = torch.from_numpy(codes_of(text, f"data: the {name} part", statistics))
    x, y = (codes[shift : shift + rows * length].view(rows, length) for shift in (0, 1))
    return Split(x, y)


def codes_of(
    text: NDArray[np.uint32], subject: str, statistics: Mapping[str, Any]
) -> NDArray[np.int64]:
    """The code of each character, int64 (characters,)."""
    known = as_characters(vocabulary_of(statistics))
    codes = np.minimum(np.searchsorted(known, text), len(known) - 1)
    unknown = known[codes] != text
    if unknown.any():
        at = int(unknown.argmax())
        raise UsageError(
            f"{subject}: character {at} is {as_text(text[at : at + 1])!r}, which the training part "
            f"has not ({len(np.unique(text[unknown]))} such in all); replace it, or divide "
            "otherwise"
        )
    return codes.astype(np.int64, copy=False)


def vocabulary_of(statistics: Mapping[str, Any]) -> str:
    """The characters of the training part, sorted. Raises UsageError for other statistics, which
    may be a stranger's.
    """
    found = statistics.get("vocabulary") if isinstance(statistics, dict) else None
    if not isinstance(found, str) or not found or list(found) != sorted(set(found)):
        raise UsageError("statistics: are not those of a text; copy statistics.json again")
    return found


def characters_of(text: NDArray[np.uint32] | Missing) -> NDArray[np.uint32]:
    """The text, which is there."""
    assert not isinstance(text, Missing)
    return text


def as_characters(text: str) -> NDArray[np.uint32]:
    """The code points of a text, uint32 (characters,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))


def as_text(characters: NDArray[np.uint32]) -> str:
    """The text of code points."""
    return characters.astype("<u4").tobytes().decode("utf-32-le")
