import math
import random
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objectives import accuracy, evaluated
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer

from experiments.config.compose import CONF
from experiments.data import Data, Split
from experiments.data.loaders import Batch, BatchRows, Loader, TensorLoader
from experiments.errors import Diverged, Interrupted, UsageError
from experiments.training.build import build
from experiments.training.fit import Callbacks, FitOptions, Validation, fit, loss_batch
from experiments.training.models import mlp
from experiments.training.objective import Objective
from experiments.training.parameter_groups import for_target
from experiments.training.parts import clip_gradients
from experiments.training.schedules import constant
from experiments.training.steps import EagerSteps, Scheduler, accumulate
from experiments.training.train_log import Metrics, State


@dataclass
class Recorder:
    """Keeps what `fit` tells: every call of log, save and progress."""

    lines: list[tuple[int, int, Metrics]] = field(default_factory=list)
    saved: list[tuple[State, bool]] = field(default_factory=list)
    advanced: list[tuple[int, int, int]] = field(default_factory=list)
    ended: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def log(self, step: int, epoch: int, metrics: Metrics) -> None:
        self.lines.append((step, epoch, dict(metrics)))

    def save(self, state: State, best: bool) -> None:
        self.saved.append((deepcopy(state), best))

    def advance(self, epoch: int, batch: int, rows: int, loss: Tensor) -> None:
        self.advanced.append((epoch, batch, rows))

    def epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.ended.append((epoch, dict(metrics)))

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Only the numbers of epochs are kept."""

    def close(self) -> None:
        """Nothing to close."""

    def of(self, tag: str) -> list[tuple[int, float]]:
        return [(step, metrics[tag]) for step, _, metrics in self.lines if tag in metrics]


def small_model(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    return mlp(784, [16], 10, dropout)


def run_fit(
    epochs: int,
    model: nn.Module,
    opt: Optimizer,
    train_loader: Loader,
    valid_loader: Loader,
    *,
    accumulated: int = 1,
    state: State | None = None,
    scheduler: Scheduler | None = None,
    loss_func: Any = cross_entropy,
    recorder: Recorder | None = None,
    log_every: int = 100,
    monitor: str = "loss/valid",
    **callbacks: Any,
) -> tuple[Recorder, Metrics]:
    recorder, scheduler = recorder or Recorder(), scheduler or constant(opt)
    objective = Objective(model, loss_func)
    maximize = monitor.startswith("accuracy")
    best = fit(
        objective,
        EagerSteps(objective, opt, scheduler, train_loader, accumulated),
        Validation(valid_loader, accuracy(loss_func)),
        state or State(),
        FitOptions(epochs, log_every=log_every, monitor=monitor, maximize=maximize),
        Callbacks(recorder.log, recorder.save, recorder, **callbacks),
    )
    return recorder, best


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def identical(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# loss_batch


def test_loss_batch_gives_the_mean_loss_and_the_number_of_rows(tiny: Data) -> None:
    model, x, y = small_model(), tiny.train.x[:50], tiny.train.y[:50]
    loss, rows = loss_batch(model, cross_entropy, x, y)
    assert rows == 50
    assert loss.shape == ()
    assert not loss.requires_grad
    assert loss.item() == cross_entropy(model(x), y).item()


def test_loss_batch_without_an_optimizer_changes_nothing(tiny: Data) -> None:
    model = small_model()
    before = weights(model)
    loss_batch(model, cross_entropy, tiny.train.x[:50], tiny.train.y[:50])
    assert identical(weights(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_loss_batch_with_an_optimizer_is_one_step_of_sgd_bit_for_bit(tiny: Data) -> None:
    model, x, y = small_model(), tiny.train.x[:50], tiny.train.y[:50]
    before = cross_entropy(model(x), y)
    gradients = torch.autograd.grad(before, list(model.parameters()))
    expected = [p.sub(g, alpha=0.1) for p, g in zip(weights(model), gradients, strict=True)]
    loss, _ = loss_batch(model, cross_entropy, x, y, SGD(model.parameters(), lr=0.1))
    assert loss.item() == before.item()
    assert identical(weights(model), expected)


def test_loss_batch_leaves_no_gradient_behind_for_the_next_step(tiny: Data) -> None:
    model = small_model()
    opt = SGD(model.parameters(), lr=0.1)
    loss_batch(model, cross_entropy, tiny.train.x[:50], tiny.train.y[:50], opt)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# evaluate


def test_evaluate_weights_each_batch_by_its_rows(tiny: Data) -> None:
    """150 rows by 64 leave 22 for the last batch, whose mean must not count as much."""
    model = small_model()
    losses = [
        cross_entropy(model(x), y).item()
        for x, y in zip(tiny.valid.x.split(64), tiny.valid.y.split(64), strict=True)
    ]
    loss, _ = evaluated(model, cross_entropy, TensorLoader(tiny.valid, batch_size=64))
    assert loss == pytest.approx(sum(np.multiply(losses, [64, 64, 22])) / 150, rel=1e-15)
    assert abs(loss - sum(losses) / 3) > 1e-6


@settings(max_examples=40)
@given(batch_size=st.integers(1, 200))
def test_evaluate_gives_nearly_the_same_whatever_the_batch_size(
    tiny: Data, batch_size: int
) -> None:
    model = small_model()
    logits = model(tiny.valid.x)
    loss, fraction = evaluated(
        model, cross_entropy, TensorLoader(tiny.valid, batch_size=batch_size)
    )
    assert loss == pytest.approx(cross_entropy(logits, tiny.valid.y).item(), rel=1e-6)
    assert fraction == int((logits.argmax(1) == tiny.valid.y).sum()) / 150


def test_accuracy_is_the_fraction_of_rows_whose_largest_logit_is_the_target() -> None:
    x = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0], [1.0, 0.0]])
    rows = Split(x, torch.tensor([0, 1, 1, 0]))
    assert evaluated(echo(), cross_entropy, TensorLoader(rows, batch_size=3))[1] == 0.75


def test_evaluate_computes_no_gradient_and_changes_neither_weights_nor_statistics(
    tiny: Data,
) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(784, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 10)
    )
    before, generator = deepcopy(model.state_dict()), torch.get_rng_state()
    evaluated(model, cross_entropy, TensorLoader(tiny.valid, batch_size=64))
    assert identical(list(model.state_dict().values()), list(before.values()))
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def test_evaluate_builds_no_graph(tiny: Data) -> None:
    seen = []

    def loss_func(logits: Tensor, targets: Tensor) -> Tensor:
        seen.append(logits.requires_grad)
        return cross_entropy(logits, targets)

    evaluated(small_model(), loss_func, TensorLoader(tiny.valid, batch_size=64))
    assert seen == [False] * 3


def test_evaluate_switches_dropout_off_and_leaves_gradients_enabled(tiny: Data) -> None:
    model, loader = small_model(dropout=0.5), TensorLoader(tiny.valid, batch_size=64)
    model.train()
    assert evaluated(model, cross_entropy, loader) == evaluated(model, cross_entropy, loader)
    assert torch.is_grad_enabled()


# fit


def tutorial_fit(
    epochs: int, model: nn.Module, opt: Optimizer, tiny: Data, shuffle: bool
) -> list[float]:
    """The loop of "What is torch.nn really?", over the same rows; the validation losses."""
    losses = []
    for epoch in range(epochs):
        model.train()
        rows = BatchRows(320, 60, shuffle=shuffle, seed=7).batches(epoch)
        for index in rows:
            loss = cross_entropy(model(tiny.train.x[index]), tiny.train.y[index])
            loss.backward()
            opt.step()
            opt.zero_grad()
        model.eval()
        with torch.no_grad():
            batches = list(zip(tiny.valid.x.split(64), tiny.valid.y.split(64), strict=True))
            means = [cross_entropy(model(xb), yb).item() for xb, yb in batches]
            nums = [len(xb) for xb, _ in batches]
        losses.append(float(np.sum(np.multiply(means, nums)) / np.sum(nums)))
    return losses


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    "optimizer",
    [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: Adam(p, lr=0.002, fused=True)],
    ids=["sgd", "adam"],
)
def test_fit_is_the_tutorials_loop_bit_for_bit(
    optimizer: Callable[[Any], Optimizer], shuffle: bool, tiny: Data
) -> None:
    """With dropout, so that a stray draw from the global generator would show."""
    model, other = small_model(dropout=0.2), small_model(dropout=0.2)
    torch.manual_seed(3)
    expected = tutorial_fit(3, other, optimizer(other.parameters()), tiny, shuffle)
    torch.manual_seed(3)
    recorder, _ = run_fit(
        3,
        model,
        optimizer(model.parameters()),
        TensorLoader(tiny.train, batch_size=60, shuffle=shuffle, seed=7),
        TensorLoader(tiny.valid, batch_size=64),
        log_every=2,
    )
    assert identical(weights(model), weights(other))
    assert [loss for _, loss in recorder.of("loss/valid")] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("option", sorted(file.stem for file in CONF.glob("optimizer/*.yaml")))
def test_every_optimizer_option_lowers_the_loss(
    option: str, compose: Callable[[list[str]], dict[str, Any]], tiny: Data
) -> None:
    model = small_model()
    opt = build(for_target(compose([f"optimizer={option}"])), "optimizer", model.parameters())
    recorder, _ = run_fit(4, model, opt, *loaders(tiny))
    losses = [loss for _, loss in recorder.of("loss/train_epoch")]
    assert losses[-1] < 0.9 * losses[0]


def loaders(tiny: Data, batch_size: int = 60, seed: int = 0) -> tuple[TensorLoader, TensorLoader]:
    """Six batches to train on, of which the last has 20 rows, and three to validate."""
    train = TensorLoader(tiny.train, batch_size=batch_size, shuffle=True, seed=seed)
    return train, TensorLoader(tiny.valid, batch_size=64)


def test_the_training_loss_is_logged_every_so_many_steps_and_at_the_end_of_each_epoch(
    tiny: Data,
) -> None:
    """Step 12 is both, and is logged once."""
    model = small_model()
    recorder, _ = run_fit(3, model, SGD(model.parameters(), lr=0.1), *loaders(tiny), log_every=4)
    assert [step for step, _ in recorder.of("loss/train")] == [4, 6, 8, 12, 16, 18]
    assert [step for step, _ in recorder.of("lr")] == [4, 6, 8, 12, 16, 18]
    for tag in ("loss/train_epoch", "loss/valid", "accuracy/valid", "throughput"):
        assert [step for step, _ in recorder.of(tag)] == [6, 12, 18]


def test_every_line_names_the_epoch_that_its_step_belongs_to_from_one(tiny: Data) -> None:
    model = small_model()
    recorder, _ = run_fit(3, model, SGD(model.parameters(), lr=0.1), *loaders(tiny), log_every=4)
    assert all(epoch == math.ceil(step / 6) for step, epoch, _ in recorder.lines)


def test_logged_training_losses_are_means_over_rows_since_the_last_one(tiny: Data) -> None:
    """At lr 0 every batch's loss is known beforehand; the last batch has only 20 rows."""
    model = small_model()
    train_loader, valid_loader = loaders(tiny)
    losses, sizes = [], []
    for xb, yb in train_loader.batches(0):
        losses.append(cross_entropy(model(xb), yb).item())
        sizes.append(len(xb))

    def mean(part: slice) -> float:
        return float(np.average(losses[part], weights=sizes[part]))

    opt = SGD(model.parameters(), lr=0.0)
    recorder, _ = run_fit(1, model, opt, train_loader, valid_loader, log_every=4)
    assert sizes[-1] == 20
    logged = [loss for _, loss in recorder.of("loss/train")]
    assert logged == pytest.approx([mean(slice(0, 4)), mean(slice(4, 6))], rel=1e-12)
    [(_, epoch)] = recorder.of("loss/train_epoch")
    assert epoch == pytest.approx(mean(slice(None)), rel=1e-12)


