"""What loaders, optimizers and schedules of one's own keep outside a checkpoint is found."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_runs import SMALL, assert_same_run, go_on, stop_after
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from experiments.data import Data, Split
from experiments.data.loaders import Batch, TensorLoader
from experiments.errors import UsageError
from experiments.training.resumable import (
    check_loaders,
    check_optimizer_state,
    check_rates,
    watch_hooks,
)

CONFIG = {group: {"_target_": "mine.Part"} for group in ("loader", "optimizer", "scheduler")}
Compose = Callable[[list[str]], dict[str, Any]]


def rows() -> Split:
    return Split(torch.arange(40.0).view(20, 2), torch.zeros(20).long())


# optimizers


class Damped(SGD):
    """Counts its steps in an attribute."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, lr=lr)
        self.steps = 0
        self.averages = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.div_(self.steps)
        super().step()


class Averaged(Optimizer):
    """Counts in its parameter group, and averages in its state, every fifth step."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr, "steps": 0})
        self.names = ["slow"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        group["steps"] += 1
        for p in group["params"]:
            slow = self.state[p].setdefault("slow", p.clone())
            p.sub_(p.grad, alpha=group["lr"])
            if group["steps"] % 5 == 0:
                p.copy_(slow.lerp_(p, 0.5))


class AveragedInAttribute(Averaged):
    """Keeps the averages, which change with every fifth step, in an attribute."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, lr)
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        if self.param_groups[0]["steps"] % 5 == 0:
            for p, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
                slow.lerp_(p, 0.5)


@pytest.mark.parametrize(("kind", "name"), [(Damped, "steps"), (AveragedInAttribute, "slow")])
def test_an_attribute_of_an_optimizer_that_goes_on_changing_is_refused(
    kind: Callable[..., Optimizer], name: str
) -> None:
    model = nn.Linear(2, 1)
    before = model.weight.clone()
    with pytest.raises(UsageError, match=rf"optimizer._target_=mine.Part: its attribute {name} "):
        check_optimizer_state(CONFIG, kind(model.parameters(), 0.1))
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None


def test_state_in_groups_and_state_is_accepted_and_resumed_with_the_same_bits(
    compose: Compose, tiny: Data, tmp_path: Path
) -> None:
    config = compose([*SMALL, "scheduler=constant"])
    config["optimizer"] = {"_target_": f"{__name__}.Averaged", "_partial_": True, "lr": 0.1}
    go_on(tmp_path / "unbroken", config, tiny)
    assert go_on(tmp_path / "run", config, tiny, stop_after(4)) == "interrupted"
    go_on(tmp_path / "run", config, tiny)
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


# hooks


def told(hook: Callable[[nn.Module], Callable[..., None]], capsys: Any) -> str:
    """What is told about a step hook in three steps."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    opt = SGD(model.parameters(), lr=0.1)
    opt.register_step_post_hook(hook(model))
    watch_hooks(CONFIG, opt, model)
    for _ in range(3):
        model(rows().x).sum().backward()
        opt.step()
    text = capsys.readouterr().err
    assert isinstance(text, str)
    return text


def averaging(model: nn.Module) -> Callable[..., None]:
    averages = [p.detach().clone() for p in model.parameters()]

    def average(*args: Any) -> None:
        for mean, p in zip(averages, model.parameters(), strict=True):
            mean.lerp_(p.detach(), 0.1)

    return average


class Ema:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.copy = model, nn.Linear(2, 2)

    def update(self, *args: Any) -> None:
        with torch.no_grad():
            self.copy.weight.lerp_(self.model.get_parameter("0.weight"), 0.1)


def counting(model: nn.Module) -> Callable[..., None]:
    steps = 0

    def count(*args: Any) -> None:
        nonlocal steps
        steps += 1

    return count


def masking(model: nn.Module) -> Callable[..., None]:
    masks = {name: torch.ones_like(p) for name, p in model.named_parameters()}

    def mask(masks: dict[str, Tensor], *args: Any) -> None:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.mul_(masks[name])

    return partial(mask, masks)


@pytest.mark.parametrize(
    ("hook", "name"),
    [
        (averaging, "average.averages.0"),
        (lambda model: Ema(model).update, "update.self.copy.weight"),
        (counting, "count.steps"),
    ],
)
def test_what_a_step_hook_changes_and_no_checkpoint_holds_is_told_once(
    hook: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = told(hook, capsys)
    assert text.startswith(f"warning: optimizer._target_=mine.Part: {name} of a step hook changes")
    assert text.count("\n") == 1


def test_a_step_hook_that_keeps_what_does_not_change_is_not_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert told(masking, capsys) == ""


# loaders


class OrderOfItsOwn(TensorLoader):
    """Draws the order of an epoch from the global generator when it is entered."""

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        for index in torch.randperm(len(self.split)).split(self.rows.batch_size)[start:]:
            yield self.split.gather(index)


class GeneratorOfItsOwn(TensorLoader):
    generator = torch.Generator()

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        for xb, yb in super().batches(epoch, start):
            yield xb + torch.rand(xb.shape, generator=self.generator), yb


class AlwaysFromTheBeginning(TensorLoader):
    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        return super().batches(epoch)


class Noisy(TensorLoader):
    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        for xb, yb in super().batches(epoch, start):
            yield xb + torch.rand(xb.shape), yb


@pytest.mark.parametrize("kind", [OrderOfItsOwn, GeneratorOfItsOwn, AlwaysFromTheBeginning])
def test_a_loader_whose_batches_depend_on_where_an_epoch_was_entered_is_refused(
    kind: type[TensorLoader],
) -> None:
    with pytest.raises(UsageError, match=r"^loader._target_=mine.Part: batch 1 of an epoch dif"):
        check_loaders(CONFIG, kind(rows(), batch_size=4, shuffle=True))


@pytest.mark.parametrize("batch_size", [4, 20])
def test_a_loader_whose_batches_draw_from_torch_is_accepted_and_draws_as_before(
    batch_size: int,
) -> None:
    state = torch.get_rng_state()
    check_loaders(CONFIG, Noisy(rows(), batch_size=batch_size, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)


# schedules


def counted() -> Callable[[int], float]:
    calls = 0

    def factor(step: int) -> float:
        nonlocal calls
        calls += 1
        return 0.5**calls

    return factor


class Counted:
    """The same, whose attributes torch keeps."""

    calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return float(0.5**self.calls)


def test_a_function_of_a_schedule_that_counts_its_calls_is_refused() -> None:
    opt = SGD(nn.Linear(2, 1).parameters(), lr=0.1)
    with pytest.raises(UsageError, match=r"^scheduler._target_=mine.Part: its function factor"):
        check_rates(CONFIG, LambdaLR(opt, counted()))


@pytest.mark.parametrize("factor", [Counted(), lambda step: 0.5**step])
def test_a_function_of_the_step_and_an_object_that_counts_are_accepted(factor: Any) -> None:
    scheduler = LambdaLR(SGD(nn.Linear(2, 1).parameters(), lr=0.1), factor)
    before = getattr(factor, "calls", 0)
    check_rates(CONFIG, scheduler)
    assert getattr(factor, "calls", 0) == before
