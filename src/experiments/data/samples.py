"""Map-style data sets whose draws belong to a stream: random transforms that can be repeated."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.data

from experiments.data.streams import derive
from experiments.errors import UsageError

Collate = Callable[[list[Any]], Any]

# How deep, and how far into a list, the generators of a data set are looked for.
MAX_DEPTH, MAX_PARTS = 4, 100


class Samples(torch.utils.data.Dataset[Any]):
    """A map-style data set in one epoch. What reading a row draws from the global generators of
    Python, NumPy and torch's CPU is a function of (seed, epoch, row).

    So neither worker processes nor resuming inside the epoch change a sample, nor what `collate`
    draws when it makes a batch of them. The generators of the process that reads are as they were
    afterwards.
    """

    def __init__(
        self, dataset: Any, seed: int = 0, epoch: int = 0, collate: Collate | None = None
    ) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch
        self.collate = collate or collate_of(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Any:
        with preserved_generators():
            return self.read(row)

    def __getitems__(self, rows: Sequence[int]) -> Any:
        """The batch of some rows, for a DataLoader whose `collate_fn` leaves it as it is.

        In a DataLoader's worker a UsageError is returned, not raised, since DataLoader would make a
        traceback of its line.
        """
        try:
            with preserved_generators():
                samples = [self.read(row) for row in rows]
                seed_generators(derive(self.seed, "collate", self.epoch, rows[0]))
                return self.collate(samples)
        except UsageError as error:
            if torch.utils.data.get_worker_info() is None:
                raise
            return error

    def read(self, row: int) -> Any:
        """The sample of a row, which leaves the generators as its stream has them."""
        seed_generators(derive(self.seed, "sample", self.epoch, row))
        return self.dataset[row]


def collate_of(dataset: Any) -> Collate:
    """What makes a batch of a data set's samples: its own `collate_fn`, or torch's default."""
    return getattr(dataset, "collate_fn", None) or torch.utils.data.default_collate


def seed_generators(value: int) -> None:
    """Seed the global generators of Python, NumPy and torch's CPU."""
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value)


@contextlib.contextmanager
def preserved_generators() -> Iterator[None]:
    """Leave the global generators of Python, NumPy and torch as they were."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        with torch.random.fork_rng(enabled=torch.cuda.is_initialized()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


def own_generators(dataset: Any) -> list[str]:
    """The states of the random generators that a data set keeps, also in parts and lists of parts,
    to see whether reading rows draws from one.
    """
    states: list[str] = []
    seen: set[int] = set()

    def visit(value: Any, depth: int) -> None:
        if id(value) in seen or depth > MAX_DEPTH:
            return
        seen.add(id(value))
        if isinstance(value, random.Random):
            states.append(str(hash(value.getstate())))
        elif isinstance(value, np.random.Generator):
            states.append(repr(value.bit_generator.state))
        elif isinstance(value, np.random.RandomState):
            states.append(repr(value.get_state()))
        elif isinstance(value, torch.Generator):
            states.append(str(hash(value.get_state().numpy().tobytes())))
        elif isinstance(value, list | tuple):
            for part in value[:MAX_PARTS]:
                visit(part, depth + 1)
        elif not isinstance(value, type | torch.Tensor | np.ndarray):
            for part in list(getattr(value, "__dict__", {}).values())[:MAX_PARTS]:
                visit(part, depth + 1)

    visit(dataset, 0)
    return states
