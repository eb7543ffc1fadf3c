"""Trace a training step into a graph of torch operations."""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.compiled.eligibility import observed_forward_hooks
from experiments.compiled.python_state import PythonState
from experiments.directory.fingerprint import fingerprint
from experiments.errors import Interrupted, UsageError


class GraphTooLarge(Exception):
    """A graph of several steps would have too many nodes."""

    def __init__(self, nodes_per_step: int) -> None:
        super().__init__(nodes_per_step)
        self.nodes_per_step = nodes_per_step


@contextlib.contextmanager
def as_usage_error(failure: str) -> Iterator[None]:
    """Turn any exception into a one-line UsageError: `failure`, the reason and the remedy."""
    try:
        yield
    except (UsageError, Interrupted, GraphTooLarge):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        if "allow_non_fake_inputs" in reason:
            reason = "it uses a tensor that is no parameter or buffer; call register_buffer"
        elif "Mixing fake modes" in reason:
            reason = "it keeps a tensor from one batch to the next; call register_buffer"
        raise UsageError(
            f"trainer.compile=true: {failure} ({reason}); use trainer.compile=false"
        ) from error


def trace(
    steps: Callable[..., Any],
    inputs: tuple[Any, ...],
    modules: Mapping[str, nn.Module] = MappingProxyType({}),
) -> torch.fx.GraphModule:
    """Trace `steps` with fake tensors: nothing is computed, and no input or generator changes.

    modules: what `steps` calls, by name. Their Python state is put back.

    Raises GraphTooLarge if `steps` does; UsageError if they cannot be traced, if a second trace
    gives a different graph, or if something changes that a graph does not hold: Python state, or a
    random generator other than torch's own.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    before = PythonState(modules)
    try:
        with as_usage_error("the model or the loss cannot be traced"), contextlib.ExitStack() as on:
            for name, module in modules.items():
                on.enter_context(observed_forward_hooks(name, module))
            graphs = [
                make_fx(lambda *args: steps(*args), tracing_mode="fake")(*inputs) for _ in range(2)
            ]
        change = before.change_to(PythonState(modules))
        drawn = [
            *(["random"] if random.getstate() != generators[0] else []),
            *(["numpy.random"] if repr(np.random.get_state()) != repr(generators[1]) else []),
        ]
    finally:
        before.restore()
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])
    if change is not None:
        raise UsageError(
            f"trainer.compile=true: {change} with each step, which a compiled step does not do; "
            "keep it in a buffer (register_buffer) or use trainer.compile=false"
        )
    # a Python random number or the time becomes a constant of the graph
    if drawn or not same_graph(*graphs):
        reason = f"draws from {drawn[0]}" if drawn else "gives a different graph each time"
        raise UsageError(
            f"trainer.compile=true: the model or the loss {reason}; "
            "draw with torch's functions, or use trainer.compile=false"
        )
    check_generators(graphs[0])
    return graphs[0]


def count_nodes() -> int:
    """The number of nodes of the graph that is being traced."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    return 0 if mode is None else len(mode.tracer.graph.nodes)


def same_graph(one: torch.fx.GraphModule, other: torch.fx.GraphModule) -> bool:
    """Whether two graphs have the same operations and the same constants."""
    # as bytes, since NaN is not equal to itself
    return one.code == other.code and fingerprint(one.state_dict()) == fingerprint(
        other.state_dict()
    )


def check_generators(graph: torch.fx.GraphModule) -> None:
    """Raise UsageError if a graph draws from a torch.Generator other than the default one."""
    for node in graph.graph.nodes:
        if node.kwargs.get("generator") is not None:
            raise UsageError(
                f"trainer.compile=true: the model or the loss draws ({node.target}) from a "
                "torch.Generator of its own; draw from torch's default generator "
                "or use trainer.compile=false"
            )


def count_flops(graph: torch.fx.GraphModule) -> int:
    """The floating point operations of a graph's matrix products and convolutions."""
    from torch.utils.flop_counter import flop_registry

    total = 0
    for node in graph.graph.nodes:
        count = flop_registry.get(getattr(node.target, "overloadpacket", None))
        if count is not None:
            args = torch.fx.map_arg(node.args, lambda argument: argument.meta["val"])
            total += count(*args, out_val=node.meta["val"])
    return total
