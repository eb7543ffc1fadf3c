"""Values of attributes and buffers to compare with those of another time, and to put back."""

import copy
import random
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from experiments.data.checks import same_bits

# Larger tensors and containers are compared by identity and version or by length only.
MAX_ELEMENTS, MAX_ITEMS, MAX_DEPTH = 1 << 20, 10_000, 6


def copied(value: Any) -> Any:
    """A copy of a value that can change in place; None if it cannot, or is no plain value."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.detach().clone()
    if isinstance(value, list | dict | set | deque | bytearray | np.ndarray):
        try:
            return copy.deepcopy(value)
        except Exception:  # tensors in the middle of a graph, locks, files
            return copy.copy(value)
    return None


def frozen(value: Any, depth: int = 0) -> Any:
    """A value to compare with the same attribute's at another time."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)  # NaN equals itself
    if isinstance(value, nn.Parameter):
        return "parameter", id(value)
    if isinstance(value, Tensor):
        return frozen_tensor(value)
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        return array.dtype.str, array.shape, array.tobytes() if array.dtype.kind != "O" else 0
    if isinstance(value, torch.Generator):
        return value.get_state().cpu().numpy().tobytes()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if depth == MAX_DEPTH:
        return type(value).__name__
    if isinstance(value, dict):
        if len(value) > MAX_ITEMS:
            return "dict", len(value)
        return "dict", [(repr(key), frozen(item, depth + 1)) for key, item in value.items()]
    if isinstance(value, list | tuple | deque | set | frozenset):
        if len(value) > MAX_ITEMS:
            return type(value).__name__, len(value)
        return type(value).__name__, [frozen(item, depth + 1) for item in value]
    if isinstance(value, type) or (callable(value) and not isinstance(value, nn.Module)):
        return type(value).__name__
    return type(value).__name__, [
        (name, frozen(item, depth + 1)) for name, item in sorted(vars_of(value).items())
    ]


SavedBuffers = list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]]


def save_buffers(*parts: Any) -> SavedBuffers:
    """The buffers of some modules with copies of their values, for `restore_buffers`."""
    return [
        (module._buffers, name, buffer, buffer.detach().clone())
        for part in parts
        if isinstance(part, nn.Module)
        for module in part.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not is_lazy(buffer)
    ]


@torch.no_grad()
def restore_buffers(saved: SavedBuffers) -> None:
    """Put buffers back, also those that were replaced, with the values that they had."""
    for table, name, buffer, value in saved:
        table[name] = buffer
        if not same_bits(buffer, value):  # an expanded one cannot be written to
            buffer.detach().copy_(value)


def vars_of(value: Any) -> dict[str, Any]:
    """The attributes of an object, if it keeps any in a __dict__."""
    found = getattr(value, "__dict__", {})
    return found if isinstance(found, dict) else {}


def frozen_tensor(value: Tensor) -> Any:
    """A tensor's dtype, shape and bytes; of a large one its memory and version."""
    kind = str(value.dtype), tuple(value.shape)
    if value.layout != torch.strided or value.is_meta:
        return kind
    if value.numel() > MAX_ELEMENTS:
        return *kind, value.data_ptr(), 0 if value.is_inference() else value._version
    flat = value.detach().cpu().resolve_conj().contiguous().reshape(-1)
    return *kind, flat.view(torch.uint8).numpy().tobytes()