def test_loss_train_epoch_does_not_depend_on_how_often_is_logged(tiny: Data) -> None:
    found = []
    for log_every in (1, 4, 1000):
        model = small_model()
        opt = SGD(model.parameters(), lr=0.1)
        recorder, _ = run_fit(2, model, opt, *loaders(tiny), log_every=log_every)
        found.append([loss for _, loss in recorder.of("loss/train_epoch")])
    assert found[0] == pytest.approx(found[1], rel=1e-14)
    assert found[0] == pytest.approx(found[2], rel=1e-14)


def test_logging_more_often_changes_no_weight(tiny: Data) -> None:
    results = []
    for log_every in (1, 1000):
        model = small_model(dropout=0.2)
        run_fit(2, model, SGD(model.parameters(), lr=0.1), *loaders(tiny), log_every=log_every)
        results.append(weights(model))
    assert identical(*results)


def test_the_logged_lr_is_the_one_that_the_step_used(tiny: Data) -> None:
    model = small_model()
    opt = SGD(model.parameters(), lr=0.1)
    used: list[float] = []
    opt.register_step_pre_hook(lambda opt, args, kwargs: used.append(opt.param_groups[0]["lr"]))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    recorder, _ = run_fit(2, model, opt, *loaders(tiny), scheduler=scheduler, log_every=5)
    assert recorder.of("lr") == [(step, used[step - 1]) for step in (5, 6, 10, 12)]
    assert used[1] == pytest.approx(0.09)


