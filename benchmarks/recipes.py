"""An epoch of the main job and of each recipe against the same epoch in a loop written by hand.

    python benchmarks/recipes.py [--rounds N] [recipes...]

Both train in one process, in turn, an epoch each: ours, everything on, from the end of one epoch's
line to the end of the next one's, with its validation, logs and checkpoints; the loop by hand
(hand_loops.py) with the same parts and initial weights, and with what this project sets for the
process: its settings of the allocator, and optimizer steps that enter no profiler. Only torch's
deterministic mode is off while it runs. The first epoch of both is left out. Both have one thread,
whatever the recipe says: the threads of torch wait for each other by spinning, which would count as
work. Prints medians of ratios, of processor time and of wall-clock time, and writes all figures to
docs/benchmarks-recipes.json.
"""

import argparse
import contextlib
import copy
import gc
import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import torch
from hand_loops import LOOPS, Accuracy, Job, first_rows, supervised
from run import machine

from experiments.config.compose import CONF, validate
from experiments.config.hydra_versions import VERSION_BASE
from experiments.data import Data
from experiments.data.loaders import evaluation_options
from experiments.directory import record
from experiments.job import load_data
from experiments.train import train
from experiments.training import accuracy, metrics, parameter_groups, parts
from experiments.training.build import build
from experiments.training.determinism import seed_global
from experiments.training.progress import Progress, make_progress
from experiments.training.scheduling import build_schedule
from experiments.training.sizes import sizes_of, with_sizes

FIGURES = Path(__file__).parent.parent / "docs" / "benchmarks-recipes.json"
Figures = dict[str, Any]
MAIN = "main"  # names the job without a recipe

# Of recipes whose epoch takes long, the first rows of each split: one of so many.
SHARES = {
    "characters": 20,
    "fashion_mnist": 40,
    "mnist_convnet": 40,
    "mnist_mlp": 4,
    "multilabel": 8,
    "segmentation": 20,
    "two_inputs": 2,
    "vae": 4,
}
# Rounds of recipes whose epoch is short.
ROUNDS = {"gan": 60, "main": 20, "regression": 60, "table": 60, "tutorial": 20}
# A recipe that starts from another run's weights starts from random ones here, and one whose
# validations are some steps apart has one after each epoch.
OVERRIDES = {
    "fine_tuning": ["init.exclude=null", "trainer.steps=null", "trainer.evaluate_every=null"]
}


