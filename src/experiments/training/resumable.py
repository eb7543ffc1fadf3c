"""Finds what loaders, optimizers and schedules of one's own keep outside a checkpoint."""

import copy
import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from experiments.data.checks import same_bits
from experiments.data.loaders import Loader, TensorLoader, TorchLoader
from experiments.data.samples import preserved_generators, seed_generators
from experiments.errors import UsageError
from experiments.training.determinism import global_state, restore_global_state
from experiments.training.frozen import frozen

# Steps of a copy of an optimizer: more than those after which it may act for the first time.
STEPS = 12


def check_loaders(config: dict[str, Any], *loaders: Loader) -> None:
    """Raise UsageError if a loader of one's own gives another batch when an epoch is entered at it,
    as a resumed run does, with the generators as they were.
    """
    for loader in loaders:
        if type(loader) in (TensorLoader, TorchLoader) and "batches" not in vars(loader):
            continue
        with preserved_generators():
            seed_generators(0)
            at = min(1, len(loader) - 1)
            expected, state = batch_at(loader, 0, at)
            restore_global_state(*state)
            found, _ = batch_at(loader, at, at)
        if not all(same_bits(a, b) for a, b in zip(expected, found, strict=True)):
            raise UsageError(
                f"loader._target_={config['loader']['_target_']}: batch {at} of an epoch differs "
                "when the epoch is entered there, as by a resumed run; make it a function of epoch "
                "and batch number, with an order from a torch.Generator seeded by the epoch; only "
                "what a batch itself draws may come from random, np.random and torch"
            )


def batch_at(loader: Loader, start: int, number: int) -> tuple[list[Tensor], Any]:
    """The tensors of a batch of the first epoch, which is entered at batch `start`, and the state
    of the global generators before it was read.
    """
    batches = loader.batches(0, start)
    for _ in range(start, number):
        next(batches)
    state = global_state()
    batch = [part.clone() for part in tree_leaves(next(batches)) if isinstance(part, Tensor)]
    if isinstance(batches, types.GeneratorType):
        batches.close()
    return batch, state


def check_optimizer_state(config: dict[str, Any], opt: Optimizer) -> None:
    """Raise UsageError if an optimizer of one's own has an attribute that goes on changing. A copy
    of it takes the steps.
    """
    own_state_dict = type(opt).state_dict is not Optimizer.state_dict
    if own_state_dict or opt._optimizer_state_dict_post_hooks or is_torchs(type(opt)):
        return
    with preserved_generators():
        try:
            name = evolving_attribute(opt)
        except Exception:  # it cannot be copied, or takes other gradients: unknown
            return
    if name is not None:
        raise UsageError(
            f"optimizer._target_={config['optimizer']['_target_']}: its attribute {name} changes "
            "in training and is in no checkpoint, so a resumed run would end with other numbers; "
            "keep it in self.state[p] or in a parameter group"
        )


def is_torchs(kind: type) -> bool:
    """Whether a class is torch's or this package's."""
    return kind.__module__.partition(".")[0] in ("torch", "experiments")


def evolving_attribute(opt: Optimizer) -> str | None:
    """The first attribute of an optimizer that changes between the first and a later step."""
    # of every optimizer: in its state_dict, or the same in each process
    internal = vars(torch.optim.SGD([torch.zeros(())]))
    twin = object.__new__(type(opt))
    # copy.deepcopy(opt) would leave out what is not in its state_dict
    twin.__dict__ = copy.deepcopy(vars(opt))
    twin._optimizer_step_pre_hooks = OrderedDict()  # they may hold the optimizer's own weights
    twin._optimizer_step_post_hooks = OrderedDict()

    def attributes() -> dict[str, Any]:
        return {name: frozen(value) for name, value in vars(twin).items() if name not in internal}

    first: dict[str, Any] = {}
    for number in range(STEPS):
        for group in twin.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, 1e-3) if p.requires_grad else None
        twin.step()
        if number == 0:
            first = attributes()
    return next((name for name, value in attributes().items() if first.get(name) != value), None)


def watch_hooks(config: dict[str, Any], opt: Optimizer, *parts: nn.Module) -> None:
    """Say after the second step if a step hook of the user's keeps something that changes and that
    is in no checkpoint: averages of the weights, say.
    """
    hooks = [*opt._optimizer_step_pre_hooks.values(), *opt._optimizer_step_post_hooks.values()]
    if not hooks:
        return
    first: dict[str, Any] = {}
    seen = 0

    def look(opt: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal first, seen
        seen += 1
        if seen > 2:
            return
        known = {id(t) for part in parts for t in (*part.parameters(), *part.buffers())}
        now = {key: value for hook in hooks for key, value in kept(hook, known, hook_name(hook))}
        changed = next((key for key, value in now.items() if first.get(key, value) != value), None)
        first = now
        if seen == 2 and changed is not None:
            print(
                f"warning: optimizer._target_={config['optimizer']['_target_']}: {changed} of a "
                "step hook changes in training and is in no checkpoint, so a resumed run goes on "
                "with another; keep it in the optimizer's state or in a buffer of the model",
                file=sys.stderr,
            )

    opt.register_step_post_hook(look)


def hook_name(hook: Any) -> str:
    """The name of a function, or of the class of another callable."""
    return str(getattr(hook, "__name__", None) or type(hook).__name__)


def kept(value: Any, known: set[int], name: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """What can be reached from a hook, by name: the identity and version of tensors other than the
    known ones, and numbers.
    """
    if depth > 6 or id(value) in known or isinstance(value, Optimizer | type):
        return
    if isinstance(value, Tensor):
        yield name, (id(value), value._version)
    elif isinstance(value, bool | int | float):
        yield name, repr(value)
    else:
        for key, part in parts_of(value):
            yield from kept(part, known, f"{name}.{key}", depth + 1)


def parts_of(value: Any) -> Iterable[tuple[Any, Any]]:
    """The parts of a value by name: of a function the variables that it closes over."""
    if isinstance(value, types.MethodType):
        return [("self", value.__self__)]
    if isinstance(value, functools.partial):
        return [*enumerate(value.args), *value.keywords.items()]
    if isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        return [(name, cell.cell_contents) for name, cell in cells]
    if isinstance(value, nn.Module):
        return [*value.named_parameters(), *value.named_buffers()]
    if isinstance(value, list | tuple):
        return enumerate(value)
    return (value if isinstance(value, dict) else getattr(value, "__dict__", {})).items()


def check_rates(config: dict[str, Any], scheduler: Any) -> None:
    """Raise UsageError if a function of LambdaLR or MultiplicativeLR gives another factor when it
    is asked again for the same step: torch keeps no state of functions.
    """
    for part in [scheduler, *getattr(scheduler, "_schedulers", [])]:
        for function in getattr(part, "lr_lambdas", []):
            if not isinstance(function, types.FunctionType | types.MethodType | functools.partial):
                continue  # of another callable torch keeps the attributes
            with preserved_generators():
                factors = []
                for _ in range(2):
                    seed_generators(0)
                    factors.append(function(1))
            if factors[0] != factors[1]:
                raise UsageError(
                    f"scheduler._target_={config['scheduler']['_target_']}: its function "
                    f"{hook_name(function)} gives {factors[0]} and then {factors[1]} for the same "
                    "step, so a resumed run would have other rates; make it a function of the "
                    "step, or an object whose attributes hold what it counts"
                )
