import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from experiments.config.compose import CONF
from experiments.data import Data
from experiments.directory import record as runs
from experiments.directory.claim import claim
from experiments.train import train
from experiments.training.fit import Scheduler
from experiments.training.schedules import constant, cosine

fractions = st.floats(0, 1)


def used(schedule: Callable[[SGD], Scheduler], steps: int, lr: float = 1.0) -> list[float]:
    """The learning rate of each of the steps of a run."""
    opt = SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = schedule(opt)
    rates = []
    for _ in range(steps):
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return rates


@given(st.floats(1e-6, 10), st.integers(1, 50))
def test_constant_is_the_optimizers_own_lr_at_every_step(lr: float, steps: int) -> None:
    assert used(constant, steps, lr) == [lr] * steps


@given(st.integers(1, 200), fractions, fractions)
def test_cosine_stays_between_zero_and_the_optimizers_lr(
    steps: int, warmup: float, final: float
) -> None:
    rates = used(lambda opt: cosine(opt, steps, warmup, final), steps)
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)


@given(st.integers(2, 200), st.floats(0, 0.9), fractions)
def test_cosine_reaches_its_final_value_at_the_last_step(
    steps: int, warmup: float, final: float
) -> None:
    if round(warmup * steps) < steps - 1:
        rates = used(lambda opt: cosine(opt, steps, warmup, final), steps)
        assert rates[-1] == pytest.approx(final, abs=1e-12)


@given(st.integers(1, 200), fractions, fractions)
def test_cosine_rises_in_equal_parts_during_warmup_and_never_after(
    steps: int, warmup: float, final: float
) -> None:
    warm = round(warmup * steps)
    rates = used(lambda opt: cosine(opt, steps, warmup, final), steps)
    assert rates[:warm] == pytest.approx([(step + 1) / (warm + 1) for step in range(warm)])
    assert all(
        one >= other - 1e-12 for one, other in zip(rates[warm:], rates[warm + 1 :], strict=False)
    )
    if warm < steps:
        assert rates[warm] == pytest.approx(1)


def test_cosine_without_warmup_is_the_curve_of_the_paper() -> None:
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(11)]
    assert used(lambda opt: cosine(opt, 11, 0.0, 0.1), 11) == pytest.approx(expected)


def test_cosine_keeps_its_final_value_after_total_steps() -> None:
    """As after the number of epochs was raised by hand."""
    assert used(lambda opt: cosine(opt, 5, 0.0, 0.2), 8)[-3:] == pytest.approx([0.2] * 3)


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Restores the torch settings that a run in this process changes."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode("default")


Rates = Callable[..., list[float]]


@pytest.fixture
def rates(
    torch_settings: None,
    compose: Callable[[list[str]], dict[str, Any]],
    tiny: Data,
    tmp_path: Path,
) -> Rates:
    """The logged lr of every step of a whole run of three epochs of six batches."""

    def rates(*overrides: str) -> list[float]:
        settings = ["trainer.epochs=3", "loader.batch_size=60", "trainer.log_every=1"]
        config = compose([*settings, *overrides])
        run = runs.start(claim(tmp_path / "run", exact=True), config, [])
        train(config, tiny, run)
        run.end("finished")
        lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        return [line["lr"] for line in lines if "lr" in line]

    return rates


@pytest.mark.parametrize("option", sorted(file.stem for file in CONF.glob("scheduler/*.yaml")))
def test_every_scheduler_option_lasts_for_a_whole_run(option: str, rates: Rates) -> None:
    found = rates(f"scheduler={option}", "optimizer.lr=0.01")
    assert len(found) == 18
    assert all(0 <= rate <= 0.01 + 1e-12 for rate in found)
    assert max(found) == pytest.approx(0.01, rel=0.02)


def test_onecycle_rises_to_optimizer_lr_and_ends_at_the_last_step(rates: Rates) -> None:
    found = rates("scheduler=onecycle", "optimizer.lr=0.5")
    assert max(found) == pytest.approx(0.5, rel=0.01)
    assert found[0] == pytest.approx(0.5 / 25)
    assert found[-1] == pytest.approx(0.5 / 25 / 10_000)
    top = found.index(max(found))
    assert found[:top] == sorted(found[:top])
    assert found[top:] == sorted(found[top:], reverse=True)


def test_a_schedule_counts_optimizer_steps_when_batches_are_accumulated(
    rates: Rates,
) -> None:
    """Six batches with accumulate=4 are two steps, of four batches and of two."""
    found = rates("scheduler=onecycle", "optimizer.lr=0.5", "trainer.accumulate=4")
    assert len(found) == 6
    assert found[-1] == pytest.approx(0.5 / 25 / 10_000)
