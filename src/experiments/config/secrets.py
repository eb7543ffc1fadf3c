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

    texts: unresolved values with the path of their keys.
    """
    found: dict[str, str] = {}
    for path, text in texts:
        for resolver, name in re.findall(IN_CONFIG, text):
            named = [name, *(str(key) for key in path[-1:])]
            secret = resolver == "secret" or any(re.search(LOOKS_SECRET, word) for word in named)
            if secret and os.environ.get(name):
                found[os.environ[name]] = name
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


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


def mask() -> None:
    """Let `${secret:NAME}` and what looks like a secret resolve to `${secret:NAME}`, in a process
    that prints a config and builds nothing.
    """
    from omegaconf.resolvers.oc import env as value_of

    def env(name: str, *default: Any, _node_: Any) -> Any:
        named = (name, str(_node_._key()))
        if name in os.environ and any(re.search(LOOKS_SECRET, word) for word in named):
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
