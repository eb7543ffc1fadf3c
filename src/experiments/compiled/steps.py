"""`trainer.compile=true`: a step, from gathering its rows to the new weights, as one function.

The step is traced into one graph (trace.py), which torch's inductor compiles ahead of time
(package.py).
"""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from experiments.compiled.eager_check import Checked, check_against_eager
from experiments.compiled.eligibility import (
    check_loader,
    check_modules,
    check_optimizer,
    check_step,
)
from experiments.compiled.package import cache_key, compile_once, load, on_threads
from experiments.compiled.python_state import PythonState
from experiments.compiled.trace import GraphTooLarge, count_flops, count_nodes, same_graph, trace
from experiments.compiled.updates import GroupedUpdate
from experiments.data.loaders import TensorLoader
from experiments.data.nests import map_tensors, tensors_of
from experiments.errors import UsageError
from experiments.training.means import Weigh
from experiments.training.objective import Objective
from experiments.training.steps import EagerSteps, Scheduler
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
    number of a signal that has arrived. one_by_one: whether something is due after each step.

    Raises UsageError if the step cannot be compiled, Interrupted after a signal.
    """

    def __init__(
        self,
        objective: Objective,
        opt: Optimizer,
        scheduler: Scheduler,
        loader: TensorLoader,
        *,
        accumulated: int = 1,
        clip_norm: float | None = None,
        stop_signal: Callable[[], int | None] = lambda: None,
        weigh: Weigh | None = None,
        one_by_one: bool = False,
    ) -> None:
        check_loader(loader)
        check_step(objective)
        if weigh is not None and accumulated > 1:
            raise UsageError(
                f"trainer.accumulate={accumulated}: a compiled step counts its batches by rows, "
                "not by class weights or targets that are not ignored; use trainer.compile=false"
            )
        self.eager = EagerSteps(objective, opt, scheduler, loader, accumulated, weigh)
        self.stop_signal, self.weigh = stop_signal, weigh
        self.loader, self.accumulated, self.clip_norm = loader, accumulated, clip_norm
        self.opt, self.update = opt, GroupedUpdate(opt)
        self.rows_per_step = accumulated * loader.rows.batch_size
        self.objective = objective
        self.parts: dict[str, nn.Module] = {"model": objective.model, "loss": objective.loss_func}
        if isinstance(objective.step, nn.Module):
            self.parts["step"] = objective.step
        self.number_names: list[str] = []
        self.check_hooks()
        self.trained_names = self.find_trained_names()
        objective.train()
        steps = 1 if one_by_one else max(1, ROWS_PER_CALL // self.rows_per_step)
        graph, inputs = self.trace_as_many_as_fit(steps)
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
        tensors = dict([*self.objective.named_parameters(), *self.objective.named_buffers()])
        self.untrained_names = [name for name in tensors if name not in self.trained_names]
        parameters = self.trained_parameters()
        states = self.update.states(parameters)
        self.group_numbers = self.update.group_numbers(parameters)
        # a parameter that the loss does not depend on has no step count
        self.step_count = max(int(state["step"]) if "step" in state else 0 for state in states)
        self.device = parameters[0].device
        if self.loader.index_device != self.device:
            raise UsageError(
                "trainer.compile=true: memory-mapped files need the model on the CPU; "
                "use trainer.device=cpu or trainer.compile=false"
            )
        self.scalars = [self.update.scalars(1)] * self.steps_per_call
        return (
            [p.detach() for p in parameters],
            [tensors[name].detach() for name in self.untrained_names],
            states,
            tensors_of(self.loader.split.tensors),
            torch.zeros(self.rows_per_call, dtype=torch.int64, device=self.device),
            torch.tensor(self.scalars, device=self.device),
        )

    def check_hooks(self) -> None:
        """Raise UsageError if a step calls hooks that are not part of the graph."""
        check_optimizer(self.opt, dict(self.objective.named_parameters()))
        check_modules(self.objective)

    def find_trained_names(self) -> list[str]:
        """The names of the parameters that the optimizer changes."""
        trained = {p for group in self.opt.param_groups for p in group["params"] if p.requires_grad}
        return [name for name, p in self.objective.named_parameters() if p in trained]

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer changes, in the order of their names."""
        parameters = dict(self.objective.named_parameters())
        return [parameters[name] for name in self.trained_names]

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
        elif self.update.group_numbers(self.trained_parameters()) != self.group_numbers:
            change = "the group of a parameter changes"
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
        check(lambda *args: self.package.run(tree_leaves(args)))

    def check_against_eager(
        self, graph: torch.fx.GraphModule, inputs: tuple[Any, ...], function: Callable[..., Tensor]
    ) -> None:
        """Compare a function with the graph's signature with eager steps. Raises UsageError."""
        tensors = dict([*self.objective.named_parameters(), *self.objective.named_buffers()])
        dtypes = {node.meta["val"].dtype for node in graph.graph.nodes
                  if isinstance(node.meta.get("val"), Tensor)}  # fmt: skip
        _, _, states, data, index, _ = inputs

        def run(parameters: Any, untrained: Any, states: Any, rows: Any, scalars: Any) -> Tensor:
            with on_threads(self.threads):
                return function(parameters, untrained, states, data, rows, scalars)[0]

        check_against_eager(
            Checked(
                self.objective,
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

    def take(self, epoch: int, start: int, limit: int | None = None) -> Iterator[StepResult]:
        """Take the steps of an epoch, from batch number `start` on; at most `limit` of them.

        Raises UsageError if what was compiled is no longer what the parts compute.
        """
        self.check_unchanged(epoch)
        left = math.inf if limit is None else limit
        if left == 0:
            return
        for index in self.loader.indices(epoch, start, self.steps_per_call * self.accumulated):
            if len(index) == self.rows_per_call and left >= self.steps_per_call:
                yield self.step(index)
                left -= self.steps_per_call
            else:
                for step_index in index.split(self.rows_per_step):
                    if left:
                        yield self.step_eagerly(step_index)
                        left -= 1
            if not left:
                return

    def step(self, index: Tensor) -> StepResult:
        """Take `steps_per_call` compiled steps on the rows `index`, int64 (rows_per_call,)."""
        self.update.check_constants()
        lrs, scalars = [], []
        for _ in range(self.steps_per_call):
            self.step_count += 1
            lrs.append(self.update.lrs())
            scalars.append(self.update.scalars(self.step_count))
            self.eager.scheduler.step()
        if scalars != self.scalars:
            self.scalars = scalars
            self.inputs[-1] = torch.tensor(scalars, device=self.device)
        self.inputs[-2] = index
        with on_threads(self.threads):
            losses, *values = self.package.run(self.inputs)
        weights = None
        if self.weigh is not None:
            targets = self.loader.split.y.index_select(0, index).split(self.rows_per_step)
            weights = torch.stack([self.weigh(yb) for yb in targets])
        numbers = dict(zip(self.number_names, values, strict=True))
        return StepResult(losses, [lr for lr, *_ in lrs], self.rows_per_step, self.accumulated,
                          weights, [others for _, *others in lrs], numbers)  # fmt: skip

    def step_eagerly(self, index: Tensor) -> StepResult:
        """Take one eager step on the rows `index`, int64 (rows,)."""
        self.step_count += 1
        batches = index.split(self.loader.rows.batch_size)
        return self.eager.step([self.loader.split.gather(batch) for batch in batches])

    def trace_steps(
        self,
        parameters: list[Tensor],
        untrained: list[Tensor],
        states: list[dict[str, Tensor]],
        data: list[Tensor],
        index: Tensor,
        scalars: Tensor,
    ) -> list[Tensor]:
        """The traced function. Updates parameters, states and untrained tensors (BatchNorm's
        buffers) in place.

        data: the tensors of the training split. index: int64 (rows,), scalars: float32 (steps, n).
        Returns the losses and each of the numbers of the steps, float32 (steps,).
        """
        initial = parameters, states
        losses: list[Tensor] = []
        numbers: dict[str, list[Tensor]] = {}
        leaves = iter(data)
        split = map_tensors(lambda _: next(leaves), self.loader.split.tensors)
        index = index.view(self.steps_per_call, self.accumulated, -1)
        for batches, step_scalars in zip(index.unbind(), scalars.unbind(), strict=True):
            parameters = [p.detach().requires_grad_() for p in parameters]
            names = self.trained_names + self.untrained_names
            tensors = dict(zip(names, parameters + untrained, strict=True))
            batch_losses, grads = [], []
            batch_numbers: dict[str, list[Tensor]] = {}
            for rows in batches.unbind():
                batch = self.objective.augmented(self.loader.split.gather(rows, split))
                output = functional_call(self.objective, tensors, (batch,))
                loss = output.loss
                if output.weight is not None:
                    raise UsageError(
                        "trainer.compile=true: the step gives the weight of a batch, which a "
                        "compiled step does not take; use trainer.compile=false"
                    )
                if self.accumulated > 1:
                    loss = loss / self.accumulated
                batch_losses.append(loss.detach())
                for name, value in output.numbers.items():
                    batch_numbers.setdefault(name, []).append(value.detach() / self.accumulated)
                grads.append(torch.autograd.grad(loss, parameters, allow_unused=True))
            losses.append(reduce(torch.add, batch_losses))
            for name, values in batch_numbers.items():
                numbers.setdefault(name, []).append(reduce(torch.add, values))
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
        self.number_names = list(numbers)
        return [torch.stack(losses), *(torch.stack(values) for values in numbers.values())]

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
        return self.update.apply(parameters, self.group_numbers, summed, states, scalars)
