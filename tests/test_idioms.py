"""What Hydra's users write in their configs, through the real command."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Completed = subprocess.CompletedProcess[str]
Command = Callable[..., Completed]
Compose = Callable[[list[str]], dict[str, Any]]

SHORT = ("model=linear", "trainer.epochs=1", "loader.batch_size=300")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], None]:
    """Write a file in the test's directory: `write("conf/experiment/mine.yaml", text)`."""

    def write(name: str, text: str) -> None:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    return write


Write = Callable[[str, str], None]


def runs(directory: Path) -> list[dict[str, Any]]:
    """The run.json of every run below a directory."""
    return [json.loads(file.read_text()) for file in sorted(directory.rglob("run.json"))]


def usage_error(completed: Completed) -> str:
    """The one line of a command that failed with a usage error."""
    assert completed.returncode == 2, completed.stderr
    [line] = completed.stderr.splitlines()
    assert re.match(r"experiments: [^\s:]", line), line
    return line.removeprefix("experiments: ")


def composed(completed: Completed) -> dict[str, Any]:
    """The config that `--cfg job` printed."""
    assert (completed.returncode, completed.stderr) == (0, "")
    config = yaml.safe_load(completed.stdout)
    assert isinstance(config, dict)
    return config


# A sweep that a file asks for

GRID = """
# @package _global_
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      seed: 0,1
"""


def test_a_file_that_asks_for_a_sweep_gets_one(
    write: Write, cli: Command, tmp_path: Path, small_mnist_dir: Path
) -> None:
    write("conf/experiment/grid.yaml", GRID)
    arguments = ("--config-dir", "conf", "experiment=grid", f"data.path={small_mnist_dir}", *SHORT)
    completed = cli(*arguments, "sweep=s", "optimizer.lr=0.1,0.2")
    assert completed.returncode == 0, completed.stderr
    found = {(run["seed"], run["config"]["optimizer"]["lr"]) for run in runs(tmp_path)}
    assert found == {(0, 0.1), (0, 0.2), (1, 0.1), (1, 0.2)}


def test_the_command_line_makes_a_single_run_of_a_sweep_in_a_file(
    write: Write, cli: Command, tmp_path: Path, small_mnist_dir: Path
) -> None:
    write("conf/experiment/grid.yaml", GRID)
    arguments = ("--config-dir", "conf", "experiment=grid", f"data.path={small_mnist_dir}", *SHORT)
    completed = cli(*arguments, "hydra.mode=RUN", "seed=7")
    assert completed.returncode == 0, completed.stderr
    assert [run["seed"] for run in runs(tmp_path)] == [7]


def test_a_key_of_the_sweep_in_a_file_that_the_command_line_sets_is_not_swept(
    write: Write, cli: Command, tmp_path: Path, small_mnist_dir: Path
) -> None:
    write("conf/experiment/grid.yaml", GRID)
    arguments = ("--config-dir", "conf", "experiment=grid", f"data.path={small_mnist_dir}", *SHORT)
    completed = cli(*arguments, "seed=7")
    assert completed.returncode == 0, completed.stderr
    assert [run["seed"] for run in runs(tmp_path)] == [7]


def test_a_wrong_value_of_a_sweep_in_a_file_is_told_before_anything_runs(
    write: Write, cli: Command, tmp_path: Path
) -> None:
    write("conf/experiment/grid.yaml", GRID.replace("0,1", "0,-1"))
    line = usage_error(cli("--config-dir", "conf", "experiment=grid"))
    assert line.startswith("seed=-1: expected a whole number")
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]


