"""Parts that do not go together are told in one line, before the first step."""

import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_runs import SMALL, go_on, record
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from experiments import load_run
from experiments.config.names import LOSS_MODULES
from experiments.data import Data, Split
from experiments.errors import UsageError
from experiments.training.parts import Parts, build_loss, build_parts

Compose = Callable[[list[str]], dict[str, Any]]
Build = Callable[..., Parts]


def here(name: str, **settings: Any) -> dict[str, Any]:
    """The config of a part of this file."""
    return {"_target_": f"{__name__}.{name}", **settings}


def torch_loss(name: str, **settings: Any) -> dict[str, Any]:
    return {"_target_": f"torch.nn.{name}", **settings}


@pytest.fixture
def parts(compose: Compose, tiny: Data) -> Build:
    """The parts of a small config with some nodes replaced, on other targets if they are given."""

    def parts(
        overrides: Iterable[str] = (),
        targets: Callable[[Split], Tensor] = lambda split: split.y,
        **nodes: dict[str, Any],
    ) -> Parts:
        splits: dict[str, Any] = {
            name: Split(split.x, targets(split)) for name, split in vars(tiny).items()
            if isinstance(split, Split)
        }  # fmt: skip
        return build_parts(compose([*SMALL, *overrides]) | nodes, Data(**splits), "cpu")

    return parts


def flat(split: Split) -> Tensor:
    """One number for each row, (rows,)."""
    numbers: Tensor = split.x.mean(1)
    return numbers


def column(split: Split) -> Tensor:
    """One number for each row, (rows, 1)."""
    return flat(split)[:, None]


class Pair(nn.Module):
    """Returns logits and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), x


class FirstOfPair(nn.Module):
    """A loss for it."""

    def forward(self, outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs[0], targets)


class Ten(nn.Module):
    """Ten of the pixels, and nothing to train."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :10]


def frozen() -> nn.Module:
    return nn.Linear(784, 10).requires_grad_(False)


def normalized() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 2, 5, stride=4), nn.BatchNorm2d(2),
        nn.Flatten(), nn.LazyLinear(10),
    )  # fmt: skip


def nothing(parameters: Iterable[Tensor]) -> None:
    """No optimizer."""


class CutOff(nn.Module):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.detach(), targets)


class Modulus(nn.Module):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.abs().mean()


class ComplexLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(784, 10, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.complex64) @ self.weight


def complex_layer() -> nn.Module:
    return ComplexLayer()


def no_loss() -> dict[str, int]:
    return {}


def own_cross_entropy(outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, label_smoothing=smoothing)


class PerRow(nn.Module):
    """A loss that forgot its mean."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")


class Squares(nn.Module):
    """A mean square, which broadcasts what it is given."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets) ** 2).mean()


class Distances(nn.Module):
    """Compares all rows with each other on purpose, and has a weight for each output."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(10))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        weighted = outputs * self.weight
        distances = (weighted[:, None] - weighted[None]).square().sum(2)
        same = targets[:, None] == targets[None, :]
        return (distances * same).mean()


def tensor_lr(parameters: Iterable[Tensor]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=torch.tensor(0.1))


class Broken(nn.Module):
    """Calls a layer with the wrong number of columns."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, :4])  # type: ignore[no-any-return]


