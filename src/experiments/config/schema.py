"""The schema: the rules for config values.

Imports no torch, so that a mistake on the command line is reported at once.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from experiments.config.cuda import cuda_devices
from experiments.config.names import flatten, format_value, suggest
from experiments.config.rules import (
    AUTO,
    COUNT,
    FLAG,
    FRACTION,
    SIZE,
    TAG,
    TEXT,
    Rule,
    choice,
    either,
    list_of,
    number,
    or_null,
)
from experiments.errors import UsageError

# Of the rows of a file, where a text is a file of its own.
SHARE = either(number(above=0, below=1), COUNT)
TARGET = Rule("a mapping with a _target_", lambda v: isinstance(v, dict) and "_target_" in v)
FUNCTIONS = list_of(TARGET)
# Names of parameters or modules, in which * stands for anything; layers may have numbers.
NAME = Rule("a text or number", either(TEXT, number(low=0, whole=True)).accepts)
PATTERNS = either(NAME, list_of(NAME))
GROUP = Rule(
    "mappings with match and options, as {match: head, lr: 0.01}",
    lambda v: isinstance(v, dict) and len(v) > 1 and PATTERNS.accepts(v.get("match")),
)
SCHEMA: Mapping[str, Rule] = {
    "seed": number(low=0, below=2**63, whole=True),
    "data.path": or_null(TEXT),
    "data.as_bytes": FLAG,
    "data.images": FLAG,
    "data.length": COUNT,
    "data.rows": number(low=10, whole=True),
    "data.resize": or_null(list_of(COUNT, length=2)),
    "data.grayscale": FLAG,
    "data.memory": FLAG,
    "data.transform": or_null(FUNCTIONS),
    "data.target": or_null(TEXT),
    "data.numbers": or_null(list_of(TEXT)),
    "data.categories": or_null(list_of(TEXT)),
    "data.classes": or_null(FLAG),
    "data.missing": choice("refuse", "fill"),
    "data.group": or_null(TEXT),
    "data.split": choice("first", "last", "random", "stratified", "grouped"),
    "data.valid": or_null(either(SHARE, TEXT)),
    "data.test": or_null(either(SHARE, TEXT)),
    "data.split_seed": number(low=0, below=2**63, whole=True),
    "data.folds": or_null(number(low=2, whole=True)),
    "data.fold": number(low=0, whole=True),
    "loader.batch_size": COUNT,
    "loader.shuffle": FLAG,
    "loader.drop_last": FLAG,
    "loader.num_workers": number(low=0, whole=True),
    "model.in_features": SIZE,
    "model.hidden": list_of(COUNT),
    "model.out_features": SIZE,
    "model.dropout": number(low=0, below=1),
    "model.activation": choice("relu", "gelu", "silu", "tanh"),
    "model.normalization": or_null(choice("batch", "layer")),
    "model.in_channels": SIZE,
    "model.channels": list_of(COUNT),
    "model.image": or_null(list_of(COUNT, length=3)),
    "model.blocks": COUNT,
    "model.vocabulary": SIZE,
    "model.length": COUNT,
    "model.width": COUNT,
    "model.layers": COUNT,
    "model.heads": COUNT,
    "model.code": COUNT,
    "model.numbers": either(AUTO, number(low=0, whole=True)),
    "model.cardinalities": either(AUTO, list_of(COUNT)),
    "model.embedding": COUNT,
    "model.latent": COUNT,
    "model.noise": COUNT,
    "model.target_scale": or_null(either(AUTO, list_of(number(), length=2))),
    "loss.label_smoothing": FRACTION,
    "loss.weight": or_null(either(choice("balanced"), list_of(number()))),
    "optimizer.lr": number(above=0),
    "optimizer.momentum": number(low=0, below=1),
    "optimizer.weight_decay": number(low=0),
    "optimizer.betas": list_of(number(low=0, below=1), length=2),
    "optimizer.eps": number(low=0),
    "optimizer.fused": or_null(FLAG),
    "optimizer.groups": or_null(list_of(GROUP)),
    "optimizer.no_decay": or_null(PATTERNS),
    "optimizer.freeze": or_null(PATTERNS),
    "scheduler.every": or_null(choice("step", "epoch")),
    "scheduler.warmup": FRACTION,
    "scheduler.final": FRACTION,
    "scheduler.milestones": list_of(FRACTION),
    "scheduler.gamma": number(above=0, high=1),
    "scheduler.factor": number(above=0, below=1),
    "scheduler.patience": number(low=0, whole=True),
    "scheduler.threshold": number(low=0),
    "scheduler.min_lr": number(low=0),
    "scheduler.max_lr": either(number(above=0), list_of(number(above=0))),
    "scheduler.pct_start": FRACTION,
    "scheduler.cycle_momentum": FLAG,
    "trainer.epochs": COUNT,
    "trainer.steps": or_null(COUNT),
    "trainer.evaluate_every": or_null(COUNT),
    "trainer.test": choice("best", "last"),
    "trainer.device": choice("auto", "cpu", "cuda"),
    "trainer.threads": COUNT,
    "trainer.log_every": COUNT,
    "trainer.clip_norm": or_null(number(above=0)),
    "trainer.accumulate": COUNT,
    "trainer.compile": FLAG,
    "trainer.precision": choice("float32", "bfloat16"),
    "trainer.matmul_precision": choice("highest", "high", "medium"),
    "trainer.monitor": TAG,
    "trainer.mode": or_null(choice("min", "max")),
    "metrics.auroc.num_classes": SIZE,
    "metrics.macro_f1.average": choice("macro", "micro", "weighted"),
    "metrics.macro_f1.num_classes": SIZE,
    "metrics.mean_iou.num_classes": SIZE,
    "metrics.multilabel_f1.average": choice("macro", "micro", "weighted"),
    "metrics.multilabel_f1.num_labels": SIZE,
    "augment.crop.size": COUNT,
    "augment.flip.probability": FRACTION,
    "augment.mixup.alpha": number(above=0, high=2),
    "augment.mixup.classes": or_null(SIZE),
    "augment.noise.std": number(low=0),
    "augment.shift.pixels": COUNT,
    "callbacks.early_stopping.min_delta": number(low=0),
    "callbacks.early_stopping.patience": COUNT,
    "callbacks.ema.decay": number(above=0, below=1),
    "checkpoint.every_steps": or_null(COUNT),
    "checkpoint.every_seconds": or_null(number(above=0)),
    "checkpoint.keep": COUNT,
    "init.run": or_null(TEXT),
    "init.checkpoint": choice("best", "last"),
    "init.file": or_null(TEXT),
    "init.match": or_null(PATTERNS),
    "init.exclude": or_null(PATTERNS),
}
# Keys that configs saved by earlier versions lack, with the values that say what those did.
ADDED_LATER: Mapping[str, Any] = {
    "trainer.compile": False,
    "trainer.precision": "float32",
    "trainer.matmul_precision": "highest",
    "trainer.mode": None,
    "trainer.steps": None,
    "trainer.evaluate_every": None,
    "trainer.test": "last",
}
# Root nodes that a config may lack, with the values that say what is done then.
OPTIONAL_ROOTS: Mapping[str, Any] = {
    "step": {"_target_": "experiments.training.objective.supervised"},
    "metrics": {"accuracy": {"_target_": "experiments.training.accuracy.Accuracy"}},
    "augment": {},
    "callbacks": {},
    "init": {"run": None, "checkpoint": "best", "file": None, "match": None, "exclude": None},
}
# Root nodes that hold any number of named nodes, each with a _target_.
NAMED = ("metrics", "augment", "callbacks")
# Keys that options of these targets have got since, with the values that say what they did before:
# a config with such a value and one without the key are the same.
NEW_OPTIONS: Mapping[str, tuple[str, Any]] = {
    "optimizer.groups": ("torch.optim.", None),
    "optimizer.no_decay": ("torch.optim.", None),
    "optimizer.freeze": ("torch.optim.", None),
}
# Nodes without a _target_, which only accept the keys of the schema; the others accept any key.
CLOSED = ("trainer", "checkpoint", "init")
GROUPS = (
    *("data", "loader", "model", "loss", "optimizer", "scheduler", "trainer"),
    *("step", "metrics", "augment", "callbacks"),
)
ROOTS = ("seed", "init", "checkpoint", *GROUPS)  # the keys of a config that a run is built from
# Root key for notes: anything below it is saved with the run, and nothing refers to it.
NOTES = "extra"
# The targets that the rules of a group, or of one key, were written for; a name that ends with a
# dot stands for all of a module. Any other target takes what it likes under the same names.
WRITTEN_FOR: Mapping[str, tuple[str, ...]] = {
    "data": ("experiments.data.", "experiments.recipes."),
    "loader": ("experiments.data.loaders.",),
    "model": ("experiments.training.models.", "experiments.recipes.", "torch.nn.Linear"),
    "loss": ("torch.nn.CrossEntropyLoss",),
    "loss.weight": ("torch.nn.CrossEntropyLoss", "torch.nn.NLLLoss"),
    "step": ("experiments.training.objective.",),
    "metrics": ("torchmetrics.classification.", "experiments.recipes."),
    "augment": ("experiments.data.augment.",),
    "callbacks": ("experiments.training.callbacks.",),
    "optimizer": ("torch.optim.SGD", "torch.optim.Adam", "torch.optim.AdamW"),
    "optimizer.lr": ("torch.optim.",),
    "optimizer.momentum": ("torch.optim.",),
    "optimizer.weight_decay": ("torch.optim.",),
    "optimizer.groups": ("torch.optim.",),
    "optimizer.no_decay": ("torch.optim.",),
    "optimizer.freeze": ("torch.optim.",),
    "scheduler": ("experiments.training.schedules.", "torch.optim.lr_scheduler.OneCycleLR"),
}
FOR_ANY_TARGET = ("loader.batch_size",)  # the keys that are read by more than the target


def rule_for(key: str, config: Mapping[Any, Any]) -> Rule | None:
    """The rule of a key in a config, None if its group builds something the rule is not about."""
    group, _, rest = key.partition(".")
    if key not in SCHEMA or key in FOR_ANY_TARGET or group not in WRITTEN_FOR:
        return SCHEMA.get(key)
    node = config[group].get(rest.partition(".")[0]) if group in NAMED else config[group]
    target = str(node.get("_target_")) if isinstance(node, Mapping) else ""
    known = WRITTEN_FOR.get(key, WRITTEN_FOR[group])
    fits = any(target.startswith(name) if name[-1] == "." else target == name for name in known)
    return SCHEMA[key] if fits else None


def check_value(key: str, value: object) -> None:
    """Raise UsageError if `value` violates the rule of `key`; keys without a rule pass."""
    rule = SCHEMA.get(key)
    if rule is not None and not rule.accepts(value):
        # as of a resolver: the text 45 would otherwise be told as if it were the number
        written = (
            repr(value) if isinstance(value, str) and is_number(value) else format_value(value)
        )
        raise UsageError(f"{key}={written}: expected {rule.words}")


def is_number(text: str) -> bool:
    """Whether a text reads as a finite number."""
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False


def with_added(config: Mapping[Any, Any]) -> dict[Any, Any]:
    """A saved config with the keys of ADDED_LATER that it lacks, in the order of the schema."""
    complete = with_optional(config)
    for key, value in ADDED_LATER.items():
        group, _, name = key.partition(".")
        node = complete.get(group)
        if isinstance(node, dict) and name not in node:
            names = [known.partition(".")[2] for known in SCHEMA if known.startswith(f"{group}.")]
            node = {**node, name: value}
            complete[group] = {name: node[name] for name in [*names, *node] if name in node}
    return complete


def with_optional(config: Mapping[Any, Any]) -> dict[Any, Any]:
    """A config with the nodes of OPTIONAL_ROOTS, and all keys of those that are closed."""
    complete = dict(config)
    for root, node in OPTIONAL_ROOTS.items():
        found = complete.setdefault(root, node)
        if root in CLOSED and isinstance(found, dict):
            complete[root] = {**node, **found}
    return complete


def nodes_with_target(config: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The nodes that something is built from, by dotted key."""
    for group in GROUPS:
        if group in NAMED:
            yield from ((f"{group}.{name}", node) for name, node in config[group].items())
        elif group not in CLOSED:
            yield group, config[group]


