"""Wall clock of 16 runs (four lr by four batch sizes, three epochs of MNIST), in turn.

    python benchmarks/sweep.py [rounds]

This project's launcher against itself with trainer.compile=true (nothing compiled before), against
Hydra's basic launcher with the loop one writes by hand, against Hydra's joblib launcher running
this project in two jobs (pip install hydra-joblib-launcher), and against the sum of the bare
loops' times, in one process, over the cores. Prints the medians.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from epoch import bare_epochs

from experiments.data.mnist import load

LRS, SIZES, EPOCHS = ("0.01", "0.03", "0.1", "0.3"), ("32", "64", "128", "256"), 3
HERE = Path(__file__).parent


def wall(command: list[str], env: dict[str, str]) -> float:
    """Seconds that a command takes in an empty directory."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        subprocess.run(
            command, cwd=folder, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **env}
        )
        return time.perf_counter() - started


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    ours = [sys.executable, "-m", "experiments", "-m", f"optimizer.lr={','.join(LRS)}",
            f"loader.batch_size={','.join(SIZES)}", f"trainer.epochs={EPOCHS}",
            "scheduler=constant"]  # fmt: skip
    plain = [sys.executable, str(HERE / "plain_loop.py"), "-m", f"+lr={','.join(LRS)}",
             f"+batch_size={','.join(SIZES)}", f"+epochs={EPOCHS}"]  # fmt: skip
    joblib = [*ours, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    cores = len(os.sched_getaffinity(0))
    data = load()
    torch.set_num_threads(1)
    names = ("ours", "compiled", "bare", "joblib", "basic")
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        times["ours"].append(wall(ours, {}))
        with tempfile.TemporaryDirectory() as folder:
            empty = {"XDG_CACHE_HOME": folder, "TORCHINDUCTOR_CACHE_DIR": folder}
            times["compiled"].append(wall([*ours, "trainer.compile=true"], empty))
        bare = [
            bare_epochs(data, EPOCHS, int(size), float(lr), 0.9) * EPOCHS
            for lr in LRS
            for size in SIZES
        ]
        times["bare"].append(sum(bare) / cores)
        times["joblib"].append(wall(joblib, {}))
        times["basic"].append(wall(plain, {}))
    for name, seconds in times.items():
        ratios = [one / other for one, other in zip(seconds, times["ours"], strict=True)]
        print(json.dumps({
            "contender": name,
            "seconds": round(statistics.median(seconds), 1),
            "to ours": round(statistics.median(ratios), 2),
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
