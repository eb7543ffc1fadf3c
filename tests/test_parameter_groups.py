"""Parameter groups by name: optimizer.groups, no_decay and freeze."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_runs import SMALL, assert_same_run, go_on, lines, stop_after
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from experiments.data import Data
from experiments.directory.checkpoints import Checkpoints
from experiments.errors import UsageError
from experiments.training.models import mlp
from experiments.training.models.images import ConvNet
from experiments.training.objective import Objective
from experiments.training.parameter_groups import freeze, grouped, names_of
from experiments.training.parts import build_optimizer

Compose = Callable[[list[str]], dict[str, Any]]
BOTH = ["optimizer.groups=[{match:2,lr:0.002}]", "optimizer.no_decay=biases_and_norms"]


def objective_of(model: nn.Module) -> Objective:
    return Objective(model, nn.CrossEntropyLoss())


def named_groups(config: dict[str, Any], objective: Objective) -> list[tuple[list[str], Any]]:
    """The first name of each parameter of each group, and the group's options."""
    freeze(config, objective)
    names = names_of(objective)
    return [
        ([names[p][0] for p in group.pop("params")], group)
        for group in grouped(config, objective) or []
    ]


def test_without_the_keys_the_optimizer_is_built_as_ever(compose: Compose) -> None:
    objective = objective_of(mlp(4, [3], 2))
    opt = build_optimizer(compose(["optimizer.weight_decay=0.1"]), objective)
    plain = SGD(objective.model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, fused=True)
    assert opt.state_dict() == plain.state_dict()
    assert grouped(compose([]), objective) is None


def test_groups_come_after_the_rest_each_with_and_then_without_decay(compose: Compose) -> None:
    assert named_groups(compose(BOTH), objective_of(mlp(4, [3], 2))) == [
        (["0.weight"], {}),
        (["0.bias"], {"weight_decay": 0.0}),
        (["2.weight"], {"lr": 0.002}),
        (["2.bias"], {"lr": 0.002, "weight_decay": 0.0}),
    ]


def test_the_first_group_that_matches_counts(compose: Compose) -> None:
    config = compose(["optimizer.groups=[{match:2.bias,lr:1},{match:['*.bias',2],lr:2}]"])
    assert named_groups(config, objective_of(mlp(4, [3], 2))) == [
        (["0.weight"], {}),
        (["2.bias"], {"lr": 1}),
        (["0.bias", "2.weight"], {"lr": 2}),
    ]


def test_biases_and_all_of_a_normalization_are_not_decayed(compose: Compose) -> None:
    model = nn.Sequential(ConvNet(1, 2, [3]), nn.LayerNorm([4, 5]), nn.MultiheadAttention(4, 2))
    config = compose(["optimizer.no_decay=[biases_and_norms,0.head]"])
    [(decayed, _), (spared, options)] = named_groups(config, objective_of(model))
    assert decayed == [
        *("0.stages.0.0.weight", "0.stages.0.3.weight"),
        *("2.in_proj_weight", "2.out_proj.weight"),
    ]
    assert {"0.head.weight", "1.weight", "2.in_proj_bias"} < set(spared)
    assert options == {"weight_decay": 0.0}


def test_the_parameters_of_a_loss_have_names_of_their_own(compose: Compose) -> None:
    loss = nn.CrossEntropyLoss()
    loss.scale = nn.Parameter(torch.ones(()))
    config = compose(["optimizer.groups=[{match:loss.scale,lr:1}]"])
    groups = named_groups(config, Objective(mlp(2, [], 2), loss))
    assert groups == [(["0.weight", "0.bias"], {}), (["loss.scale"], {"lr": 1})]


def test_a_tied_parameter_is_found_by_each_of_its_names(compose: Compose) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    config = compose(["optimizer.freeze=1.weight"])
    assert named_groups(config, objective_of(model)) == [(["0.bias", "1.bias"], {})]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.groups=[{match:head,lr:1}]",
         "optimizer.groups.0.match=head: no parameter has such a name; there is 0.weight, 0.bias,"),
        ("optimizer.freeze=[0.wieght]",
         "optimizer.freeze=0.wieght: no parameter has such a name; did you mean 0.weight?"),
        ("optimizer.no_decay=bn", "optimizer.no_decay=bn: no parameter has such a name; there is"),
        ("optimizer.groups=[{match:0,lr:1},{match:0.bias,lr:2}]",
         "optimizer.groups.1.match=0.bias: all parameters of these names are in an earlier group"),
        ("optimizer.groups=[{match:0,lrr:1}]",
         "optimizer.groups.0: torch.optim.SGD has no option lrr; did you mean lr?"),
        ("optimizer.groups=[{match:0,lr:-1}]",
         "optimizer.groups.0.lr=-1: expected a number above 0"),
        ("optimizer.groups=[{match:0,momentum:0,nesterov:true}]",
         "optimizer.groups.0: Nesterov momentum requires a momentum"),
        ("optimizer.freeze='*'", "optimizer.freeze=*: freezes all parameters"),
    ],
)  # fmt: skip
def test_what_fits_nothing_is_refused_in_one_line(
    override: str, line: str, compose: Compose
) -> None:
    with pytest.raises(UsageError, match=rf"^{re.escape(line)}[^\n]*$"):
        named_groups(compose([override]), objective_of(mlp(4, [3], 2)))


