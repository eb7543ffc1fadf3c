"""trainer.compile: what a graph would leave out is refused, in one line, before it is compiled.

Nothing here is compiled: a package is replaced by its graph, run eagerly.
"""

import itertools
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_structure, tree_unflatten

from experiments.compiled import compiler
from experiments.compiled import steps as compiled
from experiments.compiled.steps import CompiledSteps
from experiments.compiled.trace import trace
from experiments.data import Split
from experiments.data.loaders import Batch, BatchRows, TensorLoader
from experiments.errors import UsageError
from experiments.training.objective import Objective
from experiments.training.parts import clip_gradients
from experiments.training.schedules import constant

Make = Callable[..., CompiledSteps]
ROWS = 400


class GraphInsteadOfPackage:
    """In place of a package: its graph, run eagerly."""

    def __init__(self, graph: torch.fx.GraphModule, inputs: tuple[Any, ...]) -> None:
        self.graph, self.spec = graph, tree_structure(inputs)

    def run(self, leaves: list[Tensor]) -> list[Tensor]:
        return list(self.graph(*tree_unflatten(leaves, self.spec)))


@pytest.fixture(scope="module")
def split() -> Split:
    """x: float32 (400, 8), y: int64 (400,), whether the first number is positive."""
    x = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))
    return Split(x, (x[:, 0] > 0).long())


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, split: Split) -> Make:
    """A factory of CompiledSteps for the parts that are given."""
    packages: list[GraphInsteadOfPackage] = []

    def compile_nothing(
        key: str, graph: torch.fx.GraphModule, inputs: tuple[Any, ...], *others: object
    ) -> Path:
        packages.append(GraphInsteadOfPackage(graph, inputs))
        return Path()

    monkeypatch.setattr(compiled, "compile_once", compile_nothing)
    monkeypatch.setattr(compiled, "load", lambda package, device: packages[-1])

    def make(
        model: nn.Module | None = None,
        opt: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        loss_func: nn.Module | None = None,
        loader: Any = None,
        **others: Any,
    ) -> CompiledSteps:
        model = model or layers()
        model.eval()(split.x[:2])  # as `check_fit` does
        optimizer = opt(list(model.parameters()), lr=0.1)
        loader = loader or TensorLoader(split, batch_size=64, shuffle=True)
        loss_func = loss_func or nn.CrossEntropyLoss()
        return CompiledSteps(
            Objective(model, loss_func), optimizer, constant(optimizer), loader, **others
        )

    return make


def layers() -> nn.Sequential:
    """x: float32 (batch, 8) -> logits: float32 (batch, 2)"""
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


def assert_refused(make: Make, message: str, **parts: Any) -> None:
    """The parts are refused in one line that matches `message` and names the remedy."""
    with pytest.raises(UsageError, match=message) as error:
        make(**parts)
    line = str(error.value)
    assert line.startswith("trainer.compile=true: ")
    assert line.endswith("use trainer.compile=false")
    assert "\n" not in line


# Loaders


class Noisy(TensorLoader):
    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        for xb, yb in super().batches(epoch, start):
            yield xb + 1, yb


class Hard(BatchRows):
    def windows(self, epoch: int, start: int = 0, group: int = 1) -> Iterator[Any]:
        yield [torch.arange(8)]


class Augmented(Split):
    def __getitem__(self, row: int) -> Batch:
        return self.x[row] + 1, self.y[row]

    def to(self, device: str) -> Split:
        return self


class WithOptions(TensorLoader):
    def __init__(self, split: Split, **options: Any) -> None:
        self.name = "a name"
        super().__init__(split, **options)


def test_a_loader_that_changes_its_batches_is_refused(make: Make, split: Split) -> None:
    loader = Noisy(split, batch_size=64)
    assert_refused(make, r"Noisy\.batches: .*; use loader=tensors", loader=loader)


def test_a_method_assigned_to_a_loader_is_refused(make: Make, split: Split) -> None:
    loader = TensorLoader(split, batch_size=64)
    loader.batches = lambda epoch=0, start=0: iter(())  # type: ignore[method-assign]
    assert_refused(make, r"TensorLoader\.batches: ", loader=loader)


def test_a_loader_with_an_order_of_its_own_is_refused(make: Make, split: Split) -> None:
    loader = TensorLoader(split, batch_size=64)
    loader.rows = Hard(ROWS, 64)
    assert_refused(make, r"Hard\.windows: ", loader=loader)


