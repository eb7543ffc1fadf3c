"""Optimizers record their steps for a profiler, and only while one is active."""

import pytest
import torch
from torch.autograd.profiler import record_function
from torch.profiler import profile

from experiments.training import lean_optim


@pytest.fixture(autouse=True)
def installed() -> None:
    lean_optim.install()
    lean_optim.install()  # as a worker does for each of its runs


def profiled_names() -> set[str]:
    """The events that a profiler records of one optimizer step."""
    parameter = torch.zeros(2, requires_grad=True)
    opt = torch.optim.SGD([parameter], lr=0.1)
    with profile() as profiled:
        parameter.sum().backward()
        opt.step()
        opt.zero_grad()
    return {event.key for event in profiled.key_averages()}


def test_a_profiler_records_the_names_of_steps() -> None:
    assert {"Optimizer.step#SGD.step", "Optimizer.zero_grad#SGD.zero_grad"} <= profiled_names()


def test_to_look_for_the_file_of_every_module_does_not_import_the_compiler() -> None:
    assert not hasattr(lean_optim.LazyDynamo(lean_optim.DYNAMO), "__file__")


def test_without_a_profiler_nothing_is_recorded() -> None:
    with record_function("step") as entered:
        assert entered.record is None


def test_a_label_used_under_a_profiler_can_be_reused_without_one() -> None:
    label = record_function("label")
    with profile() as profiled, label:
        pass
    with label:
        assert label.record is None
    assert [event.count for event in profiled.key_averages() if event.key == "label"] == [1]


def test_a_label_decorates_a_function() -> None:
    @record_function("double")
    def double(x: int) -> int:
        return 2 * x

    with profile() as profiled:
        assert double(3) == 6
    assert double(4) == 8
    assert [event.count for event in profiled.key_averages() if event.key == "double"] == [1]
