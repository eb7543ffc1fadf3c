"""trainer.compile: equal to the eager run up to rounding, reproducible bits, one compilation.

Compiling takes about ten seconds, so all tests share a cache folder and a few step shapes.
"""

import contextlib
import json
import logging
import os
import random
import re
import signal
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_runs import assert_same_run, call, go_on, kill_after, lines, record, stop_after
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_structure, tree_unflatten
from under_way import UnderWay

from experiments import job, reproduce
from experiments.compiled import package
from experiments.compiled import steps as compiled
from experiments.compiled.package import on_threads
from experiments.compiled.steps import CompiledSteps
from experiments.compiled.trace import count_flops, trace
from experiments.data import Data, Split
from experiments.data.loaders import TensorLoader
from experiments.directory.checkpoints import Checkpoints
from experiments.errors import Diverged, UsageError
from experiments.training.determinism import prepare_torch
from experiments.training.models import mlp
from experiments.training.objective import Objective
from experiments.training.schedules import constant

pytestmark = pytest.mark.long

SINGLE_THREAD_FLOPS = compiled.SINGLE_THREAD_FLOPS
Compose = Callable[[list[str]], dict[str, Any]]
Command = Callable[..., subprocess.CompletedProcess[str]]


class Various(nn.Module):
    """BatchNorm, dropout, tied weights, a constant made in forward, frozen and unused parameters.

    x: float32 (batch, 784) -> logits: float32 (batch, 10)
    """

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(5, 3)  # first, since its optimizer state has no step count
        self.frozen = nn.Linear(784, 32).requires_grad_(False)
        self.norm = nn.BatchNorm1d(32)
        self.dropout = nn.Dropout(0.3)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.third, self.last = nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.norm(self.frozen(x)).relu())
        h = self.third(self.second(self.first(h).relu()).relu()).relu()
        logits: Tensor = self.last(h)
        return logits * torch.tensor(1.5)


class Convolutional(nn.Module):
    """x: float32 (batch, 784) -> logits: float32 (batch, 10)"""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 5, stride=3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2)
        self.last = nn.LazyLinear(10)
        self.forward(torch.zeros(2, 784))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(
            self.pool(self.norm(self.conv(x.view(-1, 1, 28, 28)))).flatten(1)
        )
        return logits


