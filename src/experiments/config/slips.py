"""One-line error messages for mistakes in a config or on the command line, with the nearest key."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.config.names import suggest
from experiments.config.schema import GROUPS, SCHEMA
from experiments.errors import UsageError


def list_options(directories: Iterable[Path]) -> dict[str, list[str]]:
    """The options of every group in config directories: `{"optimizer": ["adam", ...]}`."""
    options: dict[str, set[str]] = {}
    for directory in directories:
        for file in directory.glob("*/*.yaml"):
            options.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(names) for group, names in sorted(options.items())}


def explain(error: Exception, directories: Iterable[Path], overrides: list[str]) -> UsageError:
    """Convert an error of Hydra or OmegaConf to one line, with the nearest key or option as a hint.

    Hydra 1.3 gives no hints. Its messages are matched to add one; an unknown message is passed on
    unchanged.
    """
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    lines = [" ".join(str(cause).split()) for cause in chain]
    text = " | ".join(lines)
    options = list_options(directories)
    if found := re.search(r"Could not override '([^'@]+)'.*Key '([^']+)' (is )?not in", text):
        hint = _option_with(found[1], chain, directories) or _nearest_key(
            found[1], found[2], chain, options
        )
        return UsageError(f"{found[1]}: unknown key{hint}")
    if found := re.search(r"Could not override '([^']+)'", text):
        return UsageError(f"{found[1]}: no such group{suggest(found[1], options)}")
    if found := re.search(r"ould not find '([\w/-]+)/([^'/]+)'", text):
        group, name = found.groups()
        hint = suggest(name, options.get(group, []), group + "=")
        return UsageError(f"{group}={name}: no such option{hint}")
    if found := re.search(r"Ambiguous value for argument '([^=]+)=([^']*)'", text):
        key, values = found.groups()
        return UsageError(f"{key}={values}: several values need --multirun; a list is [{values}]")
    if isinstance(error, OverrideParseException):
        reason = (
            lines[-1]
            .partition(" See https:")[0]
            .removeprefix(f"Error parsing override '{error.override}' ")
        )
        return UsageError(
            f"{error.override}: not an override ({reason}); write key=value, quoted for the shell"
        )
    if found := re.search(r"Cannot find primary config '([^']+)'", text):
        return UsageError(f"--config-name {found[1]}: no such file; leave it out")
    if found := re.search(r"Interpolation key '([^']+)' not found full_key: (\S+)", text):
        return UsageError(f"{found[2]}=${{{found[1]}}}: there is no key {found[1]}")
    if found := re.search(r"Missing mandatory value: (\S+)", text):
        key = getattr(chain[-1], "full_key", None) or found[1]
        return UsageError(f"{key}=???: this key has no value yet; give it one")
    return UsageError(f"{' '.join(overrides)}: {lines[-1] or type(error).__name__}")


def _option_with(key: str, chain: list[BaseException], directories: Iterable[Path]) -> str | None:
    """The hint for a key that only options have which are not chosen; None for any other key."""
    group, _, name = key.rpartition(".")
    groups = [group] if group else list(GROUPS)
    config = next((node for cause in chain if (node := getattr(cause, "parent_node", None))), None)
    if not group and any(name in (config or {}).get(other, {}) for other in groups):
        return None
    for file in sorted(file for folder in directories for file in folder.glob("*/*.yaml")):
        defines = rf"(?m)^{re.escape(name)}[ ]*:"
        if file.parent.name in groups and re.search(defines, file.read_text(errors="replace")):
            return f"; {file.parent.name}={file.stem} has {file.parent.name}.{name}"
    return None


def _nearest_key(
    key: str, name: str, chain: list[BaseException], options: Mapping[str, list[str]]
) -> str:
    """The hint for an unknown key, from its siblings if OmegaConf names them, else the schema."""
    parent_key = key.rpartition(".")[0]
    if not parent_key:
        matches = [known for known in SCHEMA if known.endswith("." + key)]
        if matches:
            return f"; did you mean {matches[0]}?"
        return suggest(key, ["resume", "sweep", *options, *SCHEMA])
    for cause in chain:
        parent = getattr(cause, "parent_node", None)
        if isinstance(parent, DictConfig):
            return suggest(name, (str(sibling) for sibling in parent), parent_key + ".")
    return suggest(key, SCHEMA)


# What composing raises for a usage error (ValueError: an override such as "=3").
CONFIG_ERRORS = (HydraException, OmegaConfBaseException, ValueError)
