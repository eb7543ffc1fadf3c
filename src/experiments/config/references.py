"""What the interpolations in a composed config refer to."""

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

# A `$` after an odd number of backslashes is escaped: plain text. A name before a colon is a
# resolver's.
REFERENCE = (
    r"(?<!\\)(?:\\\\)*\$\{\s*(?P<dots>\.*)\[?"
    r"(?![\w.]+\s*:)(?P<root>[^\s.\[\]{}:,$]+)(?=\s*[.\[\]}])"
)
RESOLVER = r"\$\{\s*([\w.]+)\s*:"
# resolvers whose first argument is the name of a key
KEY_ARGUMENT = (
    r"\$\{\s*oc\.(?:select|deprecated|dict\.keys|dict\.values)\s*:"
    r"\s*['\"]?(?P<root>[^\s.\[\]{}:,$'\"]+)"
)


class Reference(NamedTuple):
    """A text with an interpolation: the keys and list indices that lead to it, and itself."""

    path: tuple[Any, ...]
    text: str


def references(node: Any, path: tuple[Any, ...] = ()) -> Iterator[Reference]:
    """Every text with an interpolation in an unresolved, plain config."""
    if isinstance(node, str):
        if "${" in node:
            yield Reference(path, node)
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from references(value, (*path, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from references(value, (*path, i))


def referred_roots(found: Iterable[tuple[tuple[Any, ...], str]]) -> set[str]:
    """The root keys that interpolations refer to, also relative ones and arguments of resolvers."""
    roots = set()
    for path, text in found:
        for match in re.finditer(REFERENCE, text):
            dots, root = len(match["dots"]), match["root"]
            if dots:  # one dot is the node that holds the text, each further one its parent
                holder = path[: len(path) - dots]
                roots.add(str(holder[0]) if holder else root)
            else:
                roots.add(root)
        roots |= {match["root"] for match in re.finditer(KEY_ARGUMENT, text)}
    return roots


def resolvers_used(found: Iterable[Reference]) -> set[str]:
    """The names of the resolvers that texts call."""
    return {name for _, text in found for name in re.findall(RESOLVER, text)}