class CountingCalls(nn.Module):
    """Counts all its calls in a buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)  # type: ignore[no-any-return]


OPTIMIZER = {"_partial_": True, "lr": 0.1}
REGRESSION = ["model.out_features=1"]

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a tuple": ({"model": here("Pair")}, "returns a tuple, and loss._target_=torch.nn.CrossEntro"),
    "no parameters": ({"model": here("Ten")}, "has no parameters, so there is nothing to train"),
    "all frozen": ({"model": here("frozen")}, "all its parameters are frozen"),
    "a closure": (
        {"optimizer": {"_target_": "torch.optim.LBFGS", **OPTIMIZER}},
        "optimizer._target_=torch.optim.LBFGS: its step requires a closure",
    ),
    "sparse gradients": (
        {"optimizer": {"_target_": "torch.optim.SparseAdam", **OPTIMIZER}},
        "needs sparse gradients",
    ),
    "no optimizer": (
        {"optimizer": here("nothing", _partial_=True)},
        "returned a NoneType; return a torch.optim.Optimizer",
    ),
    "BatchNorm's last row": (
        {"model": here("normalized"), "overrides": ["loader.batch_size=29"]},
        "loader.batch_size=29: 320 rows leave a last batch of one row",
    ),
    "BatchNorm's only row": (
        {"model": here("normalized"), "overrides": ["loader.batch_size=1"]},
        "loader.batch_size=1: 320 rows leave a last batch of one row",
    ),
    "weights for other classes": (
        {"loss": torch_loss("CrossEntropyLoss", weight=[1.0, 2.0, 0.5])},
        "loss.weight: has 3 weights, and the model 10 outputs",
    ),
    "a loss for each row": ({"loss": here("PerRow")}, "returns a tensor of shape (2,) for a batch"),
    "no reduction": (
        {"loss": torch_loss("CrossEntropyLoss", reduction="none")}, "use loss.reduction=mean",
    ),
    "a tensor as lr": ({"optimizer": here("tensor_lr", _partial_=True)}, "its lr is a tensor"),
    "a function that is called": (
        {"loss": here("own_cross_entropy")}, "a function of them needs loss._partial_=true",
    ),
    "no loss": ({"loss": here("no_loss")}, "is a dict, expected a torch.nn.Module, or"),
    "a loss cut off from the model": (
        {"loss": here("CutOff")}, "has no gradient, so there is nothing to train",
    ),
    "fused steps of complex parameters": (
        {"model": here("complex_layer"), "loss": here("Modulus")},
        "optimizer.fused=true: takes real",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_they_are_refused_in_one_line(name: str, parts: Build) -> None:
    nodes, line = REFUSED[name]
    with pytest.raises(UsageError, match=re.escape(line)) as raised:
        parts(**nodes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "loss",
    ["MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "PoissonNLLLoss", "KLDivLoss",
     "SoftMarginLoss", "HingeEmbeddingLoss"],
)  # fmt: skip
def test_a_loss_of_torch_that_would_compare_each_row_with_all_is_refused(
    loss: str, parts: Build
) -> None:
    line = f"loss._target_=torch.nn.{loss}: takes outputs and targets of one shape, not outputs " \
           "(rows, 1) and targets (rows,); give the targets a second dimension"  # fmt: skip
    with pytest.raises(UsageError, match=re.escape(line)):
        parts(REGRESSION, flat, loss=torch_loss(loss))
    parts(REGRESSION, column, loss=torch_loss(loss))


def test_a_loss_of_ones_own_that_compares_each_row_with_all_is_told(
    parts: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    parts(REGRESSION, flat, loss=here("Squares"))
    told = capsys.readouterr().err.splitlines()[0]
    assert "broadcasts (rows, 1) and (rows,) to (rows, rows)" in told


def test_a_loss_of_ones_own_that_means_to_compare_is_not_told(
    parts: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    parts(REGRESSION, column, loss=here("Squares"))
    assert capsys.readouterr().err == ""
    parts(loss=here("Distances"))
    assert "broadcasts" not in capsys.readouterr().err


def test_a_batch_of_one_row_that_training_does_not_get_to_is_fine(parts: Build) -> None:
    parts(["loader.batch_size=29", "loader.drop_last=true"], model=here("normalized"))
    parts(["loader.batch_size=30"], model=here("normalized"))
    parts(["loader.batch_size=29"])  # no BatchNorm


def test_looking_for_a_batch_of_one_row_changes_no_statistic(parts: Build) -> None:
    """One image is enough for BatchNorm2d, which is tried."""
    model = parts(["loader.batch_size=29"], model=here("images")).model
    assert {name: buffer.sum() for name, buffer in model.named_buffers()} == {
        "2.running_mean": 0, "2.running_var": 2, "2.num_batches_tracked": 0,
    }  # fmt: skip


def test_a_tuple_goes_to_a_loss_that_takes_one(
    compose: Compose, tiny: Data, tmp_path: Path
) -> None:
    nodes = {"model": here("Pair"), "loss": here("FirstOfPair")}
    assert go_on(tmp_path / "run", compose(SMALL) | nodes, tiny) == "finished"
    assert "accuracy/valid" not in record(tmp_path / "run")["metrics"]["last"]


def test_class_weights_are_a_list(compose: Compose, tiny: Data, tmp_path: Path) -> None:
    weights = [1.0, 2.0, 0.5, 1, 1, 1, 1, 1, 1, 1]
    config = compose(SMALL) | {"loss": torch_loss("CrossEntropyLoss", weight=weights)}
    weight = build_loss(config).weight
    assert isinstance(weight, Tensor)
    assert weight.dtype == torch.float32
    assert weight.tolist() == weights
    go_on(tmp_path / "run", config, tiny)
    load_run(tmp_path / "run")


def test_an_optimizer_of_torch_that_steps_without_a_closure_is_built(parts: Build) -> None:
    skipped = (LBFGS, torch.optim.SparseAdam, torch.optim.Muon)  # Muon takes matrices only
    kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type)
             and issubclass(kind, Optimizer) and kind not in (Optimizer, *skipped)]  # fmt: skip
    assert len(kinds) > 8
    for kind in kinds:
        target = f"torch.optim.{kind.__name__}"
        parts(["scheduler=constant"], optimizer={"_target_": target, **OPTIMIZER})


# Functions as losses


def test_a_function_of_ones_own_is_a_loss(parts: Build) -> None:
    node = here("own_cross_entropy", _partial_=True, smoothing=0.1)
    built = parts(loss=node)
    logits, targets = torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
    assert torch.equal(
        built.loss_func(logits, targets), own_cross_entropy(logits, targets, smoothing=0.1)
    )


def test_a_function_of_torch_is_the_module_that_calls_it(compose: Compose) -> None:
    config = compose(["loss._target_=torch.nn.functional.cross_entropy", "+loss._partial_=true"])
    assert config["loss"]["_target_"] == "torch.nn.CrossEntropyLoss"
    assert "_partial_" not in config["loss"]


@pytest.mark.parametrize("name", LOSS_MODULES)
def test_a_function_of_torch_and_its_module_take_the_same_options(name: str) -> None:
    function = inspect.signature(getattr(nn.functional, name))
    module = inspect.signature(getattr(nn, LOSS_MODULES[name]))
    options = set(function.parameters) - {"input", "target"}
    assert options - {"weight"} == set(module.parameters) - {"weight"}


def test_training_starts_from_the_buffers_that_the_model_was_built_with(parts: Build) -> None:
    assert parts(model=here("CountingCalls")).model.calls == 0


def test_an_error_of_a_layer_says_which_line_of_ones_own_called_it(parts: Build) -> None:
    with pytest.raises(UsageError, match=rf"cannot be multiplied .*, at {__file__}, line \d+\)"):
        parts(model=here("Broken"))


@pytest.mark.parametrize(
    ("overrides", "targets", "loss", "remedy"),
    [
        ((), lambda split: split.y[:, None], "CrossEntropyLoss", "with y.squeeze(1)"),
        ((), lambda split: split.y > 4, "CrossEntropyLoss", "int64 with y.long()"),
        (REGRESSION, flat, "BCEWithLogitsLoss", "y[:, None], or squeeze(1) the outputs"),
        (REGRESSION, lambda split: split.y[:, None] % 2, "BCEWithLogitsLoss", "with y.float()"),
    ],
    ids=["a column of classes", "bool", "no column", "integers"],
)
def test_targets_that_the_loss_does_not_take_are_told_with_the_remedy(
    overrides: list[str],
    targets: Callable[[Split], Tensor],
    loss: str,
    remedy: str,
    parts: Build,
) -> None:
    with pytest.raises(UsageError, match=re.escape(remedy)):
        parts(overrides, targets, loss=torch_loss(loss))
