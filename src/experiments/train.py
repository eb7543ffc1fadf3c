"""Trains a model from a config in a run directory: build the parts, restore, fit, test.

Every run goes through `train`: from the command line, resumed, or in a sweep's worker.
"""

import copy
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from experiments.config.names import overridden
from experiments.data import Data
from experiments.data.scan import Scan
from experiments.directory import statistics
from experiments.directory.checkpoints import Checkpoints, restoring
from experiments.directory.environment import packages
from experiments.directory.fingerprint import fingerprint
from experiments.directory.identity import differences, identify
from experiments.directory.record import Run, config_text
from experiments.directory.tracking import Tracker
from experiments.errors import Diverged, UsageError
from experiments.training.callbacks import after_validation, averaged_weights
from experiments.training.class_weights import class_weights, with_weights
from experiments.training.determinism import (
    global_state,
    prepare_torch,
    restore_global_state,
    seed_global,
    torch_environment,
)
from experiments.training.evaluation import evaluate
from experiments.training.fit import Callbacks, FitOptions, Validation, fit
from experiments.training.initial_weights import read_initial
from experiments.training.means import step_weights
from experiments.training.own_state import load_state, state_of
from experiments.training.parts import Parts, build_parts
from experiments.training.progress import Progress, make_progress
from experiments.training.scheduling import run_epochs
from experiments.training.sizes import auto_keys, check_sizes, sizes_of, with_sizes
from experiments.training.steps import EagerSteps, Steps
from experiments.training.train_log import Metrics, State


