"""What Hydra's command line means in a sweep: names of directories, swept and shared keys."""

import itertools
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from saved_runs import record

from experiments.config.compose import CONF, enter, validate
from experiments.config.hydra_versions import VERSION_BASE, register_resolver
from experiments.directory.record import built_part, config_text, start
from experiments.sweeps.hydra_sweep import OUR_NAMES, is_constant
from experiments.sweeps.jobs import Continuation, Job, place_job

pytestmark = pytest.mark.long

Completed = subprocess.CompletedProcess[str]
Command = Callable[..., Completed]
Place = Callable[..., tuple[Job, list[str]]]

WITHOUT_SEED = "hydra.job.config.override_dirname.exclude_keys=[seed]"


def seeds(sweep: Path) -> dict[str, int]:
    """The seed of each run in a sweep's directory, by the path below it."""
    return {
        str(file.parent.relative_to(sweep)): record(file.parent)["seed"]
        for file in sweep.rglob("run.json")
    }


# Names that are not unique


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Callable[[], Place]]:
    """A sweep's command in tmp_path: called, it gives what places its jobs, one after the other."""

    def command() -> Place:
        continuation, numbers = Continuation(lambda composed: {}), itertools.count()

        def place(*overrides: str, names: str = OUR_NAMES) -> tuple[Job, list[str]]:
            with hydra.initialize_config_dir(str(CONF), "experiments", **VERSION_BASE):
                words = [f"hydra.sweep.subdir='{names}'", "hydra.mode=MULTIRUN", *overrides]
                composed = hydra.compose("config", words, return_hydra_config=True)
            return place_job(tmp_path, composed, next(numbers), continuation)

        return place

    yield command
    HydraConfig.instance().cfg = None


def run(job: Job) -> None:
    """Leave in a job's directory what an ended run leaves there."""
    enter(job.composed)
    job.path.mkdir(parents=True)
    start(job.path, validate(job.composed), []).end("failed", "not trained")


def test_runs_whose_names_leave_a_swept_key_out_get_numbered_directories(
    place: Callable[[], Place],
) -> None:
    first = place()
    jobs = [first(f"seed={seed}", WITHOUT_SEED)[0] for seed in range(4)]
    assert [job.name for job in jobs] == ["defaults", "defaults-2", "defaults-3", "defaults-4"]
    assert first("seed=2", WITHOUT_SEED)[0].path == jobs[2].path  # not begun yet


@pytest.mark.parametrize("names", [OUR_NAMES, "run", "a/b", "${hydra:job.num}"])
def test_numbered_directories_belong_to_their_configs_in_whatever_order(
    names: str, place: Callable[[], Place], tmp_path: Path
) -> None:
    first, second = place(), place()
    jobs = {seed: first(f"seed={seed}", WITHOUT_SEED, names=names)[0] for seed in (0, 1, 2)}
    for job in jobs.values():
        run(job)
    assert len(seeds(tmp_path)) == 3
    for seed in (2, 7, 0, 1):
        job, notices = second(f"seed={seed}", WITHOUT_SEED, names=names)
        assert notices == []
        assert (job.path in {other.path for other in jobs.values()}) == (seed in jobs)
        assert seed not in jobs or job.path == jobs[seed].path


def test_a_deleted_directory_leaves_the_higher_numbers_to_their_runs(
    place: Callable[[], Place],
) -> None:
    first, second = place(), place()
    jobs = [first(f"seed={seed}", WITHOUT_SEED)[0] for seed in range(3)]
    run(jobs[0])
    run(jobs[2])
    assert second("seed=2", WITHOUT_SEED)[0].path == jobs[2].path
    assert second("seed=1", WITHOUT_SEED)[0].path == jobs[1].path


def test_a_name_of_ones_own_is_kept(place: Callable[[], Place]) -> None:
    job, _ = place()("optimizer.lr=0.5", names="lr/${optimizer.lr}")
    assert (job.name, str(job.composed.hydra.sweep.subdir)) == ("lr/0.5", "lr/0.5")


