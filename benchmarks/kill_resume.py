"""Kill runs with SIGKILL at random moments, resume them, compare every bit with unbroken ones.

    python benchmarks/kill_resume.py [--kills 100] [--reproductions 20] [--seed 0]

Each run is the real entrypoint, `experiments.__main__.main`, in a process of its own, forked
from one that has imported torch, so that it starts in milliseconds. A run is killed again and
again, resumed each time, and then left to finish; its weights, metrics.jsonl and TensorBoard's
points must be those of the uninterrupted run. Then varied configs are reproduced, every other
one after a kill and a resume. Leaves with 1 for any difference, and with the directories kept.

When to kill: a moment spread evenly over the time that a whole run takes mostly meets the
training. So every other kill waits for a save that is picked at random and strikes within the
time that a save takes. What a process was doing is read from a byte that it shares with this
one; a save was hit in the middle of its file where the temporary file is left behind.
"""

import argparse
import json
import math
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import small_mnist
import torch
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from experiments import __main__ as entrypoint
from experiments import reproduce, train
from experiments.directory import checkpoints as checkpoint
from experiments.training.fit import fit as fit_epochs

VARIANTS = {
    "momentum": ["optimizer=sgd", "scheduler=constant"],
    "adam cosine": ["optimizer=adam", "scheduler=cosine"],
    "dropout": ["model.dropout=0.3"],
    "accumulate": ["trainer.accumulate=3", "trainer.clip_norm=1.0"],
    "torch loader": ["loader=torch", "optimizer=adamw", "model.dropout=0.1"],
}
COMMON = ["trainer.epochs=3", "trainer.log_every=7", "loader.batch_size=32"]
SAVING_OFTEN = ["checkpoint.every_steps=4"]
KILLS_PER_RUN = 5
TRAIN_ROWS, TEST_ROWS = 3000, 500
STARTING, FITTING, SAVING = 0, 1, 2
PHASES = {STARTING: "starting or ending", FITTING: "training", SAVING: "saving"}

