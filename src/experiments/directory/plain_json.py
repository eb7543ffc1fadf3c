"""JSON that every reader takes. It has no word for NaN, which becomes null, nor for infinity,
which becomes 1e999: a number that is read as infinity.
"""

import json
import math
from typing import Any

INFINITE = {math.inf: "\0inf", -math.inf: "\0-inf"}  # as texts, until they are numbers


def dumps(value: Any, **options: Any) -> str:
    """Nested dicts, lists and scalars as JSON; NaN becomes null."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # seldom: only then is the whole value copied
        text = json.dumps(finite(value), allow_nan=False, **options)
        for number, word in INFINITE.items():
            text = text.replace(json.dumps(word), "1e999" if number > 0 else "-1e999")
        return text


def finite(value: Any) -> Any:
    """A copy with None for each NaN and a text of INFINITE for each infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return INFINITE.get(value)
    return value


def nan_for_null(value: Any) -> Any:
    """Numbers as they were read, in dicts or not, with NaN for each null."""
    if isinstance(value, dict):
        return {key: nan_for_null(item) for key, item in value.items()}
    return math.nan if value is None else value
