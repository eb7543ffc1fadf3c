"""The state that a module keeps in Python: what a graph of tensor operations cannot see.

Counters, lists, random generators and flags, in attributes, in the variables that a function closes
over, and in the globals that one's own functions use.
"""

import collections
import itertools
import operator
import random
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# the code of libraries is trusted to keep no state in globals
LIBRARIES = {"torch", "numpy", "experiments", *sys.stdlib_module_names}
LIBRARY_FOLDERS = tuple(sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib"))
MAX_ENTRIES = 50_000  # a larger structure is data; it is compared by its beginning
MAX_DEPTH = 20
SCALARS = (bool, int, float, complex, str, bytes, types.NoneType, torch.dtype, torch.device)


class PythonState:
    """A snapshot of the state that can be reached from some modules.

    Tensors count as nothing: whether one is read again in the next step is seen by tracing.
    """

    def __init__(self, roots: Mapping[str, nn.Module]) -> None:
        self.values: dict[str, Any] = {}
        self._copies: list[tuple[Any, Any]] = []
        self._visited: dict[int, Any] = {}  # by id; the object is kept so that ids stay unique
        for name, root in roots.items():
            self._visit(name, root, 0)

    def change_to(self, other: "PythonState") -> str | None:
        """The first difference from another snapshot of the same modules, in words."""
        for path in [*self.values, *(path for path in other.values if path not in self.values)]:
            before, after = self.values.get(path), other.values.get(path)
            # NaN is not equal to itself
            if before != after and repr(before) != repr(after):
                values = short(before), short(after)
                change = f" from {values[0]} to {values[1]}" if values[0] != values[1] else ""
                return f"{readable(path)} changes{change}"
        return None

    def restore(self) -> None:
        """Put the objects back that were in attributes, lists and dictionaries."""
        for container, copy in self._copies:
            if isinstance(container, dict):
                for key in [key for key in container if key not in copy]:
                    del container[key]
                for key, value in copy.items():
                    if container.get(key) is not value:
                        container[key] = value
            elif len(container) != len(copy) or any(map(operator.is_not, container, copy)):
                container[:] = copy

    def _visit(self, path: str, value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            return
        if isinstance(value, SCALARS):
            if value is not None:
                self.values[path] = value
            return
        if depth > MAX_DEPTH or len(self.values) > MAX_ENTRIES or id(value) in self._visited:
            return
        self._visited[id(value)] = value
        state = generator_state(value)
        if state is not None:
            self.values[path] = state
            return
        for name, child in self._children(path, value):
            self._visit(f"{path}{name}", child, depth + 1)

    def _children(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        """What is inside an object, each with the end of its path."""
        if isinstance(value, dict):
            self._copies.append((value, dict(value)))
            yield from ((f"[{key!r}]", child) for key, child in list(value.items())[:MAX_ENTRIES])
        elif isinstance(value, list | tuple | collections.deque):
            if isinstance(value, list):
                self._copies.append((value, list(value)))
            self.values[f"{path}'s length"] = len(value)
            first = itertools.islice(value, MAX_ENTRIES)
            yield from ((f"[{i}]", child) for i, child in enumerate(list(first)))
        elif isinstance(value, set | frozenset):
            self.values[path] = sorted(map(repr, filter(is_scalar, value))), len(value)
        elif isinstance(value, types.FunctionType):
            yield from function_state(value)
        elif isinstance(value, types.MethodType):
            yield from (("", value.__self__), ("", value.__func__))
        elif isinstance(value, partial):
            yield from (("", value.func), (".args", value.args), (".keywords", value.keywords))
        elif isinstance(value, types.GeneratorType):
            yield from value.gi_frame.f_locals.items() if value.gi_frame else ()
        elif isinstance(value, type):
            yield from class_state(value)
        elif isinstance(value, types.ModuleType):
            return
        else:
            yield from self._attributes(value)

    def _attributes(self, value: Any) -> Iterator[tuple[str, Any]]:
        """The attributes of an object, and of its class if that is the person's own."""
        attributes = getattr(value, "__dict__", {})
        self._copies.append((attributes, dict(attributes)))
        yield from ((f".{name}", child) for name, child in attributes.items())
        for kind in type(value).__mro__:
            slots = vars(kind).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(value, name):
                    yield f".{name}", getattr(value, name)
            yield "", kind


def class_state(kind: type) -> Iterator[tuple[str, Any]]:
    """The attributes of a class, and the functions behind its methods, if it is the person's."""
    if is_own_code(sys.modules.get(kind.__module__)):
        for name, child in vars(kind).items():
            code = getattr(child, "fget", None) or getattr(child, "__func__", child)
            if isinstance(code, types.FunctionType):
                yield "", code
            elif not name.startswith("__"):
                yield f".{name}", child


def function_state(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function closes over, its attributes, and the globals that its code names."""
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        try:
            yield f"({name})", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from ((f".{name}", child) for name, child in vars(function).items())
    yield ".__defaults__", function.__defaults__
    if is_own_code(sys.modules.get(function.__module__)):
        for name in names_in(function.__code__):
            if name in function.__globals__:
                yield f"({name})", function.__globals__[name]


def names_in(code: types.CodeType) -> Iterator[str]:
    """The global and attribute names in a function's code, and in functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


def is_own_code(module: types.ModuleType | None) -> bool:
    """Whether a module belongs to the person, not to a library."""
    if module is None or module.__name__.partition(".")[0] in LIBRARIES:
        return False
    return not str(getattr(module, "__file__", None) or "").startswith(LIBRARY_FOLDERS)


def generator_state(value: Any) -> Any:
    """The state of a random generator, an array or an iterator; None for anything else."""
    if isinstance(value, random.Random):
        return hash(value.getstate())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state())
    if isinstance(value, torch.Generator):
        return hash(bytes(value.get_state().tolist()))
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.shape, hash(value.ravel()[:MAX_ENTRIES].tobytes())
    if type(value).__module__ == "itertools":
        return repr(value)
    if isinstance(value, Iterator) and hasattr(value, "__length_hint__"):
        return "an iterator with elements left:", operator.length_hint(value)
    return None


def is_scalar(value: Any) -> bool:
    """Whether a value is a number, a string or the like."""
    return isinstance(value, SCALARS)


def readable(path: str) -> str:
    """A path without the dictionaries in which modules keep their parts."""
    for kind in ("_modules", "_parameters", "_buffers"):
        path = path.replace(f".{kind}['", ".").replace(f".{kind}[", ".")
    return path.replace("'].", ".").removesuffix("']")


def short(value: Any) -> str:
    """A value in at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
