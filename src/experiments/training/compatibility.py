"""Whether the parts of a run go together: what would fail, or mean nothing, is told beforehand."""

import inspect
import sys
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, SparseAdam
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.data.nests import describe, map_tensors, row_count, tensors_of
from experiments.errors import UsageError
from experiments.training.accuracy import OF_CLASSES

# torch's losses that compare outputs and targets element by element, and broadcast them
ELEMENTWISE = (
    nn.HingeEmbeddingLoss,
    nn.HuberLoss,
    nn.KLDivLoss,
    nn.L1Loss,
    nn.MSELoss,
    nn.PoissonNLLLoss,
    nn.SmoothL1Loss,
    nn.SoftMarginLoss,
)


def target_of(config: Mapping[str, Any], group: str) -> str:
    """A group's target as messages name it."""
    return f"{group}._target_={config[group]['_target_']}"


def check_parameters(config: Mapping[str, Any], model: nn.Module) -> None:
    """Raise UsageError for a model in which there is nothing to train."""
    parameters = list(model.parameters())
    if not parameters:
        raise UsageError(
            f"{target_of(config, 'model')}: has no parameters, so there is nothing to train; give "
            "it an nn.Parameter, or a module that has some, as an attribute"
        )
    if not any(p.requires_grad for p in parameters):
        raise UsageError(
            f"{target_of(config, 'model')}: all its parameters are frozen, so there is nothing to "
            "train; leave requires_grad of some of them true"
        )


def check_outputs(
    config: Mapping[str, Any], loss_func: nn.Module, outputs: Any, targets: Any
) -> None:
    """Raise UsageError if one of torch's losses does not take the model's outputs and the targets
    as they are; say if it broadcasts them row by row.
    """
    if type(loss_func).__module__ != nn.MSELoss.__module__:
        return
    model, loss = target_of(config, "model"), target_of(config, "loss")
    if not isinstance(outputs, Tensor):
        raise UsageError(
            f"{model}: returns a {type(outputs).__name__}, and {loss} takes one tensor; return "
            "one, or use a loss of your own"
        )
    if not isinstance(targets, Tensor):
        raise UsageError(
            f"{loss}: takes one tensor of targets, and the data's y is {describe(targets)}; use a "
            "loss or a step of your own"
        )
    weight: Any = getattr(loss_func, "weight", None)
    weighted = isinstance(loss_func, OF_CLASSES) and weight is not None and outputs.ndim > 1
    if weighted and len(weight) != outputs.shape[1]:
        raise UsageError(
            f"loss.weight: has {len(weight)} weights, and the model {outputs.shape[1]} outputs; "
            "give one weight for each"
        )
    if not isinstance(loss_func, ELEMENTWISE) or outputs.shape == targets.shape:
        return
    shapes = f"outputs {shape_of(outputs)} and targets {shape_of(targets)}"
    if outputs.ndim != targets.ndim:
        raise UsageError(
            f"{loss}: takes outputs and targets of one shape, not {shapes}; {shape_remedy(outputs)}"
        )
    print(f"warning: {loss}: broadcasts {shapes} within each row", file=sys.stderr)


def shape_of(tensor: Tensor) -> str:
    """The shape of a batch, with `rows` for the first dimension."""
    return f"({', '.join(['rows', *map(str, tensor.shape[1:])])}{',' * (tensor.ndim == 1)})"


def shape_remedy(outputs: Tensor) -> str:
    """How outputs and targets of different dimensions get one shape."""
    if outputs.ndim == 2 and outputs.shape[1] == 1:
        return "give the targets a second dimension, y[:, None], or squeeze(1) the outputs"
    return "make the shape of the targets that of the outputs, or choose another loss"


