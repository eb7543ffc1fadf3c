"""Compile a graph in a process of its own, so that a signal can end it cleanly.

Ctrl-C reaches a whole process group. If it killed a child of the compiler that probes the CPU's
features, the probe would seem to have failed and another package would result. So the compiler has
a session of its own, which is ended as a whole when the run is stopped, or when the run dies.
"""

import contextlib
import mmap
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from experiments.errors import Interrupted
from experiments.interrupt import STOP_SIGNALS

POLL_SECONDS = 0.05
TERMINATE_SECONDS = 10  # for the C++ compiler to delete what it has written in part
STACK_BYTES, RECURSION_LIMIT = 2**29, 10**6  # inductor recurses along a graph's depth
MAX_REPLY = 10_000  # characters; it must fit into a pipe that is read at the end
RESERVE_BYTES = 2**26  # from here on, memory that stands for data is only reserved
COMMAND = "import sys; sys.path[:] = {path!r}; from experiments.compiled import compiler; {call}"


class Spec(NamedTuple):
    """What the compiler needs to know of an input."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Name:
    """A reference to a node of the graph; of an operation, its namespace, name and overload."""

    parts: tuple[str, ...]


# op, target, args, kwargs and name of a node, in which nodes and operations are Name
PlainNode = tuple[str, Any, Any, Any, str]


class Task(NamedTuple):
    """A graph to compile, in parts that can be pickled, and torch's settings.

    A pickled GraphModule would not do: it is read by tracing its code, which executes operations
    without a tensor as input, draws from a random generator among them.
    """

    nodes: list[PlainNode]
    constants: dict[str, Any]
    specs: list[Spec]
    output: str
    options: dict[str, Any]
    threads: int
    matmul_precision: str
    deterministic: int


class CompilerFailed(Exception):
    """The compiler raised an exception; the message is its text."""


def compile_package(
    graph: torch.fx.GraphModule,
    inputs: tuple[Any, ...],
    output: Path,
    options: dict[str, Any],
    stop_signal: Callable[[], int | None],
) -> None:
    """Compile a graph for the shapes of its inputs into a package.

    Raises Interrupted after a signal, with nothing left running and no output, and CompilerFailed.
    """
    task = Task(
        [to_plain(node) for node in graph.graph.nodes],
        {
            str(node.target): getattr(graph, str(node.target))
            for node in graph.graph.find_nodes(op="get_attr")
        },
        [Spec(tuple(t.shape), t.stride(), t.dtype, t.device) for t in tree_leaves(inputs)],
        str(output),
        options,
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.get_deterministic_debug_mode(),
    )
    try:
        content = pickle.dumps(task)
    except (pickle.PicklingError, AttributeError, TypeError):
        content = b""
    reply = run_compiler(content, stop_signal) if content else None
    if reply is None:  # the graph has operations that only this process knows
        with block_signals():
            compile_graph(graph, inputs, output, options)
    elif reply:
        raise CompilerFailed(reply)


def run_compiler(content: bytes, stop_signal: Callable[[], int | None]) -> str | None:
    """Have a new process compile a pickled task; returns the text of its error, empty if there is
    none, and None if it could not read the task. Raises Interrupted after a signal.
    """
    command = COMMAND.format(path=sys.path, call="compiler.main()")
    process = subprocess.Popen(
        [sys.executable, "-c", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    # in a thread, since the pipe fills up while a signal is awaited
    writer = threading.Thread(target=send, args=(process, content), daemon=True)
    writer.start()
    try:
        while process.poll() is None:
            number = stop_signal()
            if number:
                raise Interrupted(number)
            time.sleep(POLL_SECONDS)
        assert process.stdout is not None
        content = process.stdout.read()
    finally:
        end_session(process)
    if process.returncode != 0:
        return f"the compiler's process ended with {process.returncode}"
    reply: str | None = pickle.loads(content)
    return reply


def send(process: subprocess.Popen[bytes], content: bytes) -> None:
    """Write a task to the compiler. The pipe stays open: its end tells that this process died."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # it has ended
        process.stdin.write(len(content).to_bytes(8, "little") + content)
        process.stdin.flush()


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End a process and all its children, and wait for them."""
    until = time.monotonic() + TERMINATE_SECONDS
    number = signal.SIGTERM
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.killpg(process.pid, number)
            process.poll()
            if time.monotonic() > until:
                number = signal.SIGKILL
            time.sleep(POLL_SECONDS)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


@contextlib.contextmanager
def block_signals() -> Iterator[None]:
    """Let stop signals wait until the end of the block."""
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def compile_graph(
    graph: torch.fx.GraphModule, inputs: tuple[Any, ...], output: Path, options: dict[str, Any]
) -> None:
    """Compile a graph in this process."""
    from experiments.compiled.products import Products  # importing it takes a second

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler warns about itself
        exported = torch.export.export(graph, inputs)
        torch._inductor.aoti_compile_and_package(
            exported,
            package_path=str(output),
            inductor_configs={**options, "post_grad_custom_post_pass": Products()},
        )


# In the compiler's process


def main() -> None:
    """Compile the task that comes through standard input; reply through standard output."""
    reply_pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the compiler prints is no reply
    size = int.from_bytes(sys.stdin.buffer.read(8), "little")
    content = sys.stdin.buffer.read(size)
    threading.Thread(target=end_with_parent, daemon=True).start()
    replies: list[str | None] = []
    threading.stack_size(STACK_BYTES)
    sys.setrecursionlimit(RECURSION_LIMIT)
    worker = threading.Thread(target=lambda: replies.append(execute(content)))
    worker.start()
    worker.join()
    with reply_pipe:
        reply_pipe.write(pickle.dumps(replies[0]))
    sys.stderr.flush()
    os._exit(0)  # the interpreter's shutdown would take a second


def end_with_parent() -> None:
    """End this process and its children when the one that started it dies."""
    sys.stdin.buffer.read(1)
    os.killpg(0, signal.SIGTERM)


def execute(content: bytes) -> str | None:
    """Compile a pickled task; returns what `run_compiler` does."""
    warnings.simplefilter("ignore")  # torch warns about itself
    import experiments.compiled.products  # noqa: F401  (reading a graph needs the compiler)

    try:
        task: Task = pickle.loads(content)
        graph = from_plain(task.nodes, task.constants)
    except Exception:
        return None
    torch.set_num_threads(task.threads)
    torch.set_float32_matmul_precision(task.matmul_precision)
    torch.set_deterministic_debug_mode(task.deterministic)
    try:
        inputs = tuple(stand_in(spec) for spec in task.specs)
        compile_graph(graph, inputs, Path(task.output), task.options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:MAX_REPLY]
    return ""


def to_plain(node: torch.fx.Node) -> PlainNode:
    """A node in parts that can be pickled."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        target = Name((namespace, name, target._overloadname))
    args, kwargs = map_nodes((node.args, node.kwargs), lambda other: Name((other.name,)))
    return node.op, target, args, kwargs, node.name


