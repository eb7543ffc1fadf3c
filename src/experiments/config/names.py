"""Formatting and parsing the names of keys, values, options, runs and moved modules."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# in the environment of a sweep and of its workers, where --keep-changed was given
KEEP_CHANGED = "EXPERIMENTS_KEEP_CHANGED"
# the same for the modules of --resolvers, separated by commas
RESOLVER_MODULES = "EXPERIMENTS_RESOLVERS"
MAX_NAME_BYTES = 200  # file systems allow 255, and suffixes are added

# What Hydra takes as a value without quotes, and what has a meaning in a value.
PLAIN = r"(?a:[\w./:+\-%@?*|$, ]*)"
STRUCTURE = re.compile(r"[\[\](){}'\"\\]")
PATHS = ("data.path", "init.run", "init.file", "hydra.run.dir", "hydra.sweep.dir")

# Old and new names of moved modules, which users' code and saved configs may still use.
MOVED: Mapping[str, str] = {
    "experiments.checkpoint": "experiments.directory.checkpoints",
    "experiments.fit": "experiments.training.fit",
    "experiments.loader": "experiments.data.loaders",
    "experiments.models": "experiments.training.models",
    "experiments.schedulers": "experiments.training.schedules",
    "experiments.streams": "experiments.data.streams",
}


# Functions of torch.nn.functional and the modules of torch.nn that call them with the same options.
LOSS_MODULES: Mapping[str, str] = {
    "binary_cross_entropy": "BCELoss",
    "binary_cross_entropy_with_logits": "BCEWithLogitsLoss",
    "cross_entropy": "CrossEntropyLoss",
    "hinge_embedding_loss": "HingeEmbeddingLoss",
    "huber_loss": "HuberLoss",
    "kl_div": "KLDivLoss",
    "l1_loss": "L1Loss",
    "mse_loss": "MSELoss",
    "multi_margin_loss": "MultiMarginLoss",
    "multilabel_margin_loss": "MultiLabelMarginLoss",
    "multilabel_soft_margin_loss": "MultiLabelSoftMarginLoss",
    "nll_loss": "NLLLoss",
    "poisson_nll_loss": "PoissonNLLLoss",
    "smooth_l1_loss": "SmoothL1Loss",
    "soft_margin_loss": "SoftMarginLoss",
}


def loss_as_module(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose loss, where it is a function of torch.nn.functional, is the module that calls
    that function.
    """
    node = config.get("loss")
    if not isinstance(node, dict):
        return config
    module, _, name = str(node.get("_target_")).rpartition(".")
    if module != "torch.nn.functional" or name not in LOSS_MODULES:
        return config
    options = {key: value for key, value in node.items() if key != "_partial_"}
    return {**config, "loss": {**options, "_target_": f"torch.nn.{LOSS_MODULES[name]}"}}


def resolver_modules() -> list[str]:
    """The modules of --resolvers, which this process or its parent was given."""
    return [module for module in os.environ.get(RESOLVER_MODULES, "").split(",") if module]


def rename_moved_targets(node: Any) -> Any:
    """A nested config with the old module names in its `_target_`s replaced."""
    if isinstance(node, dict):
        return {
            key: current_target(value) if key == "_target_" else rename_moved_targets(value)
            for key, value in node.items()
        }
    return [rename_moved_targets(item) for item in node] if isinstance(node, list) else node


def current_target(target: Any) -> Any:
    """A dotted name, with the new name of its module if that has moved."""
    module, _, name = str(target).rpartition(".")
    return f"{MOVED[module]}.{name}" if module in MOVED else target


def format_value(value: object) -> str:
    """A value as written on the command line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return "[" + ",".join(format_value(item) for item in value) + "]"
    return str(value)


def quote_value(word: str) -> str:
    """An override `key=value` with Hydra's quotes around a value that Hydra takes only in them,
    such as `sweep=été`; around each of several values, and unchanged if it needs none.

    A value with brackets, quotes or a backslash is a path if its key is one and Hydra cannot read
    it otherwise; that of any other key is left as it is.
    """
    key, _, value = word.partition("=")
    if re.fullmatch(PLAIN, value):
        return word
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Quote, QuotedString
    from hydra.errors import HydraException

    parts = value.split(",")
    if re.search(STRUCTURE, value):
        if key not in PATHS or len(parts) > 1 or value[0] in "'\"[{":
            return word
        try:
            OverridesParser.create().parse_override(word)
            return word
        except HydraException:
            pass
    quoted = [
        part if re.fullmatch(PLAIN, part) else QuotedString(part, Quote.single).with_quotes()
        for part in parts
    ]
    return f"{key}={','.join(quoted)}"


def flatten(node: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every (dotted key, value) of a nested config; a list counts as one value."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def overridden(config: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """The overridden keys with their values in a resolved config, and the overridden groups with
    their options; the seed if nothing was overridden.
    """
    values = dict(flatten(config))
    found = {}
    for override in overrides:
        key, _, option = override.lstrip("+~").partition("=")
        value = values.get(key, option)
        found[key] = value if isinstance(value, bool | int | float) else format_value(value)
    return found or {"seed": values["seed"]}


def run_name(overrides: str) -> str:
    """A run directory's name from its overrides, `loader.batch_size=32,optimizer.lr=0.1`: a single
    path component, unique, without characters that are special to a shell or a file system.
    """
    if not overrides:
        return "defaults"
    name = re.sub(r"[^\w.,=+\-\[\]]", "_", overrides)
    if name == overrides and name.strip(".") and len(name.encode()) <= MAX_NAME_BYTES:
        return name
    import hashlib  # it loads OpenSSL

    digest = hashlib.sha256(overrides.encode()).hexdigest()[:8]
    return f"{name.encode()[:MAX_NAME_BYTES].decode(errors='ignore')}-{digest}"


def suggest(word: str, words: Iterable[str], prefix: str = "", *, show_all: bool = True) -> str:
    """The hint `; did you mean X?` for the closest word, else, with `show_all`, a list of up to 12
    valid words.
    """
    import difflib

    words = sorted({known for known in words if not known.startswith("_")})
    close = difflib.get_close_matches(word, words, n=1)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    few = show_all and 0 < len(words) <= 12
    return f"; there is {', '.join(prefix + known for known in words)}" if few else ""
