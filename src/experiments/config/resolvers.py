"""Resolvers for interpolations: arithmetic and text for every config, and the user's own modules.

    ${mul:${width},4}    ${eval:'(${width} + 1) // 2'}    ${join:_,${task},${seed}}

The built-in ones are registered when a config calls them, so that they never take the place of a
resolver of the user's.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from omegaconf import OmegaConf

from experiments.config.hydra_versions import register_resolver
from experiments.config.names import RESOLVER_MODULES, resolver_modules
from experiments.errors import UsageError


def evaluate(expression: object) -> Any:
    """The value of an arithmetic expression: numbers, texts, lists, + - * / // % **, comparisons,
    `a if b else c`, and abs, int, float, len, max, min, round, sum. Raises ValueError for others.
    """
    import ast
    import operator as op

    operators: Mapping[type, Callable[..., Any]] = {
        ast.Add: op.add, ast.Sub: op.sub, ast.Mult: op.mul, ast.Div: op.truediv,
        ast.FloorDiv: op.floordiv, ast.Mod: op.mod, ast.Pow: op.pow,
        ast.UAdd: op.pos, ast.USub: op.neg, ast.Not: op.not_,
        ast.Eq: op.eq, ast.NotEq: op.ne, ast.Lt: op.lt, ast.LtE: op.le, ast.Gt: op.gt,
        ast.GtE: op.ge,
    }  # fmt: skip
    functions = {f.__name__: f for f in (abs, int, float, len, max, min, round, sum)}

    def value(node: Any) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.BinOp():
                return operators[type(node.op)](value(node.left), value(node.right))
            case ast.UnaryOp():
                return operators[type(node.op)](value(node.operand))
            case ast.Compare(ops=[compared], comparators=[right]):
                return operators[type(compared)](value(node.left), value(right))
            case ast.IfExp():
                return value(node.body) if value(node.test) else value(node.orelse)
            case ast.List() | ast.Tuple():
                return [value(item) for item in node.elts]
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
                return functions[name](*map(value, args))
        raise KeyError(type(node).__name__)

    try:
        return value(ast.parse(str(expression), mode="eval").body)
    except (SyntaxError, KeyError) as error:
        raise ValueError(
            f"{expression}: not arithmetic ({error}); --resolvers MODULE registers another eval"
        ) from None


def join(separator: object, *parts: object) -> str:
    """Parts, or the items of one list, as one text."""
    items = parts[0] if len(parts) == 1 and isinstance(parts[0], Iterable) else parts
    return str(separator).join(map(str, items))


def product(*factors: Any) -> Any:
    """The product of numbers."""
    result = 1
    for factor in factors:
        result = result * factor
    return result


BUILT_IN: Mapping[str, Callable[..., Any]] = {
    "add": lambda *terms: sum(terms),
    "sub": lambda a, b: a - b,
    "mul": product,
    "div": lambda a, b: a / b,
    "floordiv": lambda a, b: a // b,
    "min": min,
    "max": max,
    "eval": evaluate,
    "join": join,
    "lower": lambda text: str(text).lower(),
    "upper": lambda text: str(text).upper(),
    "replace": lambda text, old, new: str(text).replace(str(old), str(new)),
    # as oc.env, and never written down: see secrets.py
    "secret": lambda name: _environment_variable(name),
}


def register(names: Iterable[str] = BUILT_IN) -> None:
    """Register the built-in resolvers of these names; one of the user's of that name stays."""
    for name in names:
        if name in BUILT_IN and not OmegaConf.has_resolver(name):
            register_resolver(name, BUILT_IN[name])


def load_modules(modules: Iterable[str] | None = None) -> None:
    """Import the modules that register the user's resolvers: those of `--resolvers`, or None for
    those that a parent process was given. Raises UsageError if there is no such module.
    """
    if modules is None:
        modules = resolver_modules()
    else:
        modules = list(modules)
        if not modules:
            return
        os.environ[RESOLVER_MODULES] = ",".join(modules)  # workers inherit it
    for module in modules:
        try:
            found = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            found = None
        if found is None:
            raise UsageError(
                f"--resolvers {module}: no such module; name one in the working directory, "
                "without .py, or an installed one"
            )
        importlib.import_module(module)


def _environment_variable(name: str) -> str:
    if name not in os.environ:
        raise ValueError(f"the environment variable {name} is not set")
    return os.environ[name]
