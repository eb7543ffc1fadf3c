"""Standard streams that are closed, full or read by nobody."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, FinishedRun

SHORT = "model=linear trainer.epochs=1"


def shell(directory: Path, command: str) -> subprocess.CompletedProcess[str]:
    """A shell command, in which EXPERIMENTS stands for the interpreter and `-m experiments`."""
    command = command.replace("EXPERIMENTS", f"{sys.executable} -m experiments")
    return subprocess.run(
        ["bash", "-c", command], cwd=directory, capture_output=True, text=True, timeout=PATIENCE
    )


def state(path: Path) -> str:
    found = json.loads((path / "run.json").read_text())["state"]
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize("streams", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_run_with_closed_streams_finishes(
    streams: str, small_mnist_dir: Path, tmp_path: Path
) -> None:
    run = f"EXPERIMENTS data.path={small_mnist_dir} {SHORT} hydra.run.dir=run {streams}"
    assert shell(tmp_path, run).returncode == 0
    assert state(tmp_path / "run") == "finished"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_run_whose_output_finds_no_space_finishes_and_says_so_once(
    small_mnist_dir: Path, tmp_path: Path
) -> None:
    run = f"EXPERIMENTS data.path={small_mnist_dir} {SHORT} hydra.run.dir=run > /dev/full"
    completed = shell(tmp_path, run)
    assert completed.returncode == 0
    assert completed.stderr == (
        "warning: standard output cannot be written (No space left on device); what is printed "
        "is lost, the files are not\n"
    )
    assert state(tmp_path / "run") == "finished"


@pytest.mark.parametrize("stream", [">&-", ">/dev/full"])
def test_a_sweep_without_output_finishes(
    stream: str, small_mnist_dir: Path, tmp_path: Path
) -> None:
    sweep = f"EXPERIMENTS -m data.path={small_mnist_dir} {SHORT} seed=0,1 sweep=s {stream}"
    assert shell(tmp_path, sweep).returncode == 0
    runs = list((tmp_path / "outputs" / "s").glob("*/run.json"))
    assert [state(run.parent) for run in runs] == ["finished", "finished"]


@pytest.mark.parametrize(
    "command", ["EXPERIMENTS --help", "EXPERIMENTS.compare RUN", "EXPERIMENTS.evaluate RUN"]
)
def test_a_reader_that_leaves_early_is_no_error(
    command: str, finished_run: FinishedRun, tmp_path: Path
) -> None:
    command = command.replace("RUN", str(finished_run.path))
    completed = shell(tmp_path, f"{command} | true; exit ${{PIPESTATUS[0]}}")
    assert completed.stderr == ""
    assert completed.returncode in (0, 128 + signal.SIGPIPE)


def test_a_removed_working_directory_is_told_in_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    completed = shell(gone, "rmdir ../gone && EXPERIMENTS")
    assert completed.returncode == 2
    [line] = completed.stderr.splitlines()
    assert line.startswith("experiments: the working directory does not exist any more")


def test_what_cannot_be_encoded_is_printed_as_an_escape(tmp_path: Path) -> None:
    code = r"from experiments import stdio; stdio.protect(); print('caf\udce9')"
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    completed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert (completed.stdout, completed.stderr) == ("caf\\udce9\n", "")