OWN = ["~model.in_features", "~model.hidden", "~model.out_features", "~model.dropout"]
# each has a graph of its own, and so is compiled separately
VARIANTS = {
    # two steps per graph, on two threads; the last of an epoch's five batches is smaller
    "sgd": [
        "trainer.threads=2",
        *(*OWN, "model._target_=test_compiled.Various", "loader.batch_size=64"),
        *("optimizer=sgd", "optimizer.weight_decay=0.001", "+optimizer.nesterov=true"),
        *("scheduler=onecycle", "scheduler.cycle_momentum=true", "optimizer.lr=0.02"),
    ],
    # two batches per step; the last step of an epoch has a smaller batch
    "adamw": [
        *("model.hidden=[16]", "loader.batch_size=64", "trainer.accumulate=2"),
        *("optimizer=adamw", "trainer.clip_norm=0.5", "optimizer.lr=0.005"),
        *("loss.label_smoothing=0.1", "optimizer.betas=[0.8,0.99]"),
    ],
    # several groups, two of them with an lr of their own, and a frozen layer; steps of 40 rows
    "groups": [
        *("model.hidden=[24,16]", "loader.batch_size=40", "optimizer=adamw", "optimizer.lr=0.005"),
        *("optimizer.groups=[{match:4,lr:0.002,betas:[0.8,0.99]}]", "optimizer.freeze=2.bias"),
        *("optimizer.no_decay=biases_and_norms", "trainer.clip_norm=0.5"),
    ],
    # data as bytes
    "adam": [
        *(*OWN, "model._target_=test_compiled.Convolutional", "loader.batch_size=100"),
        *("optimizer=adam", "optimizer.weight_decay=0.01", "optimizer.lr=0.005"),
    ],
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder that all tests of this file share, also between xdist workers."""
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        patch.setattr(compiled, "SINGLE_THREAD_FLOPS", 0)  # all steps here are small
        # pytest would capture the many lines that the compiler logs for its trace viewer
        patch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
        yield home / "experiments"


@pytest.fixture(scope="module")
def rows(tiny: Data) -> Data:
    """313 training rows, a number that no batch size divides."""
    return replace(tiny, train=Split(tiny.train.x[:313], tiny.train.y[:313]))


def data_of(name: str, rows: Data) -> Data:
    """The data of a variant: the rows as floats or as bytes."""
    if name != "adam":
        return rows
    byte_splits = [Split((s.x * 255).byte(), s.y) for s in (rows.train, rows.valid, rows.test)]
    return Data(*byte_splits)


def config_of(name: str, compose: Compose, *more: str) -> dict[str, Any]:
    """The config of a compiled variant that logs every step."""
    small = ["model=mlp_small", "trainer.epochs=2", "trainer.log_every=1", "checkpoint.keep=3"]
    return compose([*small, *VARIANTS[name], "trainer.compile=true", *more])


def eagerly(config: dict[str, Any]) -> dict[str, Any]:
    """The same config with trainer.compile=false."""
    return config | {"trainer": config["trainer"] | {"compile": False}}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(
    request: pytest.FixtureRequest,
    compose: Compose,
    rows: Data,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], Data, Path]:
    """A config, its data and the directory of its run."""
    config, data = config_of(request.param, compose), data_of(request.param, rows)
    path = tmp_path_factory.mktemp("compiled") / request.param
    go_on(path, config, data)
    return config, data, path


def last(path: Path) -> dict[str, Any]:
    """The content of a run's last checkpoint."""
    content = Checkpoints(path / "checkpoints").load()
    assert content is not None
    return content


def numbers(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in lines(path)]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling fails."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the compiler was called")

    monkeypatch.setattr(package, "compile_package", refuse)


# Results


def test_its_numbers_are_the_eager_ones_to_rounding(
    variant: tuple[dict[str, Any], Data, Path], tmp_path: Path
) -> None:
    config, data, path = variant
    rounding = 2e-6
    assert go_on(tmp_path / "run", eagerly(config), data) == "finished"
    for line, eager in zip(numbers(path), numbers(tmp_path / "run"), strict=True):
        assert line == pytest.approx(eager, rel=rounding)
    one, eager_one = last(path), last(tmp_path / "run")
    for part in ("model", "optimizer", "scheduler"):
        found = dict(tree_flatten_with_path(one[part])[0])
        # the eager optimizer has no state for an unused parameter
        for at, leaf in tree_flatten_with_path(eager_one[part])[0]:
            if isinstance(leaf, Tensor):
                assert torch.allclose(found[at], leaf, rtol=rounding, atol=rounding)
            else:
                assert found[at] == leaf


def test_after_it_the_generators_stand_where_the_eager_run_leaves_them(
    variant: tuple[dict[str, Any], Data, Path], tmp_path: Path
) -> None:
    config, data, path = variant
    go_on(tmp_path / "run", eagerly(config), data)
    (tensors, values), (eager_tensors, eager_values) = (
        last(path)["random"],
        last(tmp_path / "run")["random"],
    )
    assert torch.equal(tensors["cpu"], eager_tensors["cpu"])
    assert values == eager_values


def test_frozen_and_unused_parameters_stay_and_tied_ones_stay_tied(
    compose: Compose, rows: Data, tmp_path: Path
) -> None:
    config = config_of("sgd", compose)
    go_on(tmp_path / "run", config, rows, stop_after(1))
    before = last(tmp_path / "run")["model"]
    go_on(tmp_path / "run", config, rows)
    after = last(tmp_path / "run")["model"]
    still = {name.partition(".")[0] for name in after if torch.equal(before[name], after[name])}
    assert still == {"unused", "frozen"}
    assert torch.equal(after["first.weight"], after["second.weight"])


