import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from saved_runs import SMALL, assert_same_run, go_on, stop_after
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LinearLR, MultiStepLR, StepLR

from experiments.config.compose import CONF
from experiments.config.schema import check
from experiments.data import Data
from experiments.directory import record as runs
from experiments.directory.claim import claim
from experiments.errors import UsageError
from experiments.train import train
from experiments.training.schedules import Plateau, constant, cosine, linear, multistep
from experiments.training.scheduling import build_schedule
from experiments.training.steps import Scheduler

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


def test_linear_without_warmup_is_torchs() -> None:
    """As LinearLR goes down, over the steps between the first and the last."""
    expected = used(lambda opt: LinearLR(opt, 1.0, 0.1, total_iters=10), 11)
    assert used(lambda opt: linear(opt, 11, 0.0, 0.1), 11) == pytest.approx(expected)


@given(st.integers(1, 200), fractions, fractions)
def test_linear_rises_in_equal_parts_during_warmup_and_falls_in_equal_parts_to_its_end(
    steps: int, warmup: float, final: float
) -> None:
    warm = round(warmup * steps)
    rates = used(lambda opt: linear(opt, steps, warmup, final), steps)
    assert rates[:warm] == pytest.approx([(step + 1) / (warm + 1) for step in range(warm)])
    falls = [one - other for one, other in zip(rates[warm:], rates[warm + 1 :], strict=False)]
    assert falls == pytest.approx([falls[0]] * len(falls) if falls else [])
    if warm < steps - 1:
        assert (rates[warm], rates[-1]) == pytest.approx((1, final))


def test_multistep_is_torchs_with_milestones_as_fractions_of_the_run() -> None:
    expected = used(lambda opt: MultiStepLR(opt, [10, 15], gamma=0.3), 20)
    assert used(lambda opt: multistep(opt, 20, 0.0, [0.5, 0.75], 0.3), 20) == pytest.approx(
        expected
    )


def test_multistep_warms_up_first() -> None:
    rates = used(lambda opt: multistep(opt, 8, 0.5, [0.75]), 8)
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 0.1, 0.1])


def test_plateau_warms_up_by_steps_and_then_falls_by_epochs() -> None:
    opt = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = Plateau(opt, total_steps=12, warmup=0.25, factor=0.1, patience=0)
    rates = []
    for _ in range(6):  # of two steps, all with the same number
        for _ in range(2):
            rates.append(opt.param_groups[0]["lr"])
            opt.step()
            schedule.step()
        schedule.validated(1.0)
    # the second epoch is the first to count, and the third the first without improvement
    assert rates[:6] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert rates[6:] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


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


TORCH = "torch.optim.lr_scheduler."


def node(name: str, **settings: Any) -> dict[str, Any]:
    """A scheduler's config with one of torch's schedules."""
    return {"_target_": TORCH + name, "_partial_": True, **settings}


@pytest.fixture
def used_by(
    torch_settings: None,
    compose: Callable[[list[str]], dict[str, Any]],
    tiny: Data,
    tmp_path: Path,
) -> Rates:
    """The same with the scheduler's config given."""

    def used_by(scheduler: dict[str, Any], *overrides: str) -> list[float]:
        settings = ["trainer.epochs=3", "loader.batch_size=60", "trainer.log_every=1"]
        config = compose([*settings, "model=linear", "optimizer.lr=0.01", *overrides])
        config["scheduler"] = scheduler
        run = runs.start(claim(tmp_path / "run", exact=False), config, [])
        train(check(config), tiny, run)
        run.end("finished")
        lines = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
        return [line["lr"] for line in lines if "lr" in line]

    return used_by


