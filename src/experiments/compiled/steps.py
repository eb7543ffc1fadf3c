"""`trainer.compile=true`: a step, from gathering its rows to the new weights, as one function.

The step is traced into one graph (trace.py), which torch's inductor compiles ahead of time
(package.py).
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from experiments.compiled.eager_check import Checked, check_against_eager
from experiments.compiled.eligibility import check_loader, check_modules, check_optimizer
from experiments.compiled.package import cache_key, compile_once, load, on_threads
from experiments.compiled.python_state import PythonState
from experiments.compiled.trace import GraphTooLarge, count_flops, count_nodes, same_graph, trace
from experiments.compiled.updates import find_update, optimizer_states
from experiments.data.loaders import TensorLoader, gather
from experiments.errors import UsageError
from experiments.training.fit import EagerSteps, Scheduler
from experiments.training.means import Weigh
from experiments.training.train_log import StepResult

# Steps on small batches are unrolled into one graph up to this many rows, to share the call's cost.
ROWS_PER_CALL = 128
# A graph of more nodes is traced again with fewer steps, since compiling it would take minutes.
MAX_NODES = 4000
# Below this a step runs on one thread: several would spend the time waiting for each other.
SINGLE_THREAD_FLOPS = 15_000_000


class CompiledSteps:
    """The steps of `fit.EagerSteps`, compiled. Construct it when model, optimizer and scheduler are
    in the state in which the run starts or resumes.

    Full batches are compiled, several steps on small ones into one graph; the remainder of an epoch
    runs eagerly. Results equal the eager ones to float tolerance, and are bitwise reproducible.

    accumulated: batches per optimizer step. clip_norm: maximum norm of the gradient. weigh: how
    much the loss of a batch counts, from its targets; None: by its rows. stop_signal: gives the
    number of a signal that has arrived.

    Raises UsageError if the step cannot be compiled, Interrupted after a signal.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_func: nn.Module,
        opt: Optimizer,
        scheduler: Scheduler,
        loader: TensorLoader,
        *,
        accumulated: int = 1,
        clip_norm: float | None = None,
        stop_signal: Callable[[], int | None] = lambda: None,
        weigh: Weigh | None = None,
    ) -> None:
        check_loader(loader)
        if weigh is not None and accumulated > 1:
            raise UsageError(
                f"trainer.accumulate={accumulated}: a compiled step counts its batches by rows, "
                "not by class weights or targets that are not ignored; use trainer.compile=false"
            )
        self.eager = EagerSteps(model, loss_func, opt, scheduler, loader, accumulated, weigh)
        self.stop_signal, self.weigh = stop_signal, weigh
        self.loader, self.accumulated, self.clip_norm = loader, accumulated, clip_norm
        self.opt, self.update = opt, find_update(opt)
        [self.group] = opt.param_groups
        self.constants = self.update.constants(self.group)
        self.rows_per_step = accumulated * loader.rows.batch_size
        self.module = ModelWithLoss(model, loss_func)
        self.parts = {"model": model, "loss": loss_func}
        self.check_hooks()
        self.trained_names = self.find_trained_names()
        model.train()
        graph, inputs = self.trace_as_many_as_fit(max(1, ROWS_PER_CALL // self.rows_per_step))
        self.compile(graph, inputs)
        self.inputs = tree_leaves(inputs)
        gc.freeze()  # one garbage collection pass over the compiler's modules takes long
        opt._opt_called = True  # type: ignore[attr-defined]  # or every scheduler would warn

    def trace_as_many_as_fit(self, steps: int) -> tuple[torch.fx.GraphModule, tuple[Any, ...]]:
        """The graph of so many steps, or fewer if it would be too large, and its inputs."""
        self.steps_per_call, self.rows_per_call = steps, steps * self.rows_per_step
        inputs = self.graph_inputs(self.opt)
        try:
            return self.trace(inputs), inputs
        except GraphTooLarge as error:
            return self.trace_as_many_as_fit(max(1, MAX_NODES // error.nodes_per_step))

    def graph_inputs(self, opt: Optimizer) -> tuple[Any, ...]:
        """The arguments of `trace_steps`; the model's and the optimizer's tensors are not copied.

        Raises UsageError if the data is not on the model's device.
        """
        tensors = dict([*self.module.named_parameters(), *self.module.named_buffers()])
        self.untrained_names = [name for name in tensors if name not in self.trained_names]
        parameters = [tensors[name] for name in self.trained_names]
        states = optimizer_states(opt, self.update, parameters)
        # a parameter that the loss does not depend on has no step count
        self.step_count = max(int(state["step"]) if "step" in state else 0 for state in states)
        self.device = parameters[0].device
        if self.loader.x.device != self.device:
            raise UsageError(
                "trainer.compile=true: memory-mapped files need the model on the CPU; "
                "use trainer.device=cpu or trainer.compile=false"
            )
        self.scalars = [self.update.scalars(self.group, 1)] * self.steps_per_call
        return (
            [p.detach() for p in parameters],
            [tensors[name].detach() for name in self.untrained_names],
            states,
            self.loader.x,
            self.loader.y,
            torch.zeros(self.rows_per_call, dtype=torch.int64, device=self.device),
            torch.tensor(self.scalars, device=self.device),
        )

    def check_hooks(self) -> None:
        """Raise UsageError if a step calls hooks that are not part of the graph."""
        check_optimizer(self.opt, dict(self.module.named_parameters()))
        check_modules(self.module)

    def find_trained_names(self) -> list[str]:
        """The names of the parameters that the optimizer changes."""
        trained = {p for p in self.group["params"] if p.requires_grad}
        return [name for name, p in self.module.named_parameters() if p in trained]

    def trace(self, inputs: tuple[Any, ...]) -> torch.fx.GraphModule:
        """The graph of `steps_per_call` steps. Raises UsageError if it cannot hold all of them."""
        graph = trace(self.trace_steps, inputs, self.parts)
        self.python_state, self.traced = PythonState(self.parts), (graph, inputs)
        return graph

    def check_unchanged(self, epoch: int) -> None:
        """Raise UsageError if the parts no longer compute what was compiled."""
        self.check_hooks()
        change = self.python_state.change_to(PythonState(self.parts))
        if self.find_trained_names() != self.trained_names:
            change = "requires_grad of a parameter changes"
        elif change is not None:  # not all changes matter
            before, inputs = self.traced
            graph = self.trace(inputs)
            change = None if same_graph(before, graph) else change
        if change is not None:
            raise UsageError(
                f"trainer.compile=true: {change} before epoch {epoch + 1}, so that the compiled "
                "step computes something else than the model; use trainer.compile=false"
            )

    def compile(self, graph: torch.fx.GraphModule, inputs: tuple[Any, ...]) -> None:
        """Choose the number of threads, load the compiled package and check it."""
        small = count_flops(graph) < SINGLE_THREAD_FLOPS * self.steps_per_call
        self.threads = 1 if small else torch.get_num_threads()
        check = partial(self.check_against_eager, graph, inputs)
        with on_threads(self.threads):
            self.key = cache_key(graph, inputs)
            # the graph is checked first, so that nothing is refused after minutes of compiling
            path = compile_once(self.key, graph, inputs, partial(check, graph), self.stop_signal)
            self.package = load(path, self.device)
        check(lambda *args: self.package.run(tree_leaves(args))[0])

    def check_against_eager(
        self, graph: torch.fx.GraphModule, inputs: tuple[Any, ...], function: Callable[..., Tensor]
    ) -> None:
        """Compare a function with the graph's signature with eager steps. Raises UsageError."""
        tensors = dict([*self.module.named_parameters(), *self.module.named_buffers()])
        dtypes = {node.meta["val"].dtype for node in graph.graph.nodes
                  if isinstance(node.meta.get("val"), Tensor)}  # fmt: skip
        _, _, states, x, y, index, _ = inputs

        def run(parameters: Any, untrained: Any, states: Any, rows: Any, scalars: Any) -> Tensor:
            with on_threads(self.threads):
                return function(parameters, untrained, states, x, y, rows, scalars)

        check_against_eager(
            Checked(
                self.module,
                self.eager,
                self.opt,
                self.update,
                {name: cast(nn.Parameter, tensors[name]) for name in self.trained_names},
                {name: tensors[name] for name in self.untrained_names},
                states,
                torch.arange(index.numel(), device=self.device),
                self.steps_per_call,
                bool(dtypes & {torch.bfloat16, torch.float16}),
            ),
            run,
        )

    def __len__(self) -> int:
        return len(self.loader)

    def take(self, epoch: int, start: int) -> Iterator[StepResult]:
        """Take the steps of an epoch, from batch number `start` on.

        Raises UsageError if what was compiled is no longer what the parts compute.
        """
        self.check_unchanged(epoch)
        for index in self.loader.indices(epoch, start, self.steps_per_call * self.accumulated):
            if len(index) == self.rows_per_call:
                yield self.step(index)
            else:
                for step_index in index.split(self.rows_per_step):
                    yield self.step_eagerly(step_index)

    def step(self, index: Tensor) -> StepResult:
        """Take `steps_per_call` compiled steps on the rows `index`, int64 (rows_per_call,)."""
        if self.update.constants(self.group) != self.constants:
            raise UsageError(
                f"optimizer: trainer.compile=true has {self.constants} as constants, which became "
                f"{self.update.constants(self.group)}; use trainer.compile=false"
            )
        lrs, scalars = [], []
        for _ in range(self.steps_per_call):
            self.step_count += 1
            lrs.append(self.group["lr"])
            scalars.append(self.update.scalars(self.group, self.step_count))
            self.eager.scheduler.step()
        if scalars != self.scalars:
            self.scalars = scalars
            self.inputs[-1] = torch.tensor(scalars, device=self.device)
        self.inputs[-2] = index
        with on_threads(self.threads):
            (losses,) = self.package.run(self.inputs)
        weights = None
        if self.weigh is not None:
            targets = self.loader.y.index_select(0, index).split(self.rows_per_step)
            weights = torch.stack([self.weigh(yb) for yb in targets])
        return StepResult(losses, lrs, self.rows_per_step, self.accumulated, weights)

    def step_eagerly(self, index: Tensor) -> StepResult:
        """Take one eager step on the rows `index`, int64 (rows,)."""
        self.step_count += 1
        batches = index.split(self.loader.rows.batch_size)
        x, y, pixels = self.loader.x, self.loader.y, self.loader.pixels
        return self.eager.step([gather(x, y, batch, pixels) for batch in batches])

    def trace_steps(
        self,
        parameters: list[Tensor],
        untrained: list[Tensor],
        states: list[dict[str, Tensor]],
        x: Tensor,
        y: Tensor,
        index: Tensor,
        scalars: Tensor,
    ) -> Tensor:
        """The traced function. Updates parameters, states and untrained tensors (BatchNorm's
        buffers) in place.

        index: int64 (rows,), scalars: float32 (steps, n); returns the step losses, float32 (steps,)
        """
        initial = parameters, states
        losses = []
        index = index.view(self.steps_per_call, self.accumulated, -1)
        for batches, step_scalars in zip(index.unbind(), scalars.unbind(), strict=True):
            parameters = [p.detach().requires_grad_() for p in parameters]
            names = self.trained_names + self.untrained_names
            tensors = dict(zip(names, parameters + untrained, strict=True))
            batch_losses, grads = [], []
            for rows in batches.unbind():
                batch = gather(x, y, rows, self.loader.pixels)
                loss = functional_call(self.module, tensors, batch)
                if self.accumulated > 1:
                    loss = loss / self.accumulated
                batch_losses.append(loss.detach())
                grads.append(torch.autograd.grad(loss, parameters, allow_unused=True))
            losses.append(reduce(torch.add, batch_losses))
            with torch.no_grad():
                parameters, states = self.trace_update(parameters, grads, states, step_scalars)
            nodes = count_nodes()
            if nodes > MAX_NODES and self.steps_per_call > 1:
                raise GraphTooLarge(nodes // len(losses))
        # only at the end: inductor miscompiled in-place updates between the steps
        with torch.no_grad():
            for old, new in zip(
                tree_leaves(initial), tree_leaves((parameters, states)), strict=True
            ):
                old.copy_(new)
        return torch.stack(losses)

    def trace_update(
        self,
        parameters: list[Tensor],
        grads: Sequence[tuple[Tensor | None, ...]],
        states: list[dict[str, Tensor]],
        scalars: Tensor,
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """The optimizer's update with the clipped sum of the batches' gradients."""
        # None if the loss does not depend on the parameter
        summed = [
            None if batch_grads[0] is None else reduce(torch.add, batch_grads)
            for batch_grads in zip(*grads, strict=True)
        ]
        if self.clip_norm is not None:
            # as in nn.utils.clip_grad_norm_
            norms = [torch.linalg.vector_norm(grad) for grad in summed if grad is not None]
            scale = torch.clamp(self.clip_norm / (torch.stack(norms).norm() + 1e-6), max=1.0)
            summed = [None if grad is None else grad * scale for grad in summed]
        pairs = [
            (p, state) if grad is None else self.update.apply(self.group, p, grad, state, scalars)
            for p, grad, state in zip(parameters, summed, states, strict=True)
        ]
        return [p for p, _ in pairs], [state for _, state in pairs]


class ModelWithLoss(nn.Module):
    """A model and its loss as one module: batch -> loss, float32 ()."""

    def __init__(self, model: nn.Module, loss_func: nn.Module) -> None:
        super().__init__()
        self.model, self.loss_func = model, loss_func

    def forward(self, xb: Tensor, yb: Tensor) -> Tensor:
        loss: Tensor = self.loss_func(self.model(xb), yb)
        return loss
