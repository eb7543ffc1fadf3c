"""Ahead-of-time compilation of a graph into a package in the user's cache.

The cache key is a hash of the graph and of everything else that the compiled code depends on, so
that the next process with the same step loads the package within milliseconds.
"""

import contextlib
import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from experiments.compiled.compiler import POLL_SECONDS, compile_package
from experiments.compiled.trace import as_usage_error
from experiments.directory import durable
from experiments.directory.fingerprint import fingerprint
from experiments.errors import Interrupted, UsageError

OPTIONS = {
    # dropout draws the eager numbers, from the generator whose state checkpoints hold
    "fallback_random": True,
    "memory_planning": True,  # one allocation for all intermediate tensors
}


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Run the block with torch set to `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cache_key(graph: torch.fx.GraphModule, inputs: tuple[Any, ...]) -> str:
    """A sha256, in hex, over all that the compiled code depends on."""
    shapes = [(t.dtype, tuple(t.shape), t.stride(), t.device.type) for t in tree_leaves(inputs)]
    constants = fingerprint(graph.state_dict())  # tensors that forward creates from Python numbers
    parts = (
        *(graph.code, shapes, constants, OPTIONS, torch.get_num_threads()),
        *(
            torch.__version__,
            torch.backends.cpu.get_cpu_capability(),
            cpu_features(),
            compiler_version(),
        ),
        *(torch.get_deterministic_debug_mode(), torch.get_float32_matmul_precision()),
        short_sha256(Path(__file__).with_name("products.py").read_bytes()),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def cpu_features() -> str:
    """The CPU's instruction set extensions, which the generated code is specialized for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        import platform

        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def compiler_version() -> str:
    """The C++ compiler and its version. Raises UsageError where there is none."""
    command = os.environ.get("CXX", "g++")
    try:
        result = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise UsageError(
            f"trainer.compile=true: no C++ compiler {command} found; "
            "install it, set CXX to another, or use trainer.compile=false"
        ) from None
    return result.stdout.partition("\n")[0]


def cache_folder() -> Path:
    """The folder of compiled packages, with mode 0700 because its contents are executed.

    Raises UsageError if it is not writable.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # the XDG specification says to ignore a relative path
    folder = (home if home.is_absolute() else Path.home() / ".cache") / "experiments"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable")
    except OSError as error:
        raise UsageError(
            f"trainer.compile=true: {error}; set XDG_CACHE_HOME to a writable folder "
            "or use trainer.compile=false"
        ) from None
    return folder


def compile_once(
    key: str,
    graph: torch.fx.GraphModule,
    inputs: tuple[Any, ...],
    before: Callable[[], None] = lambda: None,
    stop_signal: Callable[[], int | None] = lambda: None,
) -> Path:
    """The compiled package of a graph, from the cache or newly compiled into it.

    before: called before a package is compiled; may raise UsageError.

    stop_signal: gives the number of a signal that has arrived.

    A lock file makes concurrent processes with the same key wait instead of compiling twice. The
    file name ends in a short sha256 of the content; on a mismatch the package is compiled again.
    Raises UsageError if it cannot be compiled, and Interrupted after a signal.
    """
    folder = cache_folder()
    with (folder / f"{key}.lock").open("w") as lock:
        wait_for_lock(lock.fileno(), stop_signal)
        for file in folder.glob(f"{key}-*.pt2"):
            if short_sha256(file.read_bytes()) == file.stem.partition("-")[2]:
                return file
            file.unlink()
        before()
        print(
            f"compiling the step, once for its shapes: about {duration(len(graph.graph.nodes))}",
            flush=True,
        )
        output = folder / f"{key}.pt2"
        try:
            with as_usage_error("the step cannot be compiled"):
                compile_package(graph, inputs, output, OPTIONS, stop_signal)
                check_against_eager(graph, load(output, inputs[3][0].device), inputs)
            content = output.read_bytes()
        finally:
            output.unlink(missing_ok=True)
        package = folder / f"{key}-{short_sha256(content)}.pt2"
        durable.write(package, content)
        return package


def wait_for_lock(lock: int, stop_signal: Callable[[], int | None]) -> None:
    """Lock an open file exclusively. Raises Interrupted after a signal."""
    import fcntl

    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            number = stop_signal()
            if number:
                raise Interrupted(number) from None
            time.sleep(POLL_SECONDS)


def check_against_eager(graph: torch.fx.GraphModule, package: Any, inputs: tuple[Any, ...]) -> None:
    """Compare a package with its graph, executed eagerly, on the first rows of the data.

    Optimizer states are set to ones, since from zeros Adam turns a gradient of pure rounding error
    into a full-size step. The scalars are capped, since a large lr would diverge.

    Raises RuntimeError if they differ by more than rounding.
    """
    data, index, scalars = inputs[3:]
    rows = torch.arange(index.numel(), device=index.device).view_as(index) % len(data[0])
    results = []
    runs: list[Any] = [lambda args: graph(*args), lambda args: package.run(tree_leaves(args))]
    for run in runs:
        parts = *tree_map(torch.clone, inputs[:2]), tree_map(torch.ones_like, inputs[2])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            losses = run((*parts, data, rows, scalars.clamp(max=0.1)))
        results.append([*losses, *tree_leaves(parts)])
    for eager, compiled in zip(*results, strict=True):
        if not torch.allclose(eager, compiled, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise RuntimeError("the compiled results differ from the eager ones")


def duration(nodes: int) -> str:
    """How long compiling a graph of so many nodes takes, in words.

    The lower figure is processor time once torch's headers are precompiled, which takes 8 s, once
    for all; the upper one is twice as much. Measured with torch 2.13 on one core of an AMD EPYC,
    with the headers: an MLP of one, two and eight steps, of 109, 197 and 725 nodes, 20, 21 and 29
    s; two steps of a conv net, 367, 27 s; a GRU over 8, 32 and 64 characters, 673, 1945 and 3641,
    26, 49 and 77 s; six transformer layers, 2863, 65 s. So 18 s and 0.0165 s for each node.
    """
    seconds = 10 + 0.0165 * nodes
    low, high = round(seconds, -1), round(2 * seconds, -1)
    if low < 100:
        return f"{low:.0f} to {high:.0f} seconds"
    return f"{low / 60:.0f} to {high / 60:.0f} minutes"


def short_sha256(content: bytes) -> str:
    """The first 16 hex digits of a sha256."""
    return hashlib.sha256(content).hexdigest()[:16]


def load(package: Path, device: torch.device) -> Any:
    """Load a compiled package.

    Uses the class behind torch._inductor.aoti_load_package directly, since that function imports
    the whole compiler first: measured 1.7 s instead of 5 ms.
    """
    index = -1 if device.type == "cpu" else device.index or 0
    return torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, index)
