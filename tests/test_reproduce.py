"""Reproducing a run directory: identical bits, or a report of the first difference."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from saved_runs import SMALL, call, change_record, go_on, kill_after, record, stop_after

from experiments import job, reproduce
from experiments.data import Data, Split
from experiments.directory import record as runs
from experiments.directory.checkpoints import Checkpoints
from experiments.directory.git import git_state
from experiments.errors import Diverged

Compose = Callable[[list[str]], dict[str, Any]]
Capture = pytest.CaptureFixture[str]

VARIED = {
    "sgd": ["optimizer=sgd", "scheduler=cosine", "scheduler.warmup=0.3"],
    "adam": ["optimizer=adam", "optimizer.lr=0.003", "optimizer.weight_decay=0.01"],
    "adamw": ["optimizer=adamw", "model.dropout=0.4", "scheduler=onecycle"],
    "linear": ["~model.hidden", "model=linear", "loss.label_smoothing=0.1"],
    "torch loader": ["loader=torch", "loader.drop_last=true", "trainer.threads=2"],
    "accumulated": ["trainer.accumulate=2", "trainer.clip_norm=0.3", "loader.batch_size=31"],
    "by accuracy": ["trainer.monitor=accuracy/valid", "loader.shuffle=false", "seed=123456789"],
}


@pytest.fixture(autouse=True)
def small_data(tiny: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the data set; some tests request the real one."""
    monkeypatch.setattr(job, "load_data", lambda config: tiny)


@pytest.fixture(autouse=True)
def no_git_of_another_test() -> Iterator[None]:
    """git_state is cached per process, but tests change the directory."""
    git_state.cache_clear()
    yield
    git_state.cache_clear()


@pytest.fixture(scope="module")
def config(compose: Compose) -> dict[str, Any]:
    return compose([*SMALL, "model.dropout=0.2"])