def train(
    config: dict[str, Any],
    data: Data,
    run: Run,
    stop_signal: Callable[[], int | None] = lambda: None,
    epochs: int | None = None,
    progress: Callable[[int, int, str], Progress] = make_progress,
    stop_evaluation: Callable[[], int | None] = lambda: None,
) -> float:
    """Train the model of a resolved config and write all results to the run directory.

    Continues from the run's newest checkpoint if there is one. With `epochs` it stops after that
    many epochs and skips the test split. `progress` is called with the number of epochs, that of
    batches per epoch and the monitored number; `stop_signal` once a step and `stop_evaluation` once
    a batch of an evaluation: each returns a signal's number or None. Returns the best value of
    `trainer.monitor`. Raises UsageError if the parts do not fit together, Diverged and Interrupted
    as `fit` does.
    """
    trainer, seed = config["trainer"], config["seed"]
    device = prepare_torch(trainer)
    seed_global(seed, "init")
    sizes = sizes_of(data) if auto_keys(config) else {}
    given, config = config, with_sizes(config, sizes)
    check_sizes(config)
    balanced = class_weights(config, data)
    config = with_weights(config, balanced)
    checkpoints = Checkpoints(run.path / "checkpoints", **config["checkpoint"])
    saved = checkpoints.load()
    initial = read_initial(config["init"]) if saved is None else None
    parts = build_parts(config, data, device, initial)
    state = State() if saved is None else restore(parts, saved, run)
    steps, compiled = make_steps(parts, trainer, data.scans["train"], stop_signal)
    run.update(mode="max" if parts.maximize else "min", **({"sizes": sizes} if sizes else {}))
    if balanced:
        run.update(class_weights=balanced)
    if initial is not None:
        run.update(init={initial.name: initial.sha256})
    record_environment(run, parts, data, torch_environment(device, trainer) | compiled)
    statistics.write(run.path, data.statistics)
    tracker = start_tracking(run, given) if saved is None else continue_tracking(run, saved)
    steps_per_epoch = -(-len(parts.train_loader) // trainer["accumulate"])
    epochs_to_run = run_epochs(trainer, steps_per_epoch)
    reporter = progress(epochs_to_run, len(parts.train_loader), trainer["monitor"])
    # must come last: building the parts may have drawn from the generators
    if saved is None:
        seed_global(seed, "fit")
    else:
        restore_global_state(*saved["random"])

    def save(state: State, best: bool) -> None:
        content = checkpoint_content(parts, state, tracker)
        checkpoints.save(state.step, state.epoch, content, best=best)

    def validated(metrics: Metrics) -> str | None:
        parts.schedule.validated(metrics[trainer["monitor"]])
        return after_validation(
            parts.aids, state, metrics, trainer["monitor"], parts.maximize, tracker
        )

    parts.aids.start()
    options = FitOptions(
        epochs=epochs or (math.inf if trainer["steps"] else trainer["epochs"]),
        steps=trainer["steps"] or math.inf,
        evaluate_every=trainer["evaluate_every"],
        log_every=trainer["log_every"],
        monitor=trainer["monitor"],
        maximize=parts.maximize,
    )
    callbacks = Callbacks(
        log=tracker.log,
        save=save,
        progress=reporter,
        checkpoint_due=checkpoints.due,
        stop_signal=stop_signal,
        stop_evaluation=stop_evaluation,
        after_step=parts.aids.after_step,
        evaluated_weights=parts.aids.evaluated_weights,
        validated=validated,
        end_epoch=parts.schedule.end_epoch,
    )
    validation = Validation(parts.valid_loader, parts.metrics)
    with closing(tracker):
        try:
            fit(parts.objective, steps, validation, state, options, callbacks)
        except Diverged as error:
            tracker.hparams_end(success=False)
            raise explained(error, data) from None
        finally:
            reporter.close()
            run.update(metrics={"best": state.best, "last": state.last})
        if epochs is None:
            with tested_weights(parts, state, checkpoints, trainer["test"]):
                evaluate_test_split(parts, state, run, tracker, stop_evaluation)
    weights = fingerprint(parts.model.state_dict())
    run.update(weights={**run.record["weights"], "final": weights})
    return state.best[trainer["monitor"]]


def explained(error: Diverged, data: Data) -> Diverged:
    """The error, with the rows that are not finite, which the model seemed to cope with, as its
    cause instead of the learning rate.
    """
    for name in ("train", "valid"):
        for part, row in data.scans[name].not_finite.items():
            reason = str(error).partition(";")[0]
            return Diverged(f"{reason}; row {row} of {name} {part} is NaN or infinite: fill it")
    return error


def restore(parts: Parts, saved: dict[str, Any], run: Run) -> State:
    """Load a checkpoint into the parts. Raises UsageError if it does not fit."""
    with restoring(run.path):
        if saved["parameters"] != parts.parameter_names:
            raise ValueError("the order of the model's parameters has changed")
        parts.model.load_state_dict(saved["model"])
        parts.opt.load_state_dict(saved["optimizer"])
        parts.schedule.scheduler.load_state_dict(saved["scheduler"])
        # an earlier version stepped every schedule after each step
        parts.schedule.every = saved.get("scheduler_every", "step")
        # or a schedule that moves at once, at the end of an epoch, would warn
        parts.opt._opt_called = True  # type: ignore[attr-defined]
        parts.loss_func.load_state_dict(saved.get("loss", parts.loss_func.state_dict()))
        load_state(parts.objective.step, saved.get("step", {}))
        parts.aids.load(saved.get("callbacks", {}))
        # an earlier version counted every batch by its rows, and kept no state of the loss
        weights = {"weight": saved["state"]["rows"], "epoch_weight": saved["state"]["epoch_rows"]}
        return State(**(weights | saved["state"]))


def checkpoint_content(parts: Parts, state: State, tracker: Tracker) -> dict[str, Any]:
    """Everything that `restore`, `continue_tracking` and `restore_global_state` need."""
    return {
        "state": vars(state),
        "positions": tracker.sync(),
        "parameters": parts.parameter_names,
        "model": parts.model.state_dict(),
        "loss": parts.loss_func.state_dict(),
        "step": state_of(parts.objective.step),
        "callbacks": parts.aids.state(),
        "optimizer": parts.opt.state_dict(),
        "scheduler": parts.schedule.scheduler.state_dict(),
        "scheduler_every": parts.schedule.every,
        "random": global_state(),
    }


def make_steps(
    parts: Parts, trainer: dict[str, Any], train: Scan, stop_signal: Callable[[], int | None]
) -> tuple[Steps, dict[str, str]]:
    """The eager or compiled steps, and the key of the compiled package if there is one.

    train: what was found in the training split, which may hold targets that do not count. Raises
    Interrupted if a signal arrives while they are compiled.
    """
    weigh = step_weights(parts.objective, train)
    if not trainer["compile"]:
        return EagerSteps(parts.objective, parts.opt, parts.schedule.by_step, parts.train_loader,
                          trainer["accumulate"], weigh), {}  # fmt: skip
    from experiments.compiled.steps import CompiledSteps  # takes a second to import

    compiled = CompiledSteps(
        parts.objective,
        parts.opt,
        parts.schedule.by_step,
        parts.train_loader,
        accumulated=trainer["accumulate"],
        clip_norm=trainer["clip_norm"],
        stop_signal=stop_signal,
        weigh=weigh,
        one_by_one=parts.aids.ema is not None,
    )
    return compiled, {"compiled": compiled.key}


def start_tracking(run: Run, config: dict[str, Any]) -> Tracker:
    """Open the log files of a new run; log its config and its row in TensorBoard's HParams tab."""
    tracker = Tracker(run.path)
    tracker.text("config", f"```yaml\n{config_text(config).decode()}```")
    tracker.hparams(overridden(config, run.record["overrides"]))
    return tracker


def continue_tracking(run: Run, saved: dict[str, Any]) -> Tracker:
    """Open the log files of a resumed run, truncated to its checkpoint."""
    return Tracker(run.path, saved["state"]["step"], saved["positions"])


def evaluate_test_split(
    parts: Parts,
    state: State,
    run: Run,
    tracker: Tracker,
    stop_evaluation: Callable[[], int | None],
) -> None:
    """Evaluate the model on the test split and log the results. Raises Interrupted after a signal;
    a checkpoint is of these weights.
    """
    metrics = evaluate(parts.objective, parts.test_loader, parts.metrics, "test", stop_evaluation)
    tracker.log(state.step, state.epoch, metrics)
    run.update(metrics={**run.record["metrics"], "test": metrics})
    tracker.hparams_end(success=True)


@contextmanager
def tested_weights(
    parts: Parts, state: State, checkpoints: Checkpoints, which: str
) -> Iterator[None]:
    """Give the model the weights of the best checkpoint in the block, or the last ones."""
    if which == "last" or state.best == state.last:
        with parts.aids.evaluated_weights():
            yield
        return
    last = {name: tensor.clone() for name, tensor in parts.objective.state_dict().items()}
    step = copy.deepcopy(state_of(parts.objective.step))
    content = checkpoints.load("best")
    assert content is not None  # one was saved after the first validation
    parts.model.load_state_dict({**content["model"], **averaged_weights(content)})
    parts.loss_func.load_state_dict(content["loss"])
    load_state(parts.objective.step, content["step"])
    try:
        yield
    finally:
        parts.objective.load_state_dict(last)
        load_state(parts.objective.step, step)


def record_environment(run: Run, parts: Parts, data: Data, environment: dict[str, Any]) -> None:
    """Record what the results depend on in run.json; if the run is resumed, compare instead.

    Raises UsageError if the data differs from the start of the run; warns if anything else does.
    """
    if "environment" not in run.record:
        weights = fingerprint(parts.model.state_dict())
        run.update(environment=environment, data=data.fingerprints, weights={"initial": weights})
        return
    before = run.record["data"]
    changed = [name for name, value in data.fingerprints.items() if before.get(name) != value]
    if changed:
        raise UsageError(
            f"data: {', '.join(changed)} rows differ from those at the start of the run"
        )
    now = identify(run.record["config"], run.record)
    # what a run has started from is in its checkpoint
    changes = differences(run.record, {**now, "init": {}})
    then = {**run.record["packages"], **run.record["environment"]}
    changes += [
        f"{name} was {then.get(name)}, is {value}"
        for name, value in {**packages(), **environment}.items()
        if then.get(name) != value
    ]
    for change in dict.fromkeys(changes):  # torch and numpy are in both
        print(f"warning: {change}: bits may differ", file=sys.stderr)
