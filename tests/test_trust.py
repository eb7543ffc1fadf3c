"""Untrusted run directories: nothing that they name or contain is executed."""

import importlib
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from saved_runs import SMALL, call, go_on, stop_after
from test_checkpoint import Bomb, plant
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from experiments import __main__ as entrypoint
from experiments import evaluate, job, load_run, reproduce
from experiments.config import schema
from experiments.config.compose import CONF
from experiments.config.search_path import list_options
from experiments.data import Data
from experiments.directory.checkpoints import Checkpoints, serialize
from experiments.directory.git import git_state
from experiments.directory.trust import check_names, check_objects
from experiments.errors import UsageError

Compose = Callable[[list[str]], dict[str, Any]]

COMMANDS: dict[str, Callable[..., int]] = {
    "resume": lambda run, *more: call(entrypoint.main, f"resume={run}", *more),
    "reproduce": lambda run, *more: call(
        reproduce.main, run, "--into", run.with_name("again"), *more
    ),
    "evaluate": lambda run, *more: call(evaluate.main, run, *more),
    "evaluate last": lambda run, *more: call(evaluate.main, run, "--checkpoint", "last", *more),
}


@pytest.fixture(scope="module")
def config(compose: Compose) -> dict[str, Any]:
    return compose(SMALL)


