"""What a graph of tensor operations would leave out: loaders of one's own, and hooks.

Everything here is found by looking at the parts, so that it is refused by name. The comparison with
eager steps (eager_check.py) is the safety net for what nobody has thought of.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, NoReturn

import torch.nn.modules.module
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._pytree import tree_leaves

from experiments.data import Split
from experiments.data.arrays import MappedSplit
from experiments.data.loaders import BatchRows, TensorLoader, TorchLoader
from experiments.errors import UsageError
from experiments.training import parts
from experiments.training.objective import Objective

# what the compiled step calls itself or replaces, by the class that defines it
LOADER_NAMES = {"__len__", "__iter__", "batches", "indices", "rows", "split", "device"}
ROWS_NAMES = {"__len__", "batches", "windows", "rows", "batch_size", "shuffle", "drop_last"}
SPLIT_NAMES = {
    "__getitem__",
    "__getitems__",
    "__iter__",
    "__len__",
    "prefetched",
    "gather",
    "scaled",
}
BACKWARD_HOOKS = ("_backward_pre_hooks", "_backward_hooks")
FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def refuse(part: str, what: str, remedy: str = "") -> NoReturn:
    """Raise a UsageError about a part that the compiled step would not compute as it is."""
    raise UsageError(
        f"trainer.compile=true: {part}: {what}; {remedy}{' or ' if remedy else ''}"
        "use trainer.compile=false"
    )


def check_loader(loader: Any) -> None:
    """Raise UsageError unless the loader's batches are rows gathered from its tensors."""
    if not isinstance(loader, TensorLoader):
        if isinstance(loader, TorchLoader) and loader.split is None:
            refuse(class_name(loader.dataset), "it is read sample by sample")
        refuse(class_name(loader), "needs whole tensors", "use loader=tensors")
    changed = [
        *(f"{class_name(loader)}.{name}" for name in own(loader, TensorLoader, LOADER_NAMES)),
        *(f"{class_name(loader.rows)}.{name}" for name in own(loader.rows, BatchRows, ROWS_NAMES)),
    ]
    if not isinstance(loader.split, Split):
        refuse(class_name(loader.split), "is no experiments.data.Split", "make it one")
    if type(loader.split) is not MappedSplit:
        split_names = own(loader.split, Split, SPLIT_NAMES)
        changed += [f"{class_name(loader.split)}.{name}" for name in split_names]
    if changed:
        refuse(changed[0], "the compiled step gathers its rows without it", "use loader=tensors")


def check_step(objective: Objective) -> None:
    """Raise UsageError for a step that takes its own optimizer steps."""
    if objective.is_manual:
        refuse(class_name(objective.step), "takes its own optimizer steps, which are not one graph")


def own(part: Any, known: type, names: set[str]) -> Iterator[str]:
    """Those of `names` that a subclass of a known class, or the object itself, defines anew."""
    for kind in type(part).__mro__[: type(part).__mro__.index(known)]:
        yield from sorted(names & vars(kind).keys())
    # methods assigned to the object; its data lies there, too
    methods = {name for name in names if inspect.isfunction(vars(known).get(name))}
    yield from sorted(methods & vars(part).keys())


def check_optimizer(opt: Optimizer, parameters: dict[str, nn.Parameter]) -> None:
    """Raise UsageError if Python code runs in a step besides the optimizer's own formula.

    parameters: all of the model and the loss, by name.
    """
    part = class_name(opt)
    step = vars(opt).get("step")
    # torch's schedulers wrap it to see that it is called
    if step is not None and getattr(step, "__wrapped__", None) is not type(opt).step:
        refuse(part, "the compiled step would not call the step() assigned to it")
    if "zero_grad" in vars(opt):
        refuse(part, "the compiled step would not call the zero_grad() assigned to it")
    step_hooks: list[Any] = [
        *(opt._optimizer_step_pre_hooks | opt._optimizer_step_post_hooks).values(),
        *_global_optimizer_pre_hooks.values(),
        *_global_optimizer_post_hooks.values(),
    ]
    for hook in step_hooks:
        # trainer.clip_norm is part of the graph
        if getattr(hook, "__module__", None) != parts.__name__:
            refuse(part, f"the compiled step would not call its step hook {hook_name(hook)}")
    options = [option for group in opt.param_groups for option in group.items()]
    for name, value in options:
        if name != "params" and any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            refuse(f"optimizer.{name}", "a tensor, whose changes the compiled step would not "
                   "notice", "use a number")  # fmt: skip
    for name, p in parameters.items():
        for hooks in (p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None)):
            for gradient_hook in (hooks or {}).values():
                refuse(name, f"the compiled step would not call its gradient hook "
                       f"{hook_name(gradient_hook)}")  # fmt: skip


def check_modules(module: nn.Module) -> None:
    """Raise UsageError for hooks of modules that run with each backward pass, or for all modules.

    Forward hooks can be traced; see `observed_forward_hooks`.
    """
    everywhere = vars(torch.nn.modules.module)
    for kind in (*BACKWARD_HOOKS, *FORWARD_HOOKS):
        for hook in everywhere[f"_global{kind}"].values():
            refuse("torch.nn", f"the compiled step would not call the global hook "
                   f"{hook_name(hook)}")  # fmt: skip
    for name, part in module.named_modules():
        for kind in BACKWARD_HOOKS:
            for hook in (getattr(part, kind, None) or {}).values():
                refuse(name, f"the compiled step would not call its backward hook "
                       f"{hook_name(hook)}")  # fmt: skip


@contextlib.contextmanager
def observed_forward_hooks(root: str, module: nn.Module) -> Iterator[None]:
    """Refuse the forward hooks that return nothing in the block: what they are there for, a record
    or a print, is not part of a graph. Those of torch (weight_norm, pruning) are known.
    """
    silent: dict[Any, str] = {}
    observed: list[tuple[dict[int, Any], int, Any]] = []

    def observe(hook: Any, name: str) -> Any:
        silent[hook] = name

        def observer(*args: Any, **kwargs: Any) -> Any:
            result = hook(*args, **kwargs)
            if result is not None:
                silent.pop(hook, None)
            return result

        return observer

    for name, part in module.named_modules():
        for kind in FORWARD_HOOKS:
            hooks = getattr(part, kind, None) or {}
            for number, hook in hooks.items():
                if not str(getattr(hook, "__module__", "")).startswith("torch."):
                    observed.append((hooks, number, hook))
                    hooks[number] = observe(hook, f"{root}.{name}".rstrip("."))
    try:
        yield
    finally:
        for hooks, number, hook in observed:
            hooks[number] = hook
    for hook, name in silent.items():
        refuse(name, f"the compiled step would not call its forward hook {hook_name(hook)}, which "
               "returns nothing")  # fmt: skip


def class_name(part: Any) -> str:
    """The full name of an object's class."""
    return f"{type(part).__module__}.{type(part).__qualname__}"


def hook_name(hook: Any) -> str:
    """The name of a function, or of the class of another callable."""
    return str(getattr(hook, "__qualname__", None) or type(hook).__qualname__)
