"""A step as one graph of torch's operations."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.errors import UsageError


@contextlib.contextmanager
def explaining(failure: str) -> Iterator[None]:
    """Tell in one line, as UsageError, what torch could not do with a step, and why."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        if "allow_non_fake_inputs" in reason:
            reason = "it uses a tensor that is no parameter; have register_buffer make it known"
        raise UsageError(
            f"trainer.compile=true: {failure} ({reason}); use trainer.compile=false"
        ) from error


def trace(steps: Callable[..., Tensor], inputs: tuple[Any, ...]) -> torch.fx.GraphModule:
    """The operations of some steps as a graph; nothing is computed, and nothing changed.

    Raises UsageError where they cannot be told beforehand, or are not the same each time.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    drawn = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        with explaining("the model or the loss cannot be traced"):
            graphs = [
                make_fx(lambda *args: steps(*args), tracing_mode="fake")(*inputs) for _ in "ab"
            ]
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        torch.set_rng_state(drawn[2])
    # a number out of Python, a counter or a draw, would be frozen in the graph
    if graphs[0].code != graphs[1].code:
        raise UsageError(
            "trainer.compile=true: the model or the loss computes something else each time; "
            "use trainer.compile=false"
        )
    return graphs[0]


def operations(graph: torch.fx.GraphModule) -> int:
    """The floating point operations of a graph's matrix products and convolutions."""
    from torch.utils.flop_counter import flop_registry

    total = 0
    for node in graph.graph.nodes:
        count = flop_registry.get(getattr(node.target, "overloadpacket", None))
        if count is not None:
            args = torch.fx.map_arg(node.args, lambda argument: argument.meta["val"])
            total += count(*args, out_val=node.meta["val"])
    return total