# torch's type for its second argument has only what a graph can hold
map_nodes = cast(Callable[[Any, Callable[[torch.fx.Node], Any]], Any], torch.fx.map_arg)


def from_plain(nodes: list[PlainNode], constants: dict[str, Any]) -> torch.fx.GraphModule:
    """The graph of some nodes, as a function of all its input tensors, one after the other.

    Raises AttributeError if an operation is not known here.
    """
    graph, made = torch.fx.Graph(), dict[str, torch.fx.Node]()

    def resolve(value: Any) -> Any:
        return made[value.parts[0]] if isinstance(value, Name) else value

    for op, target, args, kwargs, name in nodes:
        if isinstance(target, Name):
            namespace, operation, overload = target.parts
            target = getattr(getattr(getattr(torch.ops, namespace), operation), overload)
        args, kwargs = torch.fx.node.map_aggregate((args, kwargs), resolve)
        made[name] = graph.create_node(op, target, args, kwargs, name)
    return torch.fx.GraphModule(constants, graph)


def stand_in(spec: Spec) -> Tensor:
    """A tensor with the given shape, whose values do not matter."""
    span = 1 + sum((n - 1) * step for n, step in zip(spec.shape, spec.stride, strict=True))
    size = span * spec.dtype.itemsize
    if spec.device.type != "cpu" or size < RESERVE_BYTES or 0 in spec.shape:
        return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=spec.device)
    # read-only, so that the data may be larger than memory
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.frombuffer(memory, dtype=spec.dtype).as_strided(spec.shape, spec.stride)
