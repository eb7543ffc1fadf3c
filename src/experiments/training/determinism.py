"""What the bits of a run depend on besides its config: torch's settings and the generators."""

import ctypes
import os
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.data.streams import derive
from experiments.errors import UsageError
from experiments.training import lean_optim


def prepare_torch(trainer: dict[str, Any]) -> str:
    """Set what the bits of a run depend on, and return the device: `cpu` or `cuda`.

    Nothing is inherited from the environment or a launcher. Raises UsageError where CUDA is
    asked for and torch has none.
    """
    lean_optim.install()
    keep_freed_memory()
    torch.set_num_threads(trainer["threads"])
    torch.set_float32_matmul_precision(trainer["matmul_precision"])
    # read by cuBLAS at its first use; torch's notes on reproducibility name the value
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    # use_deterministic_algorithms sets the same flag, and imports the compiler for a second
    torch.set_deterministic_debug_mode("error")
    # an aid to debugging that would write NaN over every new tensor
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if trainer["device"] == "cuda" and not torch.cuda.is_available():
        raise UsageError("trainer.device=cuda: torch finds no CUDA device; use cpu or auto")
    return "cuda" if trainer["device"] != "cpu" and torch.cuda.is_available() else "cpu"


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees, up to 1 GiB, for the next one. By itself it may give it
    back to the kernel each time, as chance has it: seen were 140,000 page faults an epoch, which
    took half of it. Blocks from 32 MiB on still come and go alone. Elsewhere nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # as <malloc.h> numbers them
        mallopt(trim_threshold, 2**30)
        mallopt(mmap_threshold, 2**25)


def torch_environment(device: str, trainer: dict[str, Any]) -> dict[str, Any]:
    """What the bits of a run depend on besides its config and the packages."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": trainer["threads"],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


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
