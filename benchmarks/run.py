"""Everything that is measured of this project against others, side by side and in turn.

    python benchmarks/run.py [--quick] [--only SECTION] [--threads N] [--out FOLDER]

Needs `pip install -c constraints.txt -e '.[bench]'`; whoever cannot be started is left out, with
a note. Prints Markdown tables. The figures of each measurement go to FOLDER/benchmarks.json,
where sections and numbers of threads that were not measured this time stay as they are, and the
picture to FOLDER/benchmarks.png, or benchmarks-N.png for more threads than one; FOLDER is docs,
and outputs/benchmarks with --quick. Takes a quarter of an hour on two cores, --quick three minutes.

A figure is the median over rounds, and a ratio the median of the rounds' ratios. In a round each
contender trains one epoch, in a process of its own that waits while others work, pinned to as
many cores as there are threads. Its first epoch, with compiling, counts for nothing but is told.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import report
from picture import draw

HERE = Path(__file__).parent
MLP = (
    *("bare loop", "ours", "ours, compiled", "DataLoader loop", "Lightning", "skorch", "ignite"),
    *("scikit-learn", "JAX, a jitted step", "JAX, epoch in a scan"),
    *("products, torch", "products, numpy"),
)
CONVNET = (*MLP[:7], "JAX, epoch in a scan")
PACKAGES = ("torch", "numpy", "lightning", "skorch", "pytorch-ignite", "scikit-learn", "jax")
LEAST_ACCURACY = 0.9
COMMAND = [sys.executable, "-m", "experiments"]
Figures = dict[str, Any]


def in_turn(jobs: dict[str, Figures], rounds: int, threads: int, env: Figures) -> Figures:
    """Start each job's process, let it train one epoch, and then one more in each round.

    jobs: what `contenders.py` is given, by label. Of each label this returns lists over the
        rounds, of `seconds`, `accuracy`, `peak_mib`, `resident_mib` and what else it tells, and,
        as `first`, the seconds from its process' start to the end of its first epoch; or
        `skipped`, the reason why it ended before.
    """
    cores = sorted(os.sched_getaffinity(0))[-threads:]
    limits = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)
    )
    figures: Figures = {}
    processes: dict[str, Any] = {}
    errors: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for label, job in jobs.items():
                errors[label] = Path(folder) / f"{len(errors)}.txt"
                started = time.perf_counter()
                with errors[label].open("w") as file:
                    process = subprocess.Popen(
                        [sys.executable, HERE / "contenders.py", json.dumps(job)],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=file,
                        text=True,
                        env={**os.environ, **limits, **env},
                        preexec_fn=lambda: os.sched_setaffinity(0, cores),
                    )
                processes[label] = process
                if process.stdout.readline():
                    figures[label] = {"first": time.perf_counter() - started}
                else:
                    figures[label] = {"skipped": last_words(errors[label])}
                note(f"  {label}: {figures[label]}")
            for _ in range(rounds):
                for label, process in processes.items():
                    if "skipped" in figures[label]:
                        continue
                    with contextlib.suppress(BrokenPipeError):
                        process.stdin.write("go on\n")
                        process.stdin.flush()
                    line = process.stdout.readline()
                    if not line:
                        figures[label] = {"skipped": last_words(errors[label])}
                        continue
                    for name, value in json.loads(line).items():
                        figures[label].setdefault(name, []).append(value)
        finally:
            for process in processes.values():
                # closes its input, which it takes for the end
                with contextlib.suppress(BrokenPipeError):
                    process.communicate()
    return figures


def last_words(errors: Path) -> str:
    """The last line of what a process wrote to standard error."""
    lines = errors.read_text().strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def measure_epochs(quick: bool, threads: int) -> Figures:
    """An epoch of the main job's MLP on MNIST, by contender and batch size."""
    rounds = {64: 2} if quick else {16: 2, 64: 4, 256: 3, 1024: 3}
    return {
        str(size): train_in_turn(MLP, "mlp", "mnist", size, count, threads)
        for size, count in rounds.items()
    }


def measure_convnet(quick: bool, threads: int) -> Figures:
    """An epoch of a small convolutional net on 10,000 rows of MNIST, at batch 64."""
    rounds = 2 if quick else 3
    return {"64": train_in_turn(CONVNET, "convnet", "mnist:10000", 64, rounds, threads)}


def train_in_turn(
    names: tuple[str, ...], net: str, data: str, size: int, rounds: int, threads: int
) -> Figures:
    """One group of contenders; at batch 64 with empty caches, so that `first` has the compiling."""
    note(f"{net}, batch {size}, threads {threads}")
    jobs = {
        name: {"name": name, "net": net, "data": data, "batch_size": size, "threads": threads}
        for name in names
    }
    with tempfile.TemporaryDirectory() as folder:
        return in_turn(jobs, rounds, threads, caches(folder) if size == 64 else {})


