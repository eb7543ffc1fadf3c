"""Build the parts of a run from its config and check that they fit together."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from experiments.config.names import suggest
from experiments.data import Data, reads_samples
from experiments.data.loaders import Loader, TensorLoader, evaluation_options
from experiments.data.nests import describe, is_tensor
from experiments.directory.trust import locate
from experiments.errors import UsageError
from experiments.training import parameter_groups
from experiments.training.accuracy import Accuracy, has_accuracy, is_of_classes
from experiments.training.build import (
    build,
    build_callable,
    ends_in_user_code,
    takes,
    user_line,
)
from experiments.training.callbacks import Aids
from experiments.training.checks import (
    Reader,
    check_last_batch,
    check_state,
    check_values,
    evaluated,
    mismatch_remedy,
    report_mean,
)
from experiments.training.compatibility import (
    check_loss,
    check_optimizer,
    check_outputs,
    check_parameters,
    report_broadcast,
)
from experiments.training.initial_weights import Initial, load_initial
from experiments.training.metrics import Metric, Running, as_metric, maximizes
from experiments.training.objective import NoLoss, Objective, StepOutput
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


def check_batches(config: dict[str, Any], data: Data, loader: Any) -> None:
    """Raise UsageError for a loader without batches, or for samples that make none."""
    if len(loader) == 0:
        raise UsageError(
            f"loader.batch_size={config['loader']['batch_size']}: drop_last leaves no batch of "
            f"{len(data.train)} rows; make it smaller"
        )
    if getattr(loader, "collate", None) is not None:
        return
    for name, split in data.splits.items():
        uneven = data.scans[name].uneven
        if uneven is not None and not hasattr(split, "collate_fn"):
            raise UsageError(
                f"data: a Dataset: {uneven}, so they make no batch; give all rows of {name} one "
                "shape, or the Dataset a collate_fn"
            )


def evaluation_loader(config: dict[str, Any], split: Any, device: str = "cpu") -> Loader:
    """The loader of a split whose rows are evaluated, each once and in order."""
    node = {key: value for key, value in config["loader"].items() if key != "sampler"}
    collate = node.get("collate_fn") and build_callable("loader.collate_fn", node["collate_fn"])
    options = evaluation_options(split, config["loader"]["batch_size"], collate)
    loader: Loader = build({**config, "loader": node}, "loader", split, device=device, **options)
    return loader


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


def check_fit(
    config: dict[str, Any],
    objective: Objective,
    split: Any,
    read: Reader,
) -> StepOutput:
    """The step's output for the first rows. Raises UsageError if the model rejects the data, or the
    loss the outputs and targets.
    """
    batch = read(split, list(range(min(2, len(split)))))
    output = None
    try:
        output = check_supervised(config, objective, batch, split) if objective.is_supervised else (
            evaluated(objective, batch))  # fmt: skip
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if ends_in_user_code(error.__traceback__):
            raise
        reason = str(error).partition("\n")[0] + user_line(error.__traceback__)
        raise UsageError(
            f"step._target_={config['step']['_target_']}: does not fit a batch of the data, "
            f"{describe(batch)} ({reason}); change the step, the model or data"
        ) from error
    check_loss(config, output.loss, objective.loss_group)
    for name, value in output.numbers.items():
        if not is_tensor(value) or value.ndim:
            raise UsageError(
                f"step._target_={config['step']['_target_']}: gives {name} as "
                f"{describe(value) if is_tensor(value) else type(value).__name__}, expected a "
                "tensor (), one number of the batch"
            )
    return output


def check_metrics(metrics: Mapping[str, Metric], output: StepOutput) -> list[str]:
    """Raise UsageError if a metric does not take the outputs and targets; returns the names of
    those that have a number.
    """
    found = []
    for name, metric in metrics.items():
        if output.outputs is None and not isinstance(metric, Accuracy):
            raise UsageError(
                f"metrics.{name}: the step gives no outputs and targets to compare; return "
                "experiments.StepOutput(loss, outputs, targets), or use metrics=[]"
            )
        running = Running({name: metric})
        try:
            running.update(output.outputs, output.targets)
            tags = running.compute("valid")
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            if ends_in_user_code(error.__traceback__):
                raise
            reason = str(error).partition("\n")[0]
            raise UsageError(
                f"metrics.{name}: does not take outputs {describe(output.outputs)} and targets "
                f"{describe(output.targets)} ({reason}); change its settings, or leave it out"
            ) from error
        found += [tag.rpartition("/")[0] for tag in tags]
    return found


def check_monitor(
    trainer: dict[str, Any], names: list[str], metrics: Mapping[str, Metric], output: StepOutput
) -> bool:
    """Raise UsageError if `trainer.monitor` is none of the names that a validation logs; returns
    whether a larger value is better.
    """
    monitor = trainer["monitor"]
    if monitor == "accuracy/valid" and "accuracy" in metrics and "accuracy" not in names:
        targets = output.targets
        kind = f"{targets.dtype} targets " if is_tensor(targets) else "targets "
        raise UsageError(
            f"trainer.monitor={monitor}: outputs {describe(output.outputs)} and {kind}"
            f"{describe(targets)} have no accuracy; use trainer.monitor=loss/valid"
        )
    if monitor not in (tags := [f"{name}/valid" for name in names]):
        hint = suggest(monitor, tags) or f"; there is {', '.join(tags)}"
        raise UsageError(f"trainer.monitor={monitor}: the run has no such number{hint}")
    return maximizes(monitor, trainer["mode"], metrics)


def check_supervised(
    config: dict[str, Any], objective: Objective, batch: Any, split: Any
) -> StepOutput:
    """The output of the default step for a batch. Raises UsageError if the batch is no pair, or the
    model, the loss and the data do not fit together.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise UsageError(
            f"step._target_={config['step']['_target_']}: takes batches (x, y), and one of the "
            f"data is {describe(batch)}; give a step of your own, a function of model and batch"
        )
    x, y = batch
    loss_func, logits = objective.loss_func, None
    try:
        objective.eval()
        with torch.no_grad():
            logits = objective.model(x)
            check_outputs(config, loss_func, logits, y)
            loss = loss_func(logits, y)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if ends_in_user_code(error.__traceback__):
            raise
        reason = str(error).partition("\n")[0] + user_line(error.__traceback__)
        raise UsageError(
            f"model._target_={config['model']['_target_']}: does not fit data of "
            f"x {of_all(x, split)}, y {of_all(y, split)} ({reason}); "
            f"{mismatch_remedy(loss_func, x, y, logits)}"
        ) from error
    check_loss(config, loss)
    report_broadcast(config, loss_func, logits, y)
    check_classes(split, logits, y, loss_func)
    return StepOutput(loss, logits, y)


def of_all(part: Any, split: Any) -> object:
    """The shape of a part of the data with the number of its rows; of a nest, its form."""
    return (len(split), *part.shape[1:]) if is_tensor(part) else describe(part)


def check_classes(split: Any, logits: Any, y: Any, loss_func: nn.Module) -> None:
    """Raise UsageError if the data has more classes than the model has outputs."""
    of_classes = is_of_classes(loss_func)
    if not (of_classes or has_accuracy(logits, y, of_classes=of_classes)):
        return
    if reads_samples(split) or y.is_floating_point() or logits.ndim != 2:
        return
    highest = int(split.y.max())
    if highest >= logits.shape[1] and highest != getattr(loss_func, "ignore_index", None):
        raise UsageError(
            f"model.out_features={logits.shape[1]}: the data has {highest + 1} classes; "
            "change model.out_features or data"
        )


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