@pytest.mark.parametrize("log_every", [3, 7])
def test_what_is_logged_between_steps_taken_at_once_is_what_is_logged_eagerly(
    log_every: int, compose: Compose, rows: Data, tmp_path: Path
) -> None:
    config = config_of("sgd", compose, f"trainer.log_every={log_every}")
    go_on(tmp_path / "run", config, rows)
    go_on(tmp_path / "eager", eagerly(config), rows)
    for line, eager in zip(numbers(tmp_path / "run"), numbers(tmp_path / "eager"), strict=True):
        assert line == pytest.approx(eager, rel=2e-6)


def test_an_lr_that_is_too_large_diverges(compose: Compose, rows: Data, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"loss/train is (nan|inf) at step \d+"):
        go_on(tmp_path / "run", config_of("sgd", compose, "optimizer.lr=1e30"), rows)


# Reproducibility


def test_another_run_has_the_same_bits(
    variant: tuple[dict[str, Any], Data, Path], no_compiler: None, tmp_path: Path
) -> None:
    config, data, path = variant
    go_on(tmp_path / "run", config, data)
    assert_same_run(tmp_path / "run", path)


def test_stopped_wherever_it_can_be_it_ends_with_the_same_bits(
    variant: tuple[dict[str, Any], Data, Path], no_compiler: None, tmp_path: Path
) -> None:
    config, data, path = variant
    stops = 0
    while go_on(tmp_path / "run", config, data, stop_after(1)) == "interrupted":
        stops += 1
    assert stops >= 4
    assert_same_run(tmp_path / "run", path)


def test_killed_anywhere_it_ends_with_the_same_bits(
    variant: tuple[dict[str, Any], Data, Path], no_compiler: None, tmp_path: Path
) -> None:
    config, data, path = variant
    config = config | {"checkpoint": config["checkpoint"] | {"every_steps": 2}}
    for calls in (2, 3, 5):
        run = tmp_path / str(calls)
        go_on(run, config, data, kill_after(calls))
        go_on(run, config, data)
        assert_same_run(run, path)


def test_reproduced_it_is_identical(
    variant: tuple[dict[str, Any], Data, Path],
    no_compiler: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, data, path = variant
    monkeypatch.setattr(job, "load_data", lambda config: data)
    code = call(reproduce.main, path, "--into", tmp_path / "run", "--trust", "test_compiled")
    output = capsys.readouterr()
    assert code == 0, output
    assert "identical: all" in output.out


def test_run_json_tells_which_compiled_step_it_was(
    variant: tuple[dict[str, Any], Data, Path], cache: Path
) -> None:
    key = record(variant[2])["environment"]["compiled"]
    assert len(list(cache.glob(f"{key}-*.pt2"))) == 1


@pytest.fixture
def source(variant: tuple[dict[str, Any], Data, Path], cache: Path) -> str:
    """The generated C++ wrapper that calls the kernels."""
    key = record(variant[2])["environment"]["compiled"]
    [package] = cache.glob(f"{key}-*.pt2")
    with zipfile.ZipFile(package) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".wrapper.cpp")]
        return archive.read(name).decode()


def test_a_gradient_is_accumulated_in_place(
    variant: tuple[dict[str, Any], Data, Path], source: str
) -> None:
    # the gradient of `last`, accumulated into its weight decay term, in each step of the graph
    expected = {"sgd": 2, "adamw": 0, "groups": 0, "adam": 1}[variant[2].name]
    assert len(re.findall(r"_addmm_out\((\w+), \1, ", source)) == expected


def test_a_gradient_split_between_threads_is_accumulated_in_place(
    variant: tuple[dict[str, Any], Data, Path], source: str
) -> None:
    # the gradient of `third`, in each step of the graph
    expected = {"sgd": 2, "adamw": 0, "groups": 0, "adam": 0}[variant[2].name]
    assert len(re.findall(r"baddbmm_out\((\w+), \1, ", source)) == expected


def test_a_bias_is_added_by_the_kernel_after_the_product(source: str) -> None:
    # in the graph's first step the bias is an input
    assert re.findall(r"addmm_out\(\w+, arg", source) == []