def test_throughput_is_the_rows_of_an_epoch_over_its_training_time(
    tiny: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of a slow batch counts, that of a slow validation does not."""
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)

    class Slow(TensorLoader):
        seconds = 0.02

        def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
            nonlocal now
            for batch in super().batches(epoch, start):
                now += self.seconds
                yield batch

    model = small_model()
    train, valid = Slow(tiny.train, batch_size=60), Slow(tiny.valid, batch_size=150)
    valid.seconds = 1.0
    recorder, _ = run_fit(1, model, SGD(model.parameters(), lr=0.1), train, valid)
    [(_, throughput)] = recorder.of("throughput")
    assert throughput == pytest.approx(320 / (6 * 0.02))


def test_progress_is_told_each_batch_and_each_epochs_numbers(tiny: Data) -> None:
    model = small_model()
    recorder, _ = run_fit(2, model, SGD(model.parameters(), lr=0.1), *loaders(tiny))
    sizes = [60] * 5 + [20]
    assert recorder.advanced == [
        (epoch, batch + 1, rows) for epoch in (1, 2) for batch, rows in enumerate(sizes)
    ]
    assert [epoch for epoch, _ in recorder.ended] == [1, 2]
    assert recorder.ended[0][1]["loss/valid"] == recorder.of("loss/valid")[0][1]


# Accumulated batches and clipped gradients


def test_accumulated_batches_make_the_step_of_one_batch_of_all_their_rows(tiny: Data) -> None:
    """Of 60, 60 and 20 rows, which weigh by their rows."""
    one, other = small_model(), small_model()
    x, y = tiny.train.x[:140], tiny.train.y[:140]
    parts = list(zip(x.split(60), y.split(60), strict=True))
    objective = Objective(one, cross_entropy)  # type: ignore[arg-type]
    loss = accumulate(objective, parts, SGD(one.parameters(), lr=0.5)).loss
    expected, _ = loss_batch(other, cross_entropy, x, y, SGD(other.parameters(), lr=0.5))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_step_of_accumulated_batches_counts_all_their_rows(tiny: Data) -> None:
    model = small_model()
    opt = SGD(model.parameters(), lr=0.5)
    loader = TensorLoader(Split(tiny.train.x[:140], tiny.train.y[:140]), batch_size=60)
    objective = Objective(model, cross_entropy)  # type: ignore[arg-type]
    [result] = EagerSteps(objective, opt, constant(opt), loader, 3).take(0, 0)
    assert (result.rows, result.batches) == (140, 3)


def test_fit_with_accumulated_batches_follows_fit_with_large_ones_to_a_smaller_last_group(
    tiny: Data,
) -> None:
    """320 rows: 16 batches of 20 by threes are 5 groups of 60 rows and one of 20."""
    one, other = small_model(), small_model()
    small, big = (
        (loaders(tiny, size), SGD(m.parameters(), lr=0.1)) for size, m in ((20, one), (60, other))
    )
    accumulated, _ = run_fit(3, one, small[1], *small[0], accumulated=3)
    plain, _ = run_fit(3, other, big[1], *big[0])
    for a, b in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for tag in ("loss/train", "loss/valid"):
        assert [step for step, _ in accumulated.of(tag)] == [6, 12, 18]
        expected = [pytest.approx(loss, rel=1e-5) for _, loss in plain.of(tag)]
        assert [loss for _, loss in accumulated.of(tag)] == expected


@settings(max_examples=20)
@given(limit=st.floats(1e-4, 10))
def test_a_clipped_step_is_no_longer_than_the_limit_and_keeps_its_direction(
    tiny: Data, limit: float
) -> None:
    x, y = tiny.train.x[:60], tiny.train.y[:60]
    steps = []
    for clipped in (False, True):
        model = small_model()
        before, opt = weights(model), SGD(model.parameters(), lr=1.0)
        if clipped:
            clip_gradients(opt, limit)
        loss_batch(model, cross_entropy, x, y, opt)
        parts = [(a - b).flatten() for a, b in zip(weights(model), before, strict=True)]
        steps.append(torch.cat(parts).double())
    free, short = steps
    assert short.norm() <= min(limit, free.norm()) * (1 + 1e-3)
    assert short.norm() >= min(limit, free.norm()) * (1 - 1e-2)
    assert torch.cosine_similarity(free, short, 0) > 0.999


def test_a_limit_that_no_gradient_reaches_changes_no_bit(tiny: Data) -> None:
    results = []
    for clipped in (False, True):
        model = small_model()
        opt = SGD(model.parameters(), lr=0.1)
        if clipped:
            clip_gradients(opt, 1e6)
        loss_batch(model, cross_entropy, tiny.train.x[:60], tiny.train.y[:60], opt)
        results.append(weights(model))
    assert identical(*results)


# The best epoch


def echo() -> nn.Module:
    """A model that gives its two inputs back as logits."""
    model = nn.Linear(2, 2, bias=False)
    nn.init.eye_(model.weight)
    return model


class Replay:
    """Validation batches that are others in each epoch, so that the metrics are known."""

    def __init__(self, epochs: list[Batch]) -> None:
        self.epochs = iter(epochs)

    def __len__(self) -> int:
        return 1

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        yield next(self.epochs)


def fit_through(epochs: list[Batch], monitor: str) -> tuple[Recorder, Metrics]:
    """Fit at lr 0, where the validation batch alone decides the metrics."""
    model = echo()
    train = TensorLoader(Split(torch.ones(2, 2), torch.zeros(2, dtype=torch.int64)), batch_size=2)
    opt = SGD(model.parameters(), lr=0.0)
    return run_fit(len(epochs), model, opt, train, Replay(epochs), monitor=monitor)


def with_loss(margin: float) -> Batch:
    """The larger the margin, the smaller the loss; the accuracy is 1 throughout."""
    return torch.tensor([[1.0 + margin, 0.0]]), torch.tensor([0])


def with_hits(hits: int) -> Batch:
    """Five rows, of which so many are right, the more surely wrong the rest the more are right."""
    x = torch.tensor([[1.0, 0.0]] * hits + [[0.0, 1.0 + 10.0 * hits]] * (5 - hits))
    return x, torch.zeros(5, dtype=torch.int64)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_the_best_loss_is_the_first_of_the_smallest_and_no_worse_one_replaces_it(
    margins: list[int],
) -> None:
    recorder, best = fit_through([with_loss(margin) for margin in margins], "loss/valid")
    first = margins.index(max(margins))
    assert best["epoch"] == first + 1
    assert best["loss/valid"] == recorder.of("loss/valid")[first][1]
    improved = [margin > max(margins[:i], default=-1) for i, margin in enumerate(margins)]
    assert [flag for _, flag in recorder.saved] == improved


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_the_best_accuracy_is_the_first_of_the_largest_whatever_the_loss(hits: list[int]) -> None:
    recorder, best = fit_through([with_hits(count) for count in hits], "accuracy/valid")
    first = hits.index(max(hits))
    assert best["epoch"] == first + 1
    assert best["accuracy/valid"] == max(hits) / 5
    improved = [count > max(hits[:i], default=-1) for i, count in enumerate(hits)]
    assert [flag for _, flag in recorder.saved] == improved


def test_a_number_replaces_one_that_is_nan_as_the_best() -> None:
    state = State()
    better = [
        state.validated({"f/valid": value}, 1, "f/valid", maximize=True)
        for value in (math.nan, 0.3, math.nan, 0.2, 0.5)
    ]
    assert better == [True, True, False, False, True]
    assert state.best["f/valid"] == 0.5


def test_a_validation_without_the_monitored_number_is_told() -> None:
    with pytest.raises(UsageError, match="f/valid: the validation at step 0 has no such number"):
        State().validated({"loss/valid": 1.0}, 1, "f/valid", maximize=True)


def test_the_best_metrics_are_all_of_one_epoch() -> None:
    """In epoch 2 the loss is smaller, in epoch 1 the accuracy larger."""
    epochs = [(torch.tensor([[0.1, 0.0]] * 2), torch.tensor([0, 0]))]
    epochs.append((torch.tensor([[9.0, 0.0], [0.0, 0.5]]), torch.tensor([0, 0])))
    by_loss = fit_through(epochs, "loss/valid")[1]
    by_accuracy = fit_through(epochs, "accuracy/valid")[1]
    assert (by_loss["epoch"], by_loss["accuracy/valid"]) == (2, 0.5)
    assert (by_accuracy["epoch"], by_accuracy["accuracy/valid"]) == (1, 1.0)
    assert by_loss["loss/valid"] < by_accuracy["loss/valid"]


def test_the_saved_state_already_knows_the_epoch_that_it_closes() -> None:
    recorder, _ = fit_through([with_loss(2), with_loss(1)], "loss/valid")
    states = [state for state, _ in recorder.saved]
    assert [(s.epoch, s.batch, s.step, s.rows, s.epoch_rows) for s in states] == [
        (1, 0, 1, 0, 0),
        (2, 0, 2, 0, 0),
    ]
    assert [state.best["epoch"] for state in states] == [1, 1]
    assert [state.last["epoch"] for state in states] == [1, 2]


# Divergence, checkpoints and signals


def test_a_loss_that_is_no_number_raises_diverged_after_it_was_logged(tiny: Data) -> None:
    model = small_model()
    x = tiny.train.x.clone()
    x[7] = math.nan
    train = TensorLoader(Split(x, tiny.train.y), batch_size=60)
    recorder = Recorder()
    opt = SGD(model.parameters(), lr=0.1)
    with pytest.raises(Diverged, match=r"loss/train is nan at step 4; so it was before any weight"):
        run_fit(2, model, opt, train, train, recorder=recorder, log_every=4)
    [(step, loss)] = recorder.of("loss/train")
    assert step == 4
    assert math.isnan(loss)
    assert recorder.saved == []


def test_an_lr_that_is_too_large_raises_diverged(tiny: Data) -> None:
    model = small_model()
    with pytest.raises(Diverged, match=r"; try a smaller optimizer.lr$"):
        run_fit(3, model, SGD(model.parameters(), lr=1e30), *loaders(tiny))


def test_a_validation_loss_that_is_not_finite_raises_diverged_and_is_not_saved() -> None:
    with pytest.raises(Diverged, match="loss/valid is nan at step 2"):
        fit_through([with_loss(1), with_loss(math.nan)], "loss/valid")


@pytest.mark.parametrize("number", [2, 15])
def test_a_signal_saves_after_the_step_and_raises_interrupted_with_its_number(
    number: int, tiny: Data
) -> None:
    model, recorder, state = small_model(), Recorder(), State()
    opt = SGD(model.parameters(), lr=0.1)
    with pytest.raises(Interrupted) as raised:
        run_fit(2, model, opt, *loaders(tiny), state=state, recorder=recorder, log_every=2,
                stop_signal=lambda: number if state.step == 3 else None)  # fmt: skip
    assert raised.value.signal_number == number
    [(saved, best)] = recorder.saved
    assert not best
    assert (saved.epoch, saved.batch, saved.step) == (0, 3, 3)
    assert (saved.rows, saved.epoch_rows) == (60, 120)
    assert saved.loss > 0


@pytest.mark.parametrize("stop", range(1, 13))
def test_a_fit_that_was_stopped_goes_on_with_its_state_to_the_same_bits(
    stop: int, tiny: Data
) -> None:
    """At every step of two epochs: in weights, and in every number that is logged."""

    def make() -> tuple[nn.Module, Optimizer]:
        model = small_model()
        return model, SGD(model.parameters(), lr=0.1, momentum=0.9)

    unbroken, opt = make()
    expected, best = run_fit(2, unbroken, opt, *loaders(tiny), log_every=4)

    model, opt = make()
    recorder, state, pending = Recorder(), State(), [stop]

    def stop_signal() -> int | None:
        return 15 if pending and state.step == pending[0] and pending.pop() else None

    options: dict[str, Any] = {"state": state, "recorder": recorder, "log_every": 4}
    with pytest.raises(Interrupted):
        run_fit(2, model, opt, *loaders(tiny), **options, stop_signal=stop_signal)
    assert run_fit(2, model, opt, *loaders(tiny), **options)[1] == best
    assert identical(weights(model), weights(unbroken))

    def numbers(recorder: Recorder) -> list[tuple[int, int, Metrics]]:
        return [line for line in recorder.lines if "throughput" not in line[2]]

    assert numbers(recorder) == numbers(expected)


def test_due_saves_inside_an_epoch_and_each_epochs_end_is_saved_once(tiny: Data) -> None:
    model = small_model()
    opt = SGD(model.parameters(), lr=0.1)
    recorder, _ = run_fit(
        2, model, opt, *loaders(tiny), checkpoint_due=lambda step, taken: step % 3 == 0
    )
    assert [(state.epoch, state.batch) for state, _ in recorder.saved] == [
        (0, 3), (1, 0), (1, 3), (2, 0),
    ]  # fmt: skip


def test_a_fit_whose_epochs_are_done_trains_no_further(tiny: Data) -> None:
    model = small_model()
    before = weights(model)
    state = State(epoch=3, step=18, best={"loss/valid": 0.5})
    opt = SGD(model.parameters(), lr=0.1)
    recorder, best = run_fit(3, model, opt, *loaders(tiny), state=state)
    assert identical(weights(model), before)
    assert recorder.lines == []
    assert best == {"loss/valid": 0.5}


def test_fit_draws_from_no_global_generator(tiny: Data) -> None:
    model = small_model()
    before = torch.get_rng_state(), random.getstate()
    run_fit(2, model, SGD(model.parameters(), lr=0.1), *loaders(tiny))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
