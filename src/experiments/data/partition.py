"""Which rows of a table are for training, validation and the test, by a rule.

Each division is a pure function of the number of rows, their classes or groups, and a seed of its
own, so that no other draw and no other key of a run changes it.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.errors import UsageError

SPLITS = ("train", "valid", "test")
RULES = ("first", "last", "random", "stratified", "grouped")
DEFAULT_SHARE = 0.1  # of the rows, for validation and for the test
MAX_CLASSES = 1000  # of stratified rows: more are rather numbers

Rows = NDArray[np.int64]
Share = float | int | None


@dataclass(frozen=True)
class Rule:
    """How rows are divided: the keys of the same names in a data set's config.

    split: first and last take validation and test rows from that end of the file; random draws
        them; stratified draws them with the same share of each class, within one row; grouped draws
        whole groups
    valid, test: a fraction of the rows (0.1 if None), or a number of rows from 1 on
    split_seed: of the draws
    folds: K, where validation is one of K equal parts of the rows that are not for the test
    fold: which, from 0 to K - 1
    """

    split: str = "random"
    valid: Share = None
    test: Share = None
    split_seed: int = 0
    folds: int | None = None
    fold: int = 0


def partition(
    rows: int, rule: Rule, labels: NDArray[Any] | None = None, elsewhere: Collection[str] = ()
) -> dict[str, Rows]:
    """The row numbers of each split, int64, ascending: each row in exactly one, each split with at
    least one.

    labels: (rows,) the classes of a stratified rule, the groups of a grouped one
    elsewhere: splits that have a file of their own, and get none of these rows

    Raises UsageError if the rule leaves a split empty or contradicts itself.
    """
    check_rule(rule)
    if {"valid", "test"} <= {*elsewhere}:
        return {"train": np.arange(rows)}
    order, blocks = ordered(rows, rule, labels)
    drawn = [name for name in ("test", "valid") if name not in elsewhere]
    if rule.folds is not None:
        drawn.remove("valid")
    wanted = {name: count(name, getattr(rule, name), rows) for name in drawn}
    part = assigned(rule, order, blocks, wanted)
    if rule.folds is not None:
        in_fold(part, rule, order, blocks)
    found = {
        name: np.flatnonzero(part == number)
        for number, name in enumerate(SPLITS)
        if name not in elsewhere
    }
    for name, members in found.items():
        if len(members) == 0:
            raise UsageError(f"data.split={rule.split}: {empty(name, rule, rows, len(blocks))}")
    return found


def check_rule(rule: Rule) -> None:
    """Raise UsageError for keys that contradict each other, or name a file where none is taken."""
    for name in ("valid", "test"):
        if isinstance(share := getattr(rule, name), str):
            raise UsageError(f"data.{name}={share}: expected a fraction or a number of rows here")
    if rule.folds is None:
        if rule.fold:
            raise UsageError(
                f"data.fold={rule.fold}: there are no folds; give their number, data.folds=5"
            )
        return
    if rule.valid is not None:
        raise UsageError(
            f"data.valid={rule.valid}: validation is a fold, 1/{rule.folds} of the rows; leave one "
            "of data.valid and data.folds null"
        )
    if not 0 <= rule.fold < rule.folds:
        raise UsageError(
            f"data.fold={rule.fold}: there are {rule.folds} folds, 0 to {rule.folds - 1}"
        )


def empty(name: str, rule: Rule, rows: int, groups: int) -> str:
    """Why a split has no rows, and what to change."""
    of = f"{groups} groups" if rule.split == "grouped" else f"{rows} rows"
    keys = "data.valid and data.test"
    if rule.folds is not None:
        keys = f"data.folds={rule.folds} and data.test"
    return f"leaves no {name} rows of {of}; change {keys}, or give a file for each split"


def count(name: str, share: Share, rows: int, unit: str = "rows") -> int:
    """The number of rows that a fraction, or a number of them, stands for.

    Raises UsageError if that is more than there are.
    """
    share = DEFAULT_SHARE if share is None else share
    wanted = round(share * rows) if share < 1 else int(share)
    if wanted > rows:
        raise UsageError(f"data.{name}={share}: there are only {rows} {unit}; make it smaller")
    return max(wanted, 1)


def ordered(rows: int, rule: Rule, labels: NDArray[Any] | None) -> tuple[Rows, list[Rows]]:
    """The rows in the order in which a rule takes them, and the same as blocks: one block, or one
    for each class or group, which are in random order, as are the rows in each.
    """
    order: Rows = np.arange(rows, dtype=np.int64)
    if rule.split in ("first", "last"):
        order = order if rule.split == "first" else order[::-1]
        return order, [order]
    # raw draws of a bit generator are the same in every version of numpy
    draws = np.random.PCG64(rule.split_seed)
    order = np.argsort(draws.random_raw(rows), kind="stable")
    if rule.split == "random":
        return order, [order]
    if labels is None:
        key = "a target of classes" if rule.split == "stratified" else "data.group, a column"
        raise UsageError(f"data.split={rule.split}: needs {key}; use data.split=random")
    codes = np.unique(labels, return_inverse=True)[1].reshape(-1)
    if rule.split == "stratified" and (classes := int(codes.max()) + 1) > MAX_CLASSES:
        raise UsageError(
            f"data.split=stratified: the target has {classes} different values, which are rather "
            "numbers than classes; use data.split=random"
        )
    order = order[np.argsort(codes[order], kind="stable")]
    blocks = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)
    if rule.split == "grouped":
        of_groups = np.argsort(draws.random_raw(len(blocks)), kind="stable")
        blocks = [blocks[block] for block in of_groups]
        order = np.concatenate(blocks)
    return order, blocks


def assigned(rule: Rule, order: Rows, blocks: list[Rows], wanted: dict[str, int]) -> Rows:
    """The split of each row, int64 (rows,), as an index of SPLITS, with so many test and validation
    rows; of groups as nearly so many as whole ones allow.
    """
    part = np.zeros(len(order), np.int64)
    if rule.split == "grouped":
        return whole_groups(part, blocks, wanted)
    if rule.split != "stratified":
        blocks = [order]
    shares = apportioned([len(block) for block in blocks], [*wanted.values()])
    for block, taken in zip(blocks, shares, strict=True):
        begin = 0
        for name, number in zip(wanted, taken, strict=True):
            part[block[begin : begin + number]] = SPLITS.index(name)
            begin += number
    return part


def apportioned(sizes: list[int], wanted: list[int]) -> list[list[int]]:
    """How many rows each class gives to each split, so that a split has as many as are wanted and
    each number is within one of its exact share, size * wanted / rows.

    The whole parts come first; then each class gives what is left of it, one row a split, to those
    splits that lack most, which always comes out (Gale and Ryser).
    """
    rows = sum(sizes)
    columns = [*wanted, rows - sum(wanted)]  # the last one is training
    if columns[-1] < 0:  # more than there are: no training rows, which is refused
        columns = [*wanted[:-1], rows - sum(wanted[:-1]), 0]
    whole = [[size * column // rows for column in columns] for size in sizes]
    lacking = [column - sum(row[number] for row in whole) for number, column in enumerate(columns)]
    for size, row in zip(sizes, whole, strict=True):
        left = size - sum(row)
        for number in sorted(range(len(columns)), key=lambda n: -lacking[n])[:left]:
            row[number] += 1
            lacking[number] -= 1
    return [row[:-1] for row in whole]


def whole_groups(part: Rows, blocks: list[Rows], wanted: dict[str, int]) -> Rows:
    """Give whole groups to test and validation, as long as that brings their numbers nearer to what
    is wanted, and at least one each.
    """
    following = iter(blocks)
    block = next(following, None)
    for name, number in wanted.items():
        found = 0
        while block is not None and (
            (number and not found) or abs(found + len(block) - number) < abs(found - number)
        ):
            part[block] = SPLITS.index(name)
            found += len(block)
            block = next(following, None)
    return part


def in_fold(part: Rows, rule: Rule, order: Rows, blocks: Iterable[Rows]) -> None:
    """Mark one of K folds of the rows that are not for the test as validation, in `part`.

    Folds have the same number of rows within one; if stratified, also of each class; of groups, the
    largest goes to the fold with the fewest rows so far.
    """
    assert rule.folds is not None
    number = SPLITS.index("valid")
    if rule.split == "grouped":
        rest = [block for block in blocks if part[block[0]] == 0]
        sizes = [0] * rule.folds
        for block in sorted(rest, key=len, reverse=True):
            smallest = sizes.index(min(sizes))
            sizes[smallest] += len(block)
            if smallest == rule.fold:
                part[block] = number
        return
    remaining = order[part[order] == 0]
    if rule.split in ("random", "stratified"):
        part[remaining[rule.fold :: rule.folds]] = number
    else:  # neighbouring rows stay together
        part[np.array_split(remaining, rule.folds)[rule.fold]] = number