@pytest.fixture(scope="module")
def honest(config: dict[str, Any], tiny: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "run"
    go_on(path, config, tiny)
    return path


@pytest.fixture
def original(honest: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, which tests modify."""
    shutil.copytree(honest, tmp_path / "original")
    return tmp_path / "original"


def reproduced(original: Path, capsys: Capture, *arguments: object) -> tuple[int, str]:
    """Run the command; returns its exit code and output."""
    capsys.readouterr()
    into = original.with_name(f"{original.name}-again")
    code = call(reproduce.main, original, "--into", into, *arguments)
    output = capsys.readouterr()
    assert output.err == "" or code == 2
    return code, output.out + output.err


def change_metric(run: Path, step: int, tag: str, change: Callable[[float], float]) -> None:
    """Change one number in metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    [line] = [line for line in lines if line["step"] == step and tag in line]
    line[tag] = change(line[tag])
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("name", VARIED)
def test_varied_configs_are_identical(
    name: str, compose: Compose, tiny: Data, tmp_path: Path, capsys: Capture
) -> None:
    small = [text for text in SMALL if name != "linear" or "model" not in text]
    overrides = [text for text in VARIED[name] if not text.startswith("~")]
    original = tmp_path / "run"
    go_on(original, compose([*small, *overrides]), tiny)
    code, output = reproduced(original, capsys)
    assert code == 0, output
    lines = (original / "metrics.jsonl").read_text().splitlines()
    compared = sum("throughput" not in line for line in lines)
    step = record(original)["metrics"]["last"]["step"]
    assert f"identical: all {compared} lines of numbers and weights up to step {step}" in output
    assert "differs" not in output
    again = record(tmp_path / "run-again")
    assert again["weights"] == record(original)["weights"]


def test_a_run_that_was_resumed_is_identical(
    config: dict[str, Any], tiny: Data, tmp_path: Path, capsys: Capture
) -> None:
    for stopped in (stop_after(3), kill_after(3), lambda: None):
        go_on(tmp_path / "run", config, tiny, stopped)
    code, output = reproduced(tmp_path / "run", capsys)
    assert code == 0, output


def test_a_run_that_was_interrupted_is_compared_as_far_as_it_went(
    config: dict[str, Any], tiny: Data, tmp_path: Path, capsys: Capture
) -> None:
    go_on(tmp_path / "run", config, tiny, stop_after(7))
    code, output = reproduced(tmp_path / "run", capsys)
    assert code == 0, output
    assert "up to step 6" in output
    assert "(interrupted)" in output
    assert "and weights" not in output


def test_the_original_is_left_as_it_is(original: Path, capsys: Capture) -> None:
    before = {file: file.read_bytes() for file in original.rglob("*") if file.is_file()}
    reproduced(original, capsys)
    assert before == {file: file.read_bytes() for file in original.rglob("*") if file.is_file()}


def test_a_new_directory_is_made_under_outputs(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(reproduce.main, original) == 0
    [again] = (tmp_path / "outputs").rglob("run.json")
    assert record(again.parent)["weights"] == record(original)["weights"]


def test_from_another_directory_it_is_identical(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, output = reproduced(Path("../original"), capsys)
    assert code == 0, output


def test_a_run_of_a_sweep_is_identical(
    cli_in: Callable[..., subprocess.CompletedProcess[str]],
    small_mnist_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.undo()  # its data.path was relative when the run was started
    shutil.copytree(small_mnist_dir, tmp_path / "data")
    completed = cli_in(
        tmp_path,
        *("-m", "optimizer.lr=0.01,0.1", "data.path=data", "trainer.epochs=1", "model=mlp_small"),
        "hydra.sweep.dir=sweep",
    )
    assert completed.returncode == 0, completed.stderr
    jobs = sorted(file.parent for file in (tmp_path / "sweep").rglob("run.json"))
    assert len(jobs) == 2
    shutil.move(jobs[1], tmp_path / "moved")
    code, output = reproduced(tmp_path / "moved", capsys)
    assert code == 0, output


# Differences.


def test_one_changed_number_is_named_with_its_step_and_distance(
    original: Path, capsys: Capture
) -> None:
    change_metric(original, 6, "loss/train", lambda value: value + 0.25)
    change_metric(original, 9, "loss/train", lambda value: value + 0.5)
    code, output = reproduced(original, capsys)
    assert code == 1
    [line] = [line for line in output.splitlines() if line.startswith("differs at")]
    assert "step 6, loss/train: " in line
    assert "apart by 0.25 " in line
    assert "identical" not in output


def test_the_last_bit_of_a_number_counts(original: Path, capsys: Capture) -> None:
    change_metric(original, 10, "loss/valid", lambda value: value * (1 + 2.3e-16))
    code, output = reproduced(original, capsys)
    assert code == 1
    assert "differs at    step 10, loss/valid: " in output


def test_a_number_that_is_not_there_is_named(original: Path, capsys: Capture) -> None:
    lines = (original / "metrics.jsonl").read_text().splitlines(keepends=True)
    extra = json.dumps({"step": 11, "epoch": 3, "loss/train": 1.0}) + "\n"
    (original / "metrics.jsonl").write_text("".join([*lines, extra]))
    code, output = reproduced(original, capsys)
    assert code == 1
    assert "step 11, step: 11 before, None now" in output or "step 11, loss/train: 1.0" in output


def test_a_number_that_the_original_lacks_is_named(original: Path, capsys: Capture) -> None:
    # a finished run has logged all its numbers, so missing ones at its end are a difference
    lines = (original / "metrics.jsonl").read_text().splitlines(keepends=True)
    (original / "metrics.jsonl").write_text("".join(line for line in lines if "test" not in line))
    code, _ = reproduced(original, capsys)
    assert code == 1


def test_the_relative_difference_asked_for_passes(original: Path, capsys: Capture) -> None:
    change_metric(original, 6, "loss/train", lambda value: value * (1 + 1e-6))
    code, output = reproduced(original, capsys, "--rtol", "1e-5")
    assert code == 0, output
    assert "equal within 1e-05: all" in output


def test_more_than_the_relative_difference_asked_for_does_not(
    original: Path, capsys: Capture
) -> None:
    change_metric(original, 6, "loss/train", lambda value: value * (1 + 1e-4))
    code, output = reproduced(original, capsys, "--rtol", "1e-5")
    assert code == 1
    assert "differs at    step 6, loss/train" in output


def test_a_prefix_of_the_epochs_is_compared(original: Path, capsys: Capture) -> None:
    change_metric(original, 9, "loss/train", lambda value: value + 1)
    code, output = reproduced(original, capsys, "--epochs", "1")
    assert code == 0, output
    assert "identical: all 3 lines of numbers up to step 5" in output
    change_metric(original, 3, "loss/train", lambda value: value + 1)
    shutil.rmtree(original.with_name("original-again"))
    code, output = reproduced(original, capsys, "--epochs", "1")
    assert code == 1
    assert "step 3, loss/train" in output


def test_a_prefix_has_the_schedule_of_the_whole(
    compose: Compose, tiny: Data, tmp_path: Path, capsys: Capture
) -> None:
    go_on(tmp_path / "run", compose([*SMALL, "scheduler=cosine", "trainer.epochs=4"]), tiny)
    code, output = reproduced(tmp_path / "run", capsys, "--epochs", "2")
    assert code == 0, output


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_one_changed_bit_of_data_is_named(
    split: str, original: Path, tiny: Data, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    was: Split = getattr(tiny, split)
    x = was.x.clone()
    x.view(torch.int32)[7, 300] ^= 1
    change: dict[str, Any] = {split: Split(x, was.y)}
    changed = replace(tiny, **change)
    monkeypatch.setattr(job, "load_data", lambda config: changed)
    _, output = reproduced(original, capsys)
    noted = [line for line in output.splitlines() if line.startswith("note")]
    assert [line.split(":")[0] for line in noted] == [f"note          data {split}"]


def test_changed_pixels_change_the_numbers(
    original: Path, tiny: Data, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    changed = replace(tiny, train=Split(1 - tiny.train.x, tiny.train.y))
    monkeypatch.setattr(job, "load_data", lambda config: changed)
    code, output = reproduced(original, capsys)
    assert code == 1
    assert "differs at    step 3, loss/train" in output
    assert "the final weights" in output


def test_another_seed_is_named(original: Path, capsys: Capture) -> None:
    config = yaml.safe_load((original / "config.yaml").read_text())
    (original / "config.yaml").write_text(yaml.safe_dump(config | {"seed": 1}))
    code, output = reproduced(original, capsys)
    assert code == 1
    assert "note          config.yaml was changed since the run began" in output
    assert "note          seed: 0 before, 1 now" in output
    assert "note          initial weights: " in output
    assert "differs at    step 3, loss/train" in output


def test_a_changed_value_of_the_config_is_noticed(original: Path, capsys: Capture) -> None:
    text = (original / "config.yaml").read_text()
    (original / "config.yaml").write_text(text.replace("dropout: 0.2", "dropout: 0.21"))
    code, output = reproduced(original, capsys)
    assert code == 1
    assert "config.yaml was changed" in output


def test_one_changed_bit_of_a_weight_is_named(original: Path, capsys: Capture) -> None:
    checkpoints = Checkpoints(original / "checkpoints")
    content = checkpoints.load()
    assert content is not None
    content["model"]["0.weight"].view(torch.int32)[0, 0] ^= 1
    checkpoints.save(content["state"]["step"], content["state"]["epoch"], content)
    for entry in checkpoints.entries()[:-1]:
        entry.file.unlink()
    _, output = reproduced(original, capsys)
    assert "checkpoints: the last one does not hold the run's final weights" in output


def test_a_flipped_bit_on_disk_is_named(original: Path, capsys: Capture) -> None:
    newest = Checkpoints(original / "checkpoints").entries()[-1]
    damaged = bytearray(newest.file.read_bytes())
    damaged[-1] ^= 1
    newest.file.write_bytes(damaged)
    with pytest.warns(UserWarning, match="is damaged"):
        _, output = reproduced(original, capsys)
    assert "checkpoints: the last one does not hold the run's final weights" in output


def test_other_final_weights_are_a_difference(original: Path, capsys: Capture) -> None:
    weights = record(original)["weights"]
    change_record(original, weights=weights | {"final": sha256(b"").hexdigest()})
    code, output = reproduced(original, capsys)
    assert code == 1
    assert "the final weights" in output


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        *(("packages", "torch", "1.0"), ("packages", "numpy", "1.0")),
        *(("environment", "cpu_capability", "NONE"), ("environment", "threads", 64)),
    ],
)
def test_what_differs_around_the_run_is_named(
    part: str, name: str, value: object, original: Path, capsys: Capture
) -> None:
    now = record(original)[part][name]
    change_record(original, **{part: record(original)[part] | {name: value}})
    _, output = reproduced(original, capsys)
    assert f"note          {name}: {value} before, {now} now" in output


def test_another_commit_is_named(original: Path, capsys: Capture) -> None:
    change_record(original, git={"commit": "abc", "dirty": True, "diff": "def"})
    _, output = reproduced(original, capsys)
    assert "note          git commit: abc before, " in output
    assert "note          git diff: def before, " in output


def test_what_git_could_not_tell_is_no_difference(original: Path, capsys: Capture) -> None:
    change_record(original, git={"commit": None, "dirty": None, "diff": None, "unknown": "why"})
    _, output = reproduced(original, capsys)
    assert "note          git" not in output


def test_a_run_that_diverged_diverges_again(
    compose: Compose, tmp_path: Path, capsys: Capture
) -> None:
    config = compose([*SMALL, "optimizer.lr=1e30", "scheduler=constant"])
    (tmp_path / "run").mkdir()
    run = runs.start(tmp_path / "run", config, [])
    with pytest.raises(Diverged):
        job.execute(run, config)
    code, output = reproduced(tmp_path / "run", capsys)
    assert code == 0, output
    assert "diverged: " in output
    assert "up to step 3" in output


def test_a_run_without_numbers_is_not_identical(
    config: dict[str, Any], tiny: Data, tmp_path: Path, capsys: Capture
) -> None:
    go_on(tmp_path / "run", config, tiny, stop_after(1))
    code, output = reproduced(tmp_path / "run", capsys)
    assert code == 1
    assert "nothing to compare" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--epochs", "0"], "--epochs 0: expected at least 1"),
        (["{run}", "--epochs", "3"], "--epochs 3: the run has 2"),
        (["{run}", "--rtol", "-1"], "--rtol -1.0: expected"),
        (["{run}", "--rtol", "nan"], "--rtol nan: expected"),
        (["{run}", "--into", "{run}"], "already holds a run"),
        (["nowhere"], "nowhere: holds no run"),
        ([], "the following arguments are required: run"),
        (["{run}", "--epoch"], "expected one argument"),
    ],
)
def test_a_slip_is_told_in_one_line(
    arguments: list[str], message: str, original: Path, capsys: Capture
) -> None:
    assert call(reproduce.main, *(text.format(run=original) for text in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("experiments.reproduce: ")
    assert message in error
    assert error.count("\n") == 1
