"""Build the parts of a run from its config and check that they fit together."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from experiments.data import Data, reads_samples
from experiments.data.loaders import Loader, TensorLoader, evaluation_options, select
from experiments.errors import UsageError
from experiments.training.accuracy import OF_CLASSES, has_accuracy
from experiments.training.build import build, ends_in_user_code, user_line
from experiments.training.checks import (
    check_last_batch,
    check_state,
    check_values,
    mismatch_remedy,
    report_mean,
)
from experiments.training.compatibility import (
    check_loss,
    check_monitor,
    check_optimizer,
    check_outputs,
    check_parameters,
    report_broadcast,
)
from experiments.training.probe import preserved_buffers
from experiments.training.resumable import (
    check_loaders,
    check_optimizer_state,
    check_rates,
    watch_hooks,
)
from experiments.training.scheduling import Schedule, build_schedule


@dataclass(frozen=True)
class Parts:
    """The parts of a run. The loaders yield batches on the device."""

    model: nn.Module
    loss_func: nn.Module
    opt: Optimizer
    schedule: Schedule
    train_loader: Any
    valid_loader: Loader
    test_loader: Loader

    @property
    def parameter_names(self) -> list[str]:
        """The names of the parameters of the model and the loss, in order."""
        names = [name for name, _ in self.model.named_parameters()]
        return names + [f"loss.{name}" for name, _ in self.loss_func.named_parameters()]


def build_parts(config: dict[str, Any], data: Data, device: str) -> Parts:
    """Build the parts of a resolved config on a device, `cpu` or `cuda`.

    Raises UsageError if they cannot be built or do not fit together.
    """
    trainer, batch_size = config["trainer"], config["loader"]["batch_size"]
    model = build_model(config, device)
    check_parameters(config, model)
    loss_func = build_loss(config).to(device)
    train_loader = build(config, "loader", data.train, seed=config["seed"], device=device)
    valid_loader, test_loader = (
        build(config, "loader", split, device=device, **evaluation_options(split, batch_size))
        for split in (data.valid, data.test)
    )
    if len(train_loader) == 0:
        raise UsageError(
            f"loader.batch_size={batch_size}: drop_last leaves no batch of {len(data.train)} rows; "
            "make it smaller"
        )
    with preserved_buffers(model, loss_func):
        check_fit(config, model, loss_func, data.train)
        check_values(config, model, loss_func, data)
        copies = check_state(config, model, loss_func, data.train)
        check_last_batch(config, model, loss_func, data.train, train_loader)
        report_mean(config, model, loss_func, data.train)
    for loader in (train_loader, valid_loader, test_loader):
        if isinstance(loader, TensorLoader):
            loader.copies = copies
    check_loaders(config, train_loader, valid_loader)
    loss_func.train()
    opt = build(config, "optimizer", trained_parameters(model, loss_func))
    check_optimizer(config, opt, model)
    check_optimizer_state(config, opt)
    watch_hooks(config, opt, model, loss_func)
    if trainer["clip_norm"] is not None:
        clip_gradients(opt, trainer["clip_norm"])
    schedule = build_schedule(config, opt, -(-len(train_loader) // trainer["accumulate"]))
    check_rates(config, schedule.scheduler)
    return Parts(model, loss_func, opt, schedule, train_loader, valid_loader, test_loader)


def build_model(config: dict[str, Any], device: str = "cpu") -> nn.Module:
    """The model of a config, on a device, computing in `trainer.precision`.

    bfloat16 means torch's autocast: weights, logits and operations that need the range stay
    float32.
    """
    model: nn.Module = build(config, "model").to(device)
    if config["trainer"]["precision"] == "bfloat16":
        forward = model.forward

        def as_float32(part: Any) -> Any:
            floating = isinstance(part, Tensor) and part.is_floating_point()
            return part.float() if floating else part

        def autocast(x: Tensor) -> Any:
            with torch.autocast(device, torch.bfloat16):
                logits = forward(x)
            return logits.float() if isinstance(logits, Tensor) else tree_map(as_float32, logits)

        model.forward = autocast
    return model


def trained_parameters(model: nn.Module, loss_func: nn.Module) -> Any:
    """What the optimizer gets: the parameters of the model, then those of the loss."""
    of_loss = list(loss_func.parameters())
    return [*model.parameters(), *of_loss] if of_loss else model.parameters()


def build_loss(config: dict[str, Any]) -> nn.Module:
    """The loss of a config. A list for an argument of torch's losses that is a tensor, such as
    `weight`, becomes float32. A function of outputs and targets, with `_partial_: true`, becomes a
    module.

    Raises UsageError if it cannot be built, or is neither a module nor a function.
    """
    node = config["loss"]
    tensors = {}
    module = node["_target_"].rpartition(".")[0]
    if module in ("torch.nn", nn.MSELoss.__module__):
        tensors = {
            key: torch.tensor(value, dtype=torch.float32)
            for key, value in node.items()
            if key in ("weight", "pos_weight") and is_numbers(value)
        }
    if tensors:
        rest = {key: value for key, value in node.items() if key not in tensors}
        config = {**config, "loss": {**rest, "_partial_": True}}
    try:
        loss_func = build(config, "loss", **tensors)
    except UsageError as error:
        if "required positional argument" not in str(error) or node.get("_partial_"):
            raise
        raise UsageError(f"{error}; a function of them needs loss._partial_=true") from None
    if node.get("_partial_") or inspect.isfunction(loss_func):
        return FunctionLoss(loss_func)
    if not isinstance(loss_func, nn.Module):
        raise UsageError(
            f"loss._target_={node['_target_']}: is a {type(loss_func).__name__}, expected a "
            "torch.nn.Module, or, with _partial_: true, a function of outputs and targets"
        )
    return loss_func


class FunctionLoss(nn.Module):
    """A function of outputs and targets as a loss."""

    def __init__(self, function: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        """The loss, float32 ()."""
        return self.function(outputs, targets)


def is_numbers(value: object) -> bool:
    """Whether a value of a config is a list of numbers."""
    numbers = (int, float)
    return isinstance(value, list) and all(isinstance(item, numbers) for item in value)


def check_fit(config: dict[str, Any], model: nn.Module, loss_func: nn.Module, split: Any) -> None:
    """Raise UsageError if the model rejects the data, or the loss the logits and targets."""
    device = next(model.parameters()).device
    # select copies: rows of a memory-mapped file must not be written to by an in-place layer
    x, y = (part.to(device) for part in select(split, list(range(min(2, len(split))))))
    logits = None
    try:
        with torch.no_grad():
            logits = model.eval()(x)
            check_outputs(config, loss_func, logits, y)
            loss = loss_func.eval()(logits, y)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if ends_in_user_code(error.__traceback__):
            raise
        reason = str(error).partition("\n")[0] + user_line(error.__traceback__)
        raise UsageError(
            f"model._target_={config['model']['_target_']}: does not fit data of "
            f"x {(len(split), *x.shape[1:])}, y {(len(split), *y.shape[1:])} ({reason}); "
            f"{mismatch_remedy(loss_func, x, y, logits)}"
        ) from error
    check_loss(config, loss)
    report_broadcast(config, loss_func, logits, y)
    check_monitor(config, loss_func, logits, y)
    if not (has_accuracy(logits, y, loss_func) or isinstance(loss_func, OF_CLASSES)):
        return
    if reads_samples(split) or split.y.is_floating_point() or logits.ndim != 2:
        return
    highest = int(split.y.max())
    if highest >= logits.shape[1] and highest != getattr(loss_func, "ignore_index", None):
        raise UsageError(
            f"model.out_features={logits.shape[1]}: the data has {highest + 1} classes; "
            "change model.out_features or data"
        )


def clip_gradients(opt: Optimizer, max_norm: float) -> None:
    """Clip the gradient to a norm of at most `max_norm` before each step."""
    parameters = [p for group in opt.param_groups for p in group["params"]]

    def clip(opt: Optimizer, args: Any, kwargs: Any) -> None:
        nn.utils.clip_grad_norm_(parameters, max_norm)

    opt.register_step_pre_hook(clip)