# Shared with every child: byte 0 what it is doing, bytes 8 to 15 the saves it has begun.
shared = mmap.mmap(-1, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill, resume, compare.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--reproductions", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    watch_phases()
    warm_up()
    folder = Path(tempfile.mkdtemp(prefix="kill_resume-"))
    small_mnist.write(folder / "mnist", TRAIN_ROWS, TEST_ROWS)
    chance = random.Random(args.seed)

    problems: list[str] = []
    total: Counter[str] = Counter()
    print(f"{'variant':14} {'runs':>5} {'kills':>6}  {'killed while':40} {'torn files':>10}  same")
    for number, (name, overrides) in enumerate(VARIANTS.items()):
        kills = args.kills // len(VARIANTS) + (number < args.kills % len(VARIANTS))
        counts, found = kill_variant(
            folder / name.replace(" ", "-"), overrides, kills, folder / "mnist", chance
        )
        where = ", ".join(f"{phase} {counts[phase]}" for phase in PHASES.values())
        same = f"{counts['runs'] - len(found)} of {counts['runs']}"
        print(
            f"{name:14} {counts['runs']:5} {counts['kills']:6}  {where:40} "
            f"{counts['torn']:10}  {same}",
            flush=True,
        )
        problems += [f"{name}: {problem}" for problem in found]
        total += counts
    print(
        f"{total['kills']} kills, {total['saving']} of them in a save, {total['torn']} of those "
        f"in the middle of its file; {total['restarts']} runs had to begin again"
    )

    identical = 0
    for number in range(args.reproductions):
        problem = reproduce_varied(folder / f"varied-{number}", number, folder / "mnist", chance)
        identical += problem is None
        problems += [problem] if problem else []
    print(f"{identical} of {args.reproductions} varied configs reproduced identically")
    print(f"{time.monotonic() - started:.0f} s, seed {args.seed}")
    for problem in problems:
        print(f"MISMATCH {problem}")
    if problems:
        print(f"kept in {folder}")
        sys.exit(1)
    shutil.rmtree(folder)


def kill_variant(
    folder: Path, overrides: list[str], kills: int, data: Path, chance: random.Random
) -> tuple[Counter[str], list[str]]:
    """Kill runs of one variant so many times; what was hit, and every run that ended otherwise."""
    command = [*COMMON, *SAVING_OFTEN, f"data.path={data}", *overrides]
    unbroken = folder / "unbroken"
    seconds, saves, save_seconds = time_run([*command, f"hydra.run.dir={unbroken}"])
    counts: Counter[str] = Counter()
    problems = []
    while counts["kills"] < kills:
        counts["runs"] += 1
        run = folder / f"run-{counts['runs']}"
        killed = 0
        while killed < KILLS_PER_RUN and counts["kills"] < kills:
            fresh = not (run / "run.json").exists()
            counts["restarts"] += fresh and run.exists()
            arguments = [*command, f"hydra.run.dir={run}"] if fresh else [f"resume={run}"]
            aimed = counts["kills"] % 2 == 1
            torn_before = set(torn_files(run))
            phase = start_and_kill(arguments, chance, aimed, seconds, saves, save_seconds)
            if phase is None:  # it came to its end before
                break
            killed += 1
            counts[PHASES[phase]] += 1
            counts["kills"] += 1
            counts["torn"] += not torn_before.issuperset(torn_files(run))
        fresh = not (run / "run.json").exists()
        arguments = [*command, f"hydra.run.dir={run}"] if fresh else [f"resume={run}"]
        code, output = run_to_end(arguments)
        problem = output if code else difference(unbroken, run)
        if problem:
            problems.append(f"{run.name} after {killed} kills: {problem}")
        else:
            shutil.rmtree(run)
    return counts, problems


def torn_files(run: Path) -> Iterator[Path]:
    """What kills in the middle of a checkpoint's file left; it stays until the next save."""
    return (run / "checkpoints").glob(".step-*.tmp")


def time_run(arguments: list[str]) -> tuple[float, int, float]:
    """Run to the end: its seconds, the number of saves, and the seconds that a save takes."""
    child = start(arguments)
    started = time.perf_counter()
    saving = 0
    looks = 0
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        saving += shared[0] == SAVING
        looks += 1
        time.sleep(0.0003)
    seconds = time.perf_counter() - started
    saves = count_saves()
    return seconds, saves, seconds * saving / max(looks, 1) / max(saves, 1)


def start_and_kill(
    arguments: list[str],
    chance: random.Random,
    aimed: bool,
    seconds: float,
    saves: int,
    save_seconds: float,
) -> int | None:
    """Start, kill at a random moment, and return what that hit; None where it ended before."""
    # a resumed run has less before it: a third of the way leaves room for several kills
    limit = chance.uniform(0, seconds / 2)
    nth_save = chance.randrange(max(saves // 3, 1)) + 1
    within = chance.uniform(0, save_seconds)
    child = start(arguments)
    began = time.perf_counter()
    while time.perf_counter() - began < (math.inf if aimed else limit):
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return None
        if aimed and count_saves() >= nth_save:
            struck = time.perf_counter() + within
            while time.perf_counter() < struck:
                pass
            break
        time.sleep(0 if aimed else 0.0005)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return shared[0] if os.WIFSIGNALED(status) else None


def reproduce_varied(run: Path, number: int, data: Path, chance: random.Random) -> str | None:
    """Run a config drawn at random, reproduce it from another directory; what went wrong."""
    drawn = [
        f"optimizer={chance.choice(['sgd', 'adam', 'adamw'])}",
        f"scheduler={chance.choice(['constant', 'cosine', 'onecycle'])}",
        f"loader={chance.choice(['tensors', 'tensors', 'torch'])}",
        f"model={chance.choice(['mlp', 'mlp_small', 'linear'])}",
        f"loader.batch_size={chance.choice([17, 32, 64, 100])}",
        f"loader.drop_last={chance.choice(['true', 'false'])}",
        f"loader.shuffle={chance.choice(['true', 'true', 'false'])}",
        f"optimizer.lr={chance.choice([0.001, 0.003, 0.01])}",
        f"optimizer.weight_decay={chance.choice([0, 0.01])}",
        f"loss.label_smoothing={chance.choice([0, 0.1])}",
        f"trainer.accumulate={chance.choice([1, 1, 2, 3])}",
        f"trainer.clip_norm={chance.choice(['null', '0.5'])}",
        f"trainer.monitor={chance.choice(['loss/valid', 'accuracy/valid'])}",
        f"trainer.log_every={chance.choice([1, 10, 1000])}",
        f"trainer.threads={chance.choice([1, 1, 2])}",
        f"trainer.epochs={chance.choice([1, 2])}",
        f"seed={chance.randrange(2**63)}",
    ]
    if "model=linear" not in drawn:
        drawn.append(f"model.dropout={chance.choice([0, 0.2])}")
    arguments = [*drawn, *SAVING_OFTEN, f"data.path={data}", f"hydra.run.dir={run}"]
    if number % 2:
        start_and_kill(arguments, chance, True, 1.0, 6, 0.002)
        if (run / "run.json").exists():
            arguments = [f"resume={run}"]
    code, output = run_to_end(arguments)
    if code:
        return f"{' '.join(drawn)}: {output}"
    elsewhere = run.with_name(f"{run.name}-elsewhere")
    elsewhere.mkdir()
    code, output = run_to_end([str(run), "--into", "again"], reproduce.main, elsewhere)
    if code or "identical: all" not in output:
        return f"{' '.join(drawn)}: {output}"
    return None


def difference(unbroken: Path, run: Path) -> str | None:
    """What a run has otherwise than the unbroken one, in words."""
    before, after = (json.loads((path / "run.json").read_text()) for path in (unbroken, run))
    if after["state"] != "finished":
        return f"state {after['state']}"
    if before["weights"] != after["weights"]:
        return f"weights {before['weights']} and {after['weights']}"
    if before["metrics"] != after["metrics"]:
        return f"metrics {before['metrics']} and {after['metrics']}"
    if metrics_lines(unbroken) != metrics_lines(run):
        return "metrics.jsonl"
    if list(points(unbroken)) != list(points(run)):
        return "TensorBoard's points"
    if (left := list(run.rglob("*.tmp"))) != []:
        return f"left behind: {left}"
    return None


def metrics_lines(run: Path) -> list[bytes]:
    """metrics.jsonl, as bytes, without what measures the machine."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    return [line for line in lines if b"throughput" not in line]


def points(run: Path) -> Iterator[tuple[str, int, float]]:
    """Every scalar in the event files in the order of writing, nothing taken away or doubled."""
    for file in sorted(run.glob("events.out.tfevents.*")):
        for record in RawEventFileLoader(str(file)).Load():
            event = Event.FromString(record)
            for value in event.summary.value:
                if value.HasField("simple_value") and value.tag != "throughput":
                    yield value.tag, event.step, value.simple_value


def start(
    arguments: list[str],
    call: Callable[[], None] = entrypoint.main,
    folder: Path = Path(),
    output: Path = Path(os.devnull),
) -> int:
    """Fork a process that is `python -m experiments ARGUMENTS` in a folder; returns its number."""
    shared[:] = bytes(len(shared))
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        descriptor = os.open(output, os.O_CREAT | os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(folder)
        sys.argv = ["experiments", *arguments]
        call()
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_to_end(
    arguments: list[str], call: Callable[[], None] = entrypoint.main, folder: Path = Path()
) -> tuple[int, str]:
    """Run, wait; its exit code and what it printed."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "output"
        _, status = os.waitpid(start(arguments, call, folder, output), 0)
        return os.waitstatus_to_exitcode(status), output.read_text()


def warm_up() -> None:
    """Import what torch imports at an optimizer's first step here, not in each child."""
    torch.set_num_threads(1)
    weight = torch.zeros(1, requires_grad=True)
    weight.sum().backward()
    torch.optim.SGD([weight]).step()


def watch_phases() -> None:
    """Have children tell, in the shared byte, when they fit and when they save."""
    save = checkpoint.Checkpoints.save

    def watched_save(self: checkpoint.Checkpoints, *args: Any, **kwargs: Any) -> None:
        shared[8:16] = struct.pack("q", count_saves() + 1)
        shared[0] = SAVING
        save(self, *args, **kwargs)
        shared[0] = FITTING

    def watched_fit(*args: Any, **kwargs: Any) -> dict[str, float]:
        shared[0] = FITTING
        try:
            return fit_epochs(*args, **kwargs)
        finally:
            shared[0] = STARTING

    checkpoint.Checkpoints.save = watched_save  # type: ignore[method-assign]
    train.fit = watched_fit  # type: ignore[attr-defined]


def count_saves() -> int:
    return int(struct.unpack("q", shared[8:16])[0])


if __name__ == "__main__":
    main()