# The cache


class GraphInsteadOfPackage:
    """In place of a package: its graph, run eagerly."""

    def __init__(self, graph: torch.fx.GraphModule, inputs: tuple[Any, ...]) -> None:
        self.graph, self.spec = graph, tree_structure(inputs)

    def run(self, leaves: list[Tensor]) -> list[Tensor]:
        return list(self.graph(*tree_unflatten(leaves, self.spec)))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tiny: Data) -> Callable[..., CompiledSteps]:
    """A factory of CompiledSteps that have a cache key, and run their graph eagerly."""
    graphs: list[GraphInsteadOfPackage] = []

    def compile_nothing(
        key: str, graph: torch.fx.GraphModule, inputs: tuple[Any, ...], *others: object
    ) -> Path:
        graphs.append(GraphInsteadOfPackage(graph, inputs))
        return Path()

    monkeypatch.setattr(compiled, "compile_once", compile_nothing)
    monkeypatch.setattr(compiled, "load", lambda package, device: graphs[-1])

    def make(
        model: nn.Module | None = None,
        opt: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        batch_size: int = 70,
        split: Split = tiny.train,
        loss_func: nn.Module | None = None,
        lr: float = 0.1,
        **others: Any,
    ) -> CompiledSteps:
        model = model or mlp(784, [8], 10)
        optimizer = opt(model.parameters(), lr=lr)
        loader = TensorLoader(split, batch_size=batch_size)
        loss_func = loss_func or nn.CrossEntropyLoss()
        return CompiledSteps(
            Objective(model, loss_func), optimizer, constant(optimizer), loader, **others
        )

    return make


def test_a_small_step_runs_on_one_thread_and_shares_its_package(
    steps: Callable[..., CompiledSteps], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "SINGLE_THREAD_FLOPS", SINGLE_THREAD_FLOPS)
    with on_threads(1):
        on_one_thread = steps(batch_size=16)
    with on_threads(2):
        small, large = steps(batch_size=16), steps(mlp(784, [128, 256], 10), batch_size=64)
        assert torch.get_num_threads() == 2
    assert (small.threads, large.threads) == (1, 2)
    assert small.key == on_one_thread.key


def test_the_flops_of_matrix_products_and_convolutions_are_counted() -> None:
    def step(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, w).flatten(1) @ v

    inputs = torch.zeros(7, 1, 5, 5), torch.zeros(2, 1, 3, 3), torch.zeros(18, 4)
    assert count_flops(trace(step, inputs)) == 2 * 7 * (9 * 2 * 9 + 18 * 4)


def sequence(middle: nn.Module) -> nn.Module:
    """A model with the given module in its middle."""
    return nn.Sequential(nn.Linear(784, 8), middle, nn.Linear(8, 10))


