"""Divisions by rule: hypothesis looks for rows that are lost, doubled or in the wrong split."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from experiments.data.partition import RULES, SPLITS, Rule, partition
from experiments.errors import UsageError

seeds = st.integers(0, 2**63 - 1)
labelled = st.lists(st.integers(0, 5), min_size=12, max_size=200).map(np.array)
shares = st.one_of(st.floats(0.05, 0.4), st.integers(1, 4))


def divided(labels: Any, rule: Rule) -> dict[str, Any]:
    """The division, where there are enough groups for one."""
    if rule.split == "grouped" and len(set(labels.tolist())) < 3 + (rule.folds or 0):
        labels = np.arange(len(labels)) // 2
    return partition(len(labels), rule, labels)


@given(labelled, st.sampled_from(RULES), shares, shares, seeds)
def test_each_row_is_in_exactly_one_split(
    labels: Any, split: str, valid: Any, test: Any, seed: int
) -> None:
    found = divided(labels, Rule(split, valid, test, seed))
    assert sorted(np.concatenate([found[name] for name in SPLITS])) == list(range(len(labels)))
    assert all((np.diff(rows) > 0).all() for rows in found.values())


@given(labelled, st.sampled_from(RULES), st.integers(2, 4), seeds)
def test_the_folds_are_the_rows_that_are_not_for_the_test_each_once(
    labels: Any, split: str, folds: int, seed: int
) -> None:
    found = [divided(labels, Rule(split, None, 0.1, seed, folds, fold)) for fold in range(folds)]
    assert all(np.array_equal(one["test"], found[0]["test"]) for one in found)
    valid = np.concatenate([one["valid"] for one in found])
    others = np.setdiff1d(np.arange(len(labels)), found[0]["test"])
    assert sorted(valid) == list(others)
    for one in found:
        assert np.array_equal(np.sort(np.concatenate([one["train"], one["valid"]])), others)


@given(labelled, shares, shares, seeds)
def test_a_stratified_split_has_its_share_of_each_class_within_one_row(
    labels: Any, valid: Any, test: Any, seed: int
) -> None:
    found = partition(len(labels), Rule("stratified", valid, test, seed), labels)
    for rows in found.values():
        counts = Counter(labels[rows].tolist())
        for label, size in Counter(labels.tolist()).items():
            assert abs(counts[label] - size * len(rows) / len(labels)) <= 1


@given(labelled, st.integers(2, 4), seeds)
def test_stratified_folds_have_the_same_number_of_each_class_within_one_row(
    labels: Any, folds: int, seed: int
) -> None:
    rules = [Rule("stratified", None, 0.1, seed, folds, fold) for fold in range(folds)]
    valid = [partition(len(labels), rule, labels)["valid"] for rule in rules]
    for label in set(labels.tolist()):
        counts = [int((labels[rows] == label).sum()) for rows in valid]
        assert max(counts) - min(counts) <= 1


@given(st.lists(st.integers(0, 30), min_size=40, max_size=200).map(np.array), seeds,
       st.sampled_from([None, 2, 3]))  # fmt: skip
def test_no_group_is_divided(groups: Any, seed: int, folds: int | None) -> None:
    assume(len(set(groups.tolist())) >= 1 + (folds or 2))
    found = partition(len(groups), Rule("grouped", None, 0.1, seed, folds), groups)
    of = [set(groups[rows].tolist()) for rows in found.values()]
    assert sum(map(len, of)) == len(set(groups.tolist()))


@given(st.integers(12, 300), shares, shares, seeds)
def test_a_random_split_has_exactly_the_rows_that_are_asked_for(
    rows: int, valid: Any, test: Any, seed: int
) -> None:
    found = partition(rows, Rule("random", valid, test, seed))
    for name, share in (("valid", valid), ("test", test)):
        assert len(found[name]) == (max(1, round(share * rows)) if share < 1 else share)


def test_first_and_last_take_the_ends_of_the_file() -> None:
    last = partition(10, Rule("last", 2, 3))
    assert (last["valid"].tolist(), last["test"].tolist()) == ([5, 6], [7, 8, 9])
    first = partition(10, Rule("first", 2, 3))
    assert (first["test"].tolist(), first["valid"].tolist()) == ([0, 1, 2], [3, 4])
    fold = partition(10, Rule("last", None, 1, folds=3, fold=0))
    assert fold["valid"].tolist() == [6, 7, 8]


def test_a_division_is_a_function_of_its_seed_and_leaves_the_global_generators_alone() -> None:
    np.random.seed(0)
    before = np.random.get_state()[2], np.random.get_state()[1].tolist()  # type: ignore[index]
    one, same, other = (partition(100, Rule(split_seed=seed))["test"] for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    after = np.random.get_state()[2], np.random.get_state()[1].tolist()  # type: ignore[index]
    assert before == after


def test_the_draws_are_those_of_a_bit_generator_that_no_version_of_numpy_changes() -> None:
    assert partition(10, Rule("random", 2, 2))["test"].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("rows", "rule", "words"),
    [
        (10, Rule(fold=2), "data.fold=2: there are no folds"),
        (10, Rule(folds=3, fold=3), "data.fold=3: there are 3 folds, 0 to 2"),
        (10, Rule(folds=3, valid=0.1), "data.valid=0.1: validation is a fold"),
        (10, Rule(test=11), "data.test=11: there are only 10 rows"),
        (10, Rule(valid=5, test=5), "leaves no train rows of 10 rows; change data.valid and"),
        (2, Rule(), "leaves no train rows of 2 rows"),
        (4, Rule(folds=5, fold=4), "leaves no valid rows of 4 rows; change data.folds=5"),
        (10, Rule(test="a.npy"), "data.test=a.npy: expected a fraction"),  # type: ignore[arg-type]
        (10, Rule("grouped"), "data.split=grouped: needs data.group"),
        (10, Rule("stratified"), "data.split=stratified: needs a target of classes"),
    ],
)
def test_a_rule_that_cannot_be_kept_is_refused_in_one_line(
    rows: int, rule: Rule, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        partition(rows, rule)


def test_too_few_groups_are_counted() -> None:
    with pytest.raises(UsageError, match="leaves no train rows of 2 groups"):
        partition(10, Rule("grouped"), np.arange(10) % 2)


def test_a_target_of_numbers_cannot_be_stratified() -> None:
    with pytest.raises(UsageError, match="has 1500 different values"):
        partition(1500, Rule("stratified"), np.arange(1500) / 7)