def held(*values: float) -> list[float]:
    """Values that hold for an epoch of six steps each."""
    return [value for value in values for _ in range(6)]


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (node("StepLR", step_size=2, gamma=0.1), held(0.01, 0.01, 0.001)),
        (node("MultiStepLR", milestones=[1], gamma=0.1), held(0.01, 0.001, 0.001)),
        (node("ExponentialLR", gamma=0.5), held(0.01, 0.005, 0.0025)),
        (node("CosineAnnealingLR", T_max=2), held(0.01, 0.005, 0.0)),
        (node("LinearLR", start_factor=0.5, total_iters=2), held(0.005, 0.0075, 0.01)),
        (node("ConstantLR", factor=0.5, total_iters=1), held(0.005, 0.01, 0.01)),
        (node("PolynomialLR", total_iters=2), held(0.01, 0.005, 0.0)),
        (node("CosineAnnealingWarmRestarts", T_0=2), held(0.01, 0.005, 0.01)),
    ],
)  # fmt: skip
def test_torchs_schedules_of_epochs_move_at_the_end_of_each_epoch(
    scheduler: dict[str, Any], expected: list[float], used_by: Rates
) -> None:
    assert used_by(scheduler) == pytest.approx(expected)


def test_every_step_moves_a_schedule_of_epochs_after_each_step(used_by: Rates) -> None:
    found = used_by(node("ExponentialLR", gamma=0.5, every="step"))
    assert found == pytest.approx([0.01 * 0.5**step for step in range(18)])


def test_every_epoch_moves_a_schedule_of_steps_after_each_epoch(used_by: Rates) -> None:
    found = used_by(node("OneCycleLR", max_lr=0.01, cycle_momentum=False, every="epoch"))
    assert found == held(*found[::6])
    assert found[-1] == pytest.approx(0.01 / 25 / 10_000)


def test_cyclic_lr_moves_after_each_step(used_by: Rates) -> None:
    cyclic = node("CyclicLR", base_lr=0.01, max_lr=0.02, step_size_up=2, cycle_momentum=False)
    assert used_by(cyclic)[:5] == pytest.approx([0.01, 0.015, 0.02, 0.015, 0.01])


def test_a_length_that_is_null_is_that_of_the_run(used_by: Rates) -> None:
    by_epoch = used_by(node("CosineAnnealingLR", T_max=None))
    assert by_epoch == pytest.approx(held(0.01, 0.0075, 0.0025))
    by_step = used_by(node("LinearLR", start_factor=1.0, end_factor=0.1, total_iters=None,
                           every="step"))  # fmt: skip
    assert by_step == pytest.approx([0.01 * (1 - 0.9 * step / 18) for step in range(18)])


def test_a_length_that_torch_has_a_default_for_keeps_it(used_by: Rates) -> None:
    assert used_by(node("PolynomialLR"))[-1] == pytest.approx(0.01 * 3 / 5)


def test_reduce_lr_on_plateau_follows_the_monitored_number(used_by: Rates) -> None:
    """The second loss is not a tenth of the first."""
    plateau = node("ReduceLROnPlateau", patience=0, threshold=0.9, factor=0.1)
    assert used_by(plateau) == pytest.approx(held(0.01, 0.01, 0.001))


def test_reduce_lr_on_plateau_takes_its_direction_from_the_monitor(used_by: Rates) -> None:
    """A loss that falls would be a plateau if more were better."""
    plateau = node("ReduceLROnPlateau", patience=0, factor=0.1)
    assert used_by(plateau) == held(0.01, 0.01, 0.01)
    rising = used_by(plateau, "trainer.monitor=accuracy/valid", "optimizer.lr=0.001")
    assert rising == held(0.001, 0.001, 0.001)


def own(name: str, **settings: Any) -> dict[str, Any]:
    """A scheduler's config with one of this package's schedules."""
    return {"_target_": f"{constant.__module__}.{name}", "_partial_": True, **settings}


def test_plateau_follows_the_monitored_number_after_its_warmup(used_by: Rates) -> None:
    """The warmup ends with the first epoch, and no loss is a tenth of the one before."""
    found = used_by(own("Plateau", warmup=0.25, patience=0, threshold=0.9, factor=0.1),
                    "trainer.epochs=4")  # fmt: skip
    warming = [0.01 * (step + 1) / 7 for step in range(6)]
    assert found == pytest.approx([*warming, *held(0.01, 0.001, 0.0001)])