def test_a_search_in_a_file_searches_the_keys_of_the_file(
    write: Write, cli: Command, tmp_path: Path, small_mnist_dir: Path
) -> None:
    pytest.importorskip("optuna")
    text = GRID.replace("# @package _global_\n", "# @package _global_\ndefaults:\n"
                        "  - override /hydra/sweeper: tpe\n")  # fmt: skip
    text = text.replace("seed: 0,1", "optimizer.lr: interval(0.1,0.2)")
    write("conf/experiment/search.yaml", text.replace("sweeper:\n", "sweeper:\n    trials: 2\n"))
    completed = cli(
        "--config-dir", "conf", "experiment=search", f"data.path={small_mnist_dir}", *SHORT,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    rates = {run["config"]["optimizer"]["lr"] for run in runs(tmp_path)}
    assert len(rates) == 2
    assert all(0.1 <= rate <= 0.2 for rate in rates)


# Variables at the root

WIDTH = """
# @package _global_
width: 24
model:
  hidden: ["${width}", "${width}"]
"""


def test_a_root_key_that_something_refers_to_is_swept_saved_and_resumed(
    write: Write, cli: Command, tmp_path: Path, small_mnist_dir: Path
) -> None:
    write("conf/experiment/width.yaml", WIDTH)
    completed = cli(
        "-m", "--config-dir", "conf", "experiment=width", "width=8,16", "trainer.epochs=1",
        f"data.path={small_mnist_dir}", "sweep=s",
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    found = {run["config"]["width"]: run["config"]["model"]["hidden"] for run in runs(tmp_path)}
    assert found == {8: [8, 8], 16: [16, 16]}
    assert re.search(r"^ *rank +.*\bwidth\b", completed.stdout, re.MULTILINE) or (
        "width" in (tmp_path / "outputs/s/results.csv").read_text().splitlines()[0]
    )
    [first, _] = sorted((tmp_path / "outputs/s").glob("*/"))
    resumed = cli(f"resume={first}")
    assert (resumed.returncode, resumed.stdout.split(": ")[-1]) == (0, "already finished\n")


@pytest.mark.parametrize("override", ["model.hidden=[3]", "+model/net=big"])
def test_a_variable_may_lose_its_only_reference_to_an_override_or_another_option(
    override: str, write: Write, cli: Command
) -> None:
    write("conf/mine.yaml", "defaults: [config, _self_]\n" + WIDTH.partition("_global_")[2])
    write("conf/model/net/big.yaml", "# @package model\nhidden: [9]\n")
    completed = cli("--config-dir", "conf", "--config-name", "mine", override, "trainer.epochs=0")
    assert usage_error(completed).startswith("trainer.epochs=0")  # and not: width is unknown


def test_a_misspelt_variable_gets_its_hint(write: Write, cli: Command) -> None:
    write("conf/mine.yaml", "defaults: [config, _self_]\n" + WIDTH.partition("_global_")[2])
    for word in ("widht=3", "+widht=3"):
        completed = cli("--config-dir", "conf", "--config-name", "mine", word)
        assert usage_error(completed) == "widht: unknown key; did you mean width?"


def test_an_experiment_is_not_added_to_a_config_that_has_its_choice(
    write: Write, cli: Command
) -> None:
    write("conf/mine.yaml", "defaults: [config, _self_]\n")
    arguments = ("--config-dir", "conf", "--config-name", "mine", "trainer.epochs=0")
    line = usage_error(cli(*arguments, "+experiment=tutorial"))
    assert line.endswith("the config has chosen its experiment already; leave the + out")
    assert usage_error(cli(*arguments, "experiment=tutorial")).startswith("trainer.epochs=0")


def test_a_directory_may_be_named_after_a_variable(
    write: Write, cli: Command, tmp_path: Path, small_mnist_dir: Path
) -> None:
    write(
        "conf/experiment/named.yaml",
        "# @package _global_\ntask_name: first\nhydra: {run: {dir: 'logs/${task_name}'}}\n",
    )
    completed = cli(
        "--config-dir", "conf", "experiment=named", f"data.path={small_mnist_dir}", *SHORT
    )
    assert completed.returncode == 0, completed.stderr
    assert [run["config"]["task_name"] for run in runs(tmp_path / "logs/first")] == ["first"]


def test_a_directorys_name_may_call_a_built_in_resolver(
    cli: Command, tmp_path: Path, small_mnist_dir: Path
) -> None:
    completed = cli(f"data.path={small_mnist_dir}", *SHORT, "hydra.run.dir=logs/${lower:FIRST}")
    assert completed.returncode == 0, completed.stderr
    assert (tmp_path / "logs/first/run.json").exists()


@pytest.mark.parametrize("flags", [["hydra.run.dir=a/${x}"], ["-m", "hydra.sweep.dir=a/${x}"]])
def test_a_directorys_name_that_cannot_be_resolved_is_told_in_one_line(
    flags: list[str], cli: Command, tmp_path: Path
) -> None:
    key = flags[-1].partition("=")[0]
    assert usage_error(cli(*flags)) == f"{key}=${{x}}: there is no key x"
    assert list(tmp_path.iterdir()) == []


# Places that Hydra knows


def test_a_value_may_refer_to_hydras_settings(
    write: Write, cli: Command, tmp_path: Path, small_mnist_dir: Path
) -> None:
    write("conf/experiment/cwd.yaml", "# @package _global_\ndata:\n"
          "  path: ${hydra:runtime.cwd}/rows\n")  # fmt: skip
    (tmp_path / "rows").symlink_to(small_mnist_dir)
    for flags in ([], ["-m"]):
        seed = "seed=0,1" if flags else "seed=0"
        completed = cli(*flags, "--config-dir", "conf", "experiment=cwd", *SHORT, seed)
        assert completed.returncode == 0, completed.stderr
    assert {run["config"]["data"]["path"] for run in runs(tmp_path)} == {str(tmp_path / "rows")}


def test_a_sweep_whose_values_refer_to_their_directory_goes_on(
    write: Write, cli: Command, tmp_path: Path, small_mnist_dir: Path
) -> None:
    write("conf/experiment/here.yaml", "# @package _global_\nhere: ${hydra:runtime.output_dir}\n"
          "extra: {place: '${here}'}\n")  # fmt: skip
    arguments = ("-m", "--config-dir", "conf", "experiment=here", *SHORT, "seed=0,1", "sweep=s",
                 f"data.path={small_mnist_dir}")  # fmt: skip
    for _ in range(2):
        completed = cli(*arguments)
        assert completed.returncode == 0, completed.stderr
    found = {run["config"]["here"] for run in runs(tmp_path)}
    assert found == {str(folder.parent) for folder in tmp_path.rglob("run.json")}
    assert len(found) == 2


# A primary config of one's own

PRIMARY = """
defaults:
  - data: mnist
  - loader: tensors
  - model: linear
  - loss: cross_entropy
  - optimizer: adam
  - scheduler: constant
  - trainer: default
  - _self_
hydra:
  searchpath: ["pkg://experiments.conf"]
seed: 3
checkpoint: {every_steps: null, every_seconds: null, keep: 2}
"""


@pytest.mark.parametrize(
    "place", [["--config-dir", "conf"], ["--config-path", "{}/conf"]], ids=lambda place: place[0]
)
def test_a_primary_config_of_ones_own_uses_the_options_that_come_with_the_package(
    place: list[str], write: Write, cli: Command, tmp_path: Path
) -> None:
    write("conf/mine.yaml", PRIMARY)
    flag, folder = place
    config = composed(cli(flag, folder.format(tmp_path), "--config-name", "mine", "--cfg", "job"))
    assert (config["seed"], config["optimizer"]["_target_"]) == (3, "torch.optim.Adam")


def test_a_primary_config_of_ones_own_is_run_and_swept(
    write: Write, cli: Command, tmp_path: Path, small_mnist_dir: Path
) -> None:
    write("conf/mine.yaml", PRIMARY)
    rows = f"data.path={small_mnist_dir}"
    arguments = ("--config-dir", "conf", "--config-name", "mine", rows, *SHORT)
    for flags in ([], ["-m"]):
        completed = cli(*flags, *arguments, *(["seed=0,1"] if flags else []))
        assert completed.returncode == 0, completed.stderr
    assert sorted(run["seed"] for run in runs(tmp_path)) == [0, 1, 3]


def test_a_primary_config_may_extend_the_one_that_comes_with_the_package(
    write: Write, cli: Command
) -> None:
    write("conf/mine.yaml", "defaults: [config, _self_]\nseed: 5\n")
    config = composed(cli("--config-dir", "conf", "--config-name", "mine", "--cfg", "job"))
    assert (config["seed"], config["trainer"]["epochs"]) == (5, 10)


def test_an_option_that_one_of_the_package_hides_is_told(write: Write, cli: Command) -> None:
    write("conf/model/mlp.yaml", "_target_: torch.nn.Linear\n")
    line = usage_error(cli("--config-dir", "conf", "trainer.epochs=0"))
    assert line == (
        "conf/model/mlp.yaml: hidden by the option of that name that comes with the package; "
        "rename it"
    )
    chosen = cli("--config-dir", "conf", "model=linear", "trainer.epochs=0")
    assert usage_error(chosen).startswith("trainer.epochs=0")


def test_a_primary_config_that_the_packages_hides_is_told(write: Write, cli: Command) -> None:
    write("conf/config.yaml", "defaults: [/config, _self_]\nseed: 5\n")
    line = usage_error(cli("--config-dir", "conf", "trainer.epochs=0"))
    assert line == (
        "conf/config.yaml: hidden by the primary config of that name that comes with the package; "
        "use --config-path conf"
    )


def test_a_printed_config_tells_of_a_hidden_option(write: Write, cli: Command) -> None:
    write("conf/model/mlp.yaml", "_target_: torch.nn.Linear\n")
    assert "hidden by the option" in usage_error(cli("--config-dir", "conf", "--cfg", "job"))
    assert composed(cli("--config-dir", "conf", "--cfg", "job", "model=linear"))["seed"] == 0


def test_a_primary_config_that_is_misspelt_gets_its_hint(write: Write, cli: Command) -> None:
    write("conf/mine.yaml", PRIMARY)
    line = usage_error(cli("--config-dir", "conf", "--config-name", "mime"))
    assert line == "--config-name mime: no such file; did you mean mine?"


# Groups


def test_an_option_inside_a_group_is_listed_chosen_and_gets_its_hint(
    write: Write, cli: Command
) -> None:
    write("conf/model/nested.yaml", "defaults:\n  - net: small\n_target_: nested.make\n")
    write("conf/model/net/small.yaml", "depth: 1\n")
    write("conf/model/net/big.yaml", "depth: 2\n")
    arguments = ("--config-dir", "conf", "model=nested")
    assert re.search(r"^  model/net +big, small$", cli(*arguments, "--help").stdout, re.MULTILINE)
    config = composed(cli(*arguments, "model/net=big", "--cfg", "job"))
    assert config["model"] == {"net": {"depth": 2}, "_target_": "nested.make"}
    line = usage_error(cli(*arguments, "model/net=bgi"))
    assert line == "model/net=bgi: no such option; did you mean model/net=big?"


def test_an_experiment_may_be_added_as_well_as_chosen(cli: Command) -> None:
    assert composed(cli("+experiment=tutorial", "--cfg", "job"))["trainer"]["epochs"] == 25


def test_a_group_that_the_config_does_not_choose_from_is_told_how_to_add(
    write: Write, cli: Command
) -> None:
    write("conf/debug/fast.yaml", "# @package _global_\ntrainer: {epochs: 1}\n")
    line = usage_error(cli("--config-dir", "conf", "debug=fast"))
    assert line == "debug=fast: the config chooses no debug yet; write +debug=fast"
    config = composed(cli("--config-dir", "conf", "+debug=fast", "--cfg", "job"))
    assert config["trainer"]["epochs"] == 1


def test_an_option_may_be_relocated(write: Write, cli: Command) -> None:
    write(
        "conf/experiment/two.yaml",
        "# @package _global_\ndefaults:\n  - /optimizer@optimizer_d: adam\n"
        "model: {critic: '${optimizer_d}'}\n",
    )
    line = usage_error(cli("--config-dir", "conf", "experiment=two", "optimizer_d.lrr=1"))
    assert line == "optimizer_d.lrr: unknown key; did you mean optimizer_d.lr?"


@pytest.mark.parametrize("option", ["disabled", "none", "stdout"])
def test_hydras_job_logging_may_be_chosen(
    option: str, cli: Command, tmp_path: Path, small_mnist_dir: Path
) -> None:
    completed = cli(f"hydra/job_logging={option}", f"data.path={small_mnist_dir}", *SHORT)
    assert completed.returncode == 0, completed.stderr
    assert list(tmp_path.rglob("*.log")) == []


def test_an_option_of_a_package_that_is_not_installed_names_the_package(cli: Command) -> None:
    line = usage_error(cli("hydra/launcher=submitit_slurm"))
    assert line.endswith("it needs a package: pip install hydra-submitit-launcher")


def test_callbacks_of_ones_own_are_called(
    write: Write, cli: Command, small_mnist_dir: Path
) -> None:
    write(
        "tell.py",
        "from hydra.experimental.callback import Callback\n"
        "class Tell(Callback):\n"
        "    def on_job_end(self, config, job_return, **kwargs):\n"
        "        print('told', job_return.status.name)\n",
    )
    write("conf/hydra/callbacks/tell.yaml", "tell: {_target_: tell.Tell}\n")
    completed = cli(
        "--config-dir", "conf", "hydra/callbacks=tell", f"data.path={small_mnist_dir}", *SHORT
    )
    assert completed.returncode == 0, completed.stderr
    assert "told COMPLETED" in completed.stdout


# Resolvers

RESOLVER = """
from omegaconf import OmegaConf
OmegaConf.register_new_resolver("twice", lambda number: 2 * number)
"""
TWICE = "# @package _global_\nmodel: {hidden: ['${twice:4}']}\n"


@pytest.mark.parametrize(
    ("file", "flags"),
    [
        ("my_resolvers.py", ["--resolvers", "my_resolvers"]),
        ("hydra_plugins/my_resolvers/__init__.py", []),
    ],
    ids=["a module", "a plugin"],
)
def test_a_resolver_of_ones_own_works_alone_and_in_workers(
    file: str, flags: list[str], write: Write, cli: Command, tmp_path: Path, small_mnist_dir: Path
) -> None:
    write(file, RESOLVER)
    write("conf/experiment/twice.yaml", TWICE)
    arguments = (*flags, "--config-dir", "conf", "experiment=twice", "trainer.epochs=1",
                 f"data.path={small_mnist_dir}")  # fmt: skip
    for sweep, *overrides in (
        ["--resolvers=json"], ["-m", "seed=1,2"], ["-m", "seed=3,4", "hydra/launcher=basic"]
    ):  # fmt: skip
        completed = cli(sweep, *arguments, *overrides)
        assert completed.returncode == 0, completed.stderr + completed.stdout
    assert [run["config"]["model"]["hidden"] for run in runs(tmp_path)] == [[8]] * 5


def test_a_resolver_that_does_not_exist_is_told_with_the_flag(write: Write, cli: Command) -> None:
    write("conf/experiment/twice.yaml", TWICE)
    line = usage_error(cli("--config-dir", "conf", "experiment=twice"))
    assert line.startswith("model.hidden[0]=${twice:...}: there is no resolver twice; register it")
    assert line.endswith("pass --resolvers MODULE")


def test_a_module_of_resolvers_that_does_not_exist_is_told(cli: Command) -> None:
    assert usage_error(cli("--resolvers", "nowhere")).startswith("--resolvers nowhere: no such mod")


def test_arithmetic_needs_no_resolver_of_ones_own(write: Write, cli: Command) -> None:
    write("conf/experiment/sums.yaml", "# @package _global_\nwidth: 5\nmodel:\n"
          "  hidden: ['${mul:${width},4}', \"${eval:'(${width} + 1) // 2'}\"]\n")  # fmt: skip
    arguments = ("--config-dir", "conf", "experiment=sums", "--cfg", "job", "--resolve")
    assert composed(cli(*arguments))["model"]["hidden"] == [20, 3]


# Structured configs

STRUCTURED = """
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from hydra.core.config_store import ConfigStore
from torch import nn

class Act(Enum):
    RELU = 1
    TANH = 2

@dataclass
class Conf:
    _target_: str = "structured.make"
    act: Act = Act.TANH
    where: Path = Path("elsewhere")

ConfigStore.instance().store(group="model", name="mine", node=Conf)

def make(act, where):
    print("made of", repr(act), repr(where))
    assert act is Act.TANH and isinstance(where, Path)
    return nn.Linear(784, 10)
"""


def test_a_structured_config_gives_its_enum_and_path_also_to_a_resumed_run(
    write: Write, cli: Command, tmp_path: Path, small_mnist_dir: Path
) -> None:
    write("structured.py", STRUCTURED)
    completed = cli(
        "--resolvers", "structured", "model=mine", "trainer.epochs=1", "hydra.run.dir=here",
        f"data.path={small_mnist_dir}",
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    record = json.loads((tmp_path / "here/run.json").read_text())
    (tmp_path / "here/run.json").write_text(json.dumps({**record, "state": "interrupted"}))
    resumed = cli("resume=here", "--trust", "structured")
    assert resumed.returncode == 0, resumed.stderr
    for output in (completed.stdout, resumed.stdout):
        assert re.search(r"made of <Act.TANH: 2> PosixPath\('elsewhere'\)", output)


# Secrets

FETCH = """
import torch
from experiments.data import Data, Split

def load(token, fail):
    assert token == "squeamish-ossifrage"
    if fail:
        raise RuntimeError(f"the server refused {token}")
    split = Split(torch.rand(60, 784), torch.arange(60) % 10)
    return Data(split, split, split)
"""


def leaks(directory: Path) -> list[Path]:
    files = [file for file in directory.rglob("*") if file.is_file() and file.suffix != ".py"]
    return [file for file in files if b"squeamish" in file.read_bytes()]


@pytest.mark.parametrize("reference", ["${oc.env:MY_TOKEN}", "${secret:MINE}"])
@pytest.mark.parametrize("sweep", [False, True], ids=["run", "sweep"])
def test_a_secret_reaches_what_is_built_and_is_never_written_down(
    sweep: bool, reference: str, write: Write, cli: Command, tmp_path: Path
) -> None:
    secret = {"MY_TOKEN": "squeamish-ossifrage", "MINE": "squeamish-ossifrage"}
    write("fetch.py", FETCH)
    write("conf/data/fetched.yaml", f"_target_: fetch.load\ntoken: {reference}\nfail: false\n")
    arguments = ("--config-dir", "conf", "data=fetched", *SHORT)
    swept = ("-m", *arguments, "seed=0,1")
    completed = cli(*(swept if sweep else arguments), env=secret)
    assert completed.returncode == 0, completed.stderr
    assert [run["state"] for run in runs(tmp_path)] == ["finished"] * (2 if sweep else 1)
    assert leaks(tmp_path) == []


@pytest.mark.parametrize(
    "way",
    [
        [],
        ["-m", "seed=0,1"],
        ["-m", "hydra/sweeper=tpe", "hydra.sweeper.trials=1", "seed=range(0,2)"],
    ],
    ids=["run", "grid", "search"],
)
def test_a_secret_of_the_command_line_is_never_written_down(
    way: list[str], write: Write, cli: Command, tmp_path: Path
) -> None:
    write("fetch.py", FETCH)
    write("conf/data/fetched.yaml", "_target_: fetch.load\nfail: false\n")
    words = ("+place=${oc.env:PLACE}", "+data.token=${place}", "+extra.token=${oc.env:PLACE}")
    arguments = ("--config-dir", "conf", "data=fetched", *SHORT, *words)
    completed = cli(*way, *arguments, env={"PLACE": "squeamish-ossifrage"})
    assert completed.returncode == 0, completed.stderr
    assert (leaks(tmp_path), list(tmp_path.rglob("*squeamish*"))) == ([], [])


@pytest.mark.parametrize(
    "words",
    [
        ["+extra.tokens=[${oc.env:PLACE}]"],
        ["+place=${oc.env:PLACE}", "+extra.token=${place}"],
        ["+extra.place=${oc.env:PLACE}", "+extra.token=${.place}"],
        ["+places.all=[${oc.env:PLACE}]", "+extra.token=${places.all}"],
        ["+places.all=[${oc.env:PLACE}]", "+extra.token=${places.all[0]}"],
        ["+place=${oc.env:PLACE}", "+extra.token=${oc.select:place}"],
    ],
    ids=lambda words: str(words[-1]),
)
def test_what_a_key_that_looks_secret_refers_to_is_a_secret(
    words: list[str], compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE", "squeamish-ossifrage")
    text = str(compose(words))
    assert ("squeamish" in text, "${secret:PLACE}" in text) == (False, True)


@pytest.mark.parametrize(
    "text", ["${oc.env:${name}_TOKEN}", "${secret:${name}}"], ids=["looks secret", "is marked"]
)
def test_a_secret_whose_variable_is_composed_is_refused(
    text: str, write: Write, cli: Command
) -> None:
    write("conf/data/fetched.yaml", f"_target_: fetch.load\nfrom: {text}\n")
    line = usage_error(
        cli("--config-dir", "conf", "data=fetched", "+name=MY", env={"MY_TOKEN": "a", "MY": "b"})
    )
    assert line == (
        f"data.from={text}: a secret's variable is a plain name, as in ${{secret:MY_TOKEN}}"
    )


def test_a_directory_is_not_named_after_a_secret(cli: Command, tmp_path: Path) -> None:
    words = ("+extra.token=${oc.env:MY_TOKEN}", "hydra.run.dir=outputs/${extra.token}")
    line = usage_error(cli(*SHORT, *words, env={"MY_TOKEN": "squeamish-ossifrage"}))
    assert line == (
        "hydra.run.dir=outputs/${secret:MY_TOKEN}: a directory's name holds no secret; "
        "choose another"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_resolved_config_is_printed_without_its_secrets(
    cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "hunter2")
    monkeypatch.setenv("PLACE", "hunter3")
    monkeypatch.setenv("HERE", "here")
    words = (
        "+extra.key=a-${oc.env:MY_TOKEN}",
        "+extra.x=${secret:PLACE}",
        "+extra.y=${oc.env:HERE}",
        "+extra.keys.tokens=[${extra.keys.from}]",
        "+extra.keys.from=${oc.env:PLACE}",
    )
    notes = composed(cli("--cfg", "job", "--resolve", *words))["extra"]
    assert notes == {
        "key": "a-${secret:MY_TOKEN}",
        "x": "${secret:PLACE}",
        "y": "here",
        "keys": {"tokens": ["${secret:PLACE}"], "from": "${secret:PLACE}"},
    }


@pytest.mark.parametrize("sweep", [False, True], ids=["run", "sweep"])
def test_an_error_whose_message_has_a_secret_is_told_without_it(
    sweep: bool, write: Write, cli: Command, tmp_path: Path
) -> None:
    write("fetch.py", FETCH)
    write("conf/data/fetched.yaml", "_target_: fetch.load\ntoken: ${oc.env:MY_TOKEN}\nfail: true\n")
    arguments = ("--config-dir", "conf", "data=fetched", *SHORT)
    swept = ("-m", *arguments, "seed=0,1")
    completed = cli(*(swept if sweep else arguments), env={"MY_TOKEN": "squeamish-ossifrage"})
    assert completed.returncode == 1
    assert "squeamish" not in completed.stdout + completed.stderr
    assert leaks(tmp_path) == []
    assert sweep or "RuntimeError: the server refused ${secret:MY_TOKEN}" in completed.stderr


def test_a_resumed_run_reads_its_secret_again_and_says_if_it_is_not_there(
    write: Write, cli: Command, tmp_path: Path
) -> None:
    secret = {"MY_TOKEN": "squeamish-ossifrage"}
    write("fetch.py", FETCH)
    write(
        "conf/data/fetched.yaml", "_target_: fetch.load\ntoken: ${oc.env:MY_TOKEN}\nfail: false\n"
    )
    completed = cli(
        "--config-dir", "conf", "data=fetched", *SHORT, "hydra.run.dir=here", env=secret
    )
    assert completed.returncode == 0, completed.stderr
    record = json.loads((tmp_path / "here/run.json").read_text())
    (tmp_path / "here/run.json").write_text(json.dumps({**record, "state": "interrupted"}))
    line = usage_error(cli("resume=here", "--trust", "fetch"))
    assert line.startswith(
        "data.token=${secret:MY_TOKEN}: the environment variable MY_TOKEN is not"
    )
    completed = cli("resume=here", "--trust", "fetch", env=secret)
    assert "AssertionError" not in completed.stderr
