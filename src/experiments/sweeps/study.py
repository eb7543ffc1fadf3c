"""The study of a search, stored in the sweep's directory, and what it was made with.

A search that continues has to be the same search: trials that ran with other data, epochs or
bounds, or that were ranked by another metric, would mislead the sampler. Imports no torch.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from experiments.config.compose import validate
from experiments.config.monitoring import require_mode
from experiments.config.names import current_target, flatten, format_value
from experiments.config.schema import ADDED_LATER, NEW_OPTIONS, OPTIONAL_ROOTS
from experiments.directory.identity import differences, identify
from experiments.directory.paths import display_path
from experiments.directory.record import COMPLETED, read_record
from experiments.errors import UsageError
from experiments.results.rows import run_directories

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

    Space = Mapping[str, BaseDistribution]

STUDY = "study.journal"
MADE_WITH = "made_with"  # attribute of the study
NAMED = 3  # differences that an error names
# Beginnings of keys that change what is stored or how fast, but not what a trial's value means.
IRRELEVANT = (
    "checkpoint.",
    "trainer.log_every",
    "trainer.device",
    "trainer.threads",
    "trainer.compile",
    "loader.num_workers",
)


@dataclass(frozen=True)
class Setting:
    """What a search is made with.

    space: the distribution of each searched key, as JSON. configs: the config that the trials
    share, with dotted keys; one for each option of each searched group.
    """

    space: dict[str, str]
    configs: dict[str, dict[str, Any]]

    @property
    def monitor(self) -> str:
        """The metric that is optimized. Raises UsageError if there is more than one."""
        monitors = {str(config.get("trainer.monitor")) for config in self.configs.values()}
        if len(monitors) > 1 or "trainer.monitor" in self.space:
            raise UsageError(
                "trainer.monitor: a search needs one metric, but it has several; "
                "fix it, as in trainer.monitor=loss/valid"
            )
        return monitors.pop()

    @property
    def maximize(self) -> bool:
        """Whether more of it is better. Raises UsageError if the configs do not say, or if there is
        more than one.
        """
        config = next(iter(self.configs.values()))
        return require_mode({**config, "trainer.monitor": self.monitor}, "a search")

    def differences(self, before: "Setting") -> Iterator[str]:
        """A phrase for each difference to an earlier setting."""
        for key in {**before.space, **self.space}:
            old, new = before.space.get(key), self.space.get(key)
            if old != new:
                yield f"{key}={format_distribution(old)} (now {format_distribution(new)})"
        if before.space != self.space:
            return  # values that refer to a searched key differ for this reason alone
        named = set()
        for label in self.configs:
            old_config, new_config = before.configs.get(label, {}), self.configs[label]
            options = {key: value for key, (_, value) in NEW_OPTIONS.items()}
            implied = {**ADDED_LATER, **dict(flatten(OPTIONAL_ROOTS)), **options}
            added = {key: implied[key] for key in implied if key in new_config}
            old_config = {**added, **old_config}
            for key in {**old_config, **new_config}:
                old, new = format_shared(key, old_config), format_shared(key, new_config)
                if old != new and key not in named:
                    named.add(key)
                    yield f"{key}={old} (now {new})"


def describe(
    compose: Callable[[list[str]], DictConfig],
    fixed: list[str],
    space: "Space",
) -> Setting:
    """The setting of a search.

    compose: composes overrides. fixed: the overrides that all trials share.
    """
    from optuna.distributions import CategoricalDistribution, distribution_to_json

    def config(values: dict[str, Any]) -> dict[str, Any]:
        composed = compose([*fixed, *assignments(values)])
        return dict(flatten(validate(composed, allow_unused=True)))

    first = first_values(space)
    base = config(first)
    configs = {
        f"{key}={option}": config({**first, key: option})
        for key, distribution in space.items()
        if isinstance(distribution, CategoricalDistribution) and key.lstrip("+") not in base
        for option in distribution.choices  # of a group
    }
    return Setting(
        {key: distribution_to_json(distribution) for key, distribution in space.items()},
        {label: relevant(config, space) for label, config in (configs or {"": base}).items()},
    )


def relevant(config: dict[str, Any], space: "Space") -> dict[str, Any]:
    """What all trials share of a config with dotted keys, as it is after a round trip in JSON."""
    shared = {
        key: value
        for key, value in config.items()
        if not is_searched(key, space) and not key.startswith(IRRELEVANT)
    }
    return dict(json.loads(json.dumps(shared)))


def assignments(values: Mapping[str, Any]) -> list[str]:
    """Values of searched keys as overrides."""
    return [f"{key}={format_value(value)}" for key, value in values.items()]


def first_values(space: "Space") -> dict[str, Any]:
    """A value for each searched key: that which stands for its distribution."""
    return {key: first_value(distribution) for key, distribution in space.items()}


def first_value(distribution: "BaseDistribution") -> Any:
    """The value that stands for a searched key: its first choice or its lower bound."""
    choices = getattr(distribution, "choices", None)
    return choices[0] if choices else getattr(distribution, "low")  # noqa: B009


def format_shared(key: str, config: dict[str, Any]) -> str:
    """A key's value in a config, for comparison and for an error."""
    if key not in config:
        return "(missing)"
    value = config[key]
    return format_value(current_target(value) if key.endswith("._target_") else value)