def make_job(config: dict[str, Any], data: Data) -> tuple[Job, torch.nn.Module]:
    """The parts of a recipe for the loop by hand, and a second model like its own."""
    config = with_sizes(config, sizes_of(data))
    seed_global(config["seed"], "init")
    model = parts.build_model(config)
    loss_func = parts.build_loss(config)
    objective = parts.build_objective(config, model, loss_func)
    trainer, size = config["trainer"], config["loader"]["batch_size"]
    opt = scheduler = None
    if not objective.is_manual:
        parameters = parameter_groups.grouped(config, objective) or model.parameters()
        opt = build(parameter_groups.for_target(config), "optimizer", parameters)
        schedule = build_schedule(config, opt, -(-len(data.train) // size))
        scheduler = schedule.by_step
    built = parts.build_metrics(config, loss_func)
    own = [metric for metric in built.values() if isinstance(metric, accuracy.Accuracy)]
    made = [metric for metric in built.values() if hasattr(metric, "reset")]
    made += [IoU(metric) for metric in built.values() if type(metric).__name__ == "MeanIoU"]
    ema = config["callbacks"].get("ema")
    job = Job(
        *(data, model, loss_func, opt, scheduler, size),
        valid_batch_size=evaluation_options(data.valid, size)["batch_size"],
        augment=objective.augment,
        metrics=[*([Accuracy()] if own else []), *made],
        functions=[m.function for m in built.values() if isinstance(m, metrics.OverSplit)],
        step=objective.step,
        clip_norm=trainer["clip_norm"],
        ema=ema and ema["decay"],
        perplexity="perplexity" in built,
        multilabel=config["step"]["_target_"].endswith(".multilabel"),
    )
    return job, copy.deepcopy(model)


class IoU:
    """A metric of a recipe, which is made anew for each validation."""

    def __init__(self, metric: Any) -> None:
        self.unused = metric
        self.reset()

    def reset(self) -> None:
        """Begin with a validation."""
        self.metric = copy.deepcopy(self.unused)
        self.update, self.compute = self.metric.update, self.metric.compute


class Stopwatch:
    """Seconds of the process's processors, and of the clock, since it was made."""

    def __init__(self) -> None:
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def read(self, figures: Figures) -> None:
        """Add the seconds so far to lists of figures."""
        wall, cpu = time.perf_counter(), time.process_time()
        figures.setdefault("cpu", []).append(cpu - self.cpu)
        figures.setdefault("wall", []).append(wall - self.wall)


@contextlib.contextmanager
def as_by_hand() -> Iterator[None]:
    """Torch's default modes, and draws that change none of the project's, in the block."""
    with torch.random.fork_rng(devices=[]):
        torch.set_deterministic_debug_mode("default")
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode("error")


@contextlib.contextmanager
def timed_metrics(figures: Figures) -> Iterator[None]:
    """Time the metrics of the project's validations in the block; `figures["metrics"]` holds the
    seconds since it was last set to zero.
    """
    saved = metrics.Running.update, metrics.Running.compute

    def timed(method: Any) -> Any:
        def call(*args: Any) -> Any:
            started = time.process_time()
            result = method(*args)
            figures["metrics"] += time.process_time() - started
            return result

        return call

    metrics.Running.update, metrics.Running.compute = map(timed, saved)  # type: ignore
    try:
        yield
    finally:
        metrics.Running.update, metrics.Running.compute = saved  # type: ignore[method-assign]


def composed(name: str, rounds: int) -> tuple[dict[str, Any], list[str]]:
    """The config of a recipe, and its overrides."""
    length = [f"trainer.epochs={rounds + 1}", "trainer.test=last", "trainer.threads=1"]
    recipe = [] if name == MAIN else [f"experiment={name}"]
    overrides = [*recipe, *length, *OVERRIDES.get(name, [])]
    with hydra.initialize_config_dir(str(CONF), "experiments", **VERSION_BASE):
        return validate(hydra.compose("config", overrides)), overrides


def measure(name: str, rounds: int) -> Figures:
    """The seconds of each epoch of a recipe, ours and by hand."""
    config, overrides = composed(name, rounds)
    torch.set_num_threads(1)
    data = first_rows(load_data(config), SHARES.get(name, 1))
    job, spare = make_job(config, data)
    by_hand = LOOPS.get(name, supervised)(job, spare)
    ours: Figures = {}
    hand: Figures = {}
    spent: Figures = {"metrics": 0.0}
    shares: list[float] = []
    losses: dict[str, float] = {}

    def show(epochs: int, batches: int, monitor: str) -> Progress:
        shown = make_progress(epochs, batches, monitor)
        watch = Stopwatch()

        def epoch_end(epoch: int, numbers: Mapping[str, float]) -> None:
            nonlocal watch
            shown.epoch_end(epoch, numbers)
            watch.read(ours)
            shares.append(spent["metrics"] / ours["cpu"][-1])
            with as_by_hand():
                watch = Stopwatch()
                found = next(by_hand)
                watch.read(hand)
            losses["ours"], losses["by hand"] = numbers["loss/valid"], found["loss/valid"]
            spent["metrics"] = 0.0
            watch = Stopwatch()

        return SimpleNamespace(
            advance=shown.advance,
            epoch_end=epoch_end,
            validated=shown.validated,
            close=shown.close,
        )

    gc.freeze()  # as job.execute does
    with (
        contextlib.redirect_stdout(io.StringIO()),
        tempfile.TemporaryDirectory() as folder,
        timed_metrics(spent),
    ):
        train(config, data, record.start(Path(folder), config, overrides), progress=show)
    return {
        "rows": [len(data.train), len(data.valid)],
        "batch": job.batch_size,
        "ours": {kind: seconds[1:] for kind, seconds in ours.items()},  # without the warm-up
        "by hand": {kind: seconds[1:] for kind, seconds in hand.items()},
        "metrics": shares[1:],
        "loss/valid": losses,  # after the last epoch, of both
    }


def ratio(figures: Figures, kind: str) -> float:
    """The median of the ratios of the epochs, ours to by hand. kind: cpu or wall."""
    pairs = zip(figures["ours"][kind], figures["by hand"][kind], strict=True)
    return statistics.median(mine / other for mine, other in pairs)


def line(name: str, figures: Figures) -> str:
    """A row of the table."""
    rows = f"{figures['rows'][0]:,}" + (f", 1 of {SHARES[name]}" if name in SHARES else "")
    seconds = statistics.median(figures["by hand"]["cpu"])
    share = 100 * statistics.median(figures["metrics"])
    return (
        f"| {name} | {rows} | {figures['batch']} | {seconds:.3f} | {ratio(figures, 'cpu'):.3f} | "
        f"{ratio(figures, 'wall'):.3f} | {share:.2f} % |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", help="all of conf/experiment if none is named")
    parser.add_argument("--rounds", type=int, help="epochs of each, after one to warm up")
    args = parser.parse_args()
    recipes = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
    names = args.recipes or [MAIN, *recipes]
    saved = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    print("| recipe | rows | batch | by hand, CPU s | ours, CPU | wall | metrics |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        figures = measure(name, args.rounds or ROUNDS.get(name, 10))
        saved = {"machine": machine(), **saved, name: figures}
        print(line(name, figures), flush=True)
        FIGURES.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
