"""The run directory: who owns it, and `run.json`, which says what the run was and how it went.

    .hydra/         what Hydra composed: config, overrides, its own settings
    config.yaml     the same config resolved: plain values, enough to build everything again
    run.json        state, times, versions, fingerprints, best and last metrics
    git.diff        what differed from the commit, where something did
    metrics.jsonl   every number that was logged, with every bit
    events.*        the same for TensorBoard
    checkpoints/    what a resumed run goes on from

Imports no torch.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from experiments import durable
from experiments.errors import UsageError

METRICS = "metrics.jsonl"
LOCK_SECONDS = 2.0  # a process that was killed a moment ago may still hold the lock
# What run.json has from the first moment on, and what comes to it.
RECORDED = {
    "state": str,
    "seconds": float,
    "resumed_at": list,
    "overrides": list,
    "seed": int,
    "config": dict,
    "config_sha256": str,
    "python": str,
    "platform": str,
    "packages": dict,
    "git": dict,
}
ADDED = dict.fromkeys(("environment", "data", "weights", "metrics"), dict)
State = Literal["running", "finished", "failed", "interrupted", "diverged", "pruned"]
OVER = ("finished", "diverged", "pruned")  # a sweep that goes on leaves these alone
PACKAGES = ("torch", "numpy", "safetensors", "hydra-core", "omegaconf", "tensorboard")


class Run:
    """A run directory that this process owns: it alone holds the directory's lock."""

    def __init__(self, path: Path, lock: int, record: dict[str, Any]) -> None:
        self.path = path
        self.record = record
        self._lock = lock
        self._clock = time.monotonic()

    def update(self, **changes: Any) -> None:
        """Change fields of run.json, on disk, atomically."""
        now = time.monotonic()
        self.record |= {"seconds": self.record["seconds"] + now - self._clock, **changes}
        self._clock = now
        durable.write(self.path / "run.json", json.dumps(self.record, indent=2).encode() + b"\n")

    def end(self, state: State, error: str | None = None) -> None:
        """Write the last state, an error's traceback beside it, and give the directory free."""
        if error is not None:
            durable.write(self.path / "error.txt", error.encode())
        self.update(state=state, ended=_now(), **({"error": error} if error else {}))
        os.close(self._lock)