class Times(nn.Module):
    """Multiplies by a tensor created from a Python number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor(self.factor)


def decaying(decay: float) -> Callable[..., torch.optim.Optimizer]:
    """SGD with weight decay."""
    return lambda parameters, lr: torch.optim.SGD(parameters, lr, weight_decay=decay)


def test_the_same_step_has_the_same_key_whatever_its_weights_and_lr(
    steps: Callable[..., CompiledSteps],
) -> None:
    torch.manual_seed(1)
    one = steps()
    torch.manual_seed(2)
    assert steps(lr=0.7).key == one.key


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"model": mlp(784, [9], 10)}),
        ({}, {"model": mlp(784, [8], 10, dropout=0.1)}),
        ({}, {"opt": torch.optim.AdamW}),
        ({}, {"opt": decaying(0.1)}),
        ({"opt": decaying(0.2)}, {"opt": decaying(0.1)}),
        ({}, {"batch_size": 71}),
        ({}, {"accumulated": 2}),
        ({}, {"clip_norm": 1.0}),
        ({"clip_norm": 2.0}, {"clip_norm": 1.0}),
        ({}, {"split": Split(torch.zeros(90, 784), torch.zeros(90, dtype=torch.int64))}),
        ({}, {"loss_func": nn.CrossEntropyLoss(label_smoothing=0.1)}),
        ({"model": sequence(nn.ReLU())}, {"model": sequence(nn.Tanh())}),
        ({"model": sequence(Times(2.0))}, {"model": sequence(Times(3.0))}),
        (
            {"model": sequence(nn.Linear(8, 8))},
            {"model": sequence(nn.Linear(8, 8).requires_grad_(False))},
        ),
    ],
    ids=lambda changed: ",".join(changed),
)
def test_another_step_has_another_key(
    one: dict[str, Any], other: dict[str, Any], steps: Callable[..., CompiledSteps]
) -> None:
    assert steps(**one).key != steps(**other).key


@pytest.mark.parametrize("setting", [{"threads": 2}, {"matmul_precision": "high"}], ids=str)
def test_torch_settings_change_the_key(
    setting: dict[str, Any], steps: Callable[..., CompiledSteps], compose: Compose
) -> None:
    trainer = compose([])["trainer"]
    prepare_torch(trainer)
    one = steps(mlp(784, [128], 10)).key
    prepare_torch(trainer | setting)
    other = steps(mlp(784, [128], 10)).key
    prepare_torch(trainer)
    assert other != one
    assert steps(mlp(784, [128], 10)).key == one


def test_another_compiler_changes_the_key(
    steps: Callable[..., CompiledSteps], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = steps().key
    newer = tmp_path / "g++"
    newer.write_text("#!/bin/sh\necho newer")
    newer.chmod(0o755)
    monkeypatch.setenv("CXX", str(newer))
    assert steps().key != one


def test_computing_the_key_changes_nothing(steps: Callable[..., CompiledSteps]) -> None:
    model = sequence(nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generators = torch.get_rng_state(), random.getstate()
    steps(model=model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]


def test_compiling_leaves_the_compilers_options_as_they_are() -> None:
    # the compiler added its own to them, so the next run in the process had another key
    assert set(package.OPTIONS) == {"fallback_random", "memory_planning"}


def test_a_damaged_package_is_compiled_again(
    compose: Compose,
    rows: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cache: Path,
) -> None:
    config = config_of("adamw", compose)
    go_on(tmp_path / "one", config, rows)
    [package] = cache.glob(f"{record(tmp_path / 'one')['environment']['compiled']}-*.pt2")
    whole = package.read_bytes()
    package.write_bytes(whole[:-7])

    def compile_again(graph: object, inputs: object, output: Path, *others: object) -> None:
        output.write_bytes(whole)

    monkeypatch.setattr("experiments.compiled.package.compile_package", compile_again)
    go_on(tmp_path / "two", config, rows)
    assert package.read_bytes() == whole
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_a_compiler_that_computes_something_else_is_noticed(
    compose: Compose, rows: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    go_on(tmp_path / "one", config_of("adamw", compose), rows)
    [wrong] = cache.glob(f"{record(tmp_path / 'one')['environment']['compiled']}-*.pt2")
    content = wrong.read_bytes()

    def compile_wrong(graph: object, inputs: object, output: Path, *others: object) -> None:
        output.write_bytes(content)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(package, "compile_package", compile_wrong)
    with pytest.raises(UsageError, match="compiled results differ from the eager ones"):
        go_on(tmp_path / "two", config_of("adamw", compose, "optimizer.betas=[0.8,0.5]"), rows)
    assert not list((tmp_path / "experiments").glob("*-*.pt2"))


class OtherRounding(GraphInsteadOfPackage):
    """In place of a package: its graph, run with the rows of each batch reversed."""

    def run(self, leaves: list[Tensor]) -> list[Tensor]:
        *others, index, scalars = leaves
        index = index.view(len(scalars), -1).flip(-1).flatten()
        return list(self.graph(*tree_unflatten([*others, index, scalars], self.spec)))


@pytest.mark.parametrize("opt", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("lr", [0.05, 1e9])
def test_rounding_differences_pass_the_check_against_eager(
    opt: Callable[..., torch.optim.Optimizer],
    lr: float,
    steps: Callable[..., CompiledSteps],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the gradient of the first layer's bias is pure rounding error, since BatchNorm cancels it
    packages = []

    def check(
        key: str, graph: torch.fx.GraphModule, inputs: tuple[Any, ...], *others: object
    ) -> None:
        packages.append(OtherRounding(graph, inputs))
        package.check_against_eager(graph, packages[0], inputs)

    monkeypatch.setattr(compiled, "compile_once", check)
    monkeypatch.setattr(compiled, "load", lambda path, device: packages[0])
    steps(sequence(nn.BatchNorm1d(8)), opt, batch_size=60, lr=lr)
    assert len(packages) == 1


# Errors


class Branching(nn.Linear):
    """Control flow that depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Drawing(nn.Linear):
    """A random number from Python's generator."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * random.random())


class Scaling(nn.Linear):
    """A tensor that is not registered with the module."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * SCALE


