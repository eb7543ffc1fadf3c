"""Named streams of random numbers, each derived from the run's one seed.

What draws from a stream of its own is not disturbed by what another draws: a wider model has
the same shuffle, and the shuffle of an epoch needs no history to be known.
"""

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def derive(seed: int, *names: str | int) -> int:
    """The seed, in [0, 2**63), of the stream that `names` name: the head of a sha256."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_global(seed: int, name: str) -> None:
    """Seed the generators that models and augmentations draw from without being asked.

    Those are torch's own (dropout, initial weights), on the CPU and every CUDA device,
    Python's and NumPy's.
    """
    value = derive(seed, name)
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)


def global_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of those generators: tensors, uint8 (n,), and what JSON can hold."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    numpy_state = [np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)]
    version, words, gauss_next = random.getstate()
    return tensors, {"numpy": numpy_state, "python": [version, list(words), gauss_next]}


def restore_global_state(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Put the generators back to what `global_state` returned."""
    torch.set_rng_state(tensors["cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)
    keys, position, has_gauss, gauss = values["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, words, gauss_next = values["python"]
    random.setstate((version, tuple(words), gauss_next))