@pytest.mark.parametrize(
    "override",
    ["optimizer.groups=[{match:0}]", "optimizer.groups=[{lr:1}]", "optimizer.groups=head",
     "optimizer.no_decay=true", "optimizer.freeze=[[0]]"],
)  # fmt: skip
def test_a_value_of_another_form_is_refused_where_it_is_composed(
    override: str, compose: Compose
) -> None:
    with pytest.raises(UsageError, match=r"^optimizer\.\w+=.*: expected "):
        compose([override])


def test_an_optimizer_without_weight_decay_cannot_spare_any_of_it(compose: Compose) -> None:
    config = compose(["optimizer.no_decay=biases_and_norms"])
    config["optimizer"] |= {"_target_": "torch.optim.Rprop"}
    for key in ("momentum", "weight_decay", "fused"):
        del config["optimizer"][key]
    with pytest.raises(UsageError, match=r"optimizer.no_decay: .*Rprop has no option weight_decay"):
        grouped(config, objective_of(mlp(4, [3], 2)))


def with_groups(parameters: Iterable[Tensor], lr: float, groups: int) -> Optimizer:
    """An optimizer of one's own with an option that is called groups."""
    rest = [*parameters]
    return SGD([{"params": rest[number::groups]} for number in range(groups)], lr=lr)


def test_a_target_that_takes_such_a_key_itself_is_given_it(compose: Compose) -> None:
    config = compose([])
    config["optimizer"] = {
        "_target_": f"{__name__}.with_groups", "_partial_": True, "lr": 0.1, "groups": 2
    }  # fmt: skip
    opt = build_optimizer(config, objective_of(mlp(4, [3], 2)))
    assert len(opt.param_groups) == 2


class Manual:
    """A step that takes its own optimizer steps."""

    def __init__(self, model: nn.Module, optimizer: Callable[[Any], Optimizer]) -> None:
        self.opt = optimizer(model.parameters())

    def update(self, model: nn.Module, batch: Any) -> Tensor:
        raise NotImplementedError

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        raise NotImplementedError


def test_a_step_with_its_own_optimizers_has_no_groups_of_the_config(compose: Compose) -> None:
    model = mlp(4, [3], 2)
    step = Manual(model, lambda parameters: SGD(parameters, lr=0.1))
    with pytest.raises(UsageError, match=r"^optimizer.no_decay: the step makes its optimizers"):
        build_optimizer(
            compose(["optimizer.no_decay=biases_and_norms"]), Objective(model, nn.Module(), step)
        )


# In a run


def last_model(path: Path) -> dict[str, Tensor]:
    content = Checkpoints(path / "checkpoints").load()
    assert content is not None
    model: dict[str, Tensor] = content["model"]
    return model


def rates(path: Path) -> list[dict[str, float]]:
    """The rates of each log line."""
    found = [json.loads(line) for line in lines(path)]
    return [{k: v for k, v in line.items() if k.startswith("lr")} for line in found if "lr" in line]


def test_frozen_parameters_keep_their_bits_and_the_others_do_not(
    compose: Compose, tiny: Data, tmp_path: Path
) -> None:
    config = compose([*SMALL, "optimizer.freeze=0", "optimizer.weight_decay=0.1"])
    go_on(tmp_path / "run", config, tiny, stop_after(1))
    before = last_model(tmp_path / "run")
    go_on(tmp_path / "run", config, tiny)
    after = last_model(tmp_path / "run")
    assert {name: torch.equal(before[name], after[name]) for name in before} == {
        "0.weight": True, "0.bias": True, "2.weight": False, "2.bias": False
    }  # fmt: skip


def test_a_frozen_batchnorm_that_goes_on_averaging_is_told(
    compose: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    freeze(compose(["optimizer.freeze=stages"]), objective_of(ConvNet(1, 2, [3])))
    assert "optimizer.freeze: stages.0.1, stages.0.4 keep averaging" in capsys.readouterr().err


@pytest.mark.parametrize("scheduler", ["onecycle", "cosine", "linear", "multistep", "plateau"])
@pytest.mark.parametrize("match", ["2", "'*'"])
def test_a_schedule_keeps_the_proportion_of_the_rates(
    match: str, scheduler: str, compose: Compose, tiny: Data, tmp_path: Path
) -> None:
    overrides = [*SMALL, f"scheduler={scheduler}", "trainer.log_every=1"]
    go_on(tmp_path / "plain", compose(overrides), tiny)
    config = compose([*overrides, f"optimizer.groups=[{{match:{match},lr:0.002}}]"])
    go_on(tmp_path / "run", config, tiny)
    key = "lr/1" if match == "2" else "lr"
    for line, plain in zip(rates(tmp_path / "run"), rates(tmp_path / "plain"), strict=True):
        found = line.get(key, line["lr"])  # not logged where it is the same: 0
        assert found == pytest.approx(plain["lr"] / 10)
        assert line["lr"] in (plain["lr"], found)


def test_a_stopped_run_with_groups_goes_on_exactly(
    compose: Compose, tiny: Data, tmp_path: Path
) -> None:
    config = compose([*SMALL, "optimizer=adamw", "optimizer.freeze=0.bias", *BOTH])
    go_on(tmp_path / "unbroken", config, tiny)
    while go_on(tmp_path / "run", config, tiny, stop_after(3)) == "interrupted":
        pass
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")
