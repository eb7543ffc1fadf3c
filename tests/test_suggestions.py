"""Every command that a message suggests is run as it is written."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import paced
import pytest
from conftest import PATIENCE, FinishedRun
from saved_runs import record
from under_way import UnderWay

import experiments
from experiments.errors import UsageError

pytestmark = pytest.mark.long

Completed = subprocess.CompletedProcess[str]
Command = Callable[..., Completed]

FRAGILE = """
from pathlib import Path
from torch import nn

def model():
    if Path("fragile").exists():
        raise KeyError("a mistake of ours")
    return nn.Linear(784, 10)
"""


def shell(directory: Path, command: str) -> Completed:
    """A command line as a shell in a directory takes it, with this interpreter as `python`."""
    command = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", command)
    environment = {**os.environ, **paced.environment()}
    return subprocess.run(
        command, shell=True, cwd=directory, env=environment, capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip


@pytest.fixture
def interrupted(tmp_path: Path, small_mnist_dir: Path) -> tuple[Path, str]:
    """The directory of an interrupted run of a model of one's own, and what it printed."""
    overrides = [f"data.path={small_mnist_dir}", "model=mlp_small", "model._target_=paced.held"]
    with UnderWay(
        tmp_path, *overrides, "trainer.epochs=2", "hydra.run.dir=my run",
        environment=paced.environment(held_after=12),
    ) as process:  # fmt: skip
        process.wait_for_line(r"epoch +1/")
        process.popen.send_signal(signal.SIGINT)
        code, _, error = process.end()
    assert code == 130
    return tmp_path / "my run", error


def test_the_command_that_an_interrupted_run_suggests_finishes_it(
    interrupted: tuple[Path, str],
) -> None:
    run, error = interrupted
    [command] = re.findall(r"resume with: (.*)\n", error)
    completed = shell(run.parent, command)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert record(run)["state"] == "finished"


def test_the_trust_that_a_refusal_suggests_is_the_one_that_is_missing(
    interrupted: tuple[Path, str],
) -> None:
    run, _ = interrupted
    refused = shell(run.parent, "python -m experiments resume='my run'")
    assert refused.returncode == 2
    [flag, in_python] = re.findall(
        r"pass (--trust \S+) \(in Python trust=\['(\S+)'\]\)", refused.stderr
    )[0]
    assert shell(run.parent, f"python -m experiments resume='my run' {flag}").returncode == 0
    # the last test file's directory is on the path of this process, too
    assert experiments.load_run(run, trust=[in_python]).step > 0


def test_the_command_that_a_run_without_a_checkpoint_suggests_gives_it_one(
    interrupted: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = interrupted
    for file in (run / "checkpoints").iterdir():
        file.unlink()
    monkeypatch.chdir(run.parent)
    with pytest.raises(UsageError) as refusal:
        experiments.load_run(run, trust=["paced"])
    [command] = re.findall(r"go on with: (.*)$", str(refusal.value))
    assert shell(run.parent, command).returncode == 0
    assert experiments.load_run(run, trust=["paced"]).step > 0


def test_tensorboard_reads_what_a_run_suggests_to_look_at(finished_run: FinishedRun) -> None:
    [command] = re.findall(r"^look +(.*)$", finished_run.completed.stdout, re.MULTILINE)
    directory = finished_run.path.parents[2]
    # --inspect prints what a server would show, and ends
    program = f"python -m tensorboard.main{command.removeprefix('tensorboard')} --inspect"
    completed = shell(directory, program)
    assert completed.returncode == 0, completed.stderr
    assert "loss/valid" in completed.stdout or "loss" in completed.stdout


def test_the_directory_that_a_sweeps_last_line_suggests_retries_its_failures(
    cli: Command, tmp_path: Path, small_mnist_dir: Path
) -> None:
    (tmp_path / "fragile_parts.py").write_text(FRAGILE)
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "fragile.yaml").write_text("_target_: fragile_parts.model\n")
    (tmp_path / "fragile").touch()
    command = (
        *("-m", "--config-dir", "own", "model=fragile", f"data.path={small_mnist_dir}"),
        *("trainer.epochs=1", "seed=0,1"),
    )
    failed = cli(*command)
    assert failed.returncode == 1
    [word] = re.findall(
        r"^failed .* the same command with (\S+) retries them$", failed.stdout, re.M
    )
    (tmp_path / "fragile").unlink()
    again = cli(*command, *shlex.split(word))
    assert again.returncode == 0, again.stderr
    found = [record(file.parent) for file in tmp_path.rglob("run.json")]
    assert [run["state"] for run in found] == ["finished"] * 2


