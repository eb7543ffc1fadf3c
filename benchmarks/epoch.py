"""An epoch of the main job, everything on, against the bare loop, in one process, in turn.

    python benchmarks/epoch.py [rounds] [overrides...]

Bare loop: each batch gathered by index, forward, backward, step, and the validation that the
project does too. Prints the median of the ratios, and of each one's seconds an epoch.
"""

import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import hydra
import torch
from torch import nn

from experiments import config as schema
from experiments import run as runs
from experiments.data import Data
from experiments.job import load_data
from experiments.train import train


def bare_epochs(data: Data, epochs: int, batch_size: int, lr: float, momentum: float) -> float:
    """Seconds an epoch of the loop that one would write by hand, validation included."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10))
    )
    loss_func = nn.CrossEntropyLoss()
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    x, y = data.train.x, data.train.y
    started = time.perf_counter()
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(y)).split(batch_size):
            loss = loss_func(model(x[rows]), y[rows])
            loss.backward()
            opt.step()
            opt.zero_grad()
        model.eval()
        with torch.no_grad():
            batches = data.valid.x.split(2 * batch_size), data.valid.y.split(2 * batch_size)
            for xb, yb in zip(*batches, strict=True):
                logits = model(xb)
                loss_func(logits, yb).item(), (logits.argmax(1) == yb).sum().item()
    return (time.perf_counter() - started) / epochs


def project_epochs(data: Data, overrides: list[str], epochs: int) -> float:
    """Seconds an epoch of the project's, from the first step to the last checkpoint."""
    with hydra.initialize_config_dir(str(schema.CONF), "experiments", version_base="1.3"):
        config = schema.validate(hydra.compose("config", [*overrides, f"trainer.epochs={epochs}"]))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = runs.start(Path(folder), config, overrides)
        stamps = []
        import experiments.train as module

        fit = module.fit

        def timed_fit(*args, **kwargs):  # type: ignore[no-untyped-def]
            stamps.append(time.perf_counter())
            result = fit(*args, **kwargs)
            stamps.append(time.perf_counter())
            return result

        module.fit = timed_fit
        try:
            train(config, data, run)
        finally:
            module.fit = fit
    return (stamps[1] - stamps[0]) / epochs


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    overrides = sys.argv[2:] or ["optimizer.lr=0.01", "scheduler=constant"]
    with hydra.initialize_config_dir(str(schema.CONF), "experiments", version_base="1.3"):
        config = schema.validate(hydra.compose("config", overrides))
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