@pytest.fixture(scope="module")
def honest(config: dict[str, Any], tiny: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its first epoch."""
    run = tmp_path_factory.mktemp("honest") / "run"
    go_on(run, config, tiny, stop_after(7))
    return run


@pytest.fixture
def run(honest: Path, tiny: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `honest` that tests make hostile; also the working directory of the commands."""
    monkeypatch.setattr(job, "load_data", lambda config: tiny)
    shutil.copytree(honest, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    # makes modules in the run directory importable
    monkeypatch.syspath_prepend(tmp_path / "run")
    (tmp_path / "run" / "evil.py").write_text(
        "from pathlib import Path\n"
        "from torch.nn import Linear as Model\n"
        "Path(__file__).with_name('executed').touch()\n"
    )
    return tmp_path / "run"


def refused(run: Path, capsys: pytest.CaptureFixture[str], command: str) -> str:
    """Run a command; check that it fails with one line and executes nothing; returns the line."""
    before = set(run.rglob("*"))
    capsys.readouterr()
    code = COMMANDS[command](run)
    output = capsys.readouterr()
    assert code == 2, output
    assert output.err.count("\n") == 1, output.err
    assert output.out == ""
    assert not (run / "executed").exists()
    # resume has locked the run when it detects the problem, and records the error in it
    assert set(run.rglob("*")) - before <= {run / "error.txt"}
    return output.err


def with_node(config: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """A copy of a config with the value of a dotted key replaced."""
    changed: dict[str, Any] = json.loads(json.dumps(config))
    node = changed
    *path, last = key.split(".")
    for name in path:
        node = node.setdefault(name, {})
    node[last] = value
    return changed


HOSTILE: dict[str, tuple[str, object]] = {
    "os.system": ("model", {"_target_": "os.system", "command": "touch executed"}),
    "builtins.eval": ("model", {"_target_": "builtins.eval", "_args_": ["open('executed', 'w')"]}),
    "builtins.open": ("model", {"_target_": "builtins.open", "_args_": ["executed", "w"]}),
    "a file written": (
        "loss",
        {"_target_": "pathlib.Path.write_text", "_args_": ["executed", "x"]},
    ),
    "a module in the directory": ("model._target_", "evil.Model"),
    "the whole of torch": ("model", {"_target_": "torch.load", "f": "executed"}),
    "torch.hub.load": ("model", {"_target_": "torch.hub.load", "_args_": ["evil", "Model"]}),
    "a module inside torch.nn": (
        "model",
        {
            "_target_": "torch.nn.modules.module.warnings.sys.modules.os.system",
            "_args_": ["touch executed"],
        },
    ),
    "torch.nn's way to os": (
        "model",
        {"_target_": "torch.nn.parallel.distributed.os.system", "_args_": ["touch executed"]},
    ),
    "torch.nn's way to torch.load": (
        "model",
        {"_target_": "torch.nn.modules.module.torch.load", "f": "executed"},
    ),
    "torch.optim's modules": (
        "optimizer",
        {"_target_": "torch.optim.optimizer.functools.partial", "_args_": ["print"]},
    ),
    "a scheduler's modules": (
        "scheduler",
        {"_target_": "torch.optim.lr_scheduler.warnings.sys.exit", "_args_": [0]},
    ),
    "our own modules": (
        "data",
        {"_target_": "experiments.data.mnist.Path.touch", "_args_": ["executed"]},
    ),
    "our own imports": (
        "model",
        {
            "_target_": "experiments.training.models.nn.Linear",
            "in_features": 784,
            "out_features": 10,
        },
    ),
    "a part of another group": (
        "model",
        {"_target_": "experiments.data.loaders.TensorLoader", "split": None},
    ),
    "nested in an argument": (
        "model",
        {
            "_target_": "torch.nn.Linear",
            "in_features": 784,
            "out_features": {"_target_": "builtins.eval", "_args_": ["open('executed', 'w')"]},
        },
    ),
    "nested in _args_": (
        "model",
        {
            "_target_": "torch.nn.Sequential",
            "_args_": [{"_target_": "torch.hub.load", "_args_": ["evil", "Model"]}],
        },
    ),
    "nested in a list of lists": (
        "loss",
        {
            "_target_": "torch.nn.CrossEntropyLoss",
            "weight": [[{"_target_": "builtins.open", "_args_": ["executed", "w"]}]],
        },
    ),
    "in the trainer": ("trainer.device", {"_target_": "os.system", "_args_": ["touch executed"]}),
    "beside the groups": ("extra", {"_target_": "os.system", "_args_": ["touch executed"]}),
    "in Hydra's node": (
        "hydra",
        {"job_logging": {"handlers": {"file": {"()": "os.system", "command": "touch executed"}}}},
    ),
    "a function of torch.nn": ("model", {"_target_": "torch.nn.functional.relu", "input": 1}),
    "a method of a class": ("model", {"_target_": "torch.nn.Module.apply", "fn": 1}),
    "a target that is no text": ("model._target_", ["os", "system"]),
    "an empty target": ("model._target_", ""),
    "a target's prefix alone": ("model._target_", "torch.nnx.Linear"),
    "a reference": ("model.in_features", "${oc.env:HOME}"),
    "a reference in a key": ("model.${oc.env:HOME}", 1),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_config_is_refused_in_one_line(
    name: str,
    command: str,
    run: Path,
    config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    hostile = with_node(config, *HOSTILE[name])
    (run / "config.yaml").write_text(yaml.safe_dump(hostile))
    message = refused(run, capsys, command)
    assert "reference" in message or "reference" not in name
    assert "evil" not in sys.modules
    with pytest.raises(UsageError):
        load_run(run)
    assert not (run / "executed").exists()


# Each adds to the model's arguments, written as YAML.
HOSTILE_YAML = {
    "aliases that grow": "extra: [&a [x, x], &b [*a, *a], &c [*b, *b]]",
    "a merge of an alias": "extra: {a: &a {x: 1}, b: {<<: *a}}",
    "a Python object": "extra: !!python/object/apply:os.system ['touch executed']",
    "a tuple's target": "extra: !!pairs [x: {_target_: pathlib.Path.touch, _args_: [executed]}]",
    "an ordered map": "extra: !!omap [x: {_target_: builtins.open, _args_: [executed, w]}]",
    "a target in a merge": "extra: {<<: {_target_: builtins.open, _args_: [executed, w]}}",
    "an escaped reference": r'extra: "\x24{oc.env:HOME}"',
    "a reference that makes a node": (
        r'extra: "\x24{oc.create:{_target_:builtins.open,_args_:[executed,w]}}"'
    ),
    "a target by reference": r'extra: {_target_: "torch.nn.\x24{oc.env:HOME}"}',
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_hostile_yaml_is_refused_in_one_line(
    name: str, command: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (run / "config.yaml").read_text()
    assert "\nmodel:\n" in text
    (run / "config.yaml").write_text(
        text.replace("\nmodel:\n", f"\nmodel:\n  {HOSTILE_YAML[name]}\n")
    )
    message = refused(run, capsys, command)
    for word in ("alias", "reference"):
        # refused for this reason, not for a later one
        assert word in message or word not in name


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"- 1\n",
        b"\xff\xfe",
        b"model: [",
        b"%" * 100,
        b"a: " + b"x" * 1_000_001,
        b"[" * 2000,
    ],
    ids=["empty", "a list", "no text", "torn", "no YAML", "too large", "too deep"],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_config_that_is_none_is_refused_in_one_line(
    content: bytes, command: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "config.yaml").write_bytes(content)
    refused(run, capsys, command)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1}'])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_record_that_is_none_is_refused_in_one_line(
    content: str, command: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "run.json").write_text(content)
    refused(run, capsys, command)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "name", ["config.yaml", "run.json", "metrics.jsonl", "events.out.tfevents.0000", "checkpoints"]
)
def test_symbolic_links_are_refused_in_one_line(
    name: str, command: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(run / name, run.parent / "elsewhere")
    (run / name).symlink_to(run.parent / "elsewhere")
    assert "symbolic link" in refused(run, capsys, command)


@pytest.mark.parametrize("command", ["resume", "evaluate", "evaluate last"])
def test_a_malicious_pickle_among_checkpoints_is_refused_in_one_line(
    command: str, run: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    for file in (run / "checkpoints").iterdir():
        file.unlink()
    plant(Checkpoints(run / "checkpoints"), pickle.dumps(Bomb(run / "executed")))
    assert "every checkpoint is damaged" in refused(run, capsys, command)
    assert "not a checkpoint" in str(recwarn.list[0].message)


@pytest.mark.parametrize("command", ["resume", "evaluate", "evaluate last"])
@pytest.mark.parametrize(
    "content",
    [
        {},
        {"model": 1, "state": {"step": 1}},
        {"model": {"0.weight": 5}, "state": {"step": 1}},
        {"state": {"surplus": 1}},
        {"state": [], "model": {}},
    ],
    ids=["empty", "no dict", "no tensor", "a surplus field", "no fields"],
)
def test_a_checkpoint_of_another_shape_is_refused_in_one_line(
    content: dict[str, Any], command: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (run / "checkpoints").iterdir():
        file.unlink()
    plant(Checkpoints(run / "checkpoints"), serialize(content))
    refused(run, capsys, command)


@pytest.mark.parametrize("command", ["resume", "reproduce", "evaluate"])
def test_the_pickles_of_hydras_callbacks_are_not_read(command: str, run: Path) -> None:
    (run / ".hydra").mkdir()
    bomb = pickle.dumps(Bomb(run / "executed"))
    for name in ("config.pickle", "job_return.pickle", "config.yaml"):
        (run / ".hydra" / name).write_bytes(bomb)
    assert COMMANDS[command](run) in (0, 1)
    assert not (run / "executed").exists()


# Shell scripts that configure the repository to run `touch executed` if git allows it.
REPOSITORIES = {
    "a monitor": "git config core.fsmonitor 'touch executed; false'",
    "an external diff": "git config diff.external 'touch executed; false'",
    "a submodule's diff": """
        git init -q part && cd part && git config diff.external 'touch ../executed; false'
        echo one > inner && git add inner && git -c user.name=a -c user.email=a@b commit -qm one
        cd .. && git add part 2> /dev/null && git -c user.name=a -c user.email=a@b commit -qm part
        git config diff.submodule diff && git config submodule.part.url ./part
        cd part && echo two > inner && git -c user.name=a -c user.email=a@b commit -qam two
        """,
    "a filter": """
        echo 'file filter=evil' > .gitattributes
        git config filter.evil.clean 'touch executed; cat'
    """,
    "a hook": """
        printf '#!/bin/sh\ntouch executed\n' > .git/hooks/post-index-change
        chmod +x .git/hooks/post-index-change
    """,
    "a fetch of what is missing": """
        blob=$(git rev-parse HEAD:file)
        rm -f ".git/objects/$(echo "$blob" | cut -c1-2)/$(echo "$blob" | cut -c3-)"
        git config core.repositoryformatversion 1
        git config extensions.partialClone origin
        git config remote.origin.promisor true
        git config remote.origin.url ssh://nowhere/x
        git config core.sshCommand 'touch executed; false'
    """,
}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_repository_in_the_directory_is_not_asked_to_run_anything(name: str, run: Path) -> None:
    for script in (
        "git init --quiet . && mkdir -p .git/hooks && echo one > file && git add file",
        "git -c user.name=a -c user.email=a@b commit --quiet -m first",
        REPOSITORIES[name],
        "echo two > file",
    ):
        subprocess.run(["sh", "-c", script], check=True)
    git_state.cache_clear()
    COMMANDS["reproduce"](run)
    git_state.cache_clear()
    assert not (run / "executed").exists()


def test_experimental_rerun_is_refused(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    (run / "config.pickle").write_bytes(pickle.dumps(Bomb(run / "executed")))
    assert call(entrypoint.main, "--experimental-rerun", run / "config.pickle") == 2
    assert not (run / "executed").exists()


# Harmless directories are accepted.


def test_every_shipped_option_may_be_built_from_a_saved_run(compose: Compose) -> None:
    for group, names in list_options([CONF]).items():
        if group in schema.GROUPS:
            for name in names:
                config = compose([f"{group}={name}"])
                check_names(config, [])
                check_objects(config, [])


@pytest.mark.parametrize(
    ("group", "target"),
    [
        *(("model", "torch.nn.Linear"), ("model", "torch.nn.modules.linear.Linear")),
        *(("loss", "torch.nn.MSELoss"), ("optimizer", "torch.optim.adam.Adam")),
        ("scheduler", "torch.optim.lr_scheduler.StepLR"),
    ],
)
def test_parts_of_torch_may_be_built(group: str, target: str) -> None:
    check_names({group: {"_target_": target}}, [])
    check_objects({group: {"_target_": target}}, [])


@pytest.mark.parametrize(
    ("module", "group", "kind"),
    [
        ("torch.nn", "model", nn.Module),
        ("torch.optim", "optimizer", Optimizer),
        ("torch.optim.lr_scheduler", "scheduler", LRScheduler),
    ],
)
def test_every_part_that_torch_offers_comes_back(module: str, group: str, kind: type) -> None:
    """Also those whose own module is the package, as Adafactor's and Muon's is."""
    offered = vars(importlib.import_module(module))
    parts = [name for name, part in offered.items() if isinstance(part, type)
             and issubclass(part, kind)]  # fmt: skip
    assert len(parts) > 10
    for name in parts:
        check_names({group: {"_target_": f"{module}.{name}"}}, [])
        check_objects({group: {"_target_": f"{module}.{name}"}}, [])


def test_a_tensor_may_be_an_argument_of_a_part_but_no_part() -> None:
    weight = {"_target_": "torch.tensor", "data": [1.0, 2.0]}
    config = {"loss": {"_target_": "torch.nn.CrossEntropyLoss", "weight": weight}}
    check_names(config, [])
    check_objects(config, [])
    with pytest.raises(UsageError, match=r"loss._target_=torch.tensor: not built"):
        check_names({"loss": weight}, [])


def test_nested_modules_of_torch_may_be_built() -> None:
    model = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.ReLU"}]}
    check_names({"model": model}, [])
    check_objects({"model": model}, [])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_module_that_the_person_trusts_is_built(
    command: str, run: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"_target_": "trusted_by_me.make", "width": 16}
    own = run.parent / "own"
    own.mkdir()
    (own / "trusted_by_me.py").write_text(
        "from experiments.models import mlp\ndef make(width): return mlp(784, [width], 10)\n"
    )
    monkeypatch.syspath_prepend(own)
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"model": model}))
    assert COMMANDS[command](run) == 2
    assert COMMANDS[command](run, "--trust", "trusted_by_me") == 0


def test_the_line_about_a_module_names_all_that_are_not_trusted() -> None:
    act = {"_target_": "acts.Act", "_args_": [1]}
    config = {"model": {"_target_": "nets.make", "act": act}, "loss": {"_target_": "nets.loss"}}
    with pytest.raises(UsageError) as raised:
        check_names(config, [])
    assert "pass --trust nets --trust acts (in Python trust=['nets', 'acts'])" in str(raised.value)
    check_names(config, ["nets", "acts"])


def metric(target: str) -> dict[str, Any]:
    """A config with one metric."""
    return {"metrics": {"it": {"_target_": target}}}


def test_metrics_of_torchmetrics_over_classes_and_numbers_may_be_built() -> None:
    for name in ("classification.MulticlassF1Score", "regression.R2Score"):
        check_names(metric(f"torchmetrics.{name}"), [])
        check_objects(metric(f"torchmetrics.{name}"), [])


@pytest.mark.parametrize(
    "target",
    [
        "torchmetrics.text.bert.BERTScore",  # downloads a model
        "torchmetrics.classification.accuracy.torch.load",
        "torchmetrics.classification.torch.hub.load",
        "torchmetrics.regression.mae.Tensor",
    ],
)
def test_nothing_else_of_torchmetrics_is_built(target: str) -> None:
    def check() -> None:
        check_names(metric(target), [])
        check_objects(metric(target), [])

    with pytest.raises(UsageError, match="not"):
        check()