def test_a_sweep_with_names_without_the_seed_runs_every_seed_and_goes_on(
    cli: Command, small_mnist_dir: Path, tmp_path: Path
) -> None:
    command = (
        *("-m", f"data.path={small_mnist_dir}", "model=linear", "trainer.epochs=1", "sweep=s"),
        "hydra.job.config.override_dirname.exclude_keys=[seed,data.path]",
    )
    completed = cli(*command, "seed=0,1,2")
    assert completed.returncode == 0, completed.stderr
    name = "model=linear,trainer.epochs=1"
    found = {name: 0, f"{name}-2": 1, f"{name}-3": 2}
    assert seeds(tmp_path / "outputs" / "s") == found
    again = cli(*command, "seed=2,1,0")
    assert len(re.findall(r"^\[\d/3\] .* before$", again.stdout, re.M)) == 3
    assert seeds(tmp_path / "outputs" / "s") == found


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (WITHOUT_SEED, WITHOUT_SEED),
        ("hydra.sweep.subdir=x", "hydra.sweep.subdir=x"),
        ("hydra.sweep.subdir=${optimizer.lr}", "hydra.sweep.subdir=${optimizer.lr}"),
    ],
)
def test_another_launcher_is_refused_if_two_runs_would_share_a_directory(
    names: str, said: str, cli: Command, tmp_path: Path
) -> None:
    completed = cli("-m", "hydra/launcher=basic", "seed=0,1", names)
    assert completed.returncode == 2
    [line] = completed.stderr.splitlines()
    assert line.startswith(f"experiments: {said}: the runs of seed=0 and seed=1 would share")
    assert "hydra/launcher=workers" in line
    assert list(tmp_path.iterdir()) == []


# What resolves to another value each time


def own_resolver() -> None:
    counter = itertools.count()
    register_resolver("counted", lambda: next(counter), replace=True)


def test_a_run_that_is_new_only_for_a_reference_says_so(place: Callable[[], Place]) -> None:
    own_resolver()
    job, _ = place()("+model.tag=${counted:}")
    run(job)
    again, [notice] = place()("+model.tag=${counted:}")
    assert again.path != job.path
    assert re.search(r"model\.tag=\$\{counted:\} was \d+, is \d+; run again beside it", notice)


def test_a_run_that_is_new_only_for_a_reference_through_a_variable_says_so(
    place: Callable[[], Place],
) -> None:
    own_resolver()
    words = ("+tag=${counted:}", "+model.tag=${tag}")
    run(place()(*words, names="same")[0])
    _, [notice] = place()(*words, names="same")
    assert re.search(r"model\.tag=\$\{tag\} was \d+, is \d+, .*; run again beside it", notice)


def test_a_run_that_refers_to_its_numbered_directory_is_found_again(
    place: Callable[[], Place],
) -> None:
    words = "+model.where=${hydra:runtime.output_dir}"
    first = place()
    jobs = [first(words, f"seed={seed}", names="same")[0] for seed in (0, 1, 2)]
    for job in jobs:
        run(job)
    again = place()
    for job, seed in zip(jobs, (0, 1, 2), strict=True):
        found, notices = again(words, f"seed={seed}", names="same")
        assert (found.path, notices) == (job.path, [])


def test_a_name_that_is_another_one_each_time_does_not_make_a_run_another_one(
    place: Callable[[], Place],
) -> None:
    own_resolver()
    job, _ = place()("seed=1", names="${counted:}")
    run(job)
    again, notices = place()("seed=1", names="${counted:}")
    assert (again.path, notices) == (job.path, [])


def test_what_only_names_or_is_referred_to_does_not_make_a_run_another_one() -> None:
    config = {"seed": 0, "model": {"a": [1]}, "optimizer": {"lr": 0.1}}
    named = {"when": "12:00", "seed": 0, "tags": ["a", "b"], "paths": {"a": "b"}, **config}
    assert built_part(config_text(named)) == built_part(config_text(config))
    other = {**config, "model": {"a": [2]}}
    assert built_part(config_text(other)) != built_part(config_text(config))


# Keys


def swept(cli: Command, *arguments: str) -> Completed:
    completed = cli("-m", *arguments, "model=linear", "trainer.epochs=1")
    assert completed.returncode == 0, completed.stderr
    return completed


@pytest.mark.parametrize(
    "arguments",
    [
        ["+optimizer.nesterov=true,false"],
        ["++optimizer.nesterov=true,false"],
        ["+optimizer.nesterov=true,false", "hydra/launcher=basic"],
        ["+optimizer.nesterov=true,false", "hydra/sweeper=tpe", "hydra.sweeper.trials=4"],
    ],
)
def test_an_added_key_is_swept(
    arguments: list[str], cli: Command, small_mnist_dir: Path, tmp_path: Path
) -> None:
    swept(cli, f"data.path={small_mnist_dir}", "sweep=s", *arguments)
    found = [record(file.parent) for file in (tmp_path / "outputs" / "s").glob("*/run.json")]
    assert {run["config"]["optimizer"]["nesterov"] for run in found} == {True, False}
    assert len(found) == 2


