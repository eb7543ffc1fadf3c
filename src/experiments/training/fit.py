"""The training loop: take steps, validate, save."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from experiments.data.loaders import Loader
from experiments.errors import Interrupted
from experiments.training.evaluation import Metric, evaluate
from experiments.training.frozen import restore_buffers, save_buffers
from experiments.training.objective import Objective
from experiments.training.progress import Progress
from experiments.training.steps import Steps
from experiments.training.steps import loss_batch as loss_batch  # what a step does, as a tutorial
from experiments.training.train_log import Metrics, State, TrainLog, check_finite


@dataclass(frozen=True)
class FitOptions:
    """How long to train, how often to log and to validate, and what decides which weights are best.

    Training ends after `epochs` epochs or `steps` optimizer steps, whichever comes first.

    evaluate_every: optimizer steps between two validations; None: one at each epoch's end
    maximize: whether a larger value of `monitor` is better
    """

    epochs: float = math.inf
    steps: float = math.inf
    log_every: int = 100  # optimizer steps
    evaluate_every: int | None = None
    monitor: str = "loss/valid"
    maximize: bool = False


@dataclass(frozen=True)
class Callbacks:
    """What the loop calls.

    log(step, epoch from 1, metrics): `loss/train` and `lr` every `log_every` steps, with `lr/1`
        and so on for the further parameter groups whose rates differ from the first one's;
        `loss/train_epoch` and `throughput` at each epoch's end, `loss/valid` and the metrics at
        each validation. What a step names besides its loss is logged like it.
    save(state, whether it is the best so far): after each validation and at each epoch's end, when
        `checkpoint_due(last step, number of steps in the last result)` is true, and when
        `stop_signal` returns a signal's number, which is asked once a step.
    stop_evaluation: the same within a validation, asked once a batch.
    after_step: after each result of one or more steps.
    evaluated_weights: a context in which the model has the weights that are validated.
    validated(the validation's metrics): returns why training is to end, or None.
    end_epoch: at each epoch's end, before `save`.
    """

    log: Callable[[int, int, Metrics], None]
    save: Callable[[State, bool], None]
    progress: Progress
    checkpoint_due: Callable[[int, int], bool] = lambda step, step_count: False
    stop_signal: Callable[[], int | None] = lambda: None
    stop_evaluation: Callable[[], int | None] = lambda: None
    after_step: Callable[[], None] = lambda: None
    evaluated_weights: Callable[[], AbstractContextManager[None]] = nullcontext
    validated: Callable[[Metrics], str | None] = lambda metrics: None
    end_epoch: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Validation:
    """What the validation split is evaluated with: its loader, and the metrics by name."""

    loader: Loader
    metrics: Mapping[str, Metric]


def fit(
    objective: Objective,
    steps: Steps,
    validation: Validation,
    state: State,
    options: FitOptions,
    callbacks: Callbacks,
) -> Metrics:
    """Train from `state` until all epochs or steps are done; returns the best metrics.

    Raises Interrupted after a signal, Diverged if a logged loss is not finite.
    """
    train_log, throughput = TrainLog(state, callbacks.log, options.log_every), Throughput(state)
    while not is_done(state, options):
        with throughput:
            epoch_over = take_steps(objective, steps, state, options, callbacks, train_log)
        valid: Metrics = {}
        if evaluation_due(state, options) or (epoch_over and evaluates_at_end(state, options)):
            valid = validate(objective, validation, state, callbacks)
        end_steps(state, valid, epoch_over, throughput, options, callbacks)
    return state.best


def is_done(state: State, options: FitOptions) -> bool:
    """Whether training is over; with its last validation, which ends an epoch."""
    steps_done = state.step >= options.steps and state.batch == 0
    return steps_done or state.epoch >= options.epochs or state.stopped is not None


def take_steps(
    objective: Objective,
    steps: Steps,
    state: State,
    options: FitOptions,
    callbacks: Callbacks,
    train_log: TrainLog,
) -> bool:
    """Train until a validation is due or the epoch is over; returns whether it is over."""
    objective.train()
    limit, taken = steps_until_stop(state, options), 0
    for result in steps.take(state.epoch, state.batch, limit):
        step_count = len(result.lrs)
        taken += step_count
        state.step += step_count
        state.batch += step_count * result.batches
        callbacks.progress.advance(
            state.epoch + 1, state.batch, step_count * result.rows, result.losses
        )
        callbacks.after_step()
        train_log.add(result)
        signal_number = callbacks.stop_signal()
        stops = taken == limit or state.batch >= len(steps)
        if signal_number or (not stops and callbacks.checkpoint_due(state.step, step_count)):
            train_log.read()
            callbacks.save(state, False)
        if signal_number:
            raise Interrupted(signal_number)
    over = taken != limit or state.batch >= len(steps) or state.step >= options.steps
    if over:
        train_log.end_epoch()
    else:
        train_log.read()
    return over


def steps_until_stop(state: State, options: FitOptions) -> int | None:
    """The steps until a validation is due or training is over; None: not in this epoch."""
    stops = [] if options.steps == math.inf else [max(0, int(options.steps) - state.step)]
    if options.evaluate_every is not None:
        since = state.step % options.evaluate_every
        stops.append(0 if evaluation_due(state, options) else options.evaluate_every - since)
    return min(stops, default=None)


def evaluation_due(state: State, options: FitOptions) -> bool:
    """Whether a validation is due after the last step, besides those at the ends of epochs."""
    if options.evaluate_every is None or state.evaluated == state.step:
        return False
    return state.step > 0 and state.step % options.evaluate_every == 0


def evaluates_at_end(state: State, options: FitOptions) -> bool:
    """Whether there is a validation at the end of this epoch: of each, or of the last one."""
    last = state.epoch + 1 >= options.epochs or state.step >= options.steps
    return state.evaluated != state.step and (options.evaluate_every is None or last)


def validate(
    objective: Objective, validation: Validation, state: State, callbacks: Callbacks
) -> Metrics:
    """The metrics of the validation split. After a signal, saves the state before the validation,
    which a resumed run repeats, and raises Interrupted.
    """
    # some count or average in evaluation, too
    buffers = save_buffers(objective)
    try:
        with callbacks.evaluated_weights():
            return evaluate(
                objective, validation.loader, validation.metrics, "valid", callbacks.stop_evaluation
            )
    except Interrupted:
        restore_buffers(buffers)
        callbacks.save(state, False)
        raise


def end_steps(
    state: State,
    valid: Metrics,
    epoch_over: bool,
    throughput: "Throughput",
    options: FitOptions,
    callbacks: Callbacks,
) -> None:
    """Update the state after a validation or an epoch, log the metrics and save.

    valid: the validation's metrics; empty if there was none. Raises Diverged if its loss is not
    finite.
    """
    metrics, rate = valid, throughput.rows_per_second()
    if epoch_over:
        metrics = {**state.end_epoch(), **valid}
        throughput.restart()
    epoch = state.epoch + (not epoch_over)  # from 1
    callbacks.log(state.step, epoch, metrics)
    if epoch_over:
        # on a separate line, since it differs between runs
        callbacks.log(state.step, epoch, {"throughput": rate})
    better = bool(valid) and state.validated(valid, epoch, options.monitor, options.maximize)
    if valid:
        check_finite("loss/valid", valid["loss/valid"], state.step)
        state.stopped = callbacks.validated(valid)
    if epoch_over:
        callbacks.end_epoch()
    callbacks.save(state, better)
    if epoch_over:
        shown = {**state.last, **metrics, "throughput": rate}
        callbacks.progress.epoch_end(state.epoch, shown)
    else:
        callbacks.progress.validated(state.step, valid)


class Throughput:
    """The rows per second of the training in an epoch, without its validations."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.restart()

    def restart(self) -> None:
        """Begin with an epoch, or in the middle of one, where a run is resumed."""
        self.rows, self.seconds = self.state.epoch_rows + self.state.rows, 0.0
        self.now = self.rows

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self.started
        self.now = self.state.epoch_rows + self.state.rows

    def rows_per_second(self) -> float:
        """Rows per second so far."""
        return (self.now - self.rows) / self.seconds
