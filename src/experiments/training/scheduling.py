"""Builds the learning rate schedule of a config, and decides what it moves by: steps or epochs."""

import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CyclicLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from experiments.config.names import format_value
from experiments.errors import UsageError
from experiments.training import schedules
from experiments.training.build import build
from experiments.training.parameter_groups import own_keys

Every = Literal["step", "epoch"]

# torch's documentation steps these after each batch, and all its other schedules after each epoch
BY_STEP = (OneCycleLR, CyclicLR)
# The arguments that set the rate of all parameter groups alike.
RATES: Mapping[type, tuple[str, ...]] = {OneCycleLR: ("max_lr",), CyclicLR: ("base_lr", "max_lr")}


@dataclass
class Schedule:
    """A schedule and what it moves by.

    scheduler: has step, state_dict and load_state_dict
    every: whether `step` is due after each optimizer step or at the end of each epoch
    monitored: whether `step` takes the monitored number of an epoch
    """

    scheduler: Any
    every: Every
    monitored: bool = False

    @property
    def by_step(self) -> Any:
        """What to step after each optimizer step."""
        return self.scheduler if self.every == "step" else schedules.Constant()

    def end_epoch(self) -> None:
        """Step a schedule that moves by epochs."""
        if self.every == "epoch" and not self.monitored:
            self.scheduler.step()

    def validated(self, monitored: float) -> None:
        """Step a schedule that moves by validations. monitored: `trainer.monitor` of the last."""
        if isinstance(self.scheduler, schedules.Plateau):  # moves by steps, too
            self.scheduler.validated(monitored)
        elif self.monitored:
            self.scheduler.step(monitored)


@dataclass(frozen=True)
class Setting:
    """What a schedule is built for.

    length: of the run, or of the schedule's part of it, in units of `every`. lr: `optimizer.lr`.
    grouped: whether parameter groups have options of their own.
    """

    opt: Optimizer
    every: Every
    length: int
    epochs: int
    lr: object
    monitor: str
    maximize: bool
    grouped: bool


def build_schedule(
    config: dict[str, Any], opt: Optimizer, steps_per_epoch: int, *, maximize: bool = False
) -> Schedule:
    """The schedule of a resolved config for an optimizer.

    It moves by `scheduler.every`. Without that, torch's own schedules move as torch documents them:
    OneCycleLR and CyclicLR by steps, all others by epochs. Any other function or class moves by
    steps, unless its `step` takes a metric. Lengths are filled in from the run's, in the same unit.

    steps_per_epoch: optimizer steps. maximize: whether more of `trainer.monitor` is better.

    Raises UsageError if it cannot be built or does not suit the run.
    """
    trainer, node = config["trainer"], dict(config["scheduler"])
    asked: Every | None = node.pop("every", None)
    target = f"scheduler._target_={node['_target_']}"
    every = asked or default_every(node, target)
    epochs = run_epochs(trainer, steps_per_epoch)
    length = epochs * (steps_per_epoch if every == "step" else 1)
    if trainer["steps"] is not None and every == "step":
        length = trainer["steps"]
    lr = config["optimizer"].get("lr")
    grouped = "groups" in own_keys(config["optimizer"])
    setting = Setting(opt, every, length, epochs, lr, trainer["monitor"], maximize, grouped)
    scheduler = build_node(node, setting)
    missing = [
        name for name in ("step", "state_dict", "load_state_dict") if not hasattr(scheduler, name)
    ]
    if missing:
        raise UsageError(
            f"{target}: returned a {type(scheduler).__name__} without {', '.join(missing)}; "
            "return a schedule as those of torch.optim.lr_scheduler"
        )
    monitored = takes_metric(scheduler)
    if monitored and asked == "step":
        raise UsageError(
            f"scheduler.every=step: {type(scheduler).__name__} moves by the validation, which is "
            "once an epoch; use scheduler.every=epoch"
        )
    if isinstance(scheduler, schedules.Plateau) and asked == "epoch":
        raise UsageError(
            "scheduler.every=epoch: this schedule's warmup moves by steps, and the rest of it by "
            "epochs in any case; leave it out"
        )
    if asked is None and every == "step":
        report_step(node, target, scheduler)
    return Schedule(scheduler, "epoch" if monitored else every, monitored)


