"""Fingerprints of sets of tensors: hashes of their names, dtypes, shapes and bytes."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

PIECE = 1 << 24  # bytes


def fingerprint(
    tensors: Mapping[str, Tensor],
    release: Callable[[], None] = lambda: None,
    look: Callable[[str, Tensor, int], None] = lambda name, values, first: None,
) -> str:
    """sha256 of the name, dtype, shape and bytes of each tensor, sorted by name.

    release: called after each chunk of 16 MiB, to release the pages of a mapped file.
    look(name, values, first): called with each chunk, flat, while it is in the processor's cache;
        `first` is the number of its first value in the tensor.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.reshape(-1)
        if flat.numel() > 0 and flat.stride(0) != 1:
            flat = flat.clone(memory_format=torch.contiguous_format)
        length = max(1, PIECE // flat.element_size())
        for first, chunk in zip(
            range(0, max(1, flat.numel()), length), flat.split(length), strict=True
        ):
            digest.update(chunk.view(torch.uint8).numpy().data)
            look(name, chunk, first)
            release()
    return digest.hexdigest()