@pytest.mark.parametrize(
    ("typed", "suggestion", "wanted"),
    [
        (["sweep=my first"], r"hydra\.run\.dir=('[^']+'|\S+)$", ["{}"]),
        (["warmup=0.1"], r"(scheduler=\w+) has (scheduler\.warmup)$", ["{0}", "{1}=0.1"]),
        (["betas=[0.9,0.9]"], r"(optimizer=\w+) has (optimizer\.betas)$", ["{0}", "{1}=[0.9,0.9]"]),
        (["lr=0.2"], r"did you mean (\S+)\?$", ["{0}=0.2"]),
        (["seed=0,1"], r"several values need (--multirun)", ["{0}", "seed=0,1"]),
        (["optimizer=adm"], r"did you mean (\S+)\?$", ["{0}"]),
        (["optimizer="], r"there is (optimizer=\w+),", ["{0}"]),
        (["+tags=[a,b]"], r"a note belongs under (extra\.tags)$", ["+{0}=[a,b]"]),
        (["sweep=first"], r"; add (-m), or", ["{0}", "sweep=first"]),
        (["--keep-changed"], r"; add (-m)$", ["{0}", "--keep-changed"]),
        (
            ["-m", "seed=0,1", "seed=2"],
            r"all of its values together, as a,b,c$",
            ["-m", "seed=0,1,2"],
        ),
        (["--config-name", "mine"], r"(leave it out), or give its --config-dir$", []),
        (
            ["-m", "seed=0,1", "hydra.sweep.subdir=x", "hydra/launcher=basic"],
            r"use (hydra/launcher=workers), which",
            ["-m", "seed=0,1", "hydra.sweep.subdir=x", "{0}"],
        ),
    ],
)
def test_what_a_refusal_suggests_is_accepted(
    typed: list[str],
    suggestion: str,
    wanted: list[str],
    cli: Command,
    small_mnist_dir: Path,
) -> None:
    short = [f"data.path={small_mnist_dir}", "model=linear", "trainer.epochs=1"]
    refused = cli(*typed, *short)
    assert refused.returncode == 2
    [line] = refused.stderr.splitlines()
    found = re.search(suggestion, line)
    assert found is not None, line
    if wanted == ["{}"]:
        wanted = [shlex.split(found[0])[0]]
    completed = cli(*(word.format(*found.groups()) for word in wanted), *short)
    assert completed.returncode == 0, completed.stderr


def test_the_resume_that_a_taken_directory_suggests_is_accepted(
    cli: Command, finished_run: FinishedRun
) -> None:
    refused = cli(f"hydra.run.dir={finished_run.path}")
    [word] = re.findall(r"or use (resume=\S+)$", refused.stderr.rstrip())
    completed = cli(*shlex.split(word))
    assert (completed.returncode, completed.stderr) == (0, "")
    assert "already finished" in completed.stdout


@pytest.mark.parametrize("named", [[], ["sweep=my first (1)"]], ids=["by its time", "by a name"])
def test_the_directory_that_an_interrupted_sweep_suggests_goes_on_with_it(
    named: list[str], tmp_path: Path, small_mnist_dir: Path
) -> None:
    command = (
        *("-m", f"data.path={small_mnist_dir}", "model=mlp_small", "model._target_=paced.held"),
        *("trainer.epochs=2", "seed=0,1", "hydra.launcher.workers=1", *named),
    )
    with UnderWay(tmp_path, *command, environment=paced.environment(held_after=12)) as process:
        process.wait_until(lambda: any(tmp_path.rglob("checkpoints/step-*")))
        process.popen.send_signal(signal.SIGINT)
        code, _, error = process.end()
    assert code == 130
    [word] = re.findall(r"^interrupted; the same command with (.*) goes on$", error, re.M)
    again = shell(tmp_path, f"python -m experiments {shlex.join(command)} {word}")
    assert (again.returncode, again.stderr) == (0, "")
    runs = [record(file.parent) for file in tmp_path.rglob("run.json")]
    assert [run["state"] for run in runs] == ["finished"] * 2
    assert sum(len(run["resumed_at"]) for run in runs) == 1
