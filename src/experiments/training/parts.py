"""Build the parts of a run from its config and check that they fit together."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.data import Data, reads_samples
from experiments.data.loaders import Loader, TensorLoader, evaluation_options, select
from experiments.errors import UsageError
from experiments.training.build import build
from experiments.training.checks import (
    check_last_batch,
    check_state,
    check_values,
    mismatch_remedy,
    report_mean,
)


@dataclass(frozen=True)
class Parts:
    """The parts of a run. The loaders yield batches on the device."""

    model: nn.Module
    loss_func: nn.Module
    opt: Optimizer
    scheduler: Any
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
    loss_func = build(config, "loss").to(device)
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
    check_fit(config, model, loss_func, data.train)
    check_values(config, model, loss_func, data)
    copies = check_state(config, model, loss_func, data.train)
    check_last_batch(config, model, loss_func, data.train, train_loader)
    for loader in (train_loader, valid_loader, test_loader):
        if isinstance(loader, TensorLoader):
            loader.copies = copies
    report_mean(config, model, loss_func, data.train)
    loss_func.train()
    opt = build(config, "optimizer", trained_parameters(model, loss_func))
    if trainer["clip_norm"] is not None:
        clip_gradients(opt, trainer["clip_norm"])
    steps = trainer["epochs"] * -(-len(train_loader) // trainer["accumulate"])
    scheduler = build_scheduler(config, opt, steps)
    return Parts(model, loss_func, opt, scheduler, train_loader, valid_loader, test_loader)


def build_model(config: dict[str, Any], device: str = "cpu") -> nn.Module:
    """The model of a config, on a device, computing in `trainer.precision`.

    bfloat16 means torch's autocast: weights, logits and operations that need the range stay
    float32.
    """
    model: nn.Module = build(config, "model").to(device)
    if config["trainer"]["precision"] == "bfloat16":
        forward = model.forward

        def autocast(x: Tensor) -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                logits: Tensor = forward(x)
            return logits.float()

        model.forward = autocast
    return model


def trained_parameters(model: nn.Module, loss_func: nn.Module) -> Any:
    """What the optimizer gets: the parameters of the model, then those of the loss."""
    of_loss = list(loss_func.parameters())
    return [*model.parameters(), *of_loss] if of_loss else model.parameters()


def build_scheduler(config: dict[str, Any], opt: Optimizer, steps: int) -> Any:
    """The scheduler of a config; if it accepts `total_steps`, it gets the steps of the run."""
    parameters = inspect.signature(build(config, "scheduler").func).parameters
    options = {"total_steps": steps} if "total_steps" in parameters else {}
    return build(config, "scheduler", opt, **options)


def check_fit(config: dict[str, Any], model: nn.Module, loss_func: nn.Module, split: Any) -> None:
    """Raise UsageError if the model rejects the data, or the loss the logits and targets."""
    device = next(model.parameters()).device
    # select copies: rows of a memory-mapped file must not be written to by an in-place layer
    x, y = (part.to(device) for part in select(split, list(range(min(2, len(split))))))
    logits = None
    try:
        with torch.no_grad():
            logits = model.eval()(x)
            loss_func.eval()(logits, y)
    except (IndexError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"model._target_={config['model']['_target_']}: does not fit data of "
            f"x {(len(split), *x.shape[1:])}, y {(len(split), *y.shape[1:])} ({reason}); "
            f"{mismatch_remedy(loss_func, x, y, logits)}"
        ) from error
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
