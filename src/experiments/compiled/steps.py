"""`trainer.compile=true`: a step, from gathering its rows to the new weights, as one function.

The step is traced into one graph (trace.py), which torch's inductor compiles ahead of time
(package.py).
"""

import gc
from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from experiments.compiled.package import compile_once, key_of, load, on_threads
from experiments.compiled.trace import operations, trace
from experiments.compiled.updates import update_of
from experiments.data.loaders import TensorLoader, gather
from experiments.errors import UsageError
from experiments.training.fit import EagerSteps, Scheduler
from experiments.training.train_log import StepResult

# Rows whose steps go into one graph, so that small batches share the cost of a call.
ROWS_AT_ONCE = 128
# Floating point operations below which a step runs on one thread: more would wait for each other.
SMALL_STEP = 15_000_000


class CompiledSteps:
    """The steps of `fit.EagerSteps`, compiled. Made when model, optimizer and scheduler are in the
    state in which the run starts or resumes.

    Full batches are compiled, several small ones into one graph; what is left at an epoch's end is
    stepped eagerly. The numbers are the eager ones to float tolerance, their bits the same each
    time.

    accumulated: batches that make one step. clip_norm: largest norm of the gradient.

    Raises UsageError where the step cannot be compiled.
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
    ) -> None:
        if not isinstance(loader, TensorLoader):
            raise UsageError("trainer.compile=true: takes whole tensors; use loader=tensors")
        self.eager = EagerSteps(model, loss_func, opt, scheduler, loader, accumulated)
        self.loader, self.accumulated, self.clip_norm = loader, accumulated, clip_norm
        self.update = update_of(opt)
        [self.group] = opt.param_groups
        self.rows = accumulated * loader.rows.batch_size
        self.unrolled = max(1, ROWS_AT_ONCE // self.rows)
        self.rows_at_once = self.unrolled * self.rows
        self.whole = LossOf(model, loss_func)
        trained = {p for p in self.group["params"] if p.requires_grad}
        self.names = [name for name, p in self.whole.named_parameters() if p in trained]
        tensors = dict([*self.whole.named_parameters(), *self.whole.named_buffers()])
        self.others = [name for name in tensors if name not in self.names]
        parameters = [tensors[name] for name in self.names]
        for p in parameters:
            if not opt.state[p]:
                opt.state[p].update(self.update.state(self.group, p))
        states = [dict(opt.state[p]) for p in parameters]
        # a parameter that the loss does not depend on has no steps
        self.count = max(int(state["step"]) if "step" in state else 0 for state in states)
        self.device = parameters[0].device
        if loader.x.device != self.device:
            raise UsageError(
                "trainer.compile=true: mapped files stay on the CPU, as the model must; "
                "use trainer.device=cpu or trainer.compile=false"
            )
        self.numbers = [self.update.numbers(self.group, 1)] * self.unrolled
        inputs = (
            [p.detach() for p in parameters],
            [tensors[name].detach() for name in self.others],
            states,
            loader.x,
            loader.y,
            torch.zeros(self.rows_at_once, dtype=torch.int64, device=self.device),
            torch.tensor(self.numbers, device=self.device),
        )
        model.train()
        graph = trace(self.trace_steps, inputs)
        small = operations(graph) < SMALL_STEP * self.unrolled
        self.threads = 1 if small else torch.get_num_threads()
        with on_threads(self.threads):
            self.key = key_of(graph, inputs)
            self.package = load(compile_once(self.key, graph, inputs), self.device)
        self.inputs = tree_leaves(inputs)
        gc.freeze()  # the compiler's modules stay: a collection pass over them takes long
        opt._opt_called = True  # type: ignore[attr-defined]  # or every scheduler would warn

    def __len__(self) -> int:
        return len(self.loader)

    def take(self, epoch: int, start: int) -> Iterator[StepResult]:
        """Take the steps of an epoch, from batch number `start` on."""
        for index in self.loader.indices(epoch, start, self.unrolled * self.accumulated):
            if len(index) == self.rows_at_once:
                yield self.step(index)
            else:
                for rows in index.split(self.rows):
                    yield self.step_eagerly(rows)

    def step(self, index: Tensor) -> StepResult:
        """The compiled steps on the rows of these numbers, int64 (rows_at_once,)."""
        lrs, numbers = [], []
        for _ in range(self.unrolled):
            self.count += 1
            lrs.append(self.group["lr"])
            numbers.append(self.update.numbers(self.group, self.count))
            self.eager.scheduler.step()
        if numbers != self.numbers:
            self.numbers = numbers
            self.inputs[-1] = torch.tensor(numbers, device=self.device)
        self.inputs[-2] = index
        with on_threads(self.threads):
            (losses,) = self.package.run(self.inputs)
        return StepResult(losses, lrs, self.rows, self.accumulated)

    def step_eagerly(self, index: Tensor) -> StepResult:
        """One step, not compiled, on the rows of these numbers."""
        self.count += 1
        parts = index.split(self.loader.rows.batch_size)
        return self.eager.step([gather(self.loader.x, self.loader.y, part) for part in parts])

    def trace_steps(
        self,
        parameters: list[Tensor],
        others: list[Tensor],
        states: list[dict[str, Tensor]],
        x: Tensor,
        y: Tensor,
        index: Tensor,
        numbers: Tensor,
    ) -> Tensor:
        """What is traced: changes parameters, others (BatchNorm's buffers) and states in place.

        index: int64 (rows,), numbers: float32 (steps, n);
        returns each step's loss, float32 (steps,)
        """
        before = parameters, states
        losses = []
        index = index.view(self.unrolled, self.accumulated, -1)
        for batches, now in zip(index.unbind(), numbers.unbind(), strict=True):
            parameters = [p.detach().requires_grad_() for p in parameters]
            tensors = dict(zip(self.names + self.others, parameters + others, strict=True))
            parts, grads = [], []
            for rows in batches.unbind():
                loss = functional_call(self.whole, tensors, gather(x, y, rows))
                if self.accumulated > 1:
                    loss = loss / self.accumulated
                parts.append(loss.detach())
                grads.append(torch.autograd.grad(loss, parameters, allow_unused=True))
            losses.append(reduce(torch.add, parts))
            with torch.no_grad():
                parameters, states = self.trace_update(parameters, grads, states, now)
        # only at the end: of changes in place between steps the compiler made wrong ones
        with torch.no_grad():
            for old, new in zip(
                tree_leaves(before), tree_leaves((parameters, states)), strict=True
            ):
                old.copy_(new)
        return torch.stack(losses)

    def trace_update(
        self,
        parameters: list[Tensor],
        grads: Sequence[tuple[Tensor | None, ...]],
        states: list[dict[str, Tensor]],
        numbers: Tensor,
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """The optimizer's step on the sum of the gradients of each batch, clipped before."""
        # None where the loss does not depend on the parameter
        summed = [
            None if parts[0] is None else reduce(torch.add, parts)
            for parts in zip(*grads, strict=True)
        ]
        if self.clip_norm is not None:
            # as in nn.utils.clip_grad_norm_
            norms = [torch.linalg.vector_norm(grad) for grad in summed if grad is not None]
            scale = torch.clamp(self.clip_norm / (torch.stack(norms).norm() + 1e-6), max=1.0)
            summed = [None if grad is None else grad * scale for grad in summed]
        pairs = [
            (p, state) if grad is None else self.update.apply(self.group, p, grad, state, numbers)
            for p, grad, state in zip(parameters, summed, states, strict=True)
        ]
        return [p for p, _ in pairs], [state for _, state in pairs]


class LossOf(nn.Module):
    """A model and its loss in one: float32 () of a batch."""

    def __init__(self, model: nn.Module, loss_func: nn.Module) -> None:
        super().__init__()
        self.model, self.loss_func = model, loss_func

    def forward(self, xb: Tensor, yb: Tensor) -> Tensor:
        loss: Tensor = self.loss_func(self.model(xb), yb)
        return loss