SCALE = torch.ones(10)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optimizer._target_=torch.optim.RMSprop", "~optimizer.fused"],
            r"^optimizer\._target_=torch\.optim\.\S*RMSprop: .* supports .* SGD, Adam and AdamW; ",
        ),
        (["optimizer=adam", "+optimizer.amsgrad=true"], r"^optimizer\.amsgrad=True: "),
        (["+optimizer.maximize=true"], r"^optimizer\.maximize=True: "),
        (["loader=torch"], "needs whole tensors; use loader=tensors"),
        (["model=linear", "model._target_=test_compiled.Branching"], "cannot be traced"),
        (["model=linear", "model._target_=test_compiled.Drawing"], "draws from random; "),
        (["model=linear", "model._target_=test_compiled.Scaling"], "call register_buffer"),
    ],
    ids=str,
)
def test_a_step_that_cannot_be_compiled_is_reported_in_one_line(
    overrides: list[str],
    message: str,
    compose: Compose,
    tiny: Data,
    tmp_path: Path,
    no_compiler: None,
) -> None:
    config = compose(["trainer.compile=true", "trainer.epochs=1", *overrides])
    with pytest.raises(UsageError, match=message) as error:
        go_on(tmp_path / "run", config, tiny)
    assert "trainer.compile=true" in str(error.value)
    assert "\n" not in str(error.value)
    go_on(tmp_path / "eager", eagerly(config), tiny)


