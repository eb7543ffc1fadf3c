"""An epoch of the main job, everything on, against the bare loop, in one process, in turn.

    python benchmarks/epoch.py [rounds] [overrides...]

Bare loop: each batch gathered by index, forward, backward, step, and the validation that the
project does too. Prints the median of the ratios, and of each one's seconds an epoch.
"""

import contextlib
import gc
import io
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import torch
from torch import nn

from experiments.config.compose import CONF, validate
from experiments.config.hydra_versions import VERSION_BASE
from experiments.data import Data
from experiments.directory import record as runs
from experiments.job import load_data
from experiments.train import train
from experiments.training.progress import Progress, make_progress


def mlp() -> nn.Module:
    """The net of the main job."""
    return nn.Sequential(
        *(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10))
    )


def bare_loop(
    model: nn.Module, data: Data, batch_size: int, lr: float, momentum: float
) -> Iterator[float]:
    """The loop that one would write by hand, epoch after epoch: each one's validation accuracy."""
    loss_func = nn.CrossEntropyLoss()
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    x, y = data.train.x, data.train.y
    while True:
        model.train()
        for rows in torch.randperm(len(y)).split(batch_size):
            loss = loss_func(model(x[rows]), y[rows])
            loss.backward()
            opt.step()
            opt.zero_grad()
        model.eval()
        loss_sum, correct = 0.0, 0
        with torch.no_grad():
            batches = data.valid.x.split(2 * batch_size), data.valid.y.split(2 * batch_size)
            for xb, yb in zip(*batches, strict=True):
                logits = model(xb)
                loss_sum += loss_func(logits, yb).item() * len(yb)
                correct += (logits.argmax(1) == yb).sum().item()
        yield correct / len(data.valid)


def bare_epochs(data: Data, epochs: int, batch_size: int, lr: float, momentum: float) -> float:
    """Seconds an epoch of the bare loop on the main job's net, validation included."""
    torch.manual_seed(0)
    loop = bare_loop(mlp(), data, batch_size, lr, momentum)
    started = time.perf_counter()
    for _ in itertools.islice(loop, epochs):
        pass
    return (time.perf_counter() - started) / epochs


def project(
    data: Data,
    overrides: list[str],
    show: Callable[[int, int, str], Progress],
    model: dict[str, Any] | None = None,
) -> None:
    """A run as the command line's, everything on, in a directory that is removed again.

    show: the `progress` of `train`: called when fitting begins; its result at each epoch's end.
    model: stands in the config for the model.
    """
    with hydra.initialize_config_dir(str(CONF), "experiments", **VERSION_BASE):
        config = validate(hydra.compose("config", overrides))
    config["model"] = model or config["model"]
    gc.freeze()  # as job.execute does
    with tempfile.TemporaryDirectory() as folder:
        train(config, data, runs.start(Path(folder), config, overrides), progress=show)


def project_epochs(data: Data, overrides: list[str], epochs: int) -> float:
    """Seconds an epoch of the project's, from the first step to the last checkpoint."""
    stamps = []

    def show(epochs: int, batches: int, monitor: str) -> Progress:
        shown = make_progress(epochs, batches, monitor)
        stamps.append(time.perf_counter())
        return SimpleNamespace(
            advance=shown.advance,
            epoch_end=shown.epoch_end,
            validated=shown.validated,
            close=lambda: stamps.append(time.perf_counter()),
        )

    with contextlib.redirect_stdout(io.StringIO()):
        project(data, [*overrides, f"trainer.epochs={epochs}"], show)
    return (stamps[1] - stamps[0]) / epochs


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    overrides = sys.argv[2:] or ["optimizer.lr=0.01", "scheduler=constant"]
    with hydra.initialize_config_dir(str(CONF), "experiments", **VERSION_BASE):
        config = validate(hydra.compose("config", overrides))
    data = load_data(config)
    torch.set_num_threads(config["trainer"]["threads"])
    epochs, opt = 2, config["optimizer"]
    bare, ours = [], []
    for number in range(rounds + 1):
        args = (data, epochs, config["loader"]["batch_size"], opt["lr"], opt["momentum"])
        bare.append(bare_epochs(*args))
        ours.append(project_epochs(data, overrides, epochs))
        if number == 0:  # warm-up
            bare.clear(), ours.clear()
    ratios = [mine / other for mine, other in zip(ours, bare, strict=True)]
    print(json.dumps({
        "ratio": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "bare s/epoch": round(statistics.median(bare), 3),
        "ours s/epoch": round(statistics.median(ours), 3),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
