"""Trace a training step into a graph of torch operations."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.errors import UsageError


@contextlib.contextmanager
def as_usage_error(failure: str) -> Iterator[None]:
    """Turn any exception into a one-line UsageError: `failure`, the reason and the remedy."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        if "allow_non_fake_inputs" in reason:
            reason = "it uses a tensor that is no parameter or buffer; call register_buffer"
        raise UsageError(
            f"trainer.compile=true: {failure} ({reason}); use trainer.compile=false"
        ) from error


def trace(steps: Callable[..., Tensor], inputs: tuple[Any, ...]) -> torch.fx.GraphModule:
    """Trace `steps` with fake tensors: nothing is computed, and no input or generator changes.

    Raises UsageError if they cannot be traced, or if a second trace gives a different graph.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    generator_states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        with as_usage_error("the model or the loss cannot be traced"):
            graphs = [
                make_fx(lambda *args: steps(*args), tracing_mode="fake")(*inputs) for _ in range(2)
            ]
    finally:
        random.setstate(generator_states[0])
        np.random.set_state(generator_states[1])
        torch.set_rng_state(generator_states[2])
    # a Python counter or random number would become a constant of the graph
    if graphs[0].code != graphs[1].code:
        raise UsageError(
            "trainer.compile=true: the model or the loss gives a different graph each time; "
            "use trainer.compile=false"
        )
    return graphs[0]


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