def own_roots(config: Mapping[Any, Any]) -> set[Any]:
    """The root keys of a config that nothing is built from and that are no notes."""
    return config.keys() - {*ROOTS, NOTES}


def check(config: dict[Any, Any], referred: Collection[str] | None = None) -> dict[str, Any]:
    """Check a resolved config against the schema and return it; raises UsageError.

    referred: the root keys that something refers to, which may have any name; None accepts all.
    """
    for root in own_roots(config):
        if root == "hydra" or (referred is not None and root not in referred):
            hint = suggest(str(root), {*ROOTS, *(referred or ())} - {root}, show_all=False)
            raise UsageError(
                f"{root}: unknown key"
                + (hint or f", and nothing refers to it; a note belongs under {NOTES}.{root}")
            )
    for root in ROOTS:
        if root in OPTIONAL_ROOTS and root not in config:
            continue
        if root not in config or (root != "seed" and not isinstance(config[root], dict)):
            expected = (
                SCHEMA[root].words if root in SCHEMA else f"a mapping with the keys of {root}"
            )
            raise UsageError(f"{root}={format_value(config.get(root))}: expected {expected}")
    config = with_optional(config)
    for key, value in flatten(config):
        node, _, name = key.partition(".")
        if node in CLOSED and key not in SCHEMA:
            names = [known.partition(".")[2] for known in SCHEMA if known.startswith(node + ".")]
            raise UsageError(
                f"{key}={format_value(value)}: unknown key{suggest(name, names, node + '.')}"
            )
        if rule_for(key, config) is not None:
            check_value(key, value)
    for key in SCHEMA:
        if (
            key.partition(".")[0] in CLOSED
            and key.partition(".")[2] not in config[key.partition(".")[0]]
        ):
            raise UsageError(f"{key} is missing: expected {SCHEMA[key].words}")
    for key in FOR_ANY_TARGET:
        group, _, name = key.partition(".")
        if name not in config[group]:
            raise UsageError(f"{key} is missing: expected {SCHEMA[key].words}")
    for group, node in nodes_with_target(config):
        if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
            raise UsageError(
                f"{group}._target_ is missing: name the class or function that builds it"
            )
    if config["trainer"]["device"] == "cuda" and cuda_devices() == 0:
        raise UsageError(
            "trainer.device=cuda: no CUDA device or no CUDA build of torch here; use cpu or auto"
        )
    return config