def run_epochs(trainer: Mapping[str, Any], steps_per_epoch: int) -> int:
    """The number of epochs of a run, of which the last may be a part."""
    steps: int | None = trainer["steps"]
    epochs: int = trainer["epochs"]
    return epochs if steps is None else -(-steps // steps_per_epoch)


def target_of(node: Mapping[str, Any]) -> Any:
    """The class or function that a schedule's node names. Raises UsageError if there is none."""
    if not node.get("_partial_"):
        raise UsageError(
            f"scheduler._target_={node['_target_']}: is built with the optimizer of the run; "
            "add _partial_: true"
        )
    return _locate(node["_target_"])


@functools.cache  # instantiating takes 3 ms
def _locate(target: str) -> Any:
    return build({"scheduler": {"_target_": target, "_partial_": True}}, "scheduler").func


def children(node: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The nodes of the schedules that SequentialLR or ChainedScheduler put together."""
    nested = node.get("schedulers")
    if not isinstance(nested, list):
        return []
    return [child for child in nested if isinstance(child, dict) and "_target_" in child]


def default_every(node: dict[str, Any], target: str) -> Every:
    """What a schedule moves by if its config does not say so."""
    func = target_of(node)
    nested = children(node)
    if nested and func in (SequentialLR, ChainedScheduler):
        found = {default_every({**child, "_partial_": True}, target) for child in nested}
        if len(found) > 1:
            raise UsageError(
                f"{target}: puts together schedules that move by steps and by epochs; "
                "say which with scheduler.every"
            )
        return found.pop()
    of_torch = inspect.isclass(func) and func.__module__ == LRScheduler.__module__
    return "epoch" if of_torch and not issubclass(func, BY_STEP) else "step"


def build_node(node: dict[str, Any], setting: Setting) -> Any:
    """The schedule of a node, with its nested schedules. Raises UsageError if it is unsuitable."""
    func = target_of(node)
    options = length_options(node, func, setting)
    if nested := children(node):
        spans = child_lengths(node, func, setting.length)
        options["schedulers"] = [
            build_node({**child, "_partial_": True}, Setting(**{**vars(setting), "length": span}))
            for child, span in zip(nested, spans, strict=True)
        ]
    if inspect.isclass(func) and issubclass(func, ReduceLROnPlateau):
        options |= plateau_options(node, setting)
    if inspect.isclass(func) and issubclass(func, OneCycleLR):
        check_one_cycle(node, {**node, **options}, setting)
    for kind, names in RATES.items():
        if inspect.isclass(func) and issubclass(func, kind):
            options |= rates_of_groups(node, names, setting)
    # ChainedScheduler takes the optimizer second
    args, more = (
        ((), {"optimizer": setting.opt}) if func is ChainedScheduler else ((setting.opt,), {})
    )
    try:
        return build({"scheduler": {**node, **({"schedulers": []} if nested else {})}}, "scheduler",
                     *args, **more, **options)  # fmt: skip
    except ZeroDivisionError:
        raise UsageError(
            f"scheduler._target_={node['_target_']}: a part of it has no length in a run of "
            f"{setting.length} {setting.every}s; change trainer.epochs or the scheduler's settings"
        ) from None


def length_options(
    node: dict[str, Any], func: Callable[..., Any], setting: Setting
) -> dict[str, Any]:
    """The arguments that are a length and that the config leaves to the run: `total_steps` unless
    it is given; the others if they are null, or required and absent.
    """
    parameters = parameters_of(func)
    per_epoch = setting.length // setting.epochs if setting.every == "step" else 1
    by_epochs = any(node.get(name) is not None for name in ("epochs", "steps_per_epoch"))
    lengths = {"T_max": setting.length, "total_iters": setting.length}
    lengths |= {"epochs": setting.epochs, "steps_per_epoch": per_epoch}
    options = {}
    for name, length in lengths.items():
        if name not in parameters or node.get(name) is not None:
            continue
        required = parameters[name].default is inspect.Parameter.empty
        if name in node or required or (by_epochs and name in ("epochs", "steps_per_epoch")):
            options[name] = length
    if "total_steps" in parameters and node.get("total_steps") is None and not by_epochs:
        options["total_steps"] = setting.length
    return options


def child_lengths(node: dict[str, Any], func: Callable[..., Any], length: int) -> list[int]:
    """The length of each nested schedule: SequentialLR's have the parts between the milestones."""
    count, milestones = len(children(node)), node.get("milestones")
    if func is not SequentialLR or not isinstance(milestones, list) or len(milestones) != count - 1:
        return [length] * count
    bounds = [0, *milestones, length]
    return [max(1, end - begin) for begin, end in itertools.pairwise(bounds)]


def plateau_options(node: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """The direction in which ReduceLROnPlateau's number gets better."""
    mode, monitor = "max" if setting.maximize else "min", setting.monitor
    if node.get("mode") not in (None, mode):
        raise UsageError(
            f"scheduler.mode={node['mode']}: trainer.monitor={monitor} is better when it is "
            f"{'lower' if mode == 'min' else 'higher'}; use scheduler.mode={mode} or leave it out"
        )
    return {"mode": mode}


def check_one_cycle(node: dict[str, Any], given: dict[str, Any], setting: Setting) -> None:
    """Raise UsageError if OneCycleLR is over before the run is, or has a phase without length, by
    which it would divide.
    """
    total = given.get("total_steps") or given["epochs"] * given["steps_per_epoch"]
    if total < setting.length:
        name = "total_steps" if node.get("total_steps") else "epochs"
        raise UsageError(
            f"scheduler.{name}={node.get(name)}: this cycle is over after {total} "
            f"{setting.every}s, and the run has {setting.length}; use scheduler.{name}=null"
        )
    rise = given.get("pct_start", 0.3)
    ends = [rise * total - 1, total - 1]
    if given.get("three_phase"):
        ends.insert(1, 2 * rise * total - 2)
    if any(start == end for start, end in zip([0, *ends], ends, strict=False)):
        raise UsageError(
            f"scheduler.pct_start={format_value(rise)}: of {total} {setting.every}s, this leaves a "
            "phase of the cycle without length; change scheduler.pct_start or trainer.epochs"
        )


def rates_of_groups(
    node: dict[str, Any], names: tuple[str, ...], setting: Setting
) -> dict[str, Any]:
    """A schedule's rates for each parameter group, in proportion to the group's own lr. Raises
    UsageError if it is unknown what they are in proportion to.
    """
    lrs = [group["lr"] for group in setting.opt.param_groups]
    if len(set(lrs)) == 1 and not (setting.grouped and lrs[0] != setting.lr):
        return {}
    options = {}
    for name in names:
        value = node.get(name)
        if not isinstance(value, int | float):
            continue
        if not isinstance(setting.lr, int | float):
            raise UsageError(
                f"scheduler.{name}={format_value(value)}: the optimizer's {len(lrs)} parameter "
                f"groups have the rates {format_value(lrs)}; give a list of {len(lrs)} rates"
            )
        scale = value / setting.lr
        options[name] = [lr if scale == 1 else lr * scale for lr in lrs]
    return options


def parameters_of(func: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function; none if it does not tell."""
    try:
        return inspect.signature(func).parameters
    except ValueError:
        return {}


def takes_metric(scheduler: Any) -> bool:
    """Whether `step` requires an argument."""
    parameters = parameters_of(scheduler.step).values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.default is p.empty and p.kind in positional for p in parameters)


def report_step(node: dict[str, Any], target: str, scheduler: Any) -> None:
    """Say that one of torch's schedules that are meant for epochs, and that a function of one's own
    has returned, moves by steps.
    """
    func = target_of(node)
    own = func.__module__ not in (LRScheduler.__module__, schedules.__name__)
    for_epochs = type(scheduler).__module__ == LRScheduler.__module__
    counts_steps = "total_steps" in parameters_of(func)
    if own and for_epochs and not isinstance(scheduler, BY_STEP) and not counts_steps:
        print(
            f"{target}: its {type(scheduler).__name__} moves after each step; if it counts epochs, "
            "add every: epoch to the scheduler, or else every: step",
            file=sys.stderr,
        )
