"""The real command line, in a process of its own."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PATIENCE, WATCHED, FinishedRun

from experiments.config import schema
from experiments.config.compose import CONF
from experiments.config.cuda import cuda_devices
from experiments.config.search_path import list_options
from experiments.directory.metrics import read_metrics

Completed = subprocess.CompletedProcess[str]
Command = Callable[..., Completed]


@pytest.fixture
def watched(tmp_path: Path) -> Command:
    """The command in tmp_path; it prints a line on stderr if it imported torch."""

    def watched(*arguments: str, env: dict[str, str] | None = None) -> Completed:
        return subprocess.run(
            [sys.executable, "-c", WATCHED, *arguments],
            cwd=tmp_path,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    return watched


def record(path: Path) -> dict[str, Any]:
    found = json.loads((path / "run.json").read_text())
    assert isinstance(found, dict)
    return found


def numbers(path: Path) -> list[dict[str, float]]:
    """The logged lines of a run except throughput."""
    return [line for line in read_metrics(path) if "throughput" not in line]


def usage_error(completed: Completed) -> str:
    """The one-line message of a command that failed with a usage error."""
    assert completed.returncode == 2, completed.stderr
    assert completed.stdout == ""
    lines = completed.stderr.splitlines()
    assert len(lines) == 1, completed.stderr
    prefix, _, line = lines[0].partition(": ")
    assert prefix == "experiments"
    assert re.match(r"[^\s:]", line), lines[0]
    return line


# A run


def test_a_run_leaves_everything_in_one_directory_that_it_made(finished_run: FinishedRun) -> None:
    files = {str(file.relative_to(finished_run.path)) for file in finished_run.path.rglob("*")}
    hydras = {f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")}
    assert files >= {"config.yaml", "run.json", "metrics.jsonl", *hydras}
    assert [name for name in files if name.startswith("events.out.tfevents.")]
    assert [name for name in files if re.fullmatch(r"checkpoints/.*-best-.*\.safetensors", name)]
    assert [name for name in files if name.endswith((".tmp", ".log"))] == []
    day, outputs = finished_run.path.parent, finished_run.path.parent.parent
    assert outputs.name == "outputs"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d", f"{day.name}/{finished_run.path.name}")
    assert list(outputs.parent.iterdir()) == [outputs]


def test_a_run_lowers_the_loss(finished_run: FinishedRun) -> None:
    losses = [line["loss/valid"] for line in numbers(finished_run.path) if "loss/valid" in line]
    assert len(losses) == 2
    assert losses[1] < losses[0] < 2.31


def test_a_run_ends_with_its_directory_and_the_command_that_shows_it(
    finished_run: FinishedRun,
) -> None:
    path = "/".join(finished_run.path.parts[-3:])
    *_, run, look = finished_run.completed.stdout.splitlines()
    assert shlex.split(run) == ["run", path]
    assert shlex.split(look) == ["look", "tensorboard", "--logdir", path]
    assert finished_run.completed.stderr == ""


def test_a_run_records_that_it_finished_and_what_it_reached(finished_run: FinishedRun) -> None:
    found = record(finished_run.path)
    lines = numbers(finished_run.path)
    assert found["state"] == "finished"
    best = min(
        (line for line in lines if "loss/valid" in line), key=lambda line: line["loss/valid"]
    )
    assert found["metrics"]["best"]["loss/valid"] == best["loss/valid"]
    assert found["metrics"]["test"]["loss/test"] == lines[-1]["loss/test"]


def test_a_run_saves_the_config_that_it_was_given_resolved(
    finished_run: FinishedRun, written: Callable[[list[str]], dict[str, Any]]
) -> None:
    overrides = record(finished_run.path)["overrides"]
    assert yaml.safe_load((finished_run.path / "config.yaml").read_text()) == written(overrides)
    assert yaml.safe_load((finished_run.path / ".hydra/overrides.yaml").read_text()) == overrides


@pytest.mark.parametrize("place", ["named", "deep/er/named"])
def test_hydra_run_dir_names_the_directory_and_a_second_run_in_it_is_refused(
    place: str, finished_run: FinishedRun, cli: Command, tmp_path: Path
) -> None:
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(finished_run.path, tmp_path / place)
    line = usage_error(cli(f"hydra.run.dir={place}"))
    assert line.startswith(f"hydra.run.dir={place}: already holds a run")
    assert f"resume={place}" in line
    assert numbers(tmp_path / place) == numbers(finished_run.path)


# Commands that run nothing


def test_help_lists_every_group_and_option_and_imports_no_torch(watched: Command) -> None:
    completed = watched("--help", env={"COLUMNS": "200"})
    assert (completed.returncode, completed.stderr) == (0, "")
    for group, options in list_options([CONF]).items():
        [line] = re.findall(rf"^  {group} +(.*)$", completed.stdout, re.MULTILINE)
        assert [option.rstrip("*") for option in line.split(", ")] == options


def test_the_commands_that_the_help_lists_have_a_help_of_their_own(watched: Command) -> None:
    modules = re.findall(
        r"^  python -m (experiments\.\w+) ", watched("--help").stdout, re.MULTILINE
    )
    assert len(modules) == 4
    for module in modules:
        completed = subprocess.run(
            [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True
        )
        assert completed.stdout.startswith(f"usage: python -m {module}")


def test_version_is_that_of_this_package(watched: Command) -> None:
    completed = watched("--version")
    assert completed.stdout == f"experiments {metadata.version('experiments')}\n"
    assert (completed.returncode, completed.stderr) == (0, "")


def test_a_flag_may_stand_between_overrides(watched: Command) -> None:
    completed = watched("seed=3", "--cfg", "job", "optimizer.lr=0.2", "--package", "optimizer")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert yaml.safe_load(completed.stdout)["lr"] == 0.2


def test_a_relative_config_path_is_one_from_the_working_directory(
    watched: Command, tmp_path: Path
) -> None:
    shutil.copytree(CONF, tmp_path / "mine")
    (tmp_path / "mine" / "optimizer" / "fast.yaml").write_text("defaults: [sgd]\nlr: 0.7\n")
    flags = ["--config-path", "mine", "--cfg", "job", "--package", "optimizer.lr"]
    completed = watched(*flags, "optimizer=fast")
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, "0.7\n", "")


def test_help_marks_the_default_options(
    watched: Command, compose: Callable[[list[str]], dict[str, Any]]
) -> None:
    marked = re.findall(r"^  (\w+) .*?(\w+)\*", watched("-h").stdout, re.MULTILINE)
    assert {group for group, _ in marked} == set(schema.GROUPS) - {"augment", "callbacks"}
    assert compose([f"{group}={option}" for group, option in marked]) == compose([])


def test_every_command_in_the_help_composes(
    watched: Command, compose: Callable[[list[str]], dict[str, Any]]
) -> None:
    text = watched("--help").stdout
    commands = re.findall(r"^  python -m experiments (.*?)(?:  |$)", text, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        words = [word for word in shlex.split(command) if "=" in word]
        compose([re.sub(r",.*", "", word) for word in words])


@pytest.mark.parametrize("columns", ["60", "200"])
def test_the_options_of_a_group_fit_the_terminal(columns: str, watched: Command) -> None:
    shown = watched("--help", env={"COLUMNS": columns}).stdout
    groups = shown.partition("group.key=value:\n")[2].partition("  resume=")[0]
    assert max(map(len, groups.splitlines())) <= int(columns)
    options = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
    assert " ".join(options) in " ".join(groups.replace("*", "").replace(",", "").split())


def test_help_waits_for_no_other_package() -> None:
    command = "import sys; from experiments.__main__ import main; sys.argv[1:] = ['--help']; main()"
    command += "; print(sorted({'hydra', 'omegaconf', 'yaml'} & set(sys.modules)))"
    completed = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    )
    assert completed.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("flag", ["-mh", "--hel"])
def test_an_abbreviated_help_flag_is_one(flag: str, watched: Command) -> None:
    assert watched(flag).stdout == watched("--help").stdout


def test_help_lists_the_options_of_a_config_dir_too(watched: Command, tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "special.yaml").touch()
    completed = watched("--help", "--config-dir", "mine", env={"COLUMNS": "200"})
    assert re.search(r"^  model .*\bspecial\b", completed.stdout, re.MULTILINE)


def test_cfg_job_prints_the_config_as_yaml_runs_nothing_and_imports_no_torch(
    watched: Command, tmp_path: Path, written: Callable[[list[str]], dict[str, Any]]
) -> None:
    overrides = ["optimizer=adam", "seed=3", "model.hidden=[5]"]
    completed = watched("--cfg", "job", "--resolve", *overrides)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert yaml.safe_load(completed.stdout) == written(overrides)
    assert list(tmp_path.iterdir()) == []


def test_shell_completion_prints_a_script(watched: Command) -> None:
    completed = watched("-sc", "install=bash")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert "complete -o nospace" in completed.stdout


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("optimizer=", ["optimizer=adam", "optimizer=adamw", "optimizer=sgd"]),
        ("model=mlp_", ["model=mlp_norm", "model=mlp_small", "model=mlp_wide"]),
        ("optimizer.mom", ["optimizer.momentum="]),
    ],
)
def test_shell_completion_completes(typed: str, expected: list[str], watched: Command) -> None:
    line = f"experiments {typed}"
    environment = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    completed = watched("-sc", "query=bash", env=environment)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert completed.stdout.split() == expected


# Usage errors: one line, exit code 2, no torch import, no files


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["optimizer.lrr=1"], ["optimizer.lrr", "did you mean optimizer.lr?"]),
        (["lr=1"], ["lr", "did you mean optimizer.lr?"]),
        (["modle=mlp"], ["modle", "did you mean model?"]),
        (["model=mlpp"], ["model=mlpp", "did you mean model=mlp?"]),
        (["experiment=tutorail"], ["experiment=tutorail", "experiment=tutorial"]),
        (["optimizer.lr=fast"], ["optimizer.lr=fast", "expected a number above 0"]),
        (["optimizer.lr=-1"], ["optimizer.lr=-1", "expected a number above 0"]),
        (["optimizer.lr=1,2"], ["optimizer.lr=1,2", "--multirun"]),
        (["optimizer.lr=[1"], ["optimizer.lr=[1", "write key=value, quoted for the shell"]),
        (["optimizer.lr"], ["optimizer.lr", "write key=value"]),
        (["optimizer.lr=${nope.x}"], ["optimizer.lr=${nope.x}", "there is no key nope.x"]),
        (
            ["data.path=nowhere"],
            ["nowhere/train-images-idx3-ubyte.gz", "no such file", "data.path"],
        ),
        (["--frobnicate"], ["--frobnicate"]),
        (["--cfg", "everything"], ["--cfg", "everything", "job"]),
        (["--config-dir", "nowhere"], ["--config-dir nowhere", "no such directory"]),
        (["--config-name", "nothing"], ["nothing"]),
        (["--experimental-rerun", "x"], ["--experimental-rerun", "resume=RUN_DIR"]),
        (["--trust", "os"], ["--trust os", "resume=RUN_DIR"]),
        (["resume=nowhere"], ["nowhere", "no config.yaml in it"]),
        (["resume=nowhere", "seed=1"], ["seed=1", "leave it out"]),
        (["-m", "optimizer.lr=0.1,-1"], ["optimizer.lr=-1", "expected a number above 0"]),
        (["-m", "optimizer.lr=-1,0.1"], ["optimizer.lr=-1", "expected a number above 0"]),
        (["-m", "model=mlp,mlpp"], ["model=mlpp", "did you mean model=mlp?"]),
        (["-m", "optimizer.lrr=1,2"], ["optimizer.lrr", "did you mean optimizer.lr?"]),
        (["-m", "seed=0,1", "model.hiden=[3]"], ["model.hiden", "did you mean model.hidden?"]),
        (["-m", "seed=1,2", "seed=3,4"], ["seed=1,2 and seed=3,4", "all of its values together"]),
        (["-m", "seed=1,2", "++seed=3"], ["seed=1,2 and ++seed=3", "all of its values together"]),
        (["-m", "seed=range(0,0)"], ["seed=range(0,0)", "has no value to sweep"]),
        (["-m", "seed=interval(0,1)"], ["seed=0.0", "expected a whole number"]),
        (["-m", "optimizer.lr=interval(0.1,1)"], ["interval(0.1,1)", "hydra/sweeper=tpe"]),
        (["-m", "hydra.run.dir=a,b"], ["hydra.run.dir=a,b", "give one value"]),
        (["-m", "hydra.sweep.subdir=/a", "seed=0,1"], ["hydra.sweep.subdir=/a", "below"]),
        (["sweep=x"], ["sweep=x", "add -m", "hydra.run.dir=outputs/x"]),
        (["-m", "sweep="], ["sweep=", "as in sweep=first"]),
        (["--cfg", "job", "resume=x"], ["resume=x", "config.yaml"]),
        (["warmup=0.1"], ["warmup", "scheduler=cosine has scheduler.warmup"]),
        (["optimizer.betas=[0.9,0.9]"], ["optimizer=adam has optimizer.betas"]),
        (["-m", "seed=0,1", "optimizer.lr=[1"], ["optimizer.lr=[1", "write key=value"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_slip_is_told_at_once_and_leaves_nothing(
    arguments: list[str], parts: Sequence[str], watched: Command, tmp_path: Path
) -> None:
    line = usage_error(watched(*arguments))
    for part in parts:
        assert part in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(cuda_devices() > 0, reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_told_at_once(watched: Command, tmp_path: Path) -> None:
    line = usage_error(watched("trainer.device=cuda"))
    assert line.startswith("trainer.device=cuda: ")
    assert "use cpu or auto" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["hydra.run.dir=file/run"], ["-m", "hydra.sweep.dir=file/run"]]
)
def test_a_directory_that_cannot_be_made_is_told_with_its_key(
    arguments: list[str], watched: Command, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    line = usage_error(watched(*arguments))
    assert line.startswith(f"{arguments[-1]}: cannot be created")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_the_command_is_as_quick_to_answer_through_python_m(cli: Command, tmp_path: Path) -> None:
    """As above, but started with `python -m`."""
    assert "did you mean optimizer.lr?" in usage_error(cli("optimizer.lrr=1"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.in_features=3"], ["model", "(600, 784)", "change model.in_features"]),
        (
            ["loader.drop_last=true", "loader.batch_size=601"],
            ["loader.batch_size=601", "leaves no batch of 600 rows", "make it smaller"],
        ),
        (["+model.depth=3"], ["model", "depth"]),
        (
            ["model._target_=experiments.training.models.mpl"],
            ["model._target_=experiments.training.models.mpl"],
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_parts_that_do_not_fit_together_are_told_in_one_line(
    overrides: list[str],
    parts: list[str],
    cli: Command,
    small_mnist_dir: Path,
    tmp_path: Path,
) -> None:
    """If a run directory was created, its run.json has the same message."""
    line = usage_error(cli(f"data.path={small_mnist_dir}", *overrides))
    for part in parts:
        assert part in line
    for file in tmp_path.rglob("run.json"):
        assert (record(file.parent)["state"], record(file.parent)["error"]) == ("failed", line)


def test_a_damaged_data_file_is_told_in_one_line_and_leaves_nothing(
    cli: Command, small_mnist_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged") / "data"
    shutil.copytree(small_mnist_dir, folder)
    file = folder / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-100])
    line = usage_error(cli(f"data.path={folder}"))
    assert line.startswith(f"{file}: ")
    assert "copy it again" in line
    assert list(tmp_path.iterdir()) == []


def test_a_run_does_not_hide_the_runs_of_a_sweep(cli: Command, tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "first" / "seed=0"
    run.mkdir(parents=True)
    (run / "run.json").touch()
    line = usage_error(cli("hydra.run.dir=outputs/first"))
    assert line.startswith("hydra.run.dir=outputs/first: holds the runs of a sweep")
    assert list((tmp_path / "outputs" / "first").iterdir()) == [run]


@pytest.mark.parametrize("name", ["2026-11-24/06-46-36", "2026-11-24/06-46-36/more"])
def test_a_sweep_does_not_lie_in_the_directory_of_a_run(
    name: str, watched: Command, tmp_path: Path
) -> None:
    run = tmp_path / "outputs" / "2026-11-24" / "06-46-36"
    run.mkdir(parents=True)
    (run / "run.json").touch()
    line = usage_error(watched("-m", "seed=0,1", f"sweep={name}"))
    assert line.startswith(f"hydra.sweep.dir=outputs/{name}: ")
    assert "holds a single run" in line
    assert list(run.iterdir()) == [run / "run.json"]


def test_a_run_directory_is_named_after_the_options_that_were_chosen(
    cli: Command, small_mnist_dir: Path, tmp_path: Path
) -> None:
    completed = cli(
        f"data.path={small_mnist_dir}", "model=linear", "trainer.epochs=1", "optimizer=adam",
        "hydra.run.dir=outputs/${hydra:runtime.choices.optimizer}",
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    assert record(tmp_path / "outputs" / "adam")["state"] == "finished"


def test_a_relative_path_means_the_same_if_the_job_changes_its_directory(
    cli: Command, small_mnist_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_mnist_dir, tmp_path / "rows (new)")
    completed = cli(
        "data.path=rows (new)", "model=linear", "trainer.epochs=1", "hydra.job.chdir=true",
        "hydra.run.dir=here",
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.splitlines()[-2:] == ["run   here", "look  tensorboard --logdir here"]
    assert record(tmp_path / "here")["config"]["data"]["path"] == str(tmp_path / "rows (new)")


# User-defined parts

OWN = """
from torch import nn

