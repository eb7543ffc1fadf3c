"""What bitwise reproducibility needs besides the config: torch settings and random generators."""

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
    """Set everything that the bits of a run depend on; return the device: `cpu` or `cuda`.

    Nothing is inherited from the environment or a launcher. Raises UsageError if the config
    requires CUDA and torch finds none.
    """
    lean_optim.install()
    configure_malloc()
    torch.set_num_threads(trainer["threads"])
    torch.set_float32_matmul_precision(trainer["matmul_precision"])
    # cuBLAS reads it at its first use; the value is from torch's notes on reproducibility
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    # use_deterministic_algorithms sets the same flag, but imports the compiler: one second
    torch.set_deterministic_debug_mode("error")
    # a debugging aid that would fill every new tensor with NaN
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if trainer["device"] == "cuda" and not torch.cuda.is_available():
        raise UsageError("trainer.device=cuda: torch finds no CUDA device; use cpu or auto")
    return "cuda" if trainer["device"] != "cpu" and torch.cuda.is_available() else "cpu"


def configure_malloc() -> None:
    """Let glibc's allocator keep up to 1 GiB of freed memory for the next step. By default it may
    or may not return that memory to the kernel after each step: measured 140,000 page faults per
    epoch, half of its time. Blocks of 32 MiB or more still use mmap. Without glibc, do nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(trim_threshold, 2**30)
        mallopt(mmap_threshold, 2**25)


def torch_environment(device: str, trainer: dict[str, Any]) -> dict[str, Any]:
    """What the bits of a run depend on besides its config and the package versions."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": trainer["threads"],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def seed_global(seed: int, name: str) -> None:
    """Seed the global generators, from which models and augmentations draw.

    These are torch's (dropout, initial weights), on the CPU and every CUDA device, Python's and
    NumPy's.
    """
    value = derive(seed, name)
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)


def global_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of the global generators: tensors, uint8 (n,), and JSON values."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    numpy_state = [np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)]
    version, words, gauss_next = random.getstate()
    return tensors, {"numpy": numpy_state, "python": [version, list(words), gauss_next]}


def restore_global_state(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Restore the global generators from what `global_state` returned."""
    torch.set_rng_state(tensors["cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)
    keys, position, has_gauss, gauss = values["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, words, gauss_next = values["python"]
    random.setstate((version, tuple(words), gauss_next))