WARM_UP = node("LinearLR", start_factor=0.5, total_iters=1)


def test_nested_schedules_follow_each_other(used_by: Rates) -> None:
    chain = node("SequentialLR", milestones=[1],
                 schedulers=[WARM_UP, node("CosineAnnealingLR", T_max=None)])  # fmt: skip
    assert used_by(chain) == pytest.approx(held(0.005, 0.01, 0.005))


def test_chained_schedules_multiply(used_by: Rates) -> None:
    chain = node("ChainedScheduler", schedulers=[WARM_UP, node("ExponentialLR", gamma=0.1)])
    assert used_by(chain) == pytest.approx(held(0.005, 0.001, 0.0001))


def half(optimizer: SGD) -> StepLR:
    """A schedule of one's own, which does not say what it counts."""
    return StepLR(optimizer, 6, 0.5)


def rate(optimizer: SGD) -> float:
    """No schedule, though it might look like one."""
    return 0.1


HALF = {"_target_": f"{__name__}.half", "_partial_": True}


def test_a_function_of_ones_own_moves_by_steps_and_says_so(
    used_by: Rates, capsys: pytest.CaptureFixture[str]
) -> None:
    assert used_by(HALF) == held(0.01, 0.005, 0.0025)
    assert "its StepLR moves after each step; if it counts epochs, add every: epoch" in (
        capsys.readouterr().err
    )


def test_a_function_of_ones_own_may_say_what_it_counts(
    used_by: Rates, capsys: pytest.CaptureFixture[str]
) -> None:
    assert used_by({**HALF, "every": "epoch"}) == [0.01] * 18
    assert used_by({**HALF, "every": "step"}) == held(0.01, 0.005, 0.0025)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "scheduler",
    [
        node("StepLR", step_size=1, gamma=0.5),
        node("CosineAnnealingLR", T_max=None),
        node("CosineAnnealingLR", T_max=None, every="step"),
        node("ReduceLROnPlateau", patience=0, threshold=1.0),
        node("MultiStepLR", milestones=[1, 2]),
        node("CyclicLR", base_lr=0.01, max_lr=0.02, step_size_up=2),
        node("SequentialLR", milestones=[1], schedulers=[WARM_UP, node("StepLR", step_size=1)]),
        node("ChainedScheduler", schedulers=[WARM_UP, node("StepLR", step_size=1)]),
        own("linear", warmup=0.5),
        own("multistep", warmup=0.1),
        own("Plateau", warmup=0.5, patience=0, threshold=0.9),
    ],
)  # fmt: skip
def test_a_run_stopped_inside_an_epoch_goes_on_with_its_schedule(
    scheduler: dict[str, Any],
    torch_settings: None,
    compose: Callable[[list[str]], dict[str, Any]],
    tiny: Data,
    tmp_path: Path,
) -> None:
    config = compose([*SMALL, "trainer.epochs=3"]) | {"scheduler": scheduler}
    go_on(tmp_path / "unbroken", config, tiny)
    for steps in (5, 3):  # to the end of the first epoch, and into the second
        assert go_on(tmp_path / "run", config, tiny, stop_after(steps)) == "interrupted"
    assert go_on(tmp_path / "run", config, tiny) == "finished"
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize(
    ("scheduler", "overrides", "line"),
    [
        (node("ReduceLROnPlateau", every="step"), [], "use scheduler.every=epoch"),
        (own("Plateau", every="epoch"), [], "this schedule's warmup moves by steps"),
        (node("ReduceLROnPlateau", mode="max"), [], "use scheduler.mode=min or leave it out"),
        (node("OneCycleLR", max_lr=0.01, pct_start=1.0), [], "phase of the cycle without length"),
        (node("OneCycleLR", max_lr=0.01, pct_start=0.1),
         ["trainer.epochs=1", "loader.batch_size=32"], "phase of the cycle without length"),
        (node("OneCycleLR", max_lr=0.01, total_steps=17), [], "use scheduler.total_steps=null"),
        (node("ChainedScheduler", schedulers=[WARM_UP, node("OneCycleLR", max_lr=0.01)]), [],
         "say which with scheduler.every"),
        ({"_target_": f"{__name__}.rate", "_partial_": True}, [], "a float without step, state_"),
    ],
)  # fmt: skip
def test_a_schedule_that_does_not_suit_the_run_is_refused(
    scheduler: dict[str, Any], overrides: list[str], line: str, used_by: Rates
) -> None:
    with pytest.raises(UsageError, match=re.escape(line)) as raised:
        used_by(scheduler, *overrides)
    assert "\n" not in str(raised.value)