def test_a_split_that_changes_its_rows_is_refused(make: Make, split: Split) -> None:
    with pytest.raises(UsageError, match="Augmented is read sample by sample; use loader=torch"):
        TensorLoader(Augmented(split.x, split.y), batch_size=64)


def test_a_loader_that_is_no_tensor_loader_is_named(make: Make) -> None:
    assert_refused(make, r"builtins\.list: needs whole tensors; use loader=tensors", loader=[1])


def test_a_loader_that_only_takes_other_options_is_compiled(make: Make, split: Split) -> None:
    make(loader=WithOptions(split, batch_size=64))


def test_bytes_that_are_codes_reach_eager_and_compiled_steps_as_they_are(make: Make) -> None:
    class Codes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.out = nn.Embedding(20, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            if x.is_floating_point():  # of the factory, which tries it on other rows
                return x
            return self.out(self.embedding(x.long()).mean(1))  # type: ignore[no-any-return]

    x = torch.randint(0, 20, (ROWS, 8)).to(torch.uint8)
    codes = Split(x, (x[:, 0] > 9).long(), pixels=False)
    make(Codes(), loader=TensorLoader(codes, batch_size=64))


def test_a_graph_that_would_be_too_large_has_fewer_steps(
    make: Make, monkeypatch: pytest.MonkeyPatch, split: Split
) -> None:
    loader = TensorLoader(split, batch_size=16)
    assert make(loader=loader).steps_per_call == 8
    monkeypatch.setattr(compiled, "MAX_NODES", 200)
    steps = make(loader=loader)
    assert 1 <= steps.steps_per_call < 8
    assert len(steps.traced[0].graph.nodes) <= 200
    rows = sum(len(result.lrs) * result.rows for result in steps.take(0, 0))
    assert rows == ROWS


def test_a_graph_reaches_the_compilers_process_with_all_its_operations() -> None:
    # a pickled GraphModule executes those without a tensor as input while it is read
    def steps(x: Tensor) -> Tensor:
        return x * torch.tensor([2.0, 3.0]) + torch.randn(2) + torch.zeros(2)

    graph = trace(steps, (torch.ones(2),))
    nodes = pickle.loads(pickle.dumps([compiler.to_plain(node) for node in graph.graph.nodes]))
    read = compiler.from_plain(nodes, dict(graph.state_dict()))
    assert [n.target for n in read.graph.nodes] == [n.target for n in graph.graph.nodes]
    torch.manual_seed(1)
    expected = graph(torch.ones(2))
    torch.manual_seed(1)
    assert torch.equal(read(torch.ones(2)), expected)


def test_memory_that_stands_for_data_may_exceed_what_there_is() -> None:
    spec = compiler.Spec((2**22, 2**20), (2**20, 1), torch.float32, torch.device("cpu"))
    assert compiler.stand_in(spec).shape == spec.shape  # 16 TiB


# Hooks


def sgd(change: Callable[[torch.optim.Optimizer, list[nn.Parameter]], object]) -> Any:
    """A factory of SGD with momentum that is then changed."""

    def opt(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        made = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
        change(made, parameters)
        return made

    return opt


def nothing(*args: object) -> None:
    """A hook that does nothing."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda opt, ps: opt.register_step_pre_hook(nothing), "step hook nothing"),
        (lambda opt, ps: opt.register_step_post_hook(nothing), "step hook nothing"),
        (lambda opt, ps: ps[0].register_hook(nothing), r"model\.0\.weight: .* hook nothing"),
        (lambda opt, ps: ps[1].register_post_accumulate_grad_hook(nothing), r"model\.0\.bias: "),
        (lambda opt, ps: setattr(opt, "step", nothing), r"step\(\) assigned to it"),
        (lambda opt, ps: setattr(opt, "zero_grad", nothing), r"zero_grad\(\) assigned to it"),
        (
            lambda opt, ps: opt.param_groups[0].update(lr=torch.tensor(0.1)),
            r"optimizer\.lr: a tensor, .*; use a number or ",
        ),
    ],
    ids=["pre", "post", "gradient", "accumulated", "step", "zero_grad", "lr"],
)
def test_an_optimizer_that_does_more_than_its_formula_is_refused(
    change: Any, message: str, make: Make
) -> None:
    assert_refused(make, message, opt=sgd(change))


def test_a_gradient_hook_behind_the_parameter_is_found_by_comparing_with_eager_steps(
    make: Make,
) -> None:
    kept = []

    def hook_the_node(opt: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        function = parameters[0].expand_as(parameters[0]).grad_fn
        assert function is not None
        node = function.next_functions[0][0]
        assert node is not None
        node.register_prehook(lambda grads: (grads[0] * 0.9,))
        kept.append(node)

    message = r"computes something else than an eager one: the \S+ model\.0\.weight differs by "
    assert_refused(make, message, opt=sgd(hook_the_node))


def test_global_hooks_are_refused(make: Make) -> None:
    for register in (register_optimizer_step_post_hook, register_module_forward_hook):
        handle = register(nothing)
        try:
            assert_refused(make, "hook nothing")
        finally:
            handle.remove()


@pytest.mark.parametrize(
    "register",
    ["register_full_backward_hook", "register_full_backward_pre_hook", "register_forward_hook"],
)
def test_a_hook_that_observes_a_module_is_refused(register: str, make: Make) -> None:
    model = layers()
    getattr(model[0], register)(nothing)
    assert_refused(
        make, r"model\.0: the compiled step would not call its .* hook nothing", model=model
    )


def test_a_forward_hook_that_computes_the_output_is_compiled(make: Make) -> None:
    model = layers()
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    make(model)


def test_the_projects_own_clipping_is_compiled(make: Make) -> None:
    make(opt=sgd(lambda opt, ps: clip_gradients(opt, 0.01)), clip_norm=0.01)


def test_clipping_that_the_graph_leaves_out_is_found_by_comparing_with_eager_steps(
    make: Make,
) -> None:
    message = "computes something else than an eager one: "
    assert_refused(make, message, opt=sgd(lambda opt, ps: clip_gradients(opt, 0.01)))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "reparametrize",
    [
        weight_norm,
        spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["hook weight_norm", "hook spectral_norm", "weight_norm", "spectral_norm", "prune"],
)
def test_the_reparametrizations_of_torch_are_compiled(
    reparametrize: Callable[[nn.Module], object], make: Make
) -> None:
    model = layers()
    reparametrize(model[0])
    make(model)


# State in Python

COUNT = 0


class Own(nn.Linear):
    """A layer that first does something with its input."""

    shared = 0

    def __init__(self, act: Callable[["Own", Tensor], Tensor | None]) -> None:
        super().__init__(8, 2)
        self.act, self.count, self.seen = act, 0, list[Any]()
        self.numbers, self.rng = itertools.count(), np.random.default_rng(0)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        changed = self.act(self, x)
        return super().forward(x if changed is None else changed)


def counting(layer: Own, x: Tensor) -> None:
    layer.count += 1


def counting_globally(layer: Own, x: Tensor) -> None:
    global COUNT
    COUNT += 1


def counting_in_the_class(layer: Own, x: Tensor) -> None:
    Own.shared += 1


def counting_with_an_iterator(layer: Own, x: Tensor) -> None:
    next(layer.numbers)


def recording(layer: Own, x: Tensor) -> None:
    layer.seen.append(x.detach())


def drawing_from_an_own_rng(layer: Own, x: Tensor) -> None:
    layer.rng.random()


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (counting, r"model\.count changes from 1 to 5"),
        (counting_globally, r"\(COUNT\) changes from"),
        (counting_in_the_class, r"\.shared changes from 1 to 5"),
        (counting_with_an_iterator, r"model\.numbers changes from"),
        (recording, r"model\.seen's length changes from 1 to 5"),
        (drawing_from_an_own_rng, r"model\.rng changes "),
    ],
)
def test_state_in_python_that_changes_with_each_step_is_refused(
    act: Any, name: str, make: Make
) -> None:
    # the graphs of all steps are equal, so that only the state tells
    assert_refused(make, f"{name}.*with each step, .*register_buffer", model=Own(act))


def test_tracing_puts_state_in_python_back(make: Make) -> None:
    model = Own(counting)
    with pytest.raises(UsageError):
        make(model)
    assert model.count == 1  # from `make` itself


def test_a_tensor_that_is_only_stored_is_compiled_and_put_back(make: Make) -> None:
    model = Own(lambda layer, x: layer.seen.__setitem__(slice(None), [x * 2]))
    make(model)
    assert type(model.seen[0]) is Tensor


def remembering(layer: Own, x: Tensor) -> Tensor | None:
    if not layer.training:
        return None
    last, layer.seen = layer.seen, [x.detach().mean()]
    return x + last[0] if last else None


@pytest.mark.parametrize("batch_size", [64, 128], ids=["several steps a call", "one"])
def test_a_tensor_that_is_kept_for_the_next_batch_is_refused(
    batch_size: int, make: Make, split: Split
) -> None:
    loader = TensorLoader(split, batch_size=batch_size)
    message = "keeps a tensor from one batch to the next; call register_buffer"
    assert_refused(make, message, model=Own(remembering), loader=loader)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda layer, x: x + random.random() * 0, "draws from random; "),
        (lambda layer, x: (np.random.rand(), x)[1], r"draws from numpy\.random; "),
        (
            lambda layer, x: x * torch.tensor(np.random.default_rng().random(8)).float(),
            "gives a different graph each time; ",
        ),
        (
            lambda layer, x: x + torch.randn(x.shape, generator=layer.generator),
            r"from a torch\.Generator of its own; ",
        ),
    ],
    ids=["random", "numpy", "constants", "torch.Generator"],
)
def test_draws_other_than_from_torchs_default_generator_are_refused(
    draw: Any, message: str, make: Make
) -> None:
    assert_refused(make, message, model=Own(draw))


def test_draws_from_torchs_default_generator_are_the_eager_ones(make: Make) -> None:
    make(Own(lambda layer, x: x + torch.randn_like(x)))


# Buffers


class Averaging(nn.Module):
    """A loss relative to its running mean, which is changed in place or replaced."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("mean", torch.ones(()))
        self.mean: Tensor

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(logits, y)
        if self.in_place:
            self.mean.lerp_(loss.detach(), 0.1)
        else:
            self.mean = self.mean.lerp(loss.detach(), 0.1)
        return loss / self.mean


def test_a_buffer_of_the_loss_is_updated_by_compiled_steps(make: Make) -> None:
    loss_func = Averaging(in_place=True)
    steps = make(loss_func=loss_func)
    assert loss_func.mean == 1
    next(steps.take(0, 0))
    assert loss_func.mean < 1


def test_a_buffer_that_each_step_replaces_is_refused_and_put_back(make: Make) -> None:
    loss_func = Averaging(in_place=False)
    message = r"each step replaces loss_func\.mean by another tensor, .*; change it in place"
    assert_refused(make, message, loss_func=loss_func)
    assert loss_func.mean == 1


def test_checking_leaves_everything_as_it_was(make: Make) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 2))
    model.eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    draws = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    steps = make(model, torch.optim.AdamW)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(not state["exp_avg"].any() for state in steps.opt.state.values())
    assert steps.opt.param_groups[0]["lr"] == 0.1
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert (random.getstate(), repr(np.random.get_state())) == draws[1:]


