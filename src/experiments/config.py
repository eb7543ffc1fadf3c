"""The schema: which values a config may hold, and one clear line for each that it may not.

Nothing here imports torch, so that a slip on the command line is told at once.
"""

import hashlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.errors import UsageError

PACKAGE = Path(__file__).parent
# A wheel carries conf/ inside the package; a clone and an editable install have it at the top.
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parents[1] / "conf"


class Rule(NamedTuple):
    """What a value must be, in words that follow "expected", and as a test."""

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

    return Rule(f"a {'whole ' * whole}number {bounds}", accepts)


def choice(*words: str) -> Rule:
    """One of a few words."""
    return Rule("one of " + ", ".join(words), lambda value: value in words)


def list_of(item: Rule, length: int | None = None) -> Rule:
    """A list whose items all obey one rule, of a given length where it matters."""

    def accepts(value: object) -> bool:
        fits = isinstance(value, list) and length in (None, len(value))
        return fits and all(map(item.accepts, value))  # type: ignore[call-overload]

    return Rule(
        f"a list, [...], of {'' if length is None else f'{length} times '}{item.words}", accepts
    )


def or_null(rule: Rule) -> Rule:
    """What a rule accepts, or null."""
    return Rule(f"{rule.words}, or null", lambda value: value is None or rule.accepts(value))


LONGEST_NAME = 200  # bytes; file systems allow 255, and suffixes come to it

COUNT = number(low=1, whole=True)
FRACTION = number(low=0, high=1)
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("a text", lambda value: isinstance(value, str) and value != "")

SCHEMA: Mapping[str, Rule] = {
    "seed": number(low=0, below=2**63, whole=True),
    "data.path": or_null(TEXT),
    "data.as_bytes": FLAG,
    "loader.batch_size": COUNT,
    "loader.shuffle": FLAG,
    "loader.drop_last": FLAG,
    "loader.num_workers": number(low=0, whole=True),
    "model.in_features": COUNT,
    "model.hidden": list_of(COUNT),
    "model.out_features": COUNT,
    "model.dropout": number(low=0, below=1),
    "loss.label_smoothing": FRACTION,
    "optimizer.lr": number(above=0),
    "optimizer.momentum": number(low=0, below=1),
    "optimizer.weight_decay": number(low=0),
    "optimizer.betas": list_of(number(low=0, below=1), length=2),
    "optimizer.eps": number(low=0),
    "optimizer.fused": or_null(FLAG),
    "scheduler.warmup": FRACTION,
    "scheduler.final": FRACTION,
    "scheduler.max_lr": number(above=0),
    "scheduler.pct_start": FRACTION,
    "scheduler.cycle_momentum": FLAG,
    "trainer.epochs": COUNT,
    "trainer.device": choice("auto", "cpu", "cuda"),
    "trainer.threads": COUNT,
    "trainer.log_every": COUNT,
    "trainer.clip_norm": or_null(number(above=0)),
    "trainer.accumulate": COUNT,
    "trainer.compile": FLAG,
    "trainer.precision": choice("float32", "bfloat16"),
    "trainer.matmul_precision": choice("highest", "high", "medium"),
    "trainer.monitor": choice("loss/valid", "accuracy/valid"),
    "checkpoint.every_steps": or_null(COUNT),
    "checkpoint.every_seconds": or_null(number(above=0)),
    "checkpoint.keep": COUNT,
}
# What a _target_ builds may take any key; these nodes have ours alone.
CLOSED = ("trainer", "checkpoint")
GROUPS = ("data", "loader", "model", "loss", "optimizer", "scheduler", "trainer")


def check_value(key: str, value: object) -> None:
    """Raise UsageError when `value` breaks the rule of `key`; a key without a rule passes."""
    rule = SCHEMA.get(key)
    if rule is not None and not rule.accepts(value):
        raise UsageError(f"{key}={show(value)}: expected {rule.words}")


