"""Metrics over a whole split."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassF1Score

from experiments.errors import UsageError
from experiments.training.metrics import Perplexity, Running, as_metric, maximizes

LOGITS = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(50) % 3


def over_batches(metric: Any, size: int = 20) -> float:
    """The value of a metric that gets the rows in batches."""
    running = Running({"it": as_metric("it", metric)})
    for outputs, targets in zip(LOGITS.split(size), TARGETS.split(size), strict=True):
        running.update(outputs, targets)
    return running.compute("valid")["it/valid"]


def spread(outputs: Tensor, targets: Tensor) -> Tensor:
    """A number that is no mean over batches."""
    return outputs.max() - outputs.min()


def test_a_function_gets_the_outputs_and_targets_of_the_whole_split() -> None:
    assert over_batches(spread) == pytest.approx(float(LOGITS.max() - LOGITS.min()))


def test_a_metric_of_torchmetrics_is_that_of_the_whole_split_each_time() -> None:
    metric = MulticlassF1Score(3, average="macro")
    whole = float(metric(LOGITS, TARGETS))
    metric.reset()
    assert over_batches(metric) == over_batches(metric, 7) == pytest.approx(whole)


def test_the_perplexity_is_e_to_the_cross_entropy_of_what_counts() -> None:
    expected = float(cross_entropy(LOGITS, TARGETS).exp())
    assert over_batches(Perplexity()) == pytest.approx(expected, rel=1e-6)


def test_a_value_that_is_no_number_is_refused() -> None:
    with pytest.raises(UsageError, match=r"metrics.it: its value is a tensor of shape \(3,\)"):
        over_batches(MulticlassF1Score(3, average=None))


def test_a_function_that_returns_nothing_is_refused_and_an_object_may_have_no_number() -> None:
    with pytest.raises(UsageError, match=r"metrics\.it: its function returns None"):
        over_batches(lambda outputs, targets: None)
    perplexity = Running({"it": Perplexity()})
    perplexity.update(LOGITS, torch.full_like(TARGETS, -100))
    assert perplexity.compute("valid") == {}


def test_the_metric_says_what_is_better_unless_the_config_does() -> None:
    metrics = {"f1": MulticlassF1Score(3), "spread": as_metric("spread", spread)}
    assert maximizes("f1/valid", None, metrics)
    assert not maximizes("f1/valid", "min", metrics)
    assert not maximizes("loss/valid", None, metrics)
    with pytest.raises(UsageError, match=r"set trainer\.mode=max or trainer\.mode=min"):
        maximizes("spread/valid", None, metrics)
