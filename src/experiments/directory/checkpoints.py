"""Checkpoints: saved atomically, verified when loaded, never unpickled.

A checkpoint is one safetensors file: the tensors by their path (`model.0.weight`,
`optimizer.state.0.momentum_buffer`), and in its header, as JSON, everything that is not a tensor.
The file name holds the rest: the position in the run, whether it was the best so far, and the
first 16 digits of the file's sha256, since neither safetensors nor torch detects a flipped bit.
So no other file can contradict a checkpoint, and a single rename publishes it.
"""

import contextlib
import hashlib
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
from torch import Tensor

from experiments.directory import durable
from experiments.directory.checkpoint_files import Entry, entries
from experiments.errors import UsageError

# The types of values that JSON holds as they are.
PLAIN = frozenset({type(None), bool, int, float, str})


class Checkpoints:
    """The checkpoints of one run, and when the next one is due.

    every_steps, every_seconds: interval between checkpoints within an epoch; None for no limit.
    keep: number of newest checkpoints kept on disk, besides the best.
    """

    def __init__(
        self,
        directory: Path,
        every_steps: int | None = None,
        every_seconds: float | None = None,
        keep: int = 2,
    ) -> None:
        self.directory = directory
        self.every_steps, self.every_seconds, self.keep = every_steps, every_seconds, keep
        self._saved_at = time.monotonic()

    def due(self, step: int, taken: int = 1) -> bool:
        """Whether a checkpoint is due after `step`, the last of `taken` steps done in one call."""
        if self.every_steps is not None and step % self.every_steps < taken:
            return True
        elapsed = time.monotonic() - self._saved_at
        return self.every_seconds is not None and elapsed >= self.every_seconds

    def save(self, step: int, epochs: int, content: dict[str, Any], *, best: bool = False) -> None:
        """Save nested dicts, lists, scalars and tensors as the newest checkpoint.

        Raises OSError, with all earlier checkpoints intact, if the disk is full or fails.
        """
        if not self.directory.exists():
            self.directory.mkdir()
            durable.sync_directory(self.directory.parent)
        data = serialize(content)
        digest = hashlib.sha256(data).hexdigest()[:16]
        name = f"step-{step:09d}-epoch-{epochs:05d}{'-best' * best}-{digest}.safetensors"
        new = Entry(step, epochs, best, digest, self.directory / name)
        durable.write(new.file, data)
        # checkpoints ahead of this position are damaged ones that `load` skipped: remove them
        position = (step, epochs)
        past = [old for old in self.entries() if (old.step, old.epochs) < position] + [new]
        kept = past[-self.keep :] + [old for old in past if old.best][-1:]
        for entry in set(self.entries()) - set(kept):
            entry.file.unlink()
        for left_by_kill in self.directory.glob(".step-*.tmp"):
            left_by_kill.unlink()
        self._saved_at = time.monotonic()

    def load(self, which: Literal["last", "best"] = "last") -> dict[str, Any] | None:
        """The content of the last or best checkpoint, tensors on the CPU; None if there is none.

        A damaged checkpoint is skipped, with a warning, for the one before it. Raises UsageError
        if all are damaged.
        """
        entries = [entry for entry in self.entries() if which == "last" or entry.best]
        for entry in reversed(entries):
            try:
                data = entry.file.read_bytes()
                if not hashlib.sha256(data).hexdigest().startswith(entry.digest):
                    raise ValueError(f"its sha256 does not begin with {entry.digest}")
                return deserialize(data)
            except (OSError, ValueError) as error:
                warnings.warn(
                    f"{entry.file} is damaged ({error}), using the one before it", stacklevel=2
                )
        if entries:
            raise UsageError(
                f"{self.directory}: every checkpoint is damaged; reproduce the run from its config"
            )
        return None

    def entries(self) -> list[Entry]:
        """The checkpoints on disk, oldest first."""
        return entries(self.directory)


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Convert errors from a checkpoint that does not fit the run's parts to a UsageError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{path}: its checkpoint does not fit its config ({reason})") from error


def serialize(content: dict[str, Any]) -> bytes:
    """Nested dicts (string or integer keys), lists, tuples, scalars and tensors as safetensors."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()

    def pack(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            # safetensors rejects tied and non-contiguous tensors
            storage = value.untyped_storage().data_ptr()
            tied = storage in seen
            seen.add(storage)
            plain = value.detach().cpu().contiguous()
            # paths collide for keys with dots, and for 0 and "0"; safetensors reserves __metadata__
            while path in tensors or path == "__metadata__":
                path += "'"
            tensors[path] = plain.clone() if tied else plain
            return {"tensor": path}
        if isinstance(value, dict):
            return {"dict": [[key, pack(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            if PLAIN.issuperset(map(type, value)):  # generators have a thousand numbers
                return {kind: value}
            return {kind: [pack(item, f"{path}.{i}") for i, item in enumerate(value)]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{path}: a {type(value).__name__} cannot be checkpointed")

    tree = {name: pack(value, name) for name, value in content.items()}
    return safetensors.torch.save(tensors, metadata={"tree": json.dumps(tree)})


def deserialize(data: bytes) -> dict[str, Any]:
    """The inverse of `serialize`. Builds only dicts, lists, tuples, scalars and tensors.

    Raises ValueError if the bytes are not a checkpoint.
    """
    try:
        tensors = safetensors.torch.load(data)
        header_size = int.from_bytes(data[:8], "little")
        tree = json.loads(json.loads(data[8 : 8 + header_size])["__metadata__"]["tree"])

        def unpack(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            [(kind, content)] = value.items()
            if kind == "tensor":
                return tensors[content]
            if kind == "dict":
                return {key: unpack(item) for key, item in content}
            items = [unpack(item) for item in content]
            return items if kind == "list" else tuple(items)

        return {name: unpack(value) for name, value in tree.items()}
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a checkpoint ({error})") from None
    except safetensors.SafetensorError as error:
        raise ValueError(f"not a checkpoint ({error})") from None
