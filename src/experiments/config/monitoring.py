"""Whether more of the monitored number is better, as far as a config says. Imports no torch."""

from collections.abc import Iterable, Mapping
from typing import Any

from experiments.errors import UsageError

# The metrics that the options of conf/metrics name; any other says it itself once it is built.
MAXIMIZED = (
    "experiments.training.accuracy.Accuracy",
    "torchmetrics.classification.MulticlassF1Score",
    "torchmetrics.classification.MulticlassAUROC",
    "torchmetrics.classification.MultilabelF1Score",
    "torchmetrics.classification.MultilabelAUROC",
    "torchmetrics.classification.MulticlassJaccardIndex",
    "torchmetrics.regression.R2Score",
)
MINIMIZED = (
    "torchmetrics.regression.MeanAbsoluteError",
    "torchmetrics.regression.MeanSquaredError",
    "experiments.training.metrics.Perplexity",
)


def maximizes(config: Mapping[str, Any]) -> bool | None:
    """Whether a larger value of `trainer.monitor` is better; None if only its metric knows. What is
    no metric, the loss or a part of it, is minimised.

    config: resolved, nested or with dotted keys
    """
    flat = "trainer.monitor" in config
    trainer = config.get("trainer", {})
    monitor = str(config["trainer.monitor"] if flat else trainer.get("monitor", "loss/valid"))
    mode = config.get("trainer.mode") if flat else trainer.get("mode")
    if mode is not None:
        return bool(mode == "max")
    name = monitor.rpartition("/")[0]
    if flat:
        target = config.get(f"metrics.{name}._target_")
    else:
        target = config.get("metrics", {}).get(name, {}).get("_target_")
    if name == "accuracy" and target is None:  # of runs before metrics could be chosen
        return True
    names = config if flat else {f"metrics.{key}._target_" for key in config.get("metrics", {})}
    parts = [key.split(".")[1] for key in names if str(key).startswith("metrics.")]
    if target is None and any(name.startswith(f"{part}_") for part in parts):
        return None  # one of several numbers of a metric
    if target is None or target in MINIMIZED:
        return False
    return True if target in MAXIMIZED else None


def require_mode(config: Mapping[str, Any], why: str) -> bool:
    """The same where it must be known before the metric is built. Raises UsageError."""
    found = maximizes(config)
    if found is None:
        monitor = config.get("trainer.monitor") or config["trainer"]["monitor"]
        raise UsageError(
            f"trainer.monitor={monitor}: {why} cannot tell whether more is better; set "
            "trainer.mode=max or trainer.mode=min"
        )
    return found


def monitored_first(tags: Iterable[str], monitor: str) -> list[str]:
    """The numbers of a split by tag: the loss, the monitored one, and the others in their order."""
    name = monitor.rpartition("/")[0]
    ranks = {"loss": 0, name: 1}
    return sorted(tags, key=lambda tag: ranks.get(tag.rpartition("/")[0], 2))


def mode_of(record: Mapping[str, Any]) -> bool:
    """Whether more of a run's monitored number is better, from its record."""
    found = maximizes(record["config"])
    return bool(record.get("mode") == "max") if found is None else found