# Changes while training


def scale_by_epoch(layer: Own, x: Tensor) -> Tensor:
    return x * layer.count


def test_a_model_that_computes_something_else_in_a_later_epoch_is_refused(make: Make) -> None:
    model = Own(scale_by_epoch)
    steps = make(model)
    list(steps.take(0, 0))
    model.count = 1
    with pytest.raises(UsageError, match=r"model\.count changes from 0 to 1 before epoch 2, "):
        next(steps.take(1, 0))


def test_a_number_that_changes_between_epochs_but_is_not_used_is_left_alone(make: Make) -> None:
    model = Own(lambda layer, x: None)
    steps = make(model)
    list(steps.take(0, 0))
    model.count = 1
    list(steps.take(1, 0))


def test_requires_grad_that_changes_between_epochs_is_refused(make: Make) -> None:
    model = layers()
    steps = make(model)
    list(steps.take(0, 0))
    model[0].requires_grad_(False)
    with pytest.raises(UsageError, match="requires_grad of a parameter changes before epoch 2, "):
        next(steps.take(1, 0))


def test_an_optimizers_option_that_the_graph_has_as_a_constant_may_not_change(make: Make) -> None:
    steps = make(opt=sgd(nothing))
    steps.opt.param_groups[0]["momentum"] = 0.5
    next(steps.take(0, 0))
    steps.opt.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(UsageError, match=r"'weight_decay': 0\.5"):
        next(steps.take(0, 0))
