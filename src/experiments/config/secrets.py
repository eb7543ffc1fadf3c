"""Secrets from the environment: read when a part is built, never written down.

A value is a secret if it comes from `${secret:NAME}`, or from `${oc.env:NAME}` where the key or
NAME looks like one: token, password, api_key and so on. The checked config, and with it
config.yaml, run.json and TensorBoard, has the reference `${secret:NAME}` in its place, which is
resolved again whenever the part is built, also by a run that is resumed.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from experiments.config.hydra_versions import register_resolver
from experiments.config.resolvers import register
from experiments.errors import UsageError

LOOKS_SECRET = (
    r"(?i)(?:^|[_\-.])(?:token|password|passwd|passphrase|pwd|secret|credentials?|auth|"
    r"(?:api|access|private|secret)[_\-]?key|apikey)s?(?:$|[_\-.])"
)
# a reference to the environment as a config has it, and as a saved config does
IN_CONFIG = r"\$\{\s*(oc\.env|secret)\s*:\s*['\"]?(\w+)['\"]?[^{}]*\}"
# one whose name is put together, and a reference to another key
COMPOSED_NAME = r"\$\{\s*(oc\.env|secret)\s*:\s*['\"]?([^{},]*\$\{[^{}]*\}[^{},]*)"
VARIABLE = r"\$\{\s*(?:oc\.select\s*:\s*)?(\.*)([^\s.:{},$][^\s:{},$]*)"
SAVED = r"\$\{secret:(\w+)\}"
MIN_REDACTED = 4  # characters: shorter values also occur by chance in messages

# names of secrets by their values, so that messages can leave these out
_values: dict[str, str] = {}


def hide(node: Any, raw: Any, variables: dict[str, str], key: str = "") -> Any:
    """A resolved node in which each secret is replaced by its reference.

    raw: the unresolved node. variables: names of secrets by their values. Raises UsageError for a
    secret that is no text, which would come back as another value.
    """
    if isinstance(raw, str) and "${" in raw:
        return _hide_all(node, variables, key)
    if isinstance(node, dict):
        return {k: hide(v, raw[k], variables, f"{key}.{k}" if key else k) for k, v in node.items()}
    if isinstance(node, list):
        return [hide(v, raw[i], variables, f"{key}.{i}") for i, v in enumerate(node)]
    return node


def _hide_all(node: Any, variables: dict[str, str], key: str) -> Any:
    if isinstance(node, dict):
        return {k: _hide_all(v, variables, f"{key}.{k}") for k, v in node.items()}
    if isinstance(node, list):
        return [_hide_all(v, variables, f"{key}.{i}") for i, v in enumerate(node)]
    for value, name in variables.items():
        if isinstance(node, str):
            node = node.replace(value, f"${{secret:{name}}}")
        elif str(node) == value:
            raise UsageError(
                f"{key}=${{secret:{name}}}: a secret stays a text; leave oc.decode out"
            )
    return node


def secret_variables(texts: Sequence[tuple[tuple[Any, ...], str]]) -> dict[str, str]:
    """The names of the environment variables that hold secrets, by their values, longest first.

    texts: unresolved values with the path of their keys. Raises UsageError for a secret whose
    variable is not known before the config is resolved.
    """
    marked, found = _marked(texts), dict[str, str]()
    for path, text in texts:
        for resolver, name in re.findall(COMPOSED_NAME, text):
            if path in marked or resolver == "secret" or re.search(LOOKS_SECRET, name):
                raise UsageError(
                    f"{'.'.join(map(str, path))}=${{{resolver}:{name}}}: a secret's variable is a "
                    "plain name, as in ${secret:MY_TOKEN}"
                )
        for resolver, name in re.findall(IN_CONFIG, text):
            secret = path in marked or resolver == "secret" or re.search(LOOKS_SECRET, name)
            if secret and os.environ.get(name):
                found[os.environ[name]] = name
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _marked(texts: Sequence[tuple[tuple[Any, ...], str]]) -> set[tuple[Any, ...]]:
    """The paths of the texts whose key looks like a secret, and of those that they refer to."""
    waiting = []
    for path, _ in texts:
        key = next((name for name in reversed(path) if isinstance(name, str)), "")  # of a list
        waiting += [path] if re.search(LOOKS_SECRET, key) else []
    by_path, marked = dict(texts), set(waiting)
    while waiting:
        path = waiting.pop()
        for dots, name in re.findall(VARIABLE, by_path[path]):
            # one dot is the node that holds the text, each further one its parent
            holder = path[: len(path) - len(dots)] if dots else ()
            target = [*map(str, holder), *re.split(r"[.\[\]]+", name.rstrip("]"))]
            for other in by_path.keys() - marked:
                if [*map(str, other[: len(target)])] == target:
                    waiting.append(other)
                    marked.add(other)
    return marked


def require(node: Any, key: str) -> None:
    """Note the secrets of a checked config, so that `redact` knows them. Raises UsageError for one
    that is not in the environment.
    """
    if isinstance(node, dict):
        for name, value in node.items():
            require(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            require(value, f"{key}.{i}")
    elif isinstance(node, str):
        for name in re.findall(SAVED, node):
            register(["secret"])
            if name not in os.environ:
                raise UsageError(
                    f"{key}=${{secret:{name}}}: the environment variable {name} is not set; "
                    "a run directory holds no secrets, so set it again"
                )
            _remember(os.environ[name], name)


def reject_in_directory(config: dict[str, Any], setting: str, directory: object) -> None:
    """Raise UsageError if the name of a run's directory holds a secret of its checked config.

    setting: the key that names the directory.
    """
    require(config, "")
    if (shown := redact(str(directory))) != str(directory):
        raise UsageError(f"{setting}={shown}: a directory's name holds no secret; choose another")


def mask() -> None:
    """Let `${secret:NAME}` and what looks like a secret resolve to `${secret:NAME}`, in a process
    that prints a config and builds nothing.
    """
    from omegaconf import OmegaConf
    from omegaconf.resolvers.oc import env as value_of

    from experiments.config.references import references

    def env(name: str, *default: Any, _root_: Any) -> Any:
        found = list(references(OmegaConf.to_container(_root_)))
        if name in secret_variables(found).values():
            return f"${{secret:{name}}}"
        return value_of(name, *default)

    register_resolver("oc.env", env, replace=True)
    register_resolver("secret", lambda name: f"${{secret:{name}}}", replace=True)


def redact(text: str) -> str:
    """A message or traceback with the names of secrets in the place of their values."""
    for value, name in _values.items():
        text = text.replace(value, f"${{secret:{name}}}")
    return text


def redact_logs() -> None:
    """Leave secrets out of the tracebacks that the root logger's handlers write: Hydra 1.4 has a
    failed job's in its log file.
    """
    for handler in logging.getLogger().handlers:
        handler.addFilter(_redact_record)


def _redact_record(record: logging.LogRecord) -> bool:
    if _values and record.exc_info:  # a formatter takes the text if there is one
        record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip())
    return True


def _remember(value: str, name: str) -> None:
    if len(value) < MIN_REDACTED:
        return
    if not _values:
        sys.excepthook = _print_redacted
    _values[value] = name


def _print_redacted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
