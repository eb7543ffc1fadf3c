"""A graph compiled ahead of time into a package, which is kept in the user's cache and loaded.

A package's name is a hash of the graph and of everything else that the compiled code depends on,
so that the next process with the same step loads it within milliseconds.
"""

import contextlib
import hashlib
import os
import signal
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from experiments.compiled.trace import explaining
from experiments.directory import durable
from experiments.directory.fingerprint import fingerprint
from experiments.errors import UsageError

OPTIONS = {
    # dropout draws what it would draw eagerly, from the generator that checkpoints hold
    "fallback_random": True,
    "memory_planning": True,  # one piece of memory for all that lies between
}


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Have torch use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def key_of(graph: torch.fx.GraphModule, inputs: tuple[Any, ...]) -> str:
    """A sha256, in hex, over all that the compiled code depends on."""
    shapes = [(t.dtype, tuple(t.shape), t.stride(), t.device.type) for t in tree_leaves(inputs)]
    constants = fingerprint(graph.state_dict())  # tensors that forward makes out of numbers
    parts = (
        *(graph.code, shapes, constants, OPTIONS, torch.get_num_threads()),
        *(torch.__version__, torch.backends.cpu.get_cpu_capability(), processor(), compiler()),
        *(torch.get_deterministic_debug_mode(), torch.get_float32_matmul_precision()),
        digest(Path(__file__).with_name("products.py").read_bytes()),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def processor() -> str:
    """What the processor can do, since code is compiled for just that."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        import platform

        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def compiler() -> str:
    """The C++ compiler and its version. Raises UsageError where there is none."""
    command = os.environ.get("CXX", "g++")
    try:
        told = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise UsageError(
            f"trainer.compile=true: there is no C++ compiler {command}; "
            "install one (CXX names it) or use trainer.compile=false"
        ) from None
    return told.stdout.partition("\n")[0]


def cache() -> Path:
    """Where compiled steps are kept; what lies there is executed, so it is the user's alone.

    Raises UsageError where it cannot be written.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # one that is not absolute is to be passed over, says the XDG specification
    folder = (home if home.is_absolute() else Path.home() / ".cache") / "experiments"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written")
    except OSError as error:
        raise UsageError(
            f"trainer.compile=true: {error}; have XDG_CACHE_HOME name a folder that can be "
            "written, or use trainer.compile=false"
        ) from None
    return folder


def compile_once(key: str, graph: torch.fx.GraphModule, inputs: tuple[Any, ...]) -> Path:
    """The compiled package of a graph, out of the cache or into it.

    Whoever else wants the same one at the same time waits for it. Its name tells the head of
    its own sha256, and one that does not match is made anew.
    """
    import fcntl

    folder = cache()
    with (folder / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for file in folder.glob(f"{key}-*.pt2"):
            if digest(file.read_bytes()) == file.stem.partition("-")[2]:
                return file
            file.unlink()
        print("compiling the step, once for its shapes: some 10 to 20 seconds", flush=True)
        made = folder / f"{key}.pt2"
        # Ctrl-C goes to the compiler's processes, too; one that tries out what the processor can
        # do would seem to have found less, and the package would be another one
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            with explaining("the step cannot be compiled"):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of the compiler's own making
                    from experiments.compiled.products import Products  # its imports take a second

                    exported = torch.export.export(graph, inputs)
                    torch._inductor.aoti_compile_and_package(
                        exported,
                        package_path=str(made),
                        inductor_configs={**OPTIONS, "post_grad_custom_post_pass": Products()},
                    )
                check(graph, load(made, inputs[3].device), inputs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        content = made.read_bytes()
        package = folder / f"{key}-{digest(content)}.pt2"
        durable.write(package, content)
        made.unlink()
        return package


def check(graph: torch.fx.GraphModule, package: Any, inputs: tuple[Any, ...]) -> None:
    """Run a package beside its graph, which torch computes operation by operation, on the first
    rows. Raises RuntimeError where they differ by more than rounding does.

    From states of ones and with small numbers: from zeros Adam would make as large a step of a
    gradient that is rounding alone as of any other, and a large lr would diverge.
    """
    *_, x, _, index, numbers = inputs
    rows = torch.arange(index.numel(), device=index.device).view_as(index) % len(x)
    results = []
    for run in (lambda args: [graph(*args)], lambda args: package.run(tree_leaves(args))):
        parts = *tree_map(torch.clone, inputs[:2]), tree_map(torch.ones_like, inputs[2])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            losses = run((*parts, *inputs[3:5], rows, numbers.clamp(max=0.1)))
        results.append([*losses, *tree_leaves(parts)])
    for eager, compiled in zip(*results, strict=True):
        if not torch.allclose(eager, compiled, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise RuntimeError("the compiler made something that computes other numbers")


def digest(content: bytes) -> str:
    """The head of a sha256."""
    return hashlib.sha256(content).hexdigest()[:16]


def load(package: Path, device: torch.device) -> Any:
    """A compiled package, ready to run.

    Through the class behind torch._inductor.aoti_load_package, which itself would first import
    the whole compiler: measured 1.7 s instead of 5 ms.
    """
    index = -1 if device.type == "cpu" else device.index or 0
    return torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, index)