def in_groups(parameters: Iterator[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Each parameter in a group with an lr of its own, every other one with weight decay."""
    groups = [{"params": [p], "lr": lr / i, "weight_decay": 0.1 * (i % 2)}
              for i, p in enumerate(parameters, 1)]  # fmt: skip
    return torch.optim.SGD(groups, lr, momentum=0.9)


def test_each_parameter_is_updated_with_the_options_of_its_group(
    steps: Callable[..., CompiledSteps],
) -> None:
    torch.manual_seed(0)
    made = steps(opt=in_groups)
    before = [p.detach().clone() for p in made.objective.parameters()]
    [*compiled_steps] = made.take(0, 0)
    after = [p.detach().clone() for p in made.objective.parameters()]
    with torch.no_grad():
        for p, value in zip(made.objective.parameters(), before, strict=True):
            p.copy_(value)
    made.opt.state.clear()
    [*eager_steps] = made.eager.take(0, 0)
    for p, value in zip(made.objective.parameters(), after, strict=True):
        assert torch.allclose(p, value, rtol=1e-5, atol=1e-6)
    lrs = [list(others) for result in compiled_steps for others in result.group_lrs]
    assert lrs == [list(others) for result in eager_steps for others in result.group_lrs]
    assert lrs == [pytest.approx([0.1 / 2, 0.1 / 3, 0.1 / 4])] * len(lrs)


def test_a_parameter_that_changes_its_group_between_epochs_is_refused(
    steps: Callable[..., CompiledSteps],
) -> None:
    made = steps(opt=in_groups)
    list(made.take(0, 0))
    first, second, *_ = made.opt.param_groups
    first["params"], second["params"] = second["params"], first["params"]
    with pytest.raises(UsageError, match="the group of a parameter changes before epoch 2, "):
        next(made.take(1, 0))


def test_a_constant_of_a_further_group_may_not_change(steps: Callable[..., CompiledSteps]) -> None:
    made = steps(opt=in_groups)
    made.opt.param_groups[1]["lr"] = 0.3
    next(made.take(0, 0))
    made.opt.param_groups[1]["weight_decay"] = 0.5
    with pytest.raises(UsageError, match=r"'weight_decay': 0\.5"):
        next(made.take(0, 0))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("CXX", "/nonexistent/g++", "no C++ compiler /nonexistent/g++ found; install it"),
        ("XDG_CACHE_HOME", "/dev/null", "/dev/null/experiments"),
    ],
)
def test_a_missing_compiler_or_cache_folder_is_reported_in_one_line(
    name: str, value: str, message: str, small_mnist_dir: Path, cli: Command, tmp_path: Path
) -> None:
    completed = cli(
        *(f"data.path={small_mnist_dir}", "trainer.compile=true", "hydra.run.dir=run"),
        env={name: value},
    )
    assert completed.returncode == 2
    assert message in completed.stderr
    assert completed.stderr.startswith("experiments: trainer.compile=true: ")
    assert completed.stderr.count("\n") == 1
    assert record(tmp_path / "run")["state"] == "failed"


@pytest.mark.parametrize("home", ["", "relative"])
def test_a_cache_home_that_is_not_absolute_is_ignored(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert package.cache_folder() == tmp_path / ".cache" / "experiments"
    assert package.cache_folder().stat().st_mode & 0o777 == 0o700


# Subprocesses


@pytest.fixture(scope="module")
def sweep(
    tmp_path_factory: pytest.TempPathFactory, small_mnist_dir: Path, cli_in: Command
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder with a sweep of two lr, its cache in home/ and temporary files in tmp/."""
    path = tmp_path_factory.mktemp("sweep")
    (path / "tmp").mkdir()
    return path, cli_in(
        path,
        *("-m", f"data.path={small_mnist_dir}", "trainer.compile=true", "trainer.epochs=2"),
        *("model=mlp_small", "model.hidden=[16]", "loader.batch_size=128"),
        *("optimizer.lr=0.01,0.02", "hydra.sweep.dir=sweep"),
        env={"XDG_CACHE_HOME": str(path / "home"), "TMPDIR": str(path / "tmp")},
    )


def test_a_sweep_whose_runs_share_a_step_compiles_it_once(
    sweep: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    path, completed = sweep
    assert completed.returncode == 0, completed.stderr
    assert len(list((path / "sweep").glob("*/run.json"))) == 2
    assert len(list((path / "home/experiments").glob("*.pt2"))) == 1
    counts = [file.read_text().count("compiling") for file in path.glob("sweep/*/output.txt")]
    assert sum(counts) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_compiling_ends_the_compiler_and_interrupts_the_run(
    number: signal.Signals, small_mnist_dir: Path, tmp_path: Path
) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path / "home")}
    arguments = (f"data.path={small_mnist_dir}", "trainer.epochs=1", "trainer.compile=true")

    def of_the_run() -> list[bytes]:
        """The command lines of all processes that have this test's cache folder."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if environment["XDG_CACHE_HOME"].encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes())
        return found

    def is_compiling() -> bool:
        return any(b"compiler.main" in line for line in of_the_run())

    with UnderWay(tmp_path, *arguments, "hydra.run.dir=run", environment=environment) as command:
        command.wait_for_line("compiling the step, once for its shapes: about 10 to 30 seconds")
        command.wait_until(is_compiling)
        os.killpg(command.popen.pid, number)
        code, _, error = command.end()
    assert code == 128 + number
    assert error == "interrupted; resume with: python -m experiments resume=run\n"
    assert of_the_run() == []
    assert list((tmp_path / "home").rglob("*.pt2")) == []
    assert record(tmp_path / "run")["state"] == "interrupted"


def test_runs_leave_no_unpacked_packages_behind(
    sweep: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    assert list((sweep[0] / "tmp").glob("aotinductor_*")) == []
