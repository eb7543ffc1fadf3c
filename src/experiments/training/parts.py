"""Build the parts of a run from its config."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from experiments.data import Data
from experiments.data.loaders import Loader, TensorLoader, evaluation_options
from experiments.directory.trust import locate
from experiments.errors import UsageError
from experiments.training import parameter_groups
from experiments.training.build import build, build_callable, takes
from experiments.training.callbacks import Aids
from experiments.training.checks import (
    Reader,
    check_last_batch,
    check_state,
    check_values,
    report_mean,
)
from experiments.training.compatibility import check_optimizer, check_parameters
from experiments.training.first_batch import (
    check_batches,
    check_fit,
    check_metrics,
    check_monitor,
    check_names,
)
from experiments.training.initial_weights import Initial, load_initial
from experiments.training.metrics import Metric, as_metric
from experiments.training.objective import NoLoss, Objective
from experiments.training.own_state import OwnOptimizers
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
    """The parts of a run. The loaders yield batches on the device.

    maximize: whether a larger value of `trainer.monitor` is better
    """

    objective: Objective
    opt: Optimizer
    schedule: Schedule
    train_loader: Any
    valid_loader: Loader
    test_loader: Loader
    metrics: Mapping[str, Metric]
    aids: Aids
    maximize: bool

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self.objective.model

    @property
    def loss_func(self) -> nn.Module:
        """The loss, which may have parameters of its own."""
        return self.objective.loss_func

    @property
    def parameter_names(self) -> list[str]:
        """The names of the parameters of the model, the loss and the step, in order."""
        names = [name for name, _ in self.model.named_parameters()]
        names += [f"loss.{name}" for name, _ in self.loss_func.named_parameters()]
        step = self.objective.step
        of_step = step.named_parameters() if isinstance(step, nn.Module) else []
        return names + [f"step.{name}" for name, _ in of_step]


def build_parts(
    config: dict[str, Any], data: Data, device: str, initial: Initial | None = None
) -> Parts:
    """Build the parts of a resolved config on a device, `cpu` or `cuda`.

    initial: weights that the model starts from. Raises UsageError if the parts cannot be built or
    do not fit together.
    """
    trainer = config["trainer"]
    model = build_model(config, device)
    check_parameters(config, model)
    if initial is not None:  # before a step may copy the model
        load_initial(model, initial)
    loss_func = build_loss(config).to(device)
    train_loader = build(config, "loader", data.train, seed=config["seed"], device=device)
    check_batches(config, data, train_loader)
    valid_loader, test_loader = (
        evaluation_loader(config, split, device) for split in (data.valid, data.test)
    )
    objective = build_objective(config, model, loss_func)
    parameter_groups.freeze(config, objective)
    metrics = build_metrics(config, loss_func)
    read = Reader(train_loader, device)
    with preserved_buffers(objective):
        output = check_fit(config, objective, data.train, read)
        names = ["loss", *output.numbers, *check_metrics(metrics, output)]
        check_names(config, output, names)
        maximize = check_monitor(trainer, names, metrics, output)
        check_values(config, objective, data, read)
        copies = check_state(config, objective, data.train, read)
        check_last_batch(config, objective, data.train, train_loader, read)
        report_mean(config, objective, data.train, read)
    for loader in (train_loader, valid_loader, test_loader):
        if isinstance(loader, TensorLoader):
            loader.copies = copies
    check_loaders(config, train_loader, valid_loader)
    objective.train()
    opt = build_optimizer(config, objective)
    if trainer["clip_norm"] is not None:
        clip_gradients(opt, trainer["clip_norm"])
    steps = -(-len(train_loader) // trainer["accumulate"])
    schedule = build_schedule(config, opt, steps, maximize=maximize)
    check_rates(config, schedule.scheduler)
    return Parts(objective, opt, schedule, train_loader, valid_loader, test_loader, metrics,
                 Aids(config, objective), maximize)  # fmt: skip


def evaluation_loader(config: dict[str, Any], split: Any, device: str = "cpu") -> Loader:
    """The loader of a split whose rows are evaluated, each once and in order."""
    node = {key: value for key, value in config["loader"].items() if key != "sampler"}
    options = evaluation_options(split, config["loader"]["batch_size"], collate_of(config))
    loader: Loader = build({**config, "loader": node}, "loader", split, device=device, **options)
    return loader


def collate_of(config: dict[str, Any]) -> Any:
    """What makes a batch of samples, where a config names it; None: the Dataset's own way."""
    node = config["loader"].get("collate_fn")
    return node and build_callable("loader.collate_fn", node)


