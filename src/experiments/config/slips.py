"""One-line error messages for mistakes in a config or on the command line, with the nearest key."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from experiments.config.names import flatten, suggest
from experiments.config.schema import GROUPS, NAMED, SCHEMA
from experiments.config.search_path import list_options
from experiments.errors import UsageError

# the packages that bring options of Hydra's own groups
PLUGINS = {
    "colorlog": "hydra-colorlog",
    "joblib": "hydra-joblib-launcher",
    "ray": "hydra-ray-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
}


def explain(error: Exception, directories: Iterable[Path], overrides: list[str]) -> UsageError:
    """Convert an error of Hydra, OmegaConf or YAML to one line, with the nearest key or option as a
    hint.

    Hydra 1.3 gives no hints. Its messages are matched to add one; an unknown message is passed on
    unchanged.
    """
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    lines = [" ".join(str(cause).split()) for cause in chain]
    text, directories = " | ".join(lines), list(directories)
    line = (
        _explain_choice(text, list_options(directories), overrides)
        or _explain_list(text)
        or _explain_key(text, chain, directories)
        or _explain_syntax(chain[-1], lines, directories)
        or _explain_interpolation(chain[-1], lines[-1])
    )
    if line is None:
        where = " ".join(overrides) or getattr(chain[-1], "full_key", None)
        reason = lines[-1].partition(" full_key: ")[0] or type(error).__name__
        line = f"{where}: {reason}" if where else reason
    return UsageError(line)


def _explain_choice(
    text: str, options: Mapping[str, list[str]], overrides: list[str]
) -> str | None:
    """The line for a mistake in choosing an option of a group."""
    if found := re.search(r"Could not override '([^'.]+)'", text):
        group = found[1].partition("@")[0]
        given = [override for override in overrides if override.startswith(found[1] + "=")]
        if "Key '" in text or (given and group in options):
            if group not in options:
                return None
            return f"{given[0]}: the config chooses no {found[1]} yet; write +{given[0]}"
        return f"{found[1]}: no such group{suggest(found[1], options)}"
    if found := re.search(r"ould not (?:find|load) '([\w/-]+)/([^'/]*)'", text):
        group, name = found.groups()
        hint = suggest(name, options.get(group, []), group + "=")
        if group.startswith("hydra/") and name in PLUGINS:
            hint = f"; it needs a package: pip install {PLUGINS[name]}"
        return f"{group}={name}: no such option{hint}"
    twice = r"(\S+) appears more than once in the final defaults list|Multiple values for ([^\s.]+)"
    if found := re.search(twice, text):
        group = found[1] or found[2]
        for override in overrides:
            if override.startswith(f"+{group}="):
                return f"{override}: the config has chosen its {group} already; leave the + out"
    return None


def _explain_list(text: str) -> str | None:
    """The line for a list in a file where named parts are expected."""
    # OmegaConf 2.3's words, and 2.4's
    words = "Cannot merge (DictConfig with ListConfig|incompatible container types)"
    found = re.search(rf"In '([^']+)'.*{words}", text)
    if found is None:
        return None
    return (
        f"{found[1].replace('/', '=', 1)}: a list stands where a mapping is expected; options of "
        f"{', '.join(NAMED)} are chosen under defaults, as - override /metrics: [accuracy]"
    )


def _explain_key(text: str, chain: list[BaseException], directories: list[Path]) -> str | None:
    """The line for a key that does not exist, or has several values or none."""
    if found := re.search(r"Could not override '([^'@]+)'.*Key '([^']+)' (is )?not in", text):
        hint = _option_with(found[1], chain, directories) or _nearest_key(
            found[1], found[2], chain, list_options(directories)
        )
        return f"{found[1]}: unknown key{hint}"
    if found := re.search(r"Could not delete from config. '([^']+)' does not exist", text):
        return f"~{found[1]}: the config has no {found[1]}, or it is null; leave it out"
    if found := re.search(r"Could not override '([^']+)'", text):
        return f"{found[1]}: cannot be set: it is no key of a mapping"
    if found := re.search(r"An item is already at '([^']+)'", text):
        return f"+{found[1]}: the config has this key already; leave the + out"
    if found := re.search(r"Ambiguous value for argument '([^=]+)=([^']*)'", text):
        key, values = found.groups()
        return f"{key}={values}: several values need --multirun; a list is [{values}]"
    if found := re.search(r"Missing mandatory value: (\S+)", text):
        key = getattr(chain[-1], "full_key", None) or found[1]
        return f"{key}=???: this key has no value yet; give it one"
    return None


def _explain_syntax(error: BaseException, lines: list[str], directories: list[Path]) -> str | None:
    """The line for a text that is no override, a file that is no YAML, or one that is missing."""
    if isinstance(error, OverrideParseException):
        reason = (
            lines[-1]
            .partition(" See https:")[0]
            .removeprefix(f"Error parsing override '{error.override}' ")
        )
        return (
            f"{error.override}: not an override ({reason}); write key=value, quoted for the shell"
        )
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):
        reason = error.problem or error.context or "cannot be read"
        return f"{mark.name}: line {mark.line + 1}, column {mark.column + 1}: not YAML ({reason})"
    if found := re.search(r"Cannot find primary config '([^']+)'", lines[0]):
        names = [file.stem for folder in directories for file in folder.glob("*.yaml")]
        hint = (
            suggest(found[1], names, show_all=False) or "; leave it out, or give its --config-dir"
        )
        return f"--config-name {found[1]}: no such file{hint}"
    return None


def _explain_interpolation(error: BaseException, text: str) -> str | None:
    """The line for an interpolation that cannot be resolved."""
    key = getattr(error, "full_key", None)
    given = f"{key}=" if key else ""
    if found := re.search(r"Interpolation key '([^']+)' not found full_key: (\S+)", text):
        return f"{found[2]}=${{{found[1]}}}: there is no key {found[1]}"
    if found := re.search(r"Unsupported interpolation type (\S+)", text):
        from experiments.config.resolvers import BUILT_IN

        hint = suggest(found[1], [*BUILT_IN, "oc.env", "oc.decode", "hydra", "now"], show_all=False)
        hint = hint or "; register it in a module and pass --resolvers MODULE"
        return f"{given}${{{found[1]}:...}}: there is no resolver {found[1]}{hint}"
    if found := re.search(r"Environment variable '(\w+)' not found", text):
        return f"{given}${{oc.env:{found[1]}}}: the environment variable {found[1]} is not set"
    if found := re.search(r"raised while resolving interpolation: (.*?) full_key: ", text):
        return f"{key}: {found[1]}" if key else found[1]
    return None


def _option_with(key: str, chain: list[BaseException], directories: Iterable[Path]) -> str | None:
    """The hint for a key that only options have which are not chosen; None for any other key."""
    group, _, name = key.rpartition(".")
    groups = [group] if group else list(GROUPS)
    config = node_of(chain)
    if not group and any(name in (config or {}).get(other, {}) for other in groups):
        return None
    for file in sorted(file for folder in directories for file in folder.glob("*/*.yaml")):
        defines = rf"(?m)^{re.escape(name)}[ ]*:"
        if file.parent.name in groups and re.search(defines, file.read_text(errors="replace")):
            return f"; {file.parent.name}={file.stem} has {file.parent.name}.{name}"
    return None


def node_of(chain: Iterable[BaseException]) -> Any:
    """The node of the config in which OmegaConf did not find a key, if any."""
    return next((node for cause in chain if (node := getattr(cause, "parent_node", None))), None)


def _nearest_key(
    key: str, name: str, chain: list[BaseException], options: Mapping[str, list[str]]
) -> str:
    """The hint for an unknown key: the nearest one of the config, else of the schema."""
    parent_key = key.rpartition(".")[0]
    if key == "scheduler.every":  # for any schedule, also where its YAML does not have it
        return f"; add it with +{key}=step or +{key}=epoch"
    if not parent_key:
        matches = [known for known in SCHEMA if known.endswith("." + key)]
        if matches:
            return f"; did you mean {matches[0]}?"
        return suggest(key, ["resume", "sweep", *options, *SCHEMA, *map(str, node_of(chain) or ())])
    for cause in chain:
        parent = getattr(cause, "parent_node", None)
        if isinstance(parent, DictConfig):
            if name == key.rpartition(".")[2]:
                return suggest(name, (str(sibling) for sibling in parent), parent_key + ".")
            root = OmegaConf.to_container(parent._get_root())
            assert isinstance(root, dict)
            return suggest(key, (known for known, _ in flatten(root)), show_all=False)
    return suggest(key, SCHEMA)
