"""Sweeps over all cores: the real command, its signals, and the directory that it goes on in."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import paced
import pytest
from conftest import PATIENCE, WATCHED, FinishedRun
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from saved_runs import assert_same_run, change_record, go_on, lines, record
from terminal import run_in_terminal
from under_way import UnderWay

from experiments import job
from experiments.config.monitoring import maximizes
from experiments.config.names import run_name
from experiments.directory.checkpoints import Checkpoints
from experiments.directory.claim import LOCK_FILE, lock_directory
from experiments.interrupt import Interrupt
from experiments.sweeps.jobs import Job
from experiments.sweeps.pool import Pool, record_interruption
from experiments.sweeps.view import LiveTable

Completed = subprocess.CompletedProcess[str]
Command = Callable[..., Completed]
Compose = Callable[[list[str]], dict[str, Any]]

# Models that fail while a file stands in the working directory, data that counts its readers,
# and a callback of Hydra's that kills the worker before the run has a record.
OWN = """
import os
import signal
import weakref
from pathlib import Path

from hydra.experimental.callback import Callback
from torch import nn

from experiments.data import mnist
from experiments.errors import UsageError

class Fragile(nn.Linear):
    def __init__(self, how):
        super().__init__(784, 10)
        self.how = how

    def forward(self, x):
        if Path("fragile").exists():
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            return {}["a mistake of ours"]
        return super().forward(x)

class Failing(nn.Linear):
    # It fails in one of three ways, and before that writes how many of its kind are in memory and
    # how many files are open.
    made = 0
    alive = weakref.WeakSet()

    def __init__(self):
        super().__init__(784, 10)
        Failing.made += 1
        Failing.alive.add(self)
        self.cycle = [self]
        self.how = Failing.made % 3
        with open("left", "a") as file:
            print(len(Failing.alive), len(os.listdir("/proc/self/fd")), file=file)
        if self.how == 0:
            raise UsageError("model: cannot be built")

    def forward(self, x):
        if self.how == 1:
            raise KeyError
        return super().forward(x) * float("nan")

def counted(path):
    with open("readers", "a") as file:
        print(os.getpid(), file=file)
    return mnist.load(path)

class KillAtStart(Callback):
    def on_job_start(self, config, **kwargs):
        if config.seed == 0:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def own_parts(directory: Path) -> None:
    """Options of one's own, below `own`, and the module that they name."""
    (directory / "own_parts.py").write_text(OWN)
    for name, text in {
        "model/raising": "_target_: own_parts.Fragile\nhow: raising\n",
        "model/killed": "_target_: own_parts.Fragile\nhow: killed\n",
        "model/failing": "_target_: own_parts.Failing\n",
        "data/counted": "_target_: own_parts.counted\npath: null\n",
    }.items():
        file = directory / "own" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def in_sweep(sweep: Path) -> dict[str, Path]:
    """The run directories of a sweep by what its swept overrides were."""
    return {"+".join(record(f.parent)["overrides"]): f.parent for f in sweep.glob("*/run.json")}


def states(sweep: Path) -> list[str]:
    return sorted(record(file.parent)["state"] for file in sweep.glob("*/run.json"))