class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale, self.linear = scale, nn.Linear(784, 10)

    def forward(self, x):
        return self.scale * self.linear(x)

class Broken(Scaled):
    def forward(self, x):
        return {}["a mistake of ours"]
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A config directory with user-defined options; their module is in the working directory."""
    (tmp_path / "own_models.py").write_text(OWN)
    folder = tmp_path / "own" / "model"
    folder.mkdir(parents=True)
    (folder / "scaled.yaml").write_text("_target_: own_models.Scaled\nscale: 2.0\n")
    (folder / "broken.yaml").write_text("_target_: own_models.Broken\nscale: 2.0\n")
    return folder.parent


def test_config_dir_adds_a_model_of_ones_own(
    own: Path, cli: Command, small_mnist_dir: Path, tmp_path: Path
) -> None:
    arguments = ["--config-dir", "own", "model=scaled", "model.scale=0.5", "trainer.epochs=1"]
    completed = cli(*arguments, f"data.path={small_mnist_dir}", "hydra.run.dir=here")
    assert completed.returncode == 0, completed.stderr
    config = yaml.safe_load((tmp_path / "here" / "config.yaml").read_text())
    assert config["model"] == {"_target_": "own_models.Scaled", "scale": 0.5}
    assert record(tmp_path / "here")["state"] == "finished"


def test_a_slip_in_the_option_of_a_config_dir_gets_its_hint(own: Path, watched: Command) -> None:
    line = usage_error(watched("--config-dir", "own", "model=scald"))
    assert line == "model=scald: no such option; did you mean model=scaled?"


def test_a_mistake_in_the_code_keeps_its_traceback(
    own: Path, cli: Command, small_mnist_dir: Path, tmp_path: Path
) -> None:
    """It is not reported as a usage error, and error.txt has the traceback too."""
    completed = cli(
        "--config-dir", "own", "model=broken", f"data.path={small_mnist_dir}", "hydra.run.dir=here"
    )
    assert completed.returncode == 1
    assert completed.stderr.count("Traceback (most recent call last)") >= 1
    assert completed.stderr.splitlines()[-1] == "KeyError: 'a mistake of ours'"
    found = record(tmp_path / "here")
    assert found["state"] == "failed"
    assert 'return {}["a mistake of ours"]' in found["error"]


# Concurrent runs


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, small_mnist_dir: Path) -> list[Path]:
    """The directories of eight runs of one config, started concurrently."""
    directory = tmp_path_factory.mktemp("together")
    command = [sys.executable, "-m", "experiments", f"data.path={small_mnist_dir}"]
    processes = [
        subprocess.Popen(
            [*command, "trainer.epochs=1"], cwd=directory, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(8)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, outputs
    return [directory / str(re.search(r"^run +(\S+)$", out, re.M)[1]) for out, _ in outputs]  # type: ignore[index]


def test_runs_started_together_have_a_directory_each(together: list[Path]) -> None:
    assert len(set(together)) == 8
    assert {file.parent for file in together[0].parents[2].rglob("run.json")} == set(together)


def test_runs_started_together_are_all_whole_and_of_the_same_bits(together: list[Path]) -> None:
    assert {record(path)["state"] for path in together} == {"finished"}
    assert len({record(path)["weights"]["final"] for path in together}) == 1
    first, *rest = map(numbers, together)
    assert len(first) == 3
    assert all(other == first for other in rest)


@pytest.fixture(scope="module")
def sweep(
    tmp_path_factory: pytest.TempPathFactory, small_mnist_dir: Path, cli_in: Command
) -> FinishedRun:
    """Two jobs with Hydra's basic launcher, the first with the config of `finished_run`."""
    directory = tmp_path_factory.mktemp("sweep")
    completed = cli_in(
        directory, "--multirun", "hydra/launcher=basic", f"data.path={small_mnist_dir}",
        "trainer.epochs=2", "trainer.log_every=4", "seed=0,1",
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    return FinishedRun(completed, directory)


def test_multirun_runs_every_value_in_a_directory_of_its_own(sweep: FinishedRun) -> None:
    records = [record(file.parent) for file in sweep.path.rglob("run.json")]
    assert sorted(found["seed"] for found in records) == [0, 1]
    assert {found["state"] for found in records} == {"finished"}
    assert len({found["weights"]["final"] for found in records}) == 2


def test_a_run_in_a_sweep_has_the_bits_of_the_same_run_alone(
    sweep: FinishedRun, finished_run: FinishedRun
) -> None:
    [path] = [
        file.parent for file in sweep.path.rglob("run.json") if record(file.parent)["seed"] == 0
    ]
    assert numbers(path) == numbers(finished_run.path)
    assert record(path)["weights"] == record(finished_run.path)["weights"]
