"""Fingerprints of sets of tensors: hashes of their names, dtypes, shapes and bytes."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

PIECE = 1 << 24  # bytes


def fingerprint(tensors: Mapping[str, Tensor], release: Callable[[], None] = lambda: None) -> str:
    """sha256 of the name, dtype, shape and bytes of each tensor, sorted by name.

    release: called after each chunk of 16 MiB, to release the pages of a mapped file.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.reshape(-1)
        if flat.numel() > 0 and flat.stride(0) != 1:
            flat = flat.clone(memory_format=torch.contiguous_format)
        for chunk in flat.view(torch.uint8).split(PIECE):
            digest.update(chunk.numpy().data)
            release()
    return digest.hexdigest()