def caches(folder: str) -> Figures:
    """The environment in which nothing has been compiled yet."""
    return {"XDG_CACHE_HOME": folder, "TORCHINDUCTOR_CACHE_DIR": folder}


def measure_tracking(quick: bool, threads: int) -> Figures:
    """What logging and saving take of an epoch of the main job."""
    job = {"name": "ours, timed", "net": "mlp", "data": "mnist"}
    return in_turn(
        {"ours": {**job, "batch_size": 64, "threads": threads}}, 2 if quick else 7, threads, {}
    )


def measure_growth(quick: bool, threads: int) -> Figures:
    """Rows of 16 numbers, from a thousand to ten million, at batch 1024."""
    figures = {}
    for power in range(3, 6 if quick else 8):
        job = {"net": "narrow", "data": f"narrow:{10**power}", "batch_size": 1024}
        jobs = {name: {**job, "name": name, "threads": threads} for name in ("bare loop", "ours")}
        note(f"10^{power} rows")
        figures[str(10**power)] = in_turn(jobs, {6: 3, 7: 1}.get(power, 10), threads, {})
    return figures


def measure_startup(quick: bool, threads: int) -> Figures:
    """From the shell to an answer, and to the first training step, in turn."""
    commands: dict[str, Callable[[], float]] = {
        "import hydra": lambda: seconds_of([sys.executable, "-c", "import hydra"]),
        "import torch": lambda: seconds_of([sys.executable, "-c", "import torch"]),
        "--help": lambda: seconds_of([*COMMAND, "--help"]),
        "--cfg job": lambda: seconds_of([*COMMAND, "--cfg", "job"]),
        "a config error": lambda: seconds_of([*COMMAND, "optimizer.lrr=0.1"], code=2),
        "the first step": lambda: seconds_to_step([]),
        "the first step, compiled": lambda: seconds_to_step(["trainer.compile=true"]),
    }
    figures: Figures = {name: {"seconds": []} for name in commands}
    for number in range(3 if quick else 7):
        for name, measure in commands.items():
            if "skipped" in figures[name]:
                continue
            try:
                seconds = measure()
            except RuntimeError as error:
                figures[name] = {"skipped": str(error)}
                continue
            if number > 0:  # the first one fills caches
                figures[name]["seconds"].append(seconds)
    return figures


def seconds_of(command: list[str], code: int = 0) -> float:
    """Seconds that a command takes, which must leave with a code."""
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    if done.returncode != code:
        raise RuntimeError(f"{command} left with {done.returncode}")
    return seconds


def seconds_to_step(overrides: list[str]) -> float:
    """Seconds from the shell to the moment when the main job's first step is in its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "run" / "metrics.jsonl"
        command = [*COMMAND, "trainer.log_every=1", f"hydra.run.dir={folder}/run", *overrides]
        errors = Path(folder) / "errors.txt"
        started = time.perf_counter()
        with errors.open("w") as file:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise RuntimeError(last_words(errors))
            time.sleep(0.001)
        seconds = time.perf_counter() - started
        process.send_signal(signal.SIGKILL)
        process.wait()
    return seconds


def measure_sweep(quick: bool, threads: int) -> Figures:
    """The 16 runs of benchmarks/sweep.py, once."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "sweep.py"), "1"]
        env = {**os.environ, **caches(folder)}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=True)
    return {"contenders": [json.loads(line) for line in done.stdout.splitlines()]}


def note(text: str) -> None:
    """Tell whoever waits what is going on."""
    print(text, file=sys.stderr, flush=True)


def machine() -> Figures:
    """What the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
    }


def installed(package: str) -> str | None:
    """The version of a package, None where it is not there."""
    try:
        return version(package)
    except ImportError:
        return None


SECTIONS = {
    "epochs": measure_epochs,
    "convnet": measure_convnet,
    "startup": measure_startup,
    "tracking": measure_tracking,
    "growth": measure_growth,
    "sweep": measure_sweep,
}
QUICK = ("epochs", "startup", "tracking", "growth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, rough; no convnet and sweep"
    )
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = args.out or HERE.parent / ("outputs/benchmarks" if args.quick else "docs")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "benchmarks.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    started = time.monotonic()
    for section in [args.only] if args.only else QUICK if args.quick else SECTIONS:
        figures = SECTIONS[section](args.quick, args.threads)
        results.setdefault(f"threads {args.threads}", {})[section] = figures
        results["machine"] = machine()
        file.write_text(json.dumps(results, indent=1) + "\n")
    measured = results[f"threads {args.threads}"]
    print(report.markdown(results["machine"], args.threads, measured))
    if "epochs" in measured:
        name = "benchmarks.png" if args.threads == 1 else f"benchmarks-{args.threads}.png"
        draw(measured["epochs"], args.threads, folder / name)
    note(f"{time.monotonic() - started:.0f} s; {file}")
    if lazy := report.too_inaccurate(measured, LEAST_ACCURACY):
        sys.exit(f"these did not learn: {', '.join(lazy)}")


if __name__ == "__main__":
    main()
