"""What tells two sets of tensors apart: their names, dtypes, shapes and every bit."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

PIECE = 1 << 24  # bytes


def fingerprint(tensors: Mapping[str, Tensor], release: Callable[[], None] = lambda: None) -> str:
    """sha256 over the name, dtype, shape and bytes of each tensor, in the order of the names.

    release: called now and then, gives back the memory of what was read.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.reshape(-1)
        if flat.numel() > 0 and flat.stride(0) != 1:
            flat = flat.clone(memory_format=torch.contiguous_format)
        for piece in flat.view(torch.uint8).split(PIECE):
            digest.update(piece.numpy().data)
            release()
    return digest.hexdigest()