def show(value: object) -> str:
    """A value as one would write it on the command line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return "[" + ",".join(show(item) for item in value) + "]"
    return str(value)


def validate(job: DictConfig) -> dict[str, Any]:
    """Resolve a composed config and check it, without Hydra's own node, against the schema.

    Returns the resolved config as plain dicts, lists and scalars, which is what a run saves
    and what it is built from. Raises UsageError for the first value that cannot be.
    """
    job = OmegaConf.masked_copy(job, [str(key) for key in job if key != "hydra"])
    try:
        config = OmegaConf.to_container(job, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise explain(error, [], []) from None
    assert isinstance(config, dict)
    checked = check(config)
    if checked["data"].get("path") is not None:
        # so that the saved config means the same from another directory
        checked["data"]["path"] = str(Path(checked["data"]["path"]).absolute())
    return checked


def check(config: dict[Any, Any]) -> dict[str, Any]:
    """Check a resolved config against the schema; returns it, or raises UsageError."""
    known_roots = ["seed", "checkpoint", *GROUPS]
    for root in config:
        if root not in known_roots:
            raise UsageError(f"{root}: unknown key{nearest(str(root), known_roots)}")
    for root in known_roots:
        if root not in config or (root != "seed" and not isinstance(config[root], dict)):
            raise UsageError(f"{root}={show(config.get(root))}: expected the keys of a {root}")
    for key, value in leaves(config):
        node, _, name = key.partition(".")
        if node in CLOSED and key not in SCHEMA:
            names = [known.partition(".")[2] for known in SCHEMA if known.startswith(node + ".")]
            raise UsageError(f"{key}={show(value)}: unknown key{nearest(name, names, node + '.')}")
        check_value(key, value)
    for key in SCHEMA:
        if (
            key.partition(".")[0] in CLOSED
            and key.partition(".")[2] not in config[key.partition(".")[0]]
        ):
            raise UsageError(f"{key} is missing: expected {SCHEMA[key].words}")
    for group in GROUPS:
        if group != "trainer" and not isinstance(config[group].get("_target_"), str):
            raise UsageError(f"{group}._target_ is missing: name what builds the {group}")
    if config["trainer"]["device"] == "cuda" and cuda_devices() == 0:
        raise UsageError(
            "trainer.device=cuda: no CUDA device or no CUDA build of torch here; use cpu or auto"
        )
    return config


def leaves(node: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every (dotted key, value) of a nested config; a list counts as one value."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def overridden(config: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """The keys that overrides name with their values in a resolved config, and the groups with
    their options; the seed where nothing was overridden.
    """
    values = dict(leaves(config))
    found = {}
    for override in overrides:
        key, _, option = override.lstrip("+~").partition("=")
        value = values.get(key, option)
        found[key] = value if isinstance(value, bool | int | float) else show(value)
    return found or {"seed": values["seed"]}


def run_name(overrides: str) -> str:
    """A run directory's name out of overrides, `loader.batch_size=32,optimizer.lr=0.1`: one level,
    without what a shell or a file system stumbles over, and never the same for two.
    """
    if not overrides:
        return "defaults"
    name = re.sub(r"[^\w.,=+\-\[\]]", "_", overrides)
    if name == overrides and name.strip(".") and len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(overrides.encode()).hexdigest()[:8]
    return f"{name.encode()[:LONGEST_NAME].decode(errors='ignore')}-{digest}"


# for the launchers that ask Hydra for the name: hydra.sweep.subdir
OmegaConf.register_new_resolver("run_name", run_name, replace=True)


def nearest(word: str, words: Iterable[str], prefix: str = "") -> str:
    """`; did you mean X?` for the word most like it, or the list of what there is."""
    import difflib

    words = sorted({known for known in words if not known.startswith("_")})
    close = difflib.get_close_matches(word, words, n=1)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    few = 0 < len(words) <= 12
    return f"; there is {', '.join(prefix + known for known in words)}" if few else ""


def cuda_devices() -> int:
    """How many CUDA devices the driver counts, 0 where torch is no CUDA build; imports no torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return 0
    version = Path(spec.origin).with_name("version.py")
    if re.search(r"^cuda\b.*=\s*None", version.read_text(), re.MULTILINE):
        return 0
    import ctypes

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    ready = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if ready else 0


def groups(directories: Iterable[Path]) -> dict[str, list[str]]:
    """The options of every group found in config directories: `{"optimizer": ["adam", ...]}`."""
    options: dict[str, set[str]] = {}
    for directory in directories:
        for file in directory.glob("*/*.yaml"):
            options.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(names) for group, names in sorted(options.items())}


def explain(error: Exception, directories: Iterable[Path], overrides: list[str]) -> UsageError:
    """One line for what Hydra or OmegaConf found wrong, naming the nearest key or option.

    Hydra 1.3 has no hints of its own. Its wording is matched only to add one, and is passed on
    as it is where it is not known.
    """
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    lines = [" ".join(str(cause).split()) for cause in chain]
    text = " | ".join(lines)
    options = groups(directories)
    if found := re.search(r"Could not override '([^'@]+)'.*Key '([^']+)' (is )?not in", text):
        return UsageError(
            f"{found[1]}: unknown key{_nearest_key(found[1], found[2], chain, options)}"
        )
    if found := re.search(r"Could not override '([^']+)'", text):
        return UsageError(f"{found[1]}: no such group{nearest(found[1], options)}")
    if found := re.search(r"ould not find '([\w/-]+)/([^'/]+)'", text):
        group, name = found.groups()
        hint = nearest(name, options.get(group, []), group + "=")
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
        return UsageError(f"--config-name {found[1]}: there is no such file; leave it out")
    if found := re.search(r"Interpolation key '([^']+)' not found full_key: (\S+)", text):
        return UsageError(f"{found[2]}=${{{found[1]}}}: there is no key {found[1]}")
    if found := re.search(r"Missing mandatory value: (\S+)", text):
        key = getattr(chain[-1], "full_key", None) or found[1]
        return UsageError(f"{key}=???: this key has no value yet; give it one")
    return UsageError(f"{' '.join(overrides)}: {lines[-1] or type(error).__name__}")


def _nearest_key(
    key: str, name: str, chain: list[BaseException], options: Mapping[str, list[str]]
) -> str:
    """The hint for an unknown key: its siblings where OmegaConf names them, else the schema."""
    above = key.rpartition(".")[0]
    if not above:
        homes = [known for known in SCHEMA if known.endswith("." + key)]
        if homes:
            return f"; did you mean {homes[0]}?"
        return nearest(key, ["resume", "sweep", *options, *SCHEMA])
    for cause in chain:
        parent = getattr(cause, "parent_node", None)
        if isinstance(parent, DictConfig):
            return nearest(name, (str(sibling) for sibling in parent), above + ".")
    return nearest(key, SCHEMA)


# What composing can raise for a slip of the person's (ValueError: an override such as "=3").
CONFIG_ERRORS = (HydraException, OmegaConfBaseException, ValueError)
