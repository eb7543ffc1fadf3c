"""An epoch over a 4 GB file through `data=arrays`, against one over rows that lie in memory.

    python benchmarks/arrays.py [rounds] [overrides...]

Writes the file in the directory for temporary files and takes it away again. Each epoch is the
main job's, everything on, in a process of its own, and prints a line: rows per second of the
epoch as the run logs it, seconds from loading to the end (which have the sha256 of all bytes in
them), and the peak of what the process held. The last one reads every row from the disk.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hydra
import numpy as np
import torch

from experiments.config.compose import CONF, validate
from experiments.data import Data, Split
from experiments.directory import record as runs
from experiments.directory.metrics import read_metrics
from experiments.job import load_data
from experiments.train import train

ROWS = {"train": 1_370_000, "valid": 10_000, "test": 10_000}
IN_MEMORY = 342_000  # rows that take 1 GB


def write(folder: Path) -> None:
    """Random rows of 784 floats with one of ten classes each."""
    random = np.random.default_rng(0)
    for split, rows in ROWS.items():
        file = folder / f"{split}_x.npy"
        x = np.lib.format.open_memmap(file, "w+", np.float32, (rows, 784))
        for first in range(0, rows, 10_000):
            x[first : first + 10_000] = random.random((10_000, 784), np.float32)
        np.save(folder / f"{split}_y.npy", random.integers(0, 10, rows))


def forget(folder: Path) -> None:
    """Have the kernel drop what it has cached of the files."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_memory(folder: Path) -> Data:
    """The first of the rows, read."""

    def read(split: str) -> Split:
        # behind numpy's header, which has 128 bytes
        rows = min(IN_MEMORY, ROWS[split])
        x = np.fromfile(folder / f"{split}_x.npy", np.float32, rows * 784, offset=128)
        y = np.fromfile(folder / f"{split}_y.npy", np.int64, rows, offset=128)
        return Split(torch.from_numpy(x.reshape(rows, 784)), torch.from_numpy(y))

    return Data(read("train"), read("valid"), read("test"))


def epoch(kind: str, folder: Path, overrides: list[str]) -> None:
    """One epoch in this process; prints what it took."""
    names = ["data=arrays", f"data.path={folder}", "trainer.epochs=1", *overrides]
    with hydra.initialize_config_dir(str(CONF), "experiments", version_base="1.3"):
        config = validate(hydra.compose("config", names))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        data = in_memory(folder) if kind == "memory" else load_data(config)
        if kind == "cold":
            _ = data.fingerprints  # which read every byte, and are kept
            forget(folder)
        run = runs.start(Path(place), config, names)
        train(config, data, run)
        [rate] = [line["throughput"] for line in read_metrics(run.path) if "throughput" in line]
    seconds = time.perf_counter() - started
    # getrusage would tell of the process that started this one, too
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({
        "data": kind,
        "rows": len(data.train),
        "rows/s": round(rate),
        "seconds": round(seconds, 1),
        "peak MB": int(status["VmHWM"].split()[0]) // 1024,
    }), flush=True)  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--epoch"]:
        epoch(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
        return
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        for kind in [*(["memory", "mapped"] * rounds), "cold"]:
            command = [sys.executable, __file__, "--epoch", kind, name, *sys.argv[2:]]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
