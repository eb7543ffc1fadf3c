"""Rules for config values: a predicate, and its description for error messages."""

import math
import sys
from collections.abc import Callable
from typing import NamedTuple


class Rule(NamedTuple):
    """A predicate on a value, and its description, which follows "expected" in messages."""

    words: str
    accepts: Callable[[object], bool]


def number(
    *,
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
    below: float = math.inf,
    whole: bool = False,
) -> Rule:
    """A finite number within bounds; `above` and `below` exclude the bound itself."""
    limits = {"at least": low, "above": above, "at most": high, "below": below}
    bounds = " and ".join(
        f"{word} {bound}" for word, bound in limits.items() if abs(bound) < math.inf
    )

    def accepts(value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            return False
        if abs(value) > sys.float_info.max or math.isnan(value):
            return False
        return low <= value <= high and above < value < below

    return Rule(f"a {'whole ' * whole}number {bounds}".rstrip(), accepts)


def choice(*words: str) -> Rule:
    """One of the given words."""
    return Rule("one of " + ", ".join(words), lambda value: value in words)


def list_of(item: Rule, length: int | None = None) -> Rule:
    """A list whose items all follow one rule, of a given length if any."""

    def accepts(value: object) -> bool:
        fits = isinstance(value, list) and length in (None, len(value))
        return fits and all(map(item.accepts, value))  # type: ignore[call-overload]

    return Rule(
        f"a list, [...], of {'' if length is None else f'{length} times '}{item.words}", accepts
    )


def or_null(rule: Rule) -> Rule:
    """Any value that a rule accepts, or null."""
    return Rule(f"{rule.words}, or null", lambda value: value is None or rule.accepts(value))


def either(rule: Rule, other: Rule) -> Rule:
    """Any value that one of two rules accepts."""
    return Rule(
        f"{rule.words}, or {other.words}", lambda value: rule.accepts(value) or other.accepts(value)
    )


COUNT = number(low=1, whole=True)
FRACTION = number(low=0, high=1)
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("a text", lambda value: isinstance(value, str) and value != "")
TAG = Rule(
    "a number of the validation, NAME/valid, such as loss/valid or accuracy/valid",
    lambda value: isinstance(value, str) and value.endswith("/valid") and len(value) > 6,
)
AUTO = choice("auto")
SIZE = either(COUNT, AUTO)