@contextlib.contextmanager
def making(path: Path, key: str) -> Iterator[None]:
    """Tell in one line, as UsageError, that a directory cannot be made."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{key}={path}: cannot be made ({error.strerror}); name one that can be written"
        ) from None


def claim(path: Path, *, exact: bool) -> Path:
    """Make a directory for a run that no other run has or gets; returns its path.

    With `exact` (the person named it) it may exist, but must not hold a run; else the first
    free one of `path`, `path-2`, `path-3`, ... is made. Raises UsageError when it cannot be.
    """
    with making(path, "hydra.run.dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if exact:
            path.mkdir(exist_ok=True)
            refuse_taken(path)
            return path
        number = 1
        while True:
            free = path if number == 1 else path.with_name(f"{path.name}-{number}")
            try:
                free.mkdir()
                return free
            except FileExistsError:
                number += 1


def refuse_taken(path: Path) -> None:
    """Raise UsageError where a directory holds a run."""
    if (path / "run.json").exists():
        raise UsageError(
            f"hydra.run.dir={path}: holds a run already; name another or resume={path}"
        )


def start(path: Path, config: dict[str, Any], overrides: list[str]) -> Run:
    """Own a claimed directory and write what is known before the run: config.yaml, run.json.

    Raises UsageError when another process owns it or it holds a run.
    """
    lock = lock_directory(path, LOCK_SECONDS)
    refuse_taken(path)
    clean_up(path)
    commit, diff = git_state()
    text = config_text(config)
    record = {
        "schema": 1,
        "state": "running",
        "started": _now(),
        "ended": None,
        "seconds": 0.0,
        "resumed_at": [],
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "overrides": overrides,
        "seed": config["seed"],
        "config": config,
        "config_sha256": hashlib.sha256(text).hexdigest(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages(),
        "git": {
            "commit": commit,
            "dirty": bool(diff),
            "diff": hashlib.sha256(diff).hexdigest() if diff else None,
        },
    }
    run = Run(path, lock, record)
    durable.write(path / "config.yaml", text)
    if diff:
        durable.write(path / "git.diff", diff)
    run.update()
    return run


def config_text(config: dict[str, Any]) -> bytes:
    """A resolved config as its config.yaml; floats keep every bit."""
    return yaml.safe_dump(config, sort_keys=False).encode()


def record_end(path: Path, state: State, error: str | None = None) -> dict[str, Any]:
    """Write into a run directory how its run ended, where its own process could not or did not
    know, and return its record. One that had come to its end keeps it.

    Raises UsageError where another process runs it or run.json cannot be read.
    """
    lock = lock_directory(path, LOCK_SECONDS)
    run = Run(path, lock, read_record(path))
    if run.record["state"] in ("finished", "diverged"):
        os.close(lock)
    else:
        run.end(state, error)
    return run.record


def is_locked(path: Path) -> bool:
    """Whether a process runs in a directory at this moment."""
    try:
        os.close(lock_directory(path))
    except UsageError:
        return True
    return False


def reopen(path: Path) -> Run:
    """Own the directory of a run that is not finished, to go on with it.

    Raises UsageError when there is none, another process owns it, or it has symbolic links.
    """
    lock = lock_directory(path, LOCK_SECONDS)
    refuse_links(path)
    record = read_record(path)
    clean_up(path)
    (path / "error.txt").unlink(missing_ok=True)
    record.pop("error", None)
    run = Run(path, lock, record)
    run.update(state="running", ended=None, resumed_at=[*record["resumed_at"], _now()])
    return run


def clean_up(path: Path) -> None:
    """Remove the temporary files that a killed process left in a directory; call with its lock."""
    for left in path.glob(".*.tmp"):
        left.unlink()


def refuse_links(path: Path) -> None:
    """Raise UsageError where a file in a run directory leads elsewhere: who goes on with the run
    would write there.
    """
    link = next((file for file in path.rglob("*") if file.is_symlink()), None)
    if link is not None:
        raise UsageError(f"{link}: is a symbolic link, which may lead anywhere; copy what it means")


def read_record(path: Path) -> dict[str, Any]:
    """The run.json of a run directory. Raises UsageError where there is none."""
    try:
        record = json.loads((path / "run.json").read_bytes())
        if not isinstance(record, dict) or record.get("schema") != 1:
            raise ValueError("its schema is not 1")
        if missing := sorted(RECORDED.keys() - record.keys()):
            raise ValueError(f"{', '.join(missing)} missing")
        for key, kind in (RECORDED | ADDED).items():
            if key in record and not isinstance(record[key], kind):
                raise ValueError(f"{key} is no {kind.__name__}")
    except FileNotFoundError:
        raise UsageError(f"{path}: holds no run, there is no run.json in it") from None
    except (OSError, RecursionError, ValueError) as error:
        raise UsageError(f"{path / 'run.json'}: cannot be read as a run ({error})") from None
    return record


def lock_directory(path: Path, patience: float = 0.0) -> int:
    """Lock a directory for as long as this process lives; the kernel lets go when it dies.

    patience: seconds to wait for another process that holds it. Raises UsageError.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UsageError(f"{path}: cannot be opened ({error.strerror}); name a directory") from None
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            if time.monotonic() >= until:
                os.close(descriptor)
                raise UsageError(
                    f"{path}: another process is running it; wait for it or stop it"
                ) from None
            time.sleep(0.05)


@functools.cache
def packages() -> dict[str, str]:
    """The versions of the packages that the bits of a run may depend on."""
    from importlib import metadata  # here, since it takes a twentieth of the time of `--help`

    return {name: metadata.version(name) for name in PACKAGES}


@functools.cache
def git_state() -> tuple[str | None, bytes]:
    """The commit checked out in the working directory and the diff against it.

    Untracked files stand as `?? path` lines before the diff. (None, b"") where there is no git.
    A repository may come from anywhere as well: no program that its config names is started.
    """
    plain = ["-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"]
    alone = {**os.environ, "GIT_ALLOW_PROTOCOL": "none", "GIT_OPTIONAL_LOCKS": "0"}

    def git(*arguments: str) -> bytes:
        return subprocess.run(
            ["git", *plain, *arguments], check=True, capture_output=True, timeout=10, env=alone
        ).stdout

    try:
        commit = git("rev-parse", "HEAD").decode().strip()
        for key in git("config", "--local", "--includes", "--name-only", "--list").decode().split():
            if key.startswith("filter."):
                plain += ["-c", f"{key}={'false' if key.endswith('.required') else ''}"]
        tree = ["--ignore-submodules=all"]
        status = git("status", "--porcelain", *tree).splitlines(keepends=True)
        untracked = b"".join(line for line in status if line.startswith(b"??"))
        diff = ["diff", "--no-ext-diff", "--no-textconv", *tree, "HEAD"]
        return commit, untracked + git(*diff) if status else b""
    except (OSError, subprocess.SubprocessError):
        return None, b""


def short(path: Path) -> str:
    """A path as one would type it here: relative where it lies below the working directory."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _now() -> str:
    """The time, UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
