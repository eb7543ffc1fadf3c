"""Rows as the files of a data set hold them: pixels as bytes, numbers of a table not standardised.

They are what an exported model takes.
"""

from typing import Any

import torch
from torch import Tensor

from experiments.data.loaders import Batch, inputs, select
from experiments.data.nests import map_tensors, tensors_of
from experiments.data.samples import Collate
from experiments.data.splits import Split, reads_samples
from experiments.data.tables import TableSplit


def raw_batch(
    split: Any, rows: list[int], collate: Collate | None = None
) -> tuple[Batch, dict[int, Tensor]]:
    """A batch of some rows, as `select` gives it, and what the files hold in place of its tensors,
    by their ids: uint8 for pixels, float64 for the numbers of a table. Other tensors are not in it.
    """
    batch = select(split, rows, collate)
    if not isinstance(split, Split) or reads_samples(split):
        x = tensors_of(inputs(batch))
        held = x
    else:
        x = tensors_of(batch if split.y is None else batch[0])
        index = torch.tensor(rows)
        nest = split.raw_x() if isinstance(split, TableSplit) else split.x
        held = tensors_of(map_tensors(lambda t: t.index_select(0, index), nest))
    raw = (raw_of(*pair, getattr(split, "pixels", None)) for pair in zip(x, held, strict=True))
    return batch, {id(t): found for t, found in zip(x, raw, strict=True) if found is not None}


def raw_of(x: Tensor, held: Tensor, pixels: object) -> Tensor | None:
    """What the files hold in place of a tensor of a batch; None if it is the tensor itself.

    held: what the split holds. pixels: of the split
    """
    if x.dtype != torch.float32:
        return None
    if held.dtype in (torch.float64, torch.uint8):
        return held
    return as_bytes(x) if pixels is True else None


def as_bytes(x: Tensor) -> Tensor | None:
    """The bytes, uint8, whose scaled values a tensor holds; None if it holds others."""
    found = (x * 255).round().clamp(0, 255).to(torch.uint8)
    return found if torch.equal(found / 255, x) else None
