"""Parameter groups by name: the keys groups, no_decay and freeze of a config's optimizer."""

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from experiments.config.names import format_value, suggest
from experiments.config.schema import rule_for
from experiments.directory.trust import locate
from experiments.errors import UsageError
from experiments.training.build import build

# Keys of the optimizer's node that are not passed to its target, unless that has such a parameter.
KEYS = ("groups", "no_decay", "freeze")
# What no_decay takes instead of a pattern, or among them.
BIASES_AND_NORMS = "biases_and_norms"
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
MAX_SHOWN = 12  # names in a message


def own_keys(node: Mapping[str, Any]) -> dict[str, Any]:
    """Those of KEYS in an optimizer's node that are set and that its target does not take."""
    given = {key: node[key] for key in KEYS if node.get(key) is not None}
    if not given:
        return {}
    try:
        taken = inspect.signature(locate(str(node["_target_"]))).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):  # nothing that can be called, which building it will tell
        return given
    return {key: value for key, value in given.items() if key not in taken}


def for_target(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with an optimizer's node as its target takes it."""
    node = config["optimizer"]
    left_out = {key for key in KEYS if key in node and node[key] is None} | own_keys(node).keys()
    if not left_out:
        return dict(config)
    return {**config, "optimizer": {key: node[key] for key in node if key not in left_out}}


def freeze(config: Mapping[str, Any], objective: nn.Module) -> None:
    """Set requires_grad of the parameters that `optimizer.freeze` names to False.

    objective: has the model, the loss and the step as attributes. Says whose buffers go on
    changing. Raises UsageError if a pattern matches nothing, or if nothing is left to train.
    """
    patterns = own_keys(config["optimizer"]).get("freeze")
    if patterns is None:
        return
    names = names_of(objective)
    frozen = {p for p, _ in matching("optimizer.freeze", patterns, names)}
    for p in frozen:
        p.requires_grad_(False)
    if not any(p.requires_grad for p in names):
        raise UsageError(
            f"optimizer.freeze={format_value(patterns)}: freezes all parameters, so there is "
            "nothing to train; leave some out"
        )
    averaging = [
        name.removeprefix("model.")
        for name, module in objective.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        and module.track_running_stats
        and frozen.issuperset(module.parameters())
        and any(True for _ in module.parameters())
    ]
    if averaging:
        print(
            f"optimizer.freeze: {listed(averaging)} {'keep' if averaging[1:] else 'keeps'} "
            "averaging the batches in training: running means and variances are no parameters",
            file=sys.stderr,
        )


def grouped(config: Mapping[str, Any], objective: nn.Module) -> list[dict[str, Any]] | None:
    """The parameter groups of an optimizer, with their options; None without any of KEYS.

    First the parameters of no group, then those of each of `optimizer.groups`, in which the first
    match counts; of each the parameters with weight decay come first. All are in the order of the
    model, the loss and the step; frozen ones are in none. Raises UsageError for a pattern or an
    option that fits nothing.
    """
    keys = own_keys(config["optimizer"])
    if not keys:
        return None
    names = {p: known for p, known in names_of(objective).items() if p.requires_grad}
    options: list[dict[str, Any]] = [{}]
    members: list[dict[Tensor, None]] = [dict.fromkeys(names)]
    for number, group in enumerate(checked_groups(keys.get("groups"))):
        key = f"optimizer.groups.{number}.match"
        found = [p for p, _ in matching(key, group["match"], names_of(objective))]
        members.append({p: None for p in found if p in members[0]})
        if not members[-1]:
            raise UsageError(
                f"{key}={format_value(group['match'])}: all parameters of these names are in an "
                "earlier group or frozen; put it first or leave it out"
            )
        for p in found:
            members[0].pop(p, None)
        options.append({name: value for name, value in group.items() if name != "match"})
    spared = without_decay(keys.get("no_decay"), objective)
    found_groups = []
    for own, parameters in zip(options, members, strict=True):
        for is_spared in (False, True):
            chosen = [p for p in names if p in parameters and (p in spared) is is_spared]
            if chosen:
                decay = {"weight_decay": 0.0} if is_spared else {}
                found_groups.append({"params": chosen, **own, **decay})
    check_options(config, keys, found_groups)
    return found_groups


def check_manual(config: Mapping[str, Any]) -> None:
    """Raise UsageError for groups of a step that makes its optimizers itself."""
    for key in own_keys(config["optimizer"]):
        if key != "freeze":
            raise UsageError(
                f"optimizer.{key}: the step makes its optimizers itself, and may give each "
                "parameter groups; leave it out"
            )


def checked_groups(groups: Any) -> Sequence[dict[str, Any]]:
    """The value of `optimizer.groups`. Raises UsageError unless it is a list of mappings."""
    if groups is None:
        return []
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise UsageError(
            f"optimizer.groups={format_value(groups)}: expected a list of mappings, such as "
            "[{match: head, lr: 0.01}]"
        )
    for number, group in enumerate(groups):
        if "match" not in group or len(group) == 1 or "params" in group:
            raise UsageError(
                f"optimizer.groups.{number}: expected match, with patterns of names, and options "
                "of the optimizer, such as lr"
            )
    return groups


def check_options(
    config: Mapping[str, Any], keys: Mapping[str, Any], groups: list[dict[str, Any]]
) -> None:
    """Raise UsageError for an option of a group that the optimizer does not accept. torch checks
    what its constructor is given, and groups may hold anything: so each is given to it once.
    """
    for number, group in enumerate(checked_groups(keys.get("groups"))):
        own = {name: value for name, value in group.items() if name != "match"}
        check_option(config, f"optimizer.groups.{number}", own, groups)
    if any(group.get("weight_decay") == 0.0 for group in groups) and "no_decay" in keys:
        check_option(config, "optimizer.no_decay", {"weight_decay": 0.0}, groups)


def check_option(
    config: Mapping[str, Any], key: str, options: dict[str, Any], groups: list[dict[str, Any]]
) -> None:
    """Raise UsageError if an optimizer of some groups cannot be built with these options."""
    plain = for_target(config)
    parameters = [p for group in groups for p in group["params"]]
    known = getattr(build(plain, "optimizer", parameters), "defaults", options)
    for name, value in options.items():
        if name not in known:
            target = config["optimizer"]["_target_"]
            raise UsageError(f"{key}: {target} has no option {name}{suggest(name, known)}")
        rule = rule_for(f"optimizer.{name}", config)
        if rule is not None and not rule.accepts(value):
            raise UsageError(f"{key}.{name}={format_value(value)}: expected {rule.words}")
    try:
        build({**plain, "optimizer": {**plain["optimizer"], **options}}, "optimizer", parameters)
    except UsageError as error:
        target, _, reason = str(error).partition(": ")
        raise UsageError(f"{key}: {reason or target}") from None


def without_decay(patterns: Any, objective: nn.Module) -> set[Tensor]:
    """The parameters that `optimizer.no_decay` names."""
    if patterns is None:
        return set()
    words = words_of("optimizer.no_decay", patterns)
    found: set[Tensor] = set()
    if BIASES_AND_NORMS in words:
        found = set(biases_and_norms(objective))
        words = [word for word in words if word != BIASES_AND_NORMS]
    return found | {p for p, _ in matching("optimizer.no_decay", words, names_of(objective))}


def biases_and_norms(objective: nn.Module) -> Iterator[Tensor]:
    """The parameters that are commonly not decayed: biases, those of normalizations, and all of
    fewer than two dimensions.
    """
    for module in objective.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.ndim < 2 or "bias" in name or isinstance(module, NORMS):
                yield p


def names_of(objective: nn.Module) -> dict[Tensor, list[str]]:
    """All names of each parameter, in order: the model's own, then `loss.` and `step.` with those
    of the loss and the step. A tied parameter has several.
    """
    found: dict[Tensor, list[str]] = {}
    for name, p in objective.named_parameters(remove_duplicate=False):
        part, _, rest = name.partition(".")
        prefix = {"model": "", "loss_func": "loss."}.get(part, f"{part}.")
        found.setdefault(p, []).append(f"{prefix}{rest}")
    return found


def matching(
    key: str, patterns: Any, names: Mapping[Tensor, list[str]]
) -> list[tuple[Tensor, str]]:
    """The parameters that one of the patterns matches, with the name that it does, in order.

    A pattern is a name in which `*` stands for anything, or a module's, which stands for all its
    parameters. key: the key of the config. Raises UsageError for one that matches nothing.
    """
    words = words_of(key, patterns)
    known = [name for own in names.values() for name in own]
    for word in words:
        if not any(fits(name, word) for name in known):
            modules = {name.rpartition(".")[0] for name in known} - {""}
            hint = suggest(word, {*known, *modules}, show_all=False)
            raise UsageError(
                f"{key}={word}: no parameter has such a name{hint or f'; there is {listed(known)}'}"
            )
    found = ((p, name) for p, own in names.items() for name in own)
    first = {p: name for p, name in found if any(fits(name, word) for word in words)}
    return list(first.items())


def words_of(key: str, patterns: Any) -> list[str]:
    """The patterns of a key, one or a list, as texts: layers of a Sequential are named by numbers.
    Raises UsageError for anything else.
    """
    words = patterns if isinstance(patterns, list) else [patterns]
    if not all(isinstance(word, str | int) and not isinstance(word, bool) for word in words):
        raise UsageError(
            f"{key}={format_value(patterns)}: expected patterns of names, such as [head, '*.bias']"
        )
    return [str(word) for word in words]


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern matches a parameter's name, or that of a module that it belongs to."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def listed(names: Sequence[str], most: int = MAX_SHOWN) -> str:
    """Some names for a message, of many the first ones."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