def is_searched(key: str, searched: Iterable[str]) -> bool:
    """Whether a key of the config has its value from a searched key."""
    return key in {name.lstrip("+") for name in searched}


def format_distribution(text: str | None) -> str:
    """A distribution from JSON in the syntax of the command line."""
    if text is None:
        return "(not searched)"
    found = json.loads(text)
    values = found["attributes"]
    if "choices" in values:
        return ",".join(format_value(choice) for choice in values["choices"])
    kind = "interval" if found["name"].startswith("Float") else "range"
    bounds = f"{kind}({values['low']},{values['high']})"
    return f"tag(log,{bounds})" if values.get("log") else bounds


def open_study(file: Path, setting: Setting, *, seed: int, prune: bool) -> "optuna.Study":
    """Create the study stored in a journal file, or load it to continue the search.

    The trials that a stopped search left running are enqueued again: their run directories have
    the checkpoints. Raises UsageError if the study was made with another setting.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    minimize = not setting.maximize
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(file)))
    known = sum(summary.n_trials for summary in optuna.get_all_study_summaries(storage))
    study = optuna.create_study(
        storage=storage,
        study_name="search",
        load_if_exists=True,
        # shifted by the known trials: a continued search must not draw the same numbers again
        sampler=optuna.samplers.TPESampler(seed=seed + known),
        pruner=optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner(),
        direction="minimize" if minimize else "maximize",
    )
    check_setting(study, setting, file.parent)
    states = optuna.trial.TrialState
    for trial in study.get_trials(states=(states.RUNNING,)):
        study.tell(trial.number, state=states.FAIL)
        study.enqueue_trial(trial.params)
    return study


def check_trials(
    directory: Path, setting: Setting, read_data: Callable[[], Mapping[str, str]]
) -> None:
    """Raise UsageError if a trial has ended with other code, data or versions than those of now,
    which the setting does not know. What only some options of a searched group use is compared
    with the trials that use it.

    read_data: the fingerprints of the rows by split.
    """
    found = [identify(config) for config in setting.configs.values()]
    code = {name: digest for now in found for name, digest in now["code"].items()}
    versions = {name: version for now in found for name, version in now["versions"].items()}
    init = {name: digest for now in found for name, digest in now.get("init", {}).items()}
    data_is_fixed = not any(key.lstrip("+").partition(".")[0] == "data" for key in setting.space)
    read_once = functools.cache(read_data)
    for path in run_directories(directory):
        record = read_record(path)
        if record["state"] not in COMPLETED:
            continue
        rows = read_once() if data_is_fixed and record.get("data") else {}
        changes = differences(
            {**record, "code": shared(record.get("code", {}), code),
             "versions": shared(record.get("versions", {}), versions)},
            {"code": shared(code, record.get("code", {})),
             "versions": shared(versions, record.get("versions", {})), "data": rows, "init": init},
        )  # fmt: skip
        if changes:
            raise UsageError(
                f"{display_path(directory)}: {changes[0]} since its search began, and its trials "
                "would mislead; use another sweep= for a new search, or --keep-changed"
            )


def shared(these: Mapping[str, str], those: Mapping[str, str]) -> dict[str, str]:
    """The entries of these whose key those have, too."""
    return {key: value for key, value in these.items() if key in those}


def check_setting(study: "optuna.Study", setting: Setting, directory: Path) -> None:
    """Store the setting in a study that has none; else compare it. A study of version 0.1.0 has
    none, so that only what its trials know is compared.

    Raises UsageError if they differ.
    """
    saved = study.user_attrs.get(MADE_WITH)
    if saved is not None:
        differences = list(setting.differences(Setting(**saved)))
    else:
        differences = list(differences_to_trials(study, setting))
    if differences:
        named = ", ".join(differences[:NAMED])
        more = len(differences) - NAMED
        raise UsageError(
            f"{display_path(directory)}: its search began with {named}"
            f"{f' and {more} more' if more > 0 else ''}; "
            "use another sweep= for a new search, or the same settings"
        )
    if saved is None:
        study.set_user_attr(MADE_WITH, vars(setting))


def differences_to_trials(study: "optuna.Study", setting: Setting) -> Iterator[str]:
    """The differences between a setting and a study that does not know its own."""
    from optuna.distributions import (
        CategoricalDistribution,
        distribution_to_json,
        json_to_distribution,
    )

    direction = "maximize" if setting.maximize else "minimize"
    if study.direction.name.lower() != direction:
        metric = "accuracy/valid" if direction == "minimize" else "loss/valid"
        yield f"trainer.monitor={metric} (now {setting.monitor})"
    for trial in study.get_trials(deepcopy=False)[-1:]:
        for key, before in trial.distributions.items():
            now = setting.space.get(key)
            # Optuna accepts other bounds, but no other choices
            categorical = isinstance(before, CategoricalDistribution)
            if now and categorical and json_to_distribution(now) != before:
                old = format_distribution(distribution_to_json(before))
                yield f"{key}={old} (now {format_distribution(now)})"