def build_objective(config: dict[str, Any], model: nn.Module, loss_func: nn.Module) -> Objective:
    """The model and the loss with the step and the augmentation of a config.

    Raises UsageError if the step cannot be built, or leaves a part of the config unused.
    """
    node = config["step"]
    optimizer = functools.partial(build, parameter_groups.for_target(config), "optimizer")
    step = build_callable("step", node, model=model, loss_func=loss_func, optimizer=optimizer)
    target = f"step._target_={node['_target_']}"
    if not callable(step):
        raise UsageError(
            f"{target}: a {type(step).__name__}, expected a function of model and batch, or an "
            "object that is called with them"
        )
    if isinstance(step, nn.Module):
        step.to(next(model.parameters()).device)
    augment = [build_callable(f"augment.{name}", part) for name, part in config["augment"].items()]
    objective = Objective(model, loss_func, step, augment)
    made = locate(str(node["_target_"]))
    if objective.is_manual:
        check_manual(config, target, made)
    if not (objective.takes_loss or takes(made, "loss_func") or is_unset(config["loss"])):
        raise UsageError(
            f"{target}: has no parameter loss_func, so loss.* would change nothing; use loss=none, "
            "or give the step that parameter"
        )
    return objective


def check_manual(config: dict[str, Any], target: str, made: Any) -> None:
    """Raise UsageError for what a step that takes its own optimizer steps would ignore."""
    if not takes(made, "optimizer"):
        raise UsageError(
            f"{target}: has an update(), so it takes its own optimizer steps, and its __init__ has "
            "no parameter optimizer; give it one: a function from parameters to an optimizer, as "
            "optimizer.* says"
        )
    if config["trainer"]["accumulate"] > 1:
        raise UsageError(
            f"trainer.accumulate={config['trainer']['accumulate']}: {target} takes its own "
            "optimizer steps, one for each batch; use trainer.accumulate=1 and a larger "
            "loader.batch_size"
        )
    if config["scheduler"]["_target_"] != "experiments.training.schedules.constant":
        raise UsageError(
            f"scheduler._target_={config['scheduler']['_target_']}: {target} takes its own "
            "optimizer steps and would move the rates itself; use scheduler=constant"
        )


def is_unset(node: dict[str, Any]) -> bool:
    """Whether the loss is that of `loss=none`."""
    return str(node["_target_"]) == f"{NoLoss.__module__}.NoLoss"


def build_metrics(config: dict[str, Any], loss_func: nn.Module) -> dict[str, Metric]:
    """The metrics of a config by name. Raises UsageError if one cannot be built."""
    device = next((p.device for p in loss_func.parameters()), None)
    metrics = {
        name: as_metric(name, build_callable(f"metrics.{name}", node, loss_func=loss_func))
        for name, node in config["metrics"].items()
    }
    return {name: metric.to(device) if device and isinstance(metric, nn.Module) else metric
            for name, metric in metrics.items()}  # fmt: skip


def build_optimizer(config: dict[str, Any], objective: Objective) -> Any:
    """The optimizer of the objective's parameters; of a step that has its own, all of these.

    Raises UsageError if it cannot be built or the loop cannot step it.
    """
    if objective.is_manual:
        parameter_groups.check_manual(config)
        return OwnOptimizers(objective.step)
    parameters = parameter_groups.grouped(config, objective) or trained_parameters(objective)
    opt = build(parameter_groups.for_target(config), "optimizer", parameters)
    check_optimizer(config, opt, objective.model)
    check_optimizer_state(config, opt)
    watch_hooks(config, opt, objective)
    return opt


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

        def autocast(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(device, torch.bfloat16):
                logits = forward(*args, **kwargs)
            return logits.float() if isinstance(logits, Tensor) else tree_map(as_float32, logits)

        model.forward = autocast
    return model


def trained_parameters(objective: Objective) -> Any:
    """What the optimizer gets: the parameters of the model, then those of the loss and the step."""
    own = list(objective.parameters())
    of_model = list(objective.model.parameters())
    return own if len(own) > len(of_model) else objective.model.parameters()


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


def clip_gradients(opt: Any, max_norm: float) -> None:
    """Clip the gradient to a norm of at most `max_norm` before each step."""
    if isinstance(opt, OwnOptimizers):
        for own in opt.optimizers.values():
            clip_gradients(own, max_norm)
        return
    parameters = [p for group in opt.param_groups for p in group["params"]]

    def clip(opt: Optimizer, args: Any, kwargs: Any) -> None:
        nn.utils.clip_grad_norm_(parameters, max_norm)

    opt.register_step_pre_hook(clip)
