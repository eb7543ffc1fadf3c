"""From a config to a fitted model in a run directory: build the parts, fit, report.

Whatever the run is started by, a fresh start, a resumed one or a sweep's worker, it is this.
"""

import ctypes
import inspect
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from experiments import lean_optim, progress
from experiments.build import build
from experiments.checkpoint import Checkpoints, restoring
from experiments.config import overridden
from experiments.data import Data, Split
from experiments.errors import Diverged, UsageError
from experiments.fingerprint import fingerprint
from experiments.fit import State, evaluate, fit
from experiments.loader import gather, once
from experiments.models import build_model
from experiments.progress import Shown
from experiments.run import Run, config_text, packages
from experiments.streams import global_state, restore_global_state, seed_global
from experiments.tracking import Tracker


def train(
    config: dict[str, Any],
    data: Data,
    run: Run,
    stopped: Callable[[], int | None] = lambda: None,
    epochs: int | None = None,
    show: Callable[[int, int], Shown] | None = None,
) -> float:
    """Fit what a resolved config describes and leave everything in the run's directory.

    Goes on from the run's newest checkpoint where there is one. With `epochs` it ends after so
    many of the config's, without a look at the test split. `show` is given the number of epochs
    and of batches in each, and makes what a person sees. Returns the best value of
    `trainer.monitor`. Raises UsageError where the parts do not fit together, Diverged and
    Interrupted as `fit` does.
    """
    trainer, seed = config["trainer"], config["seed"]
    device = prepare_torch(trainer)

    seed_global(seed, "init")
    model = build_model(config, device)
    loss_func: nn.Module = build(config, "loss").to(device)
    train_loader = build(config, "loader", data.train, seed=seed, device=device)
    valid_loader, test_loader = (
        build(config, "loader", split, device=device, **once(split, config["loader"]["batch_size"]))
        for split in (data.valid, data.test)
    )
    if len(train_loader) == 0:
        raise UsageError(
            f"loader.batch_size={config['loader']['batch_size']}: drop_last leaves no batch "
            f"of {len(data.train)} rows; make it smaller"
        )
    check_fit(config, model, loss_func, data.train)
    opt: Optimizer = build(config, "optimizer", model.parameters())
    if trainer["clip_norm"] is not None:
        clip_gradients(opt, trainer["clip_norm"])
    # a schedule that needs to know how long the run is says so by this argument
    steps = trainer["epochs"] * -(-len(train_loader) // trainer["accumulate"])
    takes = inspect.signature(build(config, "scheduler").func).parameters
    length = {"total_steps": steps} if "total_steps" in takes else {}
    scheduler = build(config, "scheduler", opt, **length)

    checkpoints = Checkpoints(run.path / "checkpoints", **config["checkpoint"])
    saved = checkpoints.load()
    if saved is None:
        state, positions = State(), None
    else:
        with restoring(run.path):
            state, positions = State(**saved["state"]), saved["positions"]
            if saved["parameters"] != [name for name, _ in model.named_parameters()]:
                raise ValueError("the order of the model's parameters has changed")
            model.load_state_dict(saved["model"])
            opt.load_state_dict(saved["optimizer"])
            scheduler.load_state_dict(saved["scheduler"])

    surroundings = environment(device, trainer)
    compiled = None
    if trainer["compile"]:
        from experiments.compiled import CompiledSteps  # its imports take a second

        limits = {"accumulated": trainer["accumulate"], "clip_norm": trainer["clip_norm"]}
        compiled = CompiledSteps(model, loss_func, opt, scheduler, train_loader, **limits)
        surroundings["compiled"] = compiled.key
    describe(run, data, surroundings, fingerprint(model.state_dict()))
    tracker = Tracker(run.path, state.step, positions)
    if saved is None:
        tracker.text("config", f"```yaml\n{config_text(config).decode()}```")
        tracker.hparams(overridden(config, run.record["overrides"]))

    def save(state: State, best: bool) -> None:
        content = {
            "state": vars(state),
            "positions": tracker.sync(),
            "parameters": [name for name, _ in model.named_parameters()],
            "model": model.state_dict(),
            "optimizer": opt.state_dict(),
            "scheduler": scheduler.state_dict(),
            "random": global_state(),
        }
        checkpoints.save(state.step, state.epoch, content, best=best)

    shown = (show or progress.show)(trainer["epochs"], len(train_loader))
    # last of all: building the parts may have drawn from the generators
    if saved is None:
        seed_global(seed, "fit")
    else:
        restore_global_state(*saved["random"])
    try:
        fit(
            epochs or trainer["epochs"],
            model,
            loss_func,
            opt,
            compiled or train_loader,
            valid_loader,
            scheduler=scheduler,
            state=state,
            log=tracker.log,
            save=save,
            due=checkpoints.due,
            stopped=stopped,
            progress=shown,
            monitor=trainer["monitor"],
            log_every=trainer["log_every"],
            steps=compiled,
            at_once=1 if compiled else trainer["accumulate"],
        )
    except Diverged:
        tracker.hparams_end(success=False)
        raise
    finally:
        shown.close()
        run.update(metrics={"best": state.best, "last": state.last})
    if epochs is None:
        test_loss, test_accuracy = evaluate(model, loss_func, test_loader)
        test = {"loss/test": test_loss, "accuracy/test": test_accuracy}
        tracker.log(state.step, state.epoch, test)
        run.update(metrics={**run.record["metrics"], "test": test})
        tracker.hparams_end(success=True)
    tracker.close()
    run.update(weights={**run.record["weights"], "final": fingerprint(model.state_dict())})
    return state.best[trainer["monitor"]]


def describe(run: Run, data: Data, surroundings: dict[str, Any], weights: str) -> None:
    """Write to run.json what the bits depend on; of a resumed run, compare it with what it says.

    Raises UsageError where the data is not what the run began with; warns where the rest differs.
    """
    if "environment" not in run.record:
        run.update(environment=surroundings, data=data.fingerprints, weights={"initial": weights})
        return
    before = run.record["data"]
    changed = [name for name, value in data.fingerprints.items() if before.get(name) != value]
    if changed:
        raise UsageError(
            f"data: {', '.join(changed)} rows differ from those that the run began with"
        )
    now = {"python": platform.python_version(), **packages(), **surroundings}
    then = {**run.record, **run.record["packages"], **run.record["environment"]}
    for name, value in now.items():
        if then.get(name) != value:
            was = then.get(name)
            print(f"warning: {name} was {was}, is {value}: bits may differ", file=sys.stderr)


def prepare_torch(trainer: dict[str, Any]) -> str:
    """Set what the bits of a run depend on, and return the device: `cpu` or `cuda`.

    Nothing is inherited from the environment or a launcher. Raises UsageError where CUDA is
    asked for and torch has none.
    """
    lean_optim.install()
    keep_freed_memory()
    torch.set_num_threads(trainer["threads"])
    torch.set_float32_matmul_precision(trainer["matmul_precision"])
    # read by cuBLAS at its first use; torch's notes on reproducibility name the value
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    # use_deterministic_algorithms sets the same flag, and imports the compiler for a second
    torch.set_deterministic_debug_mode("error")
    # an aid to debugging that would write NaN over every new tensor
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if trainer["device"] == "cuda" and not torch.cuda.is_available():
        raise UsageError("trainer.device=cuda: torch finds no CUDA device; use cpu or auto")
    return "cuda" if trainer["device"] != "cpu" and torch.cuda.is_available() else "cpu"


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees, up to 1 GiB, for the next one. By itself it may give it
    back to the kernel each time, as chance has it: seen were 140,000 page faults an epoch, which
    took half of it. Blocks from 32 MiB on still come and go alone. Elsewhere nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # as <malloc.h> numbers them
        mallopt(trim_threshold, 2**30)
        mallopt(mmap_threshold, 2**25)


def check_fit(config: dict[str, Any], model: nn.Module, loss_func: nn.Module, split: Split) -> None:
    """Raise UsageError where the model does not take the data or the loss does not take both."""
    device = next(model.parameters()).device
    # copies: the rows may lie in a file that must not be written to, as a layer in place would
    x, y = gather(split.x, split.y, torch.arange(min(2, len(split))))
    x, y = x.to(device), y.to(device)
    try:
        with torch.no_grad():
            logits = model.eval()(x)
            loss_func(logits, y)
    except (IndexError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"model._target_={config['model']['_target_']}: does not fit data of "
            f"x {tuple(split.x.shape)}, y {tuple(split.y.shape)} ({reason}); "
            "change model.in_features, model.out_features or data"
        ) from error
    if not split.y.is_floating_point() and logits.ndim == 2 and split.y.max() >= logits.shape[1]:
        raise UsageError(
            f"model.out_features={logits.shape[1]}: the data has {int(split.y.max()) + 1} classes"
        )


def clip_gradients(opt: Optimizer, max_norm: float) -> None:
    """Scale the gradients down to a norm of at most `max_norm` before each step."""
    parameters = [p for group in opt.param_groups for p in group["params"]]

    def clip(opt: Optimizer, args: Any, kwargs: Any) -> None:
        nn.utils.clip_grad_norm_(parameters, max_norm)

    opt.register_step_pre_hook(clip)


def environment(device: str, trainer: dict[str, Any]) -> dict[str, Any]:
    """What the bits of a run depend on besides its config and the packages."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": trainer["threads"],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
