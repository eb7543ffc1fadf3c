"""The run directory, and `run.json`, the record of the run's inputs, state and results.

    .hydra/         as composed by Hydra: config, overrides, Hydra's settings
    config.yaml     the same config resolved: plain values, sufficient to rebuild everything
    run.json        state, times, versions, fingerprints, best and last metrics
    git.diff        uncommitted changes, if any
    metrics.jsonl   every logged number, in full precision
    events.*        the same for TensorBoard
    checkpoints/    the state from which a resumed run continues

Imports no torch.
"""

import contextlib
import hashlib
import json
import platform
import re
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from experiments.config.names import MOVED, format_value, resolver_modules
from experiments.config.schema import ADDED_LATER, NEW_OPTIONS, OPTIONAL_ROOTS, ROOTS, with_added
from experiments.directory import durable
from experiments.directory.claim import (
    LOCK_SECONDS,
    Lock,
    ensure_no_run,
    lock_directory,
    reject_symlinks,
    remove_temporary_files,
)
from experiments.directory.environment import packages
from experiments.directory.git import GitState, git_state
from experiments.directory.identity import identify
from experiments.directory.plain_json import dumps, nan_for_null
from experiments.errors import UsageError

# The keys of run.json with their types: present from the start, and added during the run.
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
ADDED = {
    **dict.fromkeys(("code", "versions", "environment", "data", "weights", "metrics"), dict),
    "class_weights": dict,
    "init": dict,
    "kept": str,
    "resolvers": list,
}
FOUND_IN_TRAINING = ("environment", "data", "weights", "class_weights", "metrics")
State = Literal["running", "finished", "failed", "interrupted", "diverged", "pruned"]
ROOT_KEY = rb"(?m)^(?=[^\s-])"  # where a key that is not nested begins in a text of `config_text`
COMPLETED = ("finished", "diverged", "pruned")  # states that a continued sweep keeps


