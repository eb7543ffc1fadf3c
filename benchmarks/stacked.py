"""Seconds a model-epoch: many models in one batched program, against one compiled run a core.

    python benchmarks/stacked.py [models]

The main job's MLP at batch 64 with momentum, training alone. Stacked: torch.func's vmap over
models that see the same rows in the same order, on all cores, eager and through torch.compile.
Beside it: `trainer.compile=true`, a process of one thread for each core, all at once.
"""

import json
import multiprocessing
import os
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from experiments.compiled.steps import CompiledSteps
from experiments.data.loaders import TensorLoader, gather
from experiments.data.mnist import load
from experiments.training import lean_optim
from experiments.training.models import mlp
from experiments.training.schedules import constant

BATCH, LR, MOMENTUM, EPOCHS = 64, 0.01, 0.9, 3
Weights = dict[str, Tensor]


def model() -> nn.Module:
    """784-128-256-10."""
    return mlp(784, [128, 256], 10)


def stacked(models: int, compiled: bool) -> float:
    """Seconds of an epoch of all models in one program, over their number."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    train = load().train
    weights: Weights = {
        name: tensor.detach().clone()
        for name, tensor in stack_module_state([model() for _ in range(models)])[0].items()
    }
    velocity = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    lrs = torch.linspace(LR / 10, LR, models)
    plain, loss_func = model(), nn.CrossEntropyLoss()

    def loss(weights: Weights, xb: Tensor, yb: Tensor) -> Tensor:
        value: Tensor = loss_func(functional_call(plain, weights, (xb,)), yb)
        return value

    gradients = vmap(grad(loss), in_dims=(0, None, None))

    def step(weights: Weights, velocity: Weights, x: Tensor, y: Tensor, index: Tensor) -> None:
        grads = gradients(weights, *gather(x, y, index))
        for name, tensor in weights.items():
            velocity[name].mul_(MOMENTUM).add_(grads[name])
            tensor.sub_(lrs.view(-1, *[1] * (tensor.dim() - 1)) * velocity[name])

    run = torch.compile(step) if compiled else step
    seconds = []
    for _ in range(EPOCHS):
        started = time.perf_counter()
        for index in torch.randperm(len(train)).split(BATCH)[:-1]:
            run(weights, velocity, train.x, train.y, index)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) / models


def alone(ready: Any, seconds: Any) -> None:
    """Put the seconds of each epoch of one model, compiled, on one thread, into a queue."""
    torch.set_num_threads(1)
    lean_optim.install()
    loader = TensorLoader(load().train, batch_size=BATCH, shuffle=True, drop_last=True)
    net = model()
    opt = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)
    steps = CompiledSteps(net, nn.CrossEntropyLoss(), opt, constant(opt), loader)
    ready.wait()
    for epoch in range(EPOCHS):
        started = time.perf_counter()
        for _ in steps.take(epoch, 0):
            pass
        seconds.put(time.perf_counter() - started)


def main() -> None:
    models = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    cores = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    ready, seconds = context.Barrier(cores), context.Queue()
    processes = [context.Process(target=alone, args=(ready, seconds)) for _ in range(cores)]
    for process in processes:
        process.start()
    told = [seconds.get() for _ in range(cores * EPOCHS)]
    for process in processes:
        process.join()
    print(json.dumps({
        "a compiled run a core": round(statistics.median(told) / cores, 3),
        f"{models} stacked, eager": round(stacked(models, compiled=False), 3),
        f"{models} stacked, compiled": round(stacked(models, compiled=True), 3),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