def two_rates(parameters: Iterable[nn.Parameter], lr: float, bias: float) -> SGD:
    """The bias of a linear model learns at `bias` times the rate."""
    weight, last = parameters
    groups: list[dict[str, Any]] = [{"params": [weight]}, {"params": [last], "lr": lr * bias}]
    return SGD(groups, lr=lr)


@pytest.fixture
def group_rates(
    torch_settings: None,
    compose: Callable[[list[str]], dict[str, Any]],
    tiny: Data,
    tmp_path: Path,
) -> Callable[..., list[dict[str, float]]]:
    """The log lines of a run whose optimizer has two parameter groups."""

    def group_rates(scheduler: dict[str, Any], bias: float) -> list[dict[str, float]]:
        config = compose(["trainer.epochs=1", "loader.batch_size=60", "trainer.log_every=1",
                          "model=linear"])  # fmt: skip
        target = f"{__name__}.two_rates"
        config["optimizer"] = {"_target_": target, "_partial_": True, "lr": 0.1, "bias": bias}
        config["scheduler"] = scheduler
        run = runs.start(claim(tmp_path / "run", exact=False), config, [])
        train(config, tiny, run)
        run.end("finished")
        lines = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if "lr" in line]

    return group_rates


def test_onecycle_keeps_the_proportion_of_the_groups_rates(
    group_rates: Callable[..., list[dict[str, float]]],
) -> None:
    lines = group_rates(node("OneCycleLR", max_lr=0.1, cycle_momentum=False), 0.001)
    assert max(line["lr"] for line in lines) == pytest.approx(0.1, rel=0.05)
    assert [line["lr/1"] for line in lines] == pytest.approx([line["lr"] / 1000 for line in lines])


def test_the_rates_of_further_groups_are_logged_where_they_differ(
    group_rates: Callable[..., list[dict[str, float]]],
) -> None:
    constant_schedule = {"_target_": f"{constant.__module__}.constant", "_partial_": True}
    assert {(line["lr"], line["lr/1"]) for line in group_rates(constant_schedule, 0.5)} == {
        (0.1, 0.05)
    }
    assert all("lr/1" not in line for line in group_rates(constant_schedule, 1.0))


def test_a_rate_without_a_reference_for_the_groups_is_refused() -> None:
    opt = two_rates(nn.Linear(2, 2).parameters(), 0.1, 0.5)
    config = {
        "trainer": {"epochs": 1, "steps": None, "monitor": "loss/valid"},
        "optimizer": {},
        "scheduler": node("OneCycleLR", max_lr=0.1),
    }
    with pytest.raises(UsageError, match="give a list of 2 rates"):
        build_schedule(config, opt, 10)


def test_a_list_of_rates_is_for_the_groups(
    group_rates: Callable[..., list[dict[str, float]]],
) -> None:
    lines = group_rates(node("OneCycleLR", max_lr=[0.1, 0.3], cycle_momentum=False), 0.001)
    assert [line["lr/1"] for line in lines] == pytest.approx([3 * line["lr"] for line in lines])