@pytest.fixture(scope="module")
def mixed(
    tmp_path_factory: pytest.TempPathFactory,
    small_mnist_dir: Path,
    cli_in: Callable[..., Completed],
) -> Path:
    """A sweep with much that Hydra allows, and its directory."""
    directory = tmp_path_factory.mktemp("mixed")
    completed = cli_in(
        directory, "optimizer.betas=[0.8,0.9]", "-m", "optimizer=adam,adamw", "sweep=été à deux",
        f"data.path={small_mnist_dir}", "model=linear", "trainer.epochs=1",
        "seed=${hydra:job.num}", "hydra.job.chdir=true",
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    return directory


def test_a_key_that_only_the_swept_options_have_is_set_for_each(mixed: Path) -> None:
    runs = [record(file.parent)["config"]["optimizer"] for file in mixed.rglob("run.json")]
    assert [run["betas"] for run in runs] == [[0.8, 0.9]] * 2
    assert len({run["_target_"] for run in runs}) == 2


def test_the_number_of_a_job_can_be_its_seed(mixed: Path) -> None:
    found = [record(file.parent) for file in mixed.rglob("run.json")]
    assert {run["config"]["optimizer"]["_target_"]: run["seed"] for run in found} == {
        "torch.optim.Adam": 0,
        "torch.optim.AdamW": 1,
    }


def test_a_sweeps_name_may_have_blanks_and_accents(mixed: Path) -> None:
    assert len(list((mixed / "outputs" / "été à deux").glob("*/run.json"))) == 2


@pytest.mark.parametrize(
    ("name", "constant"),
    [("plain", True), ("${hydra:runtime.choices.model}", True), ("${where}", True),
     ("${now:%S}", False), ("${when}", False), ("${mine:}", False)],
)  # fmt: skip
def test_a_directory_that_a_file_names_is_that_of_the_same_sweep(name: str, constant: bool) -> None:
    shared = OmegaConf.create(
        {"where": "here", "hydra": {"sweep": {"dir": f"sweeps/{name}"}}}
        | ({"when": "${now:%S}"} if name == "${when}" else {})
    )
    assert is_constant(shared) == constant


def test_an_option_names_the_directory_of_a_sweep(
    cli: Command, small_mnist_dir: Path, tmp_path: Path
) -> None:
    swept(
        cli, f"data.path={small_mnist_dir}", "seed=0,1", "optimizer=adamw",
        "hydra.sweep.dir=outputs/${hydra:runtime.choices.optimizer}",
    )  # fmt: skip
    assert sorted(seeds(tmp_path / "outputs" / "adamw").values()) == [0, 1]


def test_a_relative_config_path_is_swept_too(
    cli: Command, small_mnist_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    lines = [f"defaults: [config, _self_]\nhydra: {{searchpath: ['file://{CONF}']}}\n"]
    (tmp_path / "mine" / "main.yaml").write_text("".join(lines))
    flags = ["--config-path", "mine", "--config-name", "main", "sweep=s"]
    swept(cli, *flags, f"data.path={small_mnist_dir}", "seed=0,1")
    assert sorted(seeds(tmp_path / "outputs" / "s").values()) == [0, 1]


def test_a_failure_outside_of_a_run_is_one_of_the_sweep(
    cli: Command, small_mnist_dir: Path, tmp_path: Path
) -> None:
    """Hydra's own launcher finds a run of another config in the second job's directory."""
    command = (f"data.path={small_mnist_dir}", "sweep=s", "hydra.sweep.subdir=${seed}")
    swept(cli, *command, "seed=0", "hydra/launcher=basic")
    completed = cli(
        "-m", *command, "seed=0,1", "hydra/launcher=basic", "model=mlp_small", "trainer.epochs=1"
    )
    assert completed.returncode == 1
    assert "Traceback" not in completed.stderr
    assert "holds a run with another config" in completed.stderr
    assert seeds(tmp_path / "outputs" / "s") == {"0": 0, "1": 1}


def test_the_shared_config_keeps_its_references(
    cli: Command, small_mnist_dir: Path, tmp_path: Path
) -> None:
    """What is swept and referred to has its own value in each job."""
    swept(
        cli, f"data.path={small_mnist_dir}", "sweep=s", "optimizer.lr=0.1,0.2",
        "optimizer.weight_decay=${optimizer.lr}",
    )  # fmt: skip
    found = [record(file.parent)["config"]["optimizer"] for file in tmp_path.rglob("run.json")]
    assert sorted((run["lr"], run["weight_decay"]) for run in found) == [(0.1, 0.1), (0.2, 0.2)]
    saved = OmegaConf.load(tmp_path / "outputs" / "s" / "multirun.yaml")
    assert isinstance(saved, DictConfig)
    assert "optimizer.lr=0.1,0.2" in saved.hydra.overrides.task