class Completed(Exception):
    """A run that has ended in a state that is kept; `record` is its run.json."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(record["state"])
        self.record = record


class Run:
    """A run directory whose lock this process holds."""

    def __init__(self, path: Path, lock: Lock, record: dict[str, Any]) -> None:
        self.path = path
        self.record = record
        self._lock = lock
        self._clock = time.monotonic()

    def update(self, **changes: Any) -> None:
        """Update fields of run.json atomically."""
        now = time.monotonic()
        self.record |= {"seconds": self.record["seconds"] + now - self._clock, **changes}
        self._clock = now
        text = dumps(self.record, indent=2)
        durable.write(self.path / "run.json", text.encode() + b"\n")

    def end(self, state: State, error: str | None = None) -> None:
        """Record the final state, with the error in error.txt, and release the lock."""
        try:
            if error is not None:
                durable.write(self.path / "error.txt", error.encode())
            self.update(state=state, ended=_now(), **({"error": error} if error else {}))
        finally:
            self._lock.close()


def start(path: Path, config: dict[str, Any], overrides: list[str]) -> Run:
    """Lock a claimed directory and write config.yaml, run.json and git.diff.

    Raises UsageError if another process holds the lock or the directory holds a run.
    """
    with _lock(path) as lock:
        ensure_no_run(path)
        remove_temporary_files(path)
        git = git_state()
        text = config_text(config)
        run = Run(path, lock, _new_record(config, overrides, text, git))
        durable.write(path / "config.yaml", text)
        if git.diff:
            durable.write(path / "git.diff", git.diff)
        run.update()
    return run


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[Lock]:
    """Take the lock of a run directory, and keep it unless the block raises."""
    lock = lock_directory(path, LOCK_SECONDS)
    try:
        yield lock
    except BaseException:
        lock.close()
        raise


def _new_record(
    config: dict[str, Any], overrides: list[str], text: bytes, git: GitState
) -> dict[str, Any]:
    """The run.json of a new run; `text` is its config.yaml."""
    modules = resolver_modules()
    return {
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
        **identify(config),
        **({"resolvers": modules} if modules else {}),
        "git": git.record,
    }


def config_text(config: dict[str, Any]) -> bytes:
    """A resolved config as the text of config.yaml; floats keep full precision."""
    return yaml.safe_dump(config, sort_keys=False).encode()


def built_part(text: bytes) -> bytes:
    """The part of a text made by `config_text` that a run is built from: without keys beside it,
    which only name something or are referred to, and with the new names of moved modules.

    Two configs with the same part are one run.
    """
    blocks = re.split(ROOT_KEY, text)  # one for each key that is not nested
    blocks = [block for block in blocks if block.partition(b":")[0].decode() in ROOTS]
    part = b"".join(blocks)
    lacking = [f"\n  {key.partition('.')[2]}:".encode() for key in ADDED_LATER]
    lacking += [f"\n{root}:".encode() for root in OPTIONAL_ROOTS]
    if any(key not in b"\n" + part for key in lacking):
        part = with_added_keys(part)
        blocks = re.split(ROOT_KEY, part)
    part = b"".join(sorted(blocks))
    for old, new in MOVED.items():
        part = part.replace(f"_target_: {old}.".encode(), f"_target_: {new}.".encode())
    return without_optional(part)


def without_optional(part: bytes) -> bytes:
    """The text without the keys of NEW_OPTIONS whose value says what earlier versions did."""
    blocks = re.split(ROOT_KEY, part)
    for key, (target, value) in NEW_OPTIONS.items():
        group, _, name = key.partition(".")
        line = f"\n  {name}: {format_value(value)}\n".encode()
        for number, block in enumerate(blocks):
            if block.startswith(f"{group}:".encode()) and f"_target_: {target}".encode() in block:
                blocks[number] = block.replace(line, b"\n", 1)
    return b"".join(blocks)


def with_added_keys(part: bytes) -> bytes:
    """The text of a saved config with the keys that an earlier version did not have."""
    try:
        config = yaml.safe_load(part)
    except yaml.YAMLError:
        return part
    return config_text(with_added(config)) if isinstance(config, dict) else part


def record_end(path: Path, state: State, error: str | None = None) -> dict[str, Any]:
    """Record the final state of a run on behalf of its process, which died or does not know it;
    returns the record. A completed run keeps its state.

    Raises UsageError if another process holds the lock or run.json cannot be read.
    """
    with _lock(path) as lock:
        run = Run(path, lock, read_record(path))
    if run.record["state"] in COMPLETED:
        lock.close()
    else:
        run.end(state, error)
    return run.record


def keep(path: Path) -> None:
    """Record that a run counts from now on, though one of the same config, and of other code, data
    or versions, was started after it. Raises UsageError if another process holds the lock.
    """
    with _lock(path) as lock:
        Run(path, lock, read_record(path)).update(kept=_now())
        lock.close()


def counts_since(record: dict[str, Any]) -> str:
    """When a run was started or last kept, UTC, ISO 8601; of equal configs the latest counts."""
    return str(max(record["started"], record.get("kept", "")))


def reopen(path: Path, keep: Sequence[str] = ("finished",)) -> Run:
    """Lock the directory of an unfinished run, to resume it. Without a checkpoint the run begins
    anew, and so does its identity.

    Raises Completed if the run has ended in a state of `keep`; UsageError if the directory holds no
    run, another process holds the lock, or it contains symlinks.
    """
    with _lock(path) as lock:
        reject_symlinks(path)
        # only now: until it released the lock, another process may have finished the run
        record = read_record(path)
        if record["state"] in keep:
            raise Completed(record)
        remove_temporary_files(path)
        (path / "error.txt").unlink(missing_ok=True)
        record.pop("error", None)
        if not has_checkpoint(path):
            record = {key: value for key, value in record.items() if key not in FOUND_IN_TRAINING}
            if modules := resolver_modules():
                record["resolvers"] = modules
            record |= identify(record["config"], record)
        run = Run(path, lock, record)
        run.update(state="running", ended=None, resumed_at=[*record["resumed_at"], _now()])
    return run


def has_checkpoint(path: Path) -> bool:
    """Whether a run directory has a checkpoint to continue from."""
    return any((path / "checkpoints").glob("step-*.safetensors"))


def read_record(path: Path) -> dict[str, Any]:
    """The run.json of a run directory. Raises UsageError if it is missing or malformed."""
    try:
        record = json.loads((path / "run.json").read_bytes())
        if not isinstance(record, dict) or record.get("schema") != 1:
            raise ValueError("its schema is not 1")
        if missing := sorted(RECORDED.keys() - record.keys()):
            raise ValueError(f"{', '.join(missing)} missing")
        for key, kind in (RECORDED | ADDED).items():
            if key in record and not isinstance(record[key], kind):
                raise ValueError(f"{key} is not a {kind.__name__}")
        if "metrics" in record:
            record["metrics"] = nan_for_null(record["metrics"])
    except FileNotFoundError:
        raise UsageError(f"{path}: holds no run, there is no run.json in it") from None
    except (OSError, RecursionError, ValueError) as error:
        raise UsageError(f"{path / 'run.json'}: cannot be read as a run ({error})") from None
    return record


def _now() -> str:
    """The current UTC time, ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
