"""Hydra 1.3 and 1.4 do the same here, and no warning of theirs reaches the user in vain."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

from experiments.config.compose import CONF
from experiments.config.hydra_versions import (
    BEFORE_1_4,
    VERSION_BASE,
    override_dirname,
    register_resolver,
    written_dirname,
)
from experiments.training.build import build

Command = Callable[..., subprocess.CompletedProcess[str]]
SHORT = ("model=linear", "trainer.epochs=1", "loader.batch_size=300")
LOGGING = """
version: 1
formatters: {plain: {(): own_logging.Plain}}
handlers: {console: {class: logging.StreamHandler, formatter: plain, stream: ext://sys.stdout}}
root: {level: INFO, handlers: [console]}
disable_existing_loggers: false
"""
CALLBACKS = """
# @package _global_
hydra:
  callbacks:
    mine:
      _target_: own_logging.Calls
"""
OWN = """
import logging
from hydra.experimental.callback import Callback

class Plain(logging.Formatter):
    pass

class Calls(Callback):
    def on_job_start(self, config, **kwargs):
        print("the job starts")
"""


def composed(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), "experiments", **VERSION_BASE):
        return hydra.compose("config", list(overrides), return_hydra_config=True)


@pytest.mark.filterwarnings("error")
def test_overrides_make_a_name_in_order_without_the_excluded_keys() -> None:
    excluded = "hydra.job.config.override_dirname.exclude_keys=[seed]"
    config = composed(excluded, "seed=1", "optimizer.lr=0.5", "model=mlp")
    assert override_dirname(config) == written_dirname(config) == "model=mlp,optimizer.lr=0.5"


@pytest.mark.filterwarnings("error")
def test_a_name_has_other_separators_where_the_config_says_so() -> None:
    naming = "hydra.job.config.override_dirname"
    config = composed(f"{naming}.kv_sep=-", f"{naming}.item_sep=_", "seed=1", "model=mlp")
    assert override_dirname(config) == written_dirname(config) == "model-mlp_seed-1"


@pytest.mark.filterwarnings("error")
def test_a_reference_in_an_override_is_resolved_in_the_name_and_kept_as_it_was_written() -> None:
    config = composed("seed=3", "trainer.epochs=${seed}")
    assert override_dirname(config) == "seed=3,trainer.epochs=3"
    assert written_dirname(config) == "seed=3,trainer.epochs=${seed}"


@pytest.mark.filterwarnings("error")
def test_a_builtin_without_a_signature_becomes_a_resolver_without_a_warning() -> None:
    register_resolver("smallest", min, replace=True)
    assert OmegaConf.create({"x": "${smallest:3,2}"}).x == 2


def test_a_resolver_that_exists_is_not_replaced_unasked() -> None:
    register_resolver("kept", min, replace=True)
    with pytest.raises(ValueError, match="already registered"):
        register_resolver("kept", max)


@pytest.mark.parametrize(
    "arguments",
    [("--cfg", "job", "--resolve"), SHORT, ("-m", *SHORT, "seed=0,1")],
    ids=["cfg", "run", "sweep"],
)
def test_a_command_prints_no_warning(
    arguments: tuple[str, ...], cli: Command, tmp_path: Path, small_mnist_dir: Path
) -> None:
    completed = cli(*arguments, f"data.path={small_mnist_dir}")
    assert completed.returncode == 0, completed.stderr
    outputs = [file.read_text() for file in tmp_path.rglob("output.txt")]
    assert "Warning" not in "\n".join((completed.stdout, completed.stderr, *outputs))


@pytest.mark.parametrize("sweep", [False, True], ids=["run", "sweep"])
def test_callbacks_and_a_log_format_of_ones_own_work_without_a_warning(
    sweep: bool, cli: Command, tmp_path: Path, small_mnist_dir: Path
) -> None:
    conf = tmp_path / "conf"
    (conf / "experiment").mkdir(parents=True)
    (conf / "experiment/called.yaml").write_text(CALLBACKS)
    (conf / "hydra/job_logging").mkdir(parents=True)
    (conf / "hydra/job_logging/own.yaml").write_text(LOGGING)
    (tmp_path / "own_logging.py").write_text(OWN)
    completed = cli(
        *(["-m"] if sweep else []), "--config-dir", "conf", "experiment=called",
        "hydra/job_logging=own", *SHORT, f"data.path={small_mnist_dir}",
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    outputs = [file.read_text() for file in tmp_path.rglob("output.txt")]
    text = "\n".join((completed.stdout, completed.stderr, *outputs))
    assert "the job starts" in text
    assert "Warning" not in text


@pytest.mark.skipif(BEFORE_1_4, reason="Hydra 1.3 warns of no instantiate")
def test_a_warning_about_code_of_ones_own_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_instantiate.py").write_text(
        "from hydra.utils import instantiate\n"
        "def model():\n    return instantiate({'_target_': 'torch.nn.ReLU'})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match=r"resolved _target_='torch.nn.ReLU'"):
        build({"model": {"_target_": "own_instantiate.model"}}, "model")