def check_loss(config: Mapping[str, Any], value: object, group: str = "loss") -> None:
    """Raise UsageError if a loss is not one number."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return
    found = (
        f"a tensor of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
    )
    reduction = config[group].get("reduction")
    what = "their mean" if isinstance(value, Tensor) else "the loss"
    remedy = f"return {what}, a tensor ()"
    if reduction == "none":
        remedy = "use loss.reduction=mean"
    elif group == "step":
        remedy += ", or an experiments.StepOutput with it"
    raise UsageError(f"{target_of(config, group)}: returns {found} for a batch; {remedy}")


def report_broadcast(
    config: Mapping[str, Any], loss_func: nn.Module, outputs: Any, targets: Any
) -> None:
    """Say if a loss of one's own compares each row's output with all rows' targets, as (rows, 1)
    against (rows,) does. The rows are repeated until their number shows in a shape.
    """
    if type(loss_func).__module__ == nn.MSELoss.__module__:
        return
    sizes = {size for part in tensors_of((outputs, targets)) for size in part.shape[1:]}
    rows = next(n for n in count(7) if n not in sizes)
    given = row_count(targets)

    def repeated(part: Any) -> Any:
        if not isinstance(part, Tensor) or part.ndim == 0 or len(part) != given:
            return part
        return part[torch.arange(rows, device=part.device) % given]

    watch = BroadcastWatch(rows)
    try:
        with torch.no_grad(), watch:
            loss_func(map_tensors(repeated, outputs), map_tensors(repeated, targets))
    except Exception:  # the loss does not take this number of rows
        return
    if watch.found:
        one, other = (shape_of(torch.empty(shape, device="meta")) for shape in watch.found)
        print(
            f"warning: {target_of(config, 'loss')}: broadcasts {one} and {other} to (rows, rows), "
            "so that each row meets the targets of all; give both one shape",
            file=sys.stderr,
        )


class BroadcastWatch(TorchDispatchMode):
    """Finds an operation that broadcasts two tensors of `rows` rows each against each other.

    found: their shapes, the first such pair
    """

    def __init__(self, rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = rows
        self.found: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self.found is None and torch.Tag.pointwise in func.tags:
            shapes = [tuple(arg.shape) for arg in args if isinstance(arg, Tensor) and arg.ndim]
            by_rows = [shape for shape in shapes if shape[0] == self.rows]
            # aligned at their ends, the rows of the shorter one meet another dimension
            pairs = [(a, b) for a in by_rows for b in by_rows if len(a) == len(b) + 1]
            self.found = next((pair for pair in pairs if 1 in pair[0]), None)
        return func(*args, **(kwargs or {}))


def check_optimizer(config: Mapping[str, Any], opt: Any, model: nn.Module) -> None:
    """Raise UsageError for an optimizer that the loop cannot step."""
    target = target_of(config, "optimizer")
    if not isinstance(opt, Optimizer):
        raise UsageError(
            f"{target}: returned a {type(opt).__name__}; return a torch.optim.Optimizer"
        )
    if any(isinstance(group["lr"], Tensor) for group in opt.param_groups if "lr" in group):
        raise UsageError(
            f"{target}: its lr is a tensor, which is neither logged nor scheduled; use a number"
        )
    if requires_argument(opt.step):
        raise UsageError(
            f"{target}: its step requires a closure that computes the loss again, which the "
            "training loop does not give; use an optimizer that steps without, as SGD or Adam do"
        )
    groups = [group for group in opt.param_groups if group.get("fused")]
    if any(p.is_complex() for group in groups for p in group["params"]):
        raise UsageError(
            "optimizer.fused=true: takes real parameters, and the model has complex ones; use "
            "optimizer.fused=false"
        )
    if isinstance(opt, SparseAdam) and not any(getattr(m, "sparse", 0) for m in model.modules()):
        raise UsageError(
            f"{target}: needs sparse gradients, and no module of the model has sparse=True; "
            "use optimizer=adam"
        )


def requires_argument(function: Callable[..., Any]) -> bool:
    """Whether a function cannot be called without a positional argument."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return any(p.default is p.empty and p.kind in positional for p in parameters)
