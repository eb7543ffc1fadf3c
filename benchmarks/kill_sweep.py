"""Kill sweeps with SIGKILL at random moments, continue them, compare all with an undisturbed one.

    python benchmarks/kill_sweep.py [--kills 50] [--seed 0]

Each sweep is the real command, eight short runs on the first rows of MNIST. Half of the kills hit
its parent process, half one of its workers; then the same command goes on in the same directory,
is killed again, and so on until it comes to its end, and a new sweep begins. What a finished sweep
must have in common with the undisturbed one: the ranked results.csv (without seconds and
directory), and of each run the state, the final weights and metrics.jsonl (without throughput).
No worker may outlive its parent by more than two seconds, and nothing by more than ten (the fork
server first ends its imports). Leaves with 1 for any difference, and
with the directories kept. Needs /proc.
"""

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import small_mnist

GRID = ["optimizer.lr=0.03,0.1", "loader.batch_size=32,64", "seed=0,1"]
FIXED = ["model.dropout=0.2", "trainer.epochs=5", "trainer.log_every=7", "checkpoint.every_steps=9"]
RUNS = 8
TRAIN_ROWS, TEST_ROWS = 1000, 500
ORPHAN_SECONDS = 2.0  # what a worker may take to see that its parent is gone
LAST_SECONDS = 10.0  # what anything may take
MEASURED = ("seconds", "directory")  # columns of results.csv that no two sweeps share


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill sweeps, continue them, compare.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    chance = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill_sweep-"))
    small_mnist.write(folder / "mnist", TRAIN_ROWS, TEST_ROWS)

    began = time.monotonic()
    undisturbed = Killed(folder, "undisturbed")
    code = undisturbed.start().wait()
    seconds = time.monotonic() - began
    if code or len(run_directories(undisturbed.directory)) != RUNS:
        sys.exit(f"the undisturbed sweep left with {code}:\n{undisturbed.output()}")
    print(f"undisturbed: {RUNS} runs in {seconds:.1f} s", flush=True)

    targets = ["parent", "worker"] * (args.kills // 2) + ["parent"] * (args.kills % 2)
    chance.shuffle(targets)
    problems: list[str] = []
    total: Counter[str] = Counter()
    orphan_seconds = 0.0
    print(f"{'sweep':>5} {'commands':>8} {'parent':>7} {'worker':>7}  {'while':50} same")
    while targets:
        total["sweeps"] += 1
        sweep = Killed(folder, f"sweep-{total['sweeps']}")
        sweep.kill_until_done(targets, chance, seconds)
        found = [*sweep.problems, *differences(undisturbed.directory, sweep.directory, sweep.kept)]
        problems += [f"{sweep.directory.name}: {problem}" for problem in found]
        total += sweep.counts
        orphan_seconds = max(orphan_seconds, sweep.orphan_seconds)
        for kind in ("lost", "doubled", "half-written", "touched"):
            total[kind] += sum(kind in problem for problem in found)
        where = ", ".join(f"{key[3:]} {sweep.counts[key]}" for key in sorted(sweep.counts)
                          if key.startswith("in "))  # fmt: skip
        print(
            f"{total['sweeps']:5} {sweep.counts['commands']:8} {sweep.counts['parent']:7} "
            f"{sweep.counts['worker']:7}  {where:50} {'no' if found else 'yes'}",
            flush=True,
        )
        if not found:
            shutil.rmtree(sweep.directory)
    print(
        f"{total['parent'] + total['worker']} kills, {total['parent']} of them to the parent, "
        f"{total['worker']} to a worker; {total['sweeps']} sweeps, {total['commands']} commands; "
        f"{total['torn']} kills left a temporary file"
    )
    print(f"workers outlived their parent by {orphan_seconds:.2f} s at most")
    print(
        f"runs lost {total['lost']}, doubled {total['doubled']}, half-written "
        f"{total['half-written']}, touched after their end {total['touched']}"
    )
    print(f"{time.monotonic() - started:.0f} s, seed {args.seed}")
    for problem in problems:
        print(f"MISMATCH {problem}")
    if problems:
        print(f"kept in {folder}")
        sys.exit(1)
    shutil.rmtree(folder)


class Killed:
    """A sweep in its directory, and what was done to it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.directory = folder, folder / name
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.kept: dict[str, bytes] = {}  # run.json of runs that were seen finished
        self.orphan_seconds = 0.0
        self.torn: set[Path] = set()  # temporary files that kills have left

    def start(self) -> subprocess.Popen[bytes]:
        """The command, which is the same every time."""
        self.counts["commands"] += 1
        overrides = [*GRID, *FIXED, f"data.path={self.folder / 'mnist'}"]
        overrides.append(f"hydra.sweep.dir={self.directory}")
        with (self.folder / f"{self.directory.name}.txt").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "experiments", "-m", *overrides],
                cwd=self.folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        """What all its commands have printed."""
        return (self.folder / f"{self.directory.name}.txt").read_text()

    def kill_until_done(self, targets: list[str], chance: random.Random, seconds: float) -> None:
        """Kill and continue until the sweep is over; takes its targets from the list's end."""
        idle = 0  # commands that ended by themselves, but not well
        while True:
            process = self.start()
            killed = self.kill_one_command(process, targets, chance, seconds)
            if killed:
                continue
            code = process.wait()
            if code == 0:
                return
            idle += 1
            if code != 1:
                self.problems.append(f"a command left with {code}: {self.output()[-600:]}")
            if idle > RUNS:
                self.problems.append("it came to no end")
                return

    def kill_one_command(
        self,
        process: subprocess.Popen[bytes],
        targets: list[str],
        chance: random.Random,
        seconds: float,
    ) -> bool:
        """Kill workers of one command until the turn comes to its parent; whether it did."""
        until = time.monotonic() + chance.uniform(0, 0.7 * seconds)
        while process.poll() is None:
            workers = workers_of(process.pid)
            if not targets or time.monotonic() < until or (targets[-1] == "worker" and not workers):
                time.sleep(0.002)
                continue
            for path in run_directories(self.directory):
                content = (path / "run.json").read_bytes()
                if json.loads(content)["state"] == "finished":
                    self.kept.setdefault(path.name, content)
            target = targets.pop()
            self.counts[target] += 1
            self.counts[f"in {self.phase(workers)}"] += 1
            if target == "worker":
                os.kill(chance.choice(workers), signal.SIGKILL)
                until = time.monotonic() + chance.uniform(0, 0.4 * seconds)
                self.count_torn()
                continue
            process.kill()
            process.wait()
            self.wait_for_orphans(process.pid, set(workers))
            self.count_torn()
            return True
        return False

    def phase(self, workers: list[int]) -> str:
        """How far the sweep is: starting, running, ending."""
        if not workers:
            return "start"
        states = [
            json.loads((path / "run.json").read_bytes())["state"]
            for path in run_directories(self.directory)
        ]
        if "running" in states:
            return "runs"
        return "end" if states.count("finished") == RUNS else "between runs"

    def count_torn(self) -> None:
        """Count a kill that struck in the middle of writing a file."""
        left = set(self.directory.rglob(".*.tmp"))
        self.counts["torn"] += bool(left - self.torn)
        self.torn |= left

    def wait_for_orphans(self, session: int, workers: set[int]) -> None:
        """Wait until nothing of a killed command runs any more, its workers least of all."""
        began = time.monotonic()
        while (left := living(session)) and time.monotonic() - began < LAST_SECONDS:
            if left & workers:
                self.orphan_seconds = max(self.orphan_seconds, time.monotonic() - began)
            time.sleep(0.005)
        if self.orphan_seconds > ORPHAN_SECONDS or left:
            self.problems.append(
                f"workers outlived their parent by {self.orphan_seconds:.1f} s; left: {left}"
            )


def differences(undisturbed: Path, sweep: Path, kept: dict[str, bytes]) -> list[str]:
    """What a sweep has otherwise than the undisturbed one, in words."""
    expected = {path.name: path for path in run_directories(undisturbed)}
    found = {path.name: path for path in run_directories(sweep)}
    problems = [f"{name}: lost" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name}: doubled" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        before, after = record(expected[name]), record(found[name])
        left = [file.name for file in found[name].rglob(".*.tmp")]
        if after["state"] != "finished" or left:
            problems.append(f"{name}: half-written, state {after['state']}, {left}")
        elif before["weights"] != after["weights"] or before["metrics"] != after["metrics"]:
            problems.append(f"{name}: other weights or metrics")
        elif metrics_lines(expected[name]) != metrics_lines(found[name]):
            problems.append(f"{name}: metrics.jsonl")
        if name in kept and (found[name] / "run.json").read_bytes() != kept[name]:
            problems.append(f"{name}: touched after it had finished")
    if ranked(undisturbed) != ranked(sweep):
        problems.append(f"results.csv: {ranked(sweep)} for {ranked(undisturbed)}")
    return problems


def ranked(sweep: Path) -> list[dict[str, str]]:
    """The lines of results.csv, in order, without what measures the machine."""
    try:
        with (sweep / "results.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
    except FileNotFoundError:
        return []
    return [{key: line[key] for key in line if key not in MEASURED} for line in lines]


def record(run: Path) -> dict[str, Any]:
    """run.json."""
    content = json.loads((run / "run.json").read_bytes())
    assert isinstance(content, dict)
    return content


def metrics_lines(run: Path) -> list[bytes]:
    """metrics.jsonl, as bytes, without what measures the machine."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    return [line for line in lines if b"throughput" not in line]


def run_directories(sweep: Path) -> list[Path]:
    """The directories of its runs."""
    return sorted(file.parent for file in sweep.glob("*/run.json"))


def processes() -> dict[int, tuple[int, int]]:
    """Every living process: its parent and its session."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if state not in "ZX":
            found[int(stat.parent.name)] = (int(parent), int(session))
    return found


def workers_of(parent: int) -> list[int]:
    """The grandchildren of a command: the children of its fork server."""
    known = processes()
    children = {pid for pid, (above, _) in known.items() if above == parent}
    return sorted(pid for pid, (above, _) in known.items() if above in children)


def living(session: int) -> set[int]:
    """The processes of a session."""
    return {pid for pid, (_, other) in processes().items() if other == session}


if __name__ == "__main__":
    main()