def contents(run: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a run: when it was written, and what is in it."""
    files = (file for file in run.rglob("*") if file.is_file())
    return {str(f.relative_to(run)): (f.stat().st_mtime_ns, f.read_bytes()) for f in files}


# Runs that fail, are killed or diverge, and the same command again


class Mixed(NamedTuple):
    """A sweep in which of three models two fail, and the next command, when they no longer do."""

    path: Path
    first: Completed
    states: dict[str, str]  # by model and lr, after the first command
    errors: dict[str, str]  # error.txt
    results: str  # results.csv
    kept: dict[str, dict[str, tuple[int, bytes]]]  # files of the finished and diverged runs
    second: Completed


MODELS = ("mlp", "raising", "killed")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, small_mnist_dir: Path) -> Mixed:
    directory = tmp_path_factory.mktemp("mixed")
    own_parts(directory)
    (directory / "fragile").touch()

    def command(lrs: str) -> Completed:
        return subprocess.run(
            [
                *(sys.executable, "-c", WATCHED, "-m", "--config-dir", "own", "sweep=mixed"),
                *(f"data.path={small_mnist_dir}", "trainer.epochs=2", "trainer.log_every=4"),
                *(f"model={','.join(MODELS)}", f"optimizer.lr={lrs}"),
            ],
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def named() -> dict[str, Path]:
        return {
            re.sub(r".*model=(\w+)\+optimizer.lr=(\S+)", r"\1 \2", overrides): path
            for overrides, path in in_sweep(path).items()
        }

    path = directory / "outputs" / "mixed"
    first = command("0.1,1e9")
    found = {name: record(run)["state"] for name, run in named().items()}
    errors = {n: (r / "error.txt").read_text() for n, r in named().items() if found[n] == "failed"}
    over = ("finished", "diverged")
    kept = {name: contents(run) for name, run in named().items() if found[name] in over}
    results = (path / "results.csv").read_text()
    (directory / "fragile").unlink()
    second = command("0.1,1e9,0.2")
    return Mixed(path, first, found, errors, results, kept, second)


def test_a_run_that_raises_or_is_killed_stops_no_other(mixed: Mixed) -> None:
    assert mixed.states == {
        "mlp 0.1": "finished",
        "mlp 1000000000.0": "diverged",
        **{f"{model} {lr}": "failed" for model in MODELS[1:] for lr in ("0.1", "1000000000.0")},
    }
    assert mixed.first.returncode == 1


def test_the_traceback_of_a_run_that_raised_is_in_its_directory(mixed: Mixed) -> None:
    text = mixed.errors["raising 0.1"]
    assert text.startswith("Traceback (most recent call last)")
    assert 'return {}["a mistake of ours"]' in text
    assert text.rstrip().endswith("KeyError: 'a mistake of ours'")


def test_a_run_whose_worker_was_killed_says_by_what(mixed: Mixed) -> None:
    assert "SIGKILL" in mixed.errors["killed 0.1"]


def test_a_run_is_reported_at_once_in_a_line_of_its_own(mixed: Mixed) -> None:
    out = mixed.first.stdout
    assert re.findall(r"^\[(\d)/6\] ", out, re.M) == ["1", "2", "3", "4", "5", "6"]
    assert len(re.findall(r"^\[\d/6\] \S*raising\S*  failed .*a mistake of ours", out, re.M)) == 2
    assert len(re.findall(r"^\[\d/6\] \S*killed\S*  failed .*SIGKILL", out, re.M)) == 2
    assert out.index("[6/6]") < out.index("rank ")


def test_without_a_terminal_there_are_plain_lines(mixed: Mixed) -> None:
    for completed in (mixed.first, mixed.second):
        assert "\x1b" not in completed.stdout + completed.stderr
        assert "\r" not in completed.stdout


def test_the_parent_of_a_sweep_imports_no_torch(mixed: Mixed) -> None:
    assert (mixed.first.stderr, mixed.second.stderr) == ("", "")


def test_the_table_ranks_the_finished_run_first_and_the_diverged_last(mixed: Mixed) -> None:
    [*_, table] = mixed.first.stdout.partition("\nrank ")
    told = re.findall(r"^ +(\d) .*(finished|failed|diverged)", table, re.M)
    expected = ["finished", *["failed"] * 4, "diverged"]
    assert told == [(str(rank), state) for rank, state in enumerate(expected, 1)]


def test_a_run_in_a_worker_has_the_bits_of_the_same_run_alone(
    mixed: Mixed, finished_run: FinishedRun
) -> None:
    [run] = [path for name, path in in_sweep(mixed.path).items() if "mlp+optimizer.lr=0.1" in name]
    assert lines(run) == lines(finished_run.path)
    assert record(run)["weights"] == record(finished_run.path)["weights"]
    assert record(run)["metrics"] == record(finished_run.path)["metrics"]
    assert record(run)["environment"] == record(finished_run.path)["environment"]


def test_the_same_command_leaves_every_file_of_a_finished_or_diverged_run(mixed: Mixed) -> None:
    assert len(mixed.kept) == 2
    now = [contents(run) for run in in_sweep(mixed.path).values()]
    for files in mixed.kept.values():
        assert files in now


def test_the_same_command_retries_what_failed_and_runs_what_is_new(mixed: Mixed) -> None:
    out = mixed.second.stdout
    assert len(re.findall(r"^\[\d/9\] ", out, re.M)) == 9
    assert len(re.findall(r"^\[\d/9\] .* before$", out, re.M)) == 2
    # the linear model survives the large lr or does not, but no run fails any more
    assert set(states(mixed.path)) == {"finished", "diverged"}
    assert len(states(mixed.path)) == 9


def test_only_diverged_runs_are_no_failure(mixed: Mixed) -> None:
    assert "diverged" in states(mixed.path)
    assert mixed.second.returncode == 0


def test_a_run_that_is_retried_keeps_no_error_of_before(mixed: Mixed) -> None:
    for file in mixed.path.glob("*/run.json"):
        found = record(file.parent)
        assert (found["state"] == "diverged") == ("error" in found)
        assert (found["state"] == "diverged") == (file.parent / "error.txt").exists()


def test_a_worker_that_is_killed_before_its_run_has_a_record_is_a_failure(
    tmp_path: Path, small_mnist_dir: Path, cli: Command
) -> None:
    own_parts(tmp_path)
    completed = cli(
        "-m", "sweep=early", f"data.path={small_mnist_dir}", "seed=0,1", "trainer.epochs=1",
        "+hydra.callbacks.early={_target_: own_parts.KillAtStart}",
    )  # fmt: skip
    sweep = tmp_path / "outputs" / "early"
    assert re.search(r"seed=0\S*  failed .*SIGKILL", completed.stdout)
    assert completed.returncode == 1
    [run] = [path for path in sweep.glob("*seed=0*") if path.is_dir()]
    assert "SIGKILL" in (run / "error.txt").read_text()
    assert re.search(r"^ +\d .*failed", completed.stdout, re.M)


def test_runs_that_fail_leave_neither_models_nor_open_files_in_their_worker(
    tmp_path: Path, small_mnist_dir: Path, cli: Command
) -> None:
    own_parts(tmp_path)
    completed = cli(
        "-m", "--config-dir", "own", "sweep=failing", f"data.path={small_mnist_dir}",
        "model=failing", "seed=range(0,12)", "trainer.epochs=1", "hydra.launcher.workers=1",
    )  # fmt: skip
    assert completed.returncode == 1, completed.stderr
    assert states(tmp_path / "outputs" / "failing") == ["diverged"] * 4 + ["failed"] * 8
    left = [line.split() for line in (tmp_path / "left").read_text().splitlines()]
    assert [models for models, _ in left] == ["1"] * 12
    assert len({files for _, files in left[3:]}) == 1


def test_the_loader_processes_of_a_worker_that_is_killed_leave_too(
    tmp_path: Path, small_mnist_dir: Path
) -> None:
    own_parts(tmp_path)
    (tmp_path / "fragile").touch()
    with UnderWay(
        tmp_path, "-m", "--config-dir", "own", "sweep=s", f"data.path={small_mnist_dir}",
        "model=killed", "loader=torch", "loader.num_workers=1", "seed=0,1",
        "hydra.launcher.workers=1",
    ) as sweep:  # fmt: skip
        code, out, _ = sweep.end()
        assert sweep.outlived() == []
    assert code == 1
    assert len(re.findall(r"failed .*SIGKILL", out)) == 2
    assert states(tmp_path / "outputs" / "s") == ["failed", "failed"]


@pytest.mark.parametrize(
    ("before", "after"), [("running", "interrupted"), ("finished", "finished")]
)
def test_a_run_whose_worker_a_signal_ended_before_it_could_say_so_is_recorded(
    before: str, after: str, finished_run: FinishedRun, tmp_path: Path
) -> None:
    path = shutil.copytree(finished_run.path, tmp_path / "run")
    change_record(path, state=before)
    state, value, error = record_interruption(Job("run", path, OmegaConf.create()))
    assert (state, error) == (after, None)
    assert (value is None) == (after == "interrupted")
    assert record(path)["state"] == after


def test_a_run_that_a_signal_ended_is_not_started_again_by_a_pool_that_has_not_yet_noticed(
    tmp_path: Path,
) -> None:
    ended: list[Job] = []
    pool = Pool(1, on_job_end=ended.append)
    job = Job("run", tmp_path, OmegaConf.create())
    pool.end(job, "interrupted", None, None)  # a signal that was meant for the run before
    assert (pool.retry_queue, ended) == ([job], [])
    pool.retry_queue.clear()
    with Interrupt() as pool.interrupt:
        signal.raise_signal(signal.SIGTERM)  # to the whole process group: to the worker as well
        pool.end(job, "interrupted", None, None)
    assert (pool.retry_queue, ended) == ([], [job])


def test_runs_whose_first_epoch_ends_before_a_validation_are_swept(
    cli: Command, small_mnist_dir: Path
) -> None:
    steps = ["trainer.steps=15", "trainer.evaluate_every=12", f"data.path={small_mnist_dir}"]
    completed = cli("-m", "optimizer.lr=0.05,0.1", *steps, "sweep=sparse")
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.count(" finished ") == 2


def test_the_record_of_a_run_says_whether_more_of_an_own_metric_is_better(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    path = shutil.copytree(finished_run.path, tmp_path / "run")
    config = {**record(path)["config"], "metrics": {"mine": {"_target_": "mine.Metric"}}}
    config["trainer"] = {**config["trainer"], "monitor": "mine/valid"}
    change_record(path, mode="max", config=config)
    job = Job("run", path, OmegaConf.create(), maximize=maximizes(config))
    assert job.maximize is None
    Pool(1, on_job_end=lambda job: None).end(job, "finished", 0.5, None)
    assert job.maximize


# Workers, and a config that changes


class Changed(NamedTuple):
    """Two runs on one worker, and the same command with one more after its model changed."""

    path: Path
    readers: list[str]
    kept: dict[Path, dict[str, tuple[int, bytes]]]
    second: Completed


@pytest.fixture(scope="module")
def changed(
    tmp_path_factory: pytest.TempPathFactory, small_mnist_dir: Path, cli_in: Command
) -> Changed:
    directory = tmp_path_factory.mktemp("changed")
    own_parts(directory)
    model = directory / "own" / "model" / "mine.yaml"

    def command(width: int, seeds: str) -> Completed:
        model.write_text(f"defaults: [mlp]\nhidden: [{width}]\n")
        completed = cli_in(
            directory, "-m", "--config-dir", "own", "sweep=mine", "hydra.launcher.workers=1",
            "data=counted", f"data.path={small_mnist_dir}", "model=mine", "trainer.epochs=1",
            f"seed={seeds}",
        )  # fmt: skip
        assert completed.returncode == 0, completed.stderr
        return completed

    command(8, "0,1")
    path = directory / "outputs" / "mine"
    readers = (directory / "readers").read_text().split()
    kept = {file.parent: contents(file.parent) for file in path.glob("*/run.json")}
    return Changed(path, readers, kept, command(9, "0,1,2"))


def test_runs_share_a_worker_which_reads_the_data_once(changed: Changed) -> None:
    assert len(changed.kept) == 2
    assert len(changed.readers) == 1


def test_a_changed_config_is_a_new_run_and_leaves_the_old_one_alone(changed: Changed) -> None:
    for run, files in changed.kept.items():
        assert contents(run) == files
    widths = sorted(
        (record(file.parent)["seed"], record(file.parent)["config"]["model"]["hidden"])
        for file in changed.path.glob("*/run.json")
    )
    assert widths == [(0, [8]), (0, [9]), (1, [8]), (1, [9]), (2, [9])]
    assert " before" not in changed.second.stdout


def test_a_sweep_that_another_process_runs_is_refused(cli: Command, tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "taken"
    sweep.mkdir(parents=True)
    lock = lock_directory(sweep)
    completed = cli("-m", "sweep=taken", "seed=0,1")
    lock.close()
    assert completed.returncode == 2
    [line] = completed.stderr.splitlines()
    assert line.startswith("experiments: outputs/taken: another process is running it")
    assert completed.stdout == ""
    assert [file.name for file in sweep.iterdir()] == [LOCK_FILE]


def test_two_sweeps_that_start_together_have_a_directory_each(
    tmp_path: Path, small_mnist_dir: Path
) -> None:
    overrides = [f"data.path={small_mnist_dir}", "trainer.epochs=1", "hydra.launcher.workers=1"]
    with (
        UnderWay(tmp_path, "-m", *overrides, "seed=0") as one,
        UnderWay(tmp_path, "-m", *overrides, "seed=1") as other,
    ):
        ends = [one.end(), other.end()]
    assert [code for code, _, _ in ends] == [0, 0], ends
    directories = [re.search(r"^sweep of 1 runs in (\S+)$", out, re.M) for _, out, _ in ends]
    first, second = (str(found and found[1]) for found in directories)
    assert first != second
    for path, seed in ((first, 0), (second, 1)):
        [file] = (tmp_path / path).glob("*/run.json")
        assert record(file.parent)["seed"] == seed


@pytest.fixture(scope="module")
def joblib_runs(
    tmp_path_factory: pytest.TempPathFactory, small_mnist_dir: Path, cli_in: Command
) -> Path:
    """A sweep that Hydra's joblib launcher ran."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    directory = tmp_path_factory.mktemp("joblib")
    completed = cli_in(
        directory, "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1", "sweep=joblib",
        f"data.path={small_mnist_dir}", "trainer.epochs=2", "trainer.log_every=4", "seed=0,1",
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    return directory / "outputs" / "joblib"


def test_another_launcher_runs_the_same_jobs_to_the_same_bits(
    joblib_runs: Path, finished_run: FinishedRun
) -> None:
    found = [file.parent for file in joblib_runs.rglob("run.json")]
    assert [record(run)["state"] for run in found] == ["finished"] * 2
    [run] = [run for run in found if record(run)["seed"] == 0]
    assert lines(run) == lines(finished_run.path)
    assert record(run)["weights"] == record(finished_run.path)["weights"]


def test_another_launcher_makes_one_level_of_directories_too(joblib_runs: Path) -> None:
    """Though a value, here data.path, has slashes in it."""
    assert states(joblib_runs) == ["finished"] * 2


def test_loader_workers_run_under_another_launcher_to_the_same_bits(
    tmp_path: Path, small_mnist_dir: Path, cli: Command
) -> None:
    """Its processes start their own kind of process by default, which is not a DataLoader's."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    for name, launcher, workers in (("j", "joblib", 2), ("b", "basic", 0)):
        completed = cli(
            "-m", f"hydra/launcher={launcher}", f"sweep={name}", f"data.path={small_mnist_dir}",
            "trainer.epochs=1", "model=linear", "loader=torch", f"loader.num_workers={workers}",
            "seed=0,1",
        )  # fmt: skip
        assert completed.returncode == 0, completed.stderr
    for seed in ("seed=0", "seed=1"):
        [one] = (tmp_path / "outputs" / "j").glob(f"*{seed}*")
        [other] = (tmp_path / "outputs" / "b").glob(f"*{seed}*")
        assert lines(one) == lines(other)
        assert record(one)["weights"] == record(other)["weights"]


@pytest.mark.parametrize("state", ["finished", "pruned"])
def test_another_launcher_keeps_what_is_complete_too(
    state: str, tmp_path: Path, small_mnist_dir: Path, cli: Command
) -> None:
    command = [
        *("-m", "hydra/launcher=basic", "sweep=s", "seed=0", f"data.path={small_mnist_dir}"),
        "trainer.epochs=1",
    ]
    assert cli(*command).returncode == 0
    [run] = [file.parent for file in (tmp_path / "outputs" / "s").glob("*/run.json")]
    change_record(run, state=state)
    before = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    completed = cli(*command)
    assert completed.returncode == 0, completed.stderr
    assert "Traceback" not in completed.stderr
    assert {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()} == before


# Signals


class Stop(NamedTuple):
    """How a command ended that a signal had stopped."""

    code: int
    error: str
    left: list[str]  # processes
    states: list[str]
    at_checkpoint: bool  # each interrupted run has logged what its checkpoint has, and no more


class Stopped(NamedTuple):
    """A sweep of three runs that was stopped in three ways and then went on to its end.

    Each time a run is held when it has done less than a third of its steps: none comes to its end.
    """

    path: Path
    overrides: list[str]
    stops: dict[signal.Signals, Stop]
    last: Completed


SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def stopped(
    tmp_path_factory: pytest.TempPathFactory, small_mnist_dir: Path, cli_in: Command
) -> Stopped:
    directory = tmp_path_factory.mktemp("stopped")
    path = directory / "outputs" / "stopped"
    overrides = [
        *(f"data.path={small_mnist_dir}", "model=mlp_small", "model.dropout=0.2"),
        *("trainer.epochs=12", "checkpoint.every_steps=4", "loader.batch_size=60"),
        "model._target_=paced.held",
    ]
    arguments = [*overrides, f"seed={','.join(map(str, SEEDS))}", "sweep=stopped"]
    stops = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        before = epochs(path)
        with UnderWay(
            directory, "-m", *arguments, environment=paced.environment(held_after=35)
        ) as sweep:
            sweep.wait_until(lambda before=before: epochs(path) >= before + 3)  # type: ignore[misc]
            sweep.popen.send_signal(number)
            code, _, error = sweep.end()
            left = sweep.outlived()
        at_checkpoint = all(
            ((run := file.parent) and record(run)["state"] != "interrupted") or newest_is_last(run)
            for file in path.glob("*/run.json")
        )
        stops[number] = Stop(code, error, left, states(path), at_checkpoint)
    last = cli_in(directory, "-m", *arguments, env=paced.environment())
    return Stopped(path, overrides, stops, last)


def epochs(sweep: Path) -> int:
    """Epochs done in all runs of a sweep."""
    return sum(f.read_text().count("loss/valid") for f in sweep.glob("*/metrics.jsonl"))


def newest_is_last(run: Path) -> bool:
    """Whether the newest checkpoint is of the last step that was logged, or of a later one."""
    content = Checkpoints(run / "checkpoints").load()
    logged = [json.loads(line)["step"] for line in lines(run)]
    return not logged or (content is not None and content["state"]["step"] >= max(logged))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_a_sweep_at_checkpoints_and_says_how_to_go_on(
    number: signal.Signals, code: int, stopped: Stopped
) -> None:
    stop = stopped.stops[number]
    assert stop.code == code
    assert "the same command with hydra.sweep.dir=outputs/stopped goes on" in stop.error
    assert stop.error.count("\n") == 1
    assert "interrupted" in stop.states
    assert set(stop.states) <= {"interrupted", "finished"}
    assert stop.at_checkpoint


def test_after_a_signal_no_process_is_left_behind(stopped: Stopped) -> None:
    assert [stop.left for stop in stopped.stops.values()] == [[], [], []]


def test_a_sweep_whose_parent_was_killed_has_runs_that_say_running(stopped: Stopped) -> None:
    """As a run that is killed alone; what reads them sees that nobody holds them."""
    stop = stopped.stops[signal.SIGKILL]
    assert stop.code == -signal.SIGKILL
    assert "running" in stop.states


def test_stopped_again_and_again_a_sweep_ends_with_the_bits_of_runs_alone(
    stopped: Stopped, compose: Compose, tmp_path: Path
) -> None:
    assert stopped.last.returncode == 0, stopped.last.stderr
    assert len(list(stopped.path.glob("*/run.json"))) == len(SEEDS)
    resumed = 0
    for seed in SEEDS:
        [run] = stopped.path.glob(f"*seed={seed}*")
        config = compose([*stopped.overrides, f"seed={seed}"])
        alone = tmp_path / str(seed)
        go_on(alone, config, job.load_data(config))
        assert_same_run(run, alone)
        resumed += len(record(run)["resumed_at"])
    assert resumed >= 3


def test_a_sweep_that_is_stopped_while_its_workers_start_has_no_failed_run(
    tmp_path: Path, small_mnist_dir: Path
) -> None:
    endless = (f"data.path={small_mnist_dir}", "trainer.epochs=100000")
    with UnderWay(tmp_path, "-m", *endless, "seed=0,1,2", "sweep=s") as sweep:
        sweep.wait_for_line("sweep of 3 runs in outputs/s\n")
        sweep.popen.send_signal(signal.SIGINT)
        code, out, error = sweep.end()
        assert code == 130, error
        assert "failed" not in out
        assert "failed" not in states(tmp_path / "outputs" / "s")
        assert sweep.outlived() == []


# In a terminal

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


OVER = re.compile(r"[1-5] of 6 runs over \([^)]*[12] failed[^)]*\)")
LEFT = re.compile(r"about \d+ (s|min) left")
RANKED = re.compile(r"\b1\b\W+\S*model=mlp\w*\S*\W+loss/valid \d\.\d{4}")


def losses(text: str) -> dict[str, set[str]]:
    """The losses of each running model that were drawn with its name, bar and accuracy."""
    running = re.findall(r"model=(mlp\w*)\S* .* (\d\.\d{4}) .* \d\.\d{4}", text)
    return {name: {loss for other, loss in running if other == name} for name, _ in running}


def all_was_drawn(terminal: str) -> bool:
    """Whether what the tests look for has been seen; the runs that go on are endless."""
    text = ESCAPE.sub("", terminal)
    found = losses(text)
    several = [name for name in found if len(found[name]) >= 2]
    return len(several) == 2 and all(pattern.search(text) for pattern in (OVER, LEFT, RANKED))


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory, small_mnist_dir: Path) -> str:
    """What a sweep of two runs that finish, two that fail and two that go on for ever writes to a
    terminal, until it is interrupted.
    """
    directory = tmp_path_factory.mktemp("terminal")
    own_parts(directory)
    (directory / "fragile").touch()
    return run_in_terminal(
        directory,
        400,
        *("-m", "--config-dir", "own", "sweep=s", f"data.path={small_mnist_dir}"),
        *("trainer.epochs=3,100000", "model=raising,mlp_small,mlp", "hydra.launcher.workers=2"),
        code=130,
        interrupt_when=all_was_drawn,
    )


@pytest.mark.parametrize("columns", [20, 80])
def test_names_and_errors_that_look_like_markup_are_shown_as_they_are(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = io.StringIO()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", text)
    job = Job("a[/b]=[bold]", tmp_path, OmegaConf.create(), "failed", error="shape [/x]\x1b[2J")
    table = LiveTable(2, [job, Job("[/c]", tmp_path, OmegaConf.create(), "running")])
    table.job_ended(job)
    table.refresh()
    table.close()
    assert "shape [/x]\\x1b[2J" in text.getvalue().replace("\n", "")


def test_a_terminal_shows_each_running_job_with_its_progress(terminal: str) -> None:
    found = losses(ESCAPE.sub("", terminal))
    assert found.keys() == {"mlp", "mlp_small"}
    assert len(found["mlp"]) >= 2


def test_a_terminal_shows_how_many_are_over_and_the_time_left(terminal: str) -> None:
    text = ESCAPE.sub("", terminal)
    assert OVER.search(text)
    assert LEFT.search(text)


def test_a_terminal_ranks_finished_runs_while_others_go_on(terminal: str) -> None:
    assert RANKED.search(ESCAPE.sub("", terminal))


def test_a_terminal_shows_a_failure_at_once_and_in_red(terminal: str) -> None:
    assert re.search(r"\x1b\[31mfailed\x1b\[0m \S*raising\S*: KeyError", terminal)
    table = terminal[terminal.rindex("rank ") :]
    assert re.search(r"\x1b\[31m[^\x1b\n]*raising[^\x1b\n]*failed[^\x1b\n]*\x1b\[0m", table)


# Names of directories


@given(st.text(min_size=1, max_size=400))
def test_any_overrides_name_a_directory_of_one_level(overrides: str) -> None:
    name = run_name(overrides)
    assert "/" not in name
    assert "\0" not in name
    assert name not in ("", ".", "..")
    assert len(name.encode()) <= 250
    assert not re.search(r"[\s'\"$`\\*?|&;<>(){}!~#]", name)


@given(st.sets(st.text(alphabet="ab/_ é=,1.", max_size=6), min_size=2))
def test_no_two_overrides_have_the_same_name(overrides: set[str]) -> None:
    assert len({run_name(text) for text in overrides}) == len(overrides)


@given(st.text(alphabet="xé", min_size=150, max_size=300), st.text(max_size=3), st.text(max_size=3))
def test_long_overrides_that_differ_at_their_end_have_different_names(
    long: str, one: str, other: str
) -> None:
    assert (run_name(long + one) == run_name(long + other)) == (one == other)


def test_common_overrides_are_readable_names() -> None:
    assert run_name("loader.batch_size=32,optimizer.lr=0.1") == (
        "loader.batch_size=32,optimizer.lr=0.1"
    )
