"""Comparing run directories: table, CSV file and plot."""

import csv
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import FinishedRun
from saved_runs import call, change_record, record

from experiments.compare import main
from experiments.directory.claim import lock_directory
from experiments.results import pictures
from experiments.results.fitting import short_keys
from experiments.results.rows import collect
from experiments.results.tables import no_formula, table

Completed = subprocess.CompletedProcess[str]
Compare = Callable[..., Completed]
Change = dict[str, Any]


@pytest.fixture
def compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Compare:
    """`python -m experiments.compare` in tmp_path, called in this process."""
    monkeypatch.chdir(tmp_path)

    def compare(*arguments: object) -> Completed:
        code = call(main, *arguments)
        return Completed("compare", code, *capsys.readouterr())

    return compare


def make_run(finished: Path, path: Path, overrides: Change, **changes: Any) -> Path:
    """A reduced copy of a finished run with other overrides and other fields of its record."""
    path.mkdir(parents=True)
    for name in ("run.json", "metrics.jsonl", "config.yaml"):
        shutil.copy(finished / name, path)
    config = record(path)["config"]
    for key, value in overrides.items():
        group, _, name = key.partition(".")
        if name:
            config[group] = config[group] | {name: value}
        elif key in ("seed",):
            config[key] = value
    texts = [f"{key}={value}" for key, value in overrides.items()]
    change_record(path, config=config, overrides=texts, **changes)
    return path


def reached(loss: float, accuracy: float = 0.5) -> Change:
    """The `metrics` of a record."""
    last = {"loss/valid": loss, "accuracy/valid": accuracy, "epoch": 2, "step": 20}
    return {"best": last, "last": last}


def grid(finished: Path, sweep: Path, keys: Iterable[str]) -> list[Path]:
    """A grid of three values of each key, whose loss increases with the values."""
    points: list[dict[str, Any]] = [{}]
    for key in keys:
        values = [1, 2, 10] if key != "optimizer.lr" else [0.1, 0.01, 1.0]
        points = [point | {key: value} for point in points for value in values]
    return [
        make_run(finished, sweep / str(number), point, metrics=reached(sum(point.values())))
        for number, point in enumerate(points)
    ]


def results(directory: Path) -> list[dict[str, str]]:
    with (directory / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def size_of_png(file: Path) -> tuple[int, int]:
    """Width and height of a PNG, which must be complete."""
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", content[16:24])
    return int(width), int(height)


def test_it_ranks_the_runs_by_their_best_number_whatever_their_names(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    losses = [0.5, 0.25, 0.75, 0.125]
    for number, loss in enumerate(losses):
        path = tmp_path / "sweep" / str(number)
        make_run(finished_run.path, path, {"seed": number}, metrics=reached(loss))
    completed = compare("sweep")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert [line["seed"] for line in results(tmp_path / "sweep")] == ["3", "1", "0", "2"]
    printed = re.findall(r"^ +(\d) +(\d) +finished +(\S+)", completed.stdout, re.M)
    assert printed == [
        ("1", "3", "0.1250"), ("2", "1", "0.2500"), ("3", "0", "0.5000"), ("4", "2", "0.7500"),
    ]  # fmt: skip


def test_runs_without_an_accuracy_have_no_column_for_it(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    best = {"loss/valid": 0.5, "epoch": 2, "step": 20}
    for seed in range(2):
        make_run(finished_run.path, tmp_path / "sweep" / str(seed), {"seed": seed},
                 metrics={"best": best, "last": best})  # fmt: skip
    completed = compare("sweep")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert "accuracy" not in completed.stdout
    assert [line["best loss/valid"] for line in results(tmp_path / "sweep")] == ["0.5", "0.5"]


def test_where_accuracy_is_monitored_the_higher_is_the_better(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    for number, accuracy in enumerate([0.5, 0.9, 0.7]):
        overrides = {"seed": number, "trainer.monitor": "accuracy/valid"}
        path = tmp_path / "sweep" / str(number)
        make_run(finished_run.path, path, overrides, metrics=reached(1.0, accuracy))
    assert compare("sweep").returncode == 0
    assert [line["seed"] for line in results(tmp_path / "sweep")] == ["1", "2", "0"]


def test_runs_with_different_metrics_are_ranked_apart_and_a_line_says_so(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    for number, (monitor, loss, accuracy) in enumerate([
        ("loss/valid", 0.5, 0.9), ("accuracy/valid", 0.1, 0.6), ("loss/valid", 0.2, 0.3),
        ("accuracy/valid", 0.7, 0.8),
    ]):  # fmt: skip
        overrides = {"seed": number, "trainer.monitor": monitor}
        path = tmp_path / "sweep" / str(number)
        make_run(finished_run.path, path, overrides, metrics=reached(loss, accuracy))
    completed = compare("sweep")
    assert completed.returncode == 0
    found = [(line["trainer.monitor"], line["rank"], line["seed"])
             for line in results(tmp_path / "sweep")]  # fmt: skip
    assert found == [
        ("accuracy/valid", "1", "3"), ("accuracy/valid", "2", "1"),
        ("loss/valid", "1", "2"), ("loss/valid", "2", "0"),
    ]  # fmt: skip
    assert "\nranked apart: trainer.monitor is accuracy/valid or loss/valid\n" in completed.stdout


def test_the_metric_is_a_column_where_it_comes_from_a_changed_file(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    """No override names it then."""
    for number, monitor in enumerate(["loss/valid", "accuracy/valid"]):
        path = tmp_path / "sweep" / str(number)
        make_run(finished_run.path, path, {"seed": number, "trainer.monitor": monitor})
        change_record(path, overrides=[f"seed={number}"])
    assert compare("sweep").returncode == 0
    metrics = [line["trainer.monitor"] for line in results(tmp_path / "sweep")]
    assert metrics == ["accuracy/valid", "loss/valid"]


def test_results_csv_has_every_bit_and_every_directory(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    chance = random.Random(0)
    losses = {f"sweep/{number}": chance.random() for number in range(5)}
    for path, loss in losses.items():
        seed = int(path[-1])
        make_run(finished_run.path, tmp_path / path, {"seed": seed}, metrics=reached(loss))
    assert compare("sweep").returncode == 0
    found = {
        line["directory"]: float(line["best loss/valid"]) for line in results(tmp_path / "sweep")
    }
    assert found == losses


@pytest.mark.parametrize(
    "keys",
    [[], ["seed"], ["seed", "optimizer.lr"], ["seed", "optimizer.lr", "loader.batch_size"]],
    ids=len,
)
def test_there_is_a_picture_for_any_number_of_swept_keys(
    keys: list[str], finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    grid(finished_run.path, tmp_path / "sweep", keys)
    completed = compare("sweep")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert size_of_png(tmp_path / "sweep" / "results.png") == (1300, 550)
    lines = results(tmp_path / "sweep")
    assert len(lines) == 3 ** len(keys)
    assert set(keys) <= lines[0].keys()


def test_a_picture_that_cannot_be_drawn_costs_a_line_and_no_number(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid(finished_run.path, tmp_path / "sweep", ["seed"])
    (tmp_path / "sweep" / "results.png").write_bytes(b"a picture of before")

    def broken(*args: object) -> bytes:
        raise RuntimeError("no font\nat all")

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "results_picture", broken)
        completed = compare("sweep")
    assert completed.returncode == 0
    assert completed.stderr == (
        "warning: sweep/results.png: not drawn (RuntimeError: no font at all); "
        "the numbers are complete\n"
    )
    assert len(results(tmp_path / "sweep")) == 3
    assert not (tmp_path / "sweep" / "results.png").exists()
    assert compare("sweep").returncode == 0
    assert (tmp_path / "sweep" / "results.png").exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "keys",
    [[], ["data.path"], ["data.path", "model._target_"], ["data.path", "model._target_", "seed"]],
    ids=len,
)
def test_long_names_and_values_leave_the_picture_its_room(
    keys: list[str], finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    """matplotlib warns where they take all of it."""
    for number in range(2 if keys else 1):
        overrides = dict.fromkeys(keys, f"{number}{'long' * 50}{number}")
        path = tmp_path / "sweep" / f"{number}{'long' * 50}"
        make_run(finished_run.path, path, overrides, metrics=reached(0.5))
    assert compare("sweep").returncode == 0
    assert size_of_png(tmp_path / "sweep" / "results.png") == (1300, 550)


def test_failed_diverged_and_interrupted_runs_stand_below_the_finished(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    kinds = {"diverged": {}, "failed": {}, "interrupted": {"metrics": reached(9.0)}, "finished": {}}
    for number, (state, changes) in enumerate(kinds.items()):
        path = make_run(
            finished_run.path, tmp_path / "sweep" / state,
            {"seed": number, "optimizer.lr": 0.1 * number}, state=state, **changes,
        )  # fmt: skip
        if state in ("diverged", "failed"):
            (path / "metrics.jsonl").unlink()
            content = record(path)
            del content["metrics"]
            (path / "run.json").write_text(json.dumps(content))
    completed = compare("sweep")
    assert (completed.returncode, completed.stderr) == (0, "")
    found = [line["state"] for line in results(tmp_path / "sweep")]
    assert found == ["finished", "interrupted", "failed", "diverged"]


def test_pruned_runs_rank_below_the_others_and_above_those_without_a_number(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    runs = [
        *(("diverged", 0.1), ("failed", 0.1), ("interrupted", None), ("pruned", 0.3)),
        *(("pruned", 0.2), ("interrupted", 0.5), ("finished", 0.4)),
    ]
    for number, (state, loss) in enumerate(runs):
        metrics = reached(loss) if loss is not None else {"best": {}, "last": {}}
        path = tmp_path / "sweep" / str(number)
        make_run(finished_run.path, path, {"seed": number}, state=state, metrics=metrics)
    assert compare("sweep").returncode == 0
    found = [(line["state"], line["best loss/valid"]) for line in results(tmp_path / "sweep")]
    assert found == [
        *(("finished", "0.4"), ("interrupted", "0.5"), ("pruned", "0.2"), ("pruned", "0.3")),
        *(("interrupted", ""), ("failed", "0.1"), ("diverged", "0.1")),
    ]


def test_a_run_under_way_is_shown_with_its_epochs_and_numbers_so_far(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    """Its run.json has none before its end."""
    path = make_run(
        finished_run.path, tmp_path / "sweep" / "a", {"seed": 1}, state="running", metrics={}
    )
    finished = record(finished_run.path)["metrics"]
    lock = lock_directory(path)
    completed = compare("sweep")
    lock.close()
    assert completed.returncode == 0, completed.stderr
    [line] = results(tmp_path / "sweep")
    assert (line["state"], line["epochs"]) == ("running", "2")
    assert float(line["best loss/valid"]) == finished["best"]["loss/valid"]
    assert float(line["last accuracy/valid"]) == finished["last"]["accuracy/valid"]


@pytest.mark.parametrize("text", ["nonsense", '{"loss/valid": "x"}', '{"loss/valid": null}'])
def test_a_run_under_way_with_damaged_numbers_has_none(
    text: str, finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    path = make_run(
        finished_run.path, tmp_path / "sweep" / "a", {"seed": 1}, state="running", metrics={}
    )
    (path / "metrics.jsonl").write_text(text + "\n")
    assert compare("sweep").returncode == 0
    assert [line["best loss/valid"] for line in results(tmp_path / "sweep")] == [""]


def test_a_group_that_a_run_does_not_override_is_the_option_that_it_chose(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    chosen = {"a": None, "b": "adamw", "c": None}
    for seed, (name, option) in enumerate(chosen.items()):
        overrides = {"optimizer": option, "seed": seed} if option else {"seed": seed}
        path = make_run(finished_run.path, tmp_path / "sweep" / name, overrides)
        if name == "c":
            (path / ".hydra").mkdir()
            (path / ".hydra" / "hydra.yaml").write_text(
                "hydra:\n  runtime:\n    choices:\n      experiment: mine\n      optimizer: adam\n"
            )
    assert compare("sweep").returncode == 0
    found = {
        Path(line["directory"]).name: line["optimizer"] for line in results(tmp_path / "sweep")
    }
    assert found == {"a": "sgd", "b": "adamw", "c": "adam"}


def test_control_characters_of_a_strangers_run_reach_no_terminal(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    for number in range(2):
        values = {"data.path": f"\x1b]0;title\x07\n{number}", "optimizer": f"\x9b{number}m"}
        path = tmp_path / "sweep" / f"run\x1b[2J{number}"
        make_run(finished_run.path, path, values, state=f"odd\r{number}")
    (tmp_path / "sweep" / "torn\x1b[2J").mkdir()
    (tmp_path / "sweep" / "torn\x1b[2J" / "run.json").write_text("{}")
    runs = sorted((tmp_path / "sweep").glob("run*"))
    for arguments in (["sweep"], runs):
        completed = compare(*arguments)
        written = completed.stdout + completed.stderr
        assert completed.returncode == 0
        assert all(char.isprintable() or char == "\n" for char in written), written
        assert "\\x1b" in written


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("keys", [["data.path"], ["data.path", "seed"]], ids=len)
def test_a_dollar_or_a_character_without_a_glyph_leaves_the_picture(
    keys: list[str], finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    for number in range(2):
        overrides = dict.fromkeys(keys, f"$\\frac{number}$ \U00012000")
        make_run(finished_run.path, tmp_path / "sweep" / str(number), overrides)
    completed = compare("sweep")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert size_of_png(tmp_path / "sweep" / "results.png") == (1300, 550)


@pytest.mark.parametrize("columns", [20, 60, 100, 200])
def test_a_table_fits_its_terminal(
    columns: int, finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid(finished_run.path, tmp_path / "sweep", ["seed", "optimizer.lr", "loader.batch_size"])
    rows = collect([tmp_path / "sweep"])
    piped = table(rows)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = table(rows).splitlines()
    assert max(map(len, lines)) <= columns
    assert len(lines) == len(piped.splitlines()) == 28
    assert "optimizer.lr" in piped
    if columns >= 60:
        for word in ("rank", "seed", "lr", "batch_size", "best loss"):
            assert word in lines[0]
        assert "…" not in "".join(lines)


def test_keys_are_shortened_to_what_distinguishes_them() -> None:
    keys = ["optimizer.lr", "model.lr", "seed", "data.path", "data.other.path"]
    assert short_keys(keys) == {
        "optimizer.lr": "optimizer.lr",
        "model.lr": "model.lr",
        "seed": "seed",
        "data.path": "data.path",
        "data.other.path": "other.path",
    }


def test_a_run_that_was_killed_is_told_as_interrupted(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    """Its record says running, but no process holds the lock."""
    make_run(finished_run.path, tmp_path / "sweep" / "killed", {"seed": 1}, state="running")
    assert compare("sweep").returncode == 0
    assert [line["state"] for line in results(tmp_path / "sweep")] == ["interrupted"]


def test_options_of_a_group_are_values_like_others(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    for number, option in enumerate(["sgd", "adam"]):
        for seed in (0, 1):
            path = tmp_path / "sweep" / f"{option}{seed}"
            overrides = {"optimizer": option, "seed": seed}
            make_run(finished_run.path, path, overrides, metrics=reached(number + seed / 2))
    assert compare("sweep").returncode == 0
    found = [(line["optimizer"], line["seed"]) for line in results(tmp_path / "sweep")]
    assert found == [("sgd", "0"), ("sgd", "1"), ("adam", "0"), ("adam", "1")]


def test_a_single_run_is_a_table_of_one(finished_run: FinishedRun, compare: Compare) -> None:
    before = sorted(finished_run.path.iterdir())
    completed = compare(finished_run.path)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert re.search(r"^ +1 .*finished", completed.stdout, re.M)
    assert sorted(finished_run.path.iterdir()) == before


def test_two_runs_are_laid_side_by_side_where_they_differ(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    make_run(finished_run.path, tmp_path / "a", {"optimizer.lr": 0.5}, metrics=reached(0.25))
    make_run(finished_run.path, tmp_path / "b", {"optimizer.lr": 0.1}, metrics=reached(0.125))
    completed = compare("a", "b")
    assert (completed.returncode, completed.stderr) == (0, "")
    cells = [re.split(r" {2,}", line) for line in completed.stdout.splitlines() if line]
    assert cells[:2] == [["A", "a"], ["B", "b"]]
    assert ["optimizer.lr", "0.5", "0.1"] in cells
    assert ["best loss/valid", "0.25", "0.125"] in cells
    assert not [line for line in cells if line[0] in ("seed", "best accuracy/valid")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_two_equal_runs_have_no_difference(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    for name in ("a", "b"):
        make_run(finished_run.path, tmp_path / name, {})
    assert "no difference" in compare("a", "b").stdout


def test_several_directories_are_one_table_and_into_names_where_the_results_go(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    for sweep, seeds in (("one", (0, 1)), ("two", (2, 3))):
        for seed in seeds:
            path = tmp_path / sweep / str(seed)
            make_run(finished_run.path, path, {"seed": seed}, metrics=reached(seed))
    completed = compare("one", "two", "--into", "both")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert [line["seed"] for line in results(tmp_path / "both")] == ["0", "1", "2", "3"]
    assert size_of_png(tmp_path / "both" / "results.png") == (1300, 550)
    assert not (tmp_path / "one" / "results.csv").exists()


def strict(text: str) -> Any:
    """Parse JSON strictly: NaN and infinities are errors."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_export_writes_what_other_programs_read(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    make_run(finished_run.path, tmp_path / "sweep" / "a", {"seed": 1}, metrics=reached(0.125))
    assert compare("sweep", "--export", "runs.json").returncode == 0
    [row] = strict((tmp_path / "runs.json").read_text())
    assert row["path"] == "sweep/a"
    assert row["state"] == "finished"
    assert row["config"]["seed"] == 1
    assert row["best"]["loss/valid"] == 0.125


def test_export_is_json_too_where_a_loss_was_no_number(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    metrics = {"best": {}, "last": reached(float("nan"))["last"]}
    path = tmp_path / "sweep" / "a"
    make_run(finished_run.path, path, {"seed": 1}, metrics=metrics, state="diverged")
    assert compare("sweep", "--export", "runs.json").returncode == 0
    [row] = strict((tmp_path / "runs.json").read_text())
    assert row["state"] == "diverged"


@pytest.mark.parametrize("torn", [b"", b'{"schema": 1}', b"[]"], ids=["empty", "bare", "list"])
def test_a_run_that_cannot_be_read_is_told_and_left_out(
    torn: bytes, finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    make_run(finished_run.path, tmp_path / "sweep" / "good", {"seed": 1})
    make_run(finished_run.path, tmp_path / "sweep" / "torn", {"seed": 2})
    (tmp_path / "sweep" / "torn" / "run.json").write_bytes(torn)
    completed = compare("sweep")
    assert completed.returncode == 0, completed.stderr
    [line] = completed.stderr.splitlines()
    assert "sweep/torn" in line
    assert [line["directory"] for line in results(tmp_path / "sweep")] == ["sweep/good"]


@pytest.mark.parametrize("left", ["torn", "missing"])
def test_a_run_whose_metrics_are_torn_or_missing_is_compared_by_its_record(
    left: str, finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    for seed in (0, 1):
        make_run(finished_run.path, tmp_path / "sweep" / str(seed), {"seed": seed})
    file = tmp_path / "sweep" / "0" / "metrics.jsonl"
    if left == "torn":
        file.write_bytes(file.read_bytes() + b'{"step": 20, "loss/va')
    else:
        file.unlink()
    completed = compare("sweep")
    assert completed.returncode == 0, completed.stderr
    assert len(results(tmp_path / "sweep")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "nowhere: no such directory"), (["."], ".: contains no run")],
)
def test_a_slip_is_told_in_one_line(arguments: list[str], message: str, compare: Compare) -> None:
    completed = compare(*arguments)
    assert completed.returncode == 2
    assert completed.stderr == f"experiments.compare: {message}\n"


def test_it_imports_no_torch(finished_run: FinishedRun, tmp_path: Path) -> None:
    grid(finished_run.path, tmp_path / "sweep", ["seed", "optimizer.lr"])
    code = (
        "import sys; from experiments.compare import main; main(); "
        "sys.exit('torch' in sys.modules and 'torch was imported')"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "sweep")], capture_output=True, text=True
    )
    assert (completed.returncode, completed.stderr) == (0, "")


def make_sweep(finished: Path, path: Path, runs: int) -> None:
    """So many copies of a finished run, each with another seed and another best loss."""
    one = make_run(finished, path.with_name("one"), {"seed": 1, "optimizer.lr": 0.1})
    text = (one / "run.json").read_text()
    chance = random.Random(0)
    for number in range(runs):
        run = path / f"{number:04}"
        run.mkdir(parents=True)
        content = json.loads(text)
        content["config"]["seed"] = number
        content["overrides"] = [f"seed={number}"]
        content["metrics"] = reached(chance.random())
        (run / "run.json").write_text(json.dumps(content))
        os.link(one / "metrics.jsonl", run / "metrics.jsonl")
    shutil.rmtree(one)


@pytest.mark.parametrize(
    ("cell", "written"),
    [("=1+1", "'=1+1"), ("@x", "'@x"), ("-2", "-2"), ("+1e-3", "+1e-3"), ("-x", "'-x"), ("a", "a")],
)
def test_no_value_is_a_formula_in_a_spreadsheet(cell: str, written: str) -> None:
    assert no_formula(cell) == written


def test_a_directory_in_results_csv_stays_a_path_and_no_formula(
    compare: Compare, finished_run: FinishedRun, tmp_path: Path
) -> None:
    make_run(finished_run.path, tmp_path / "+seed=1", {"seed": 1})
    assert compare(".").returncode == 0
    [row] = results(tmp_path)
    assert row["directory"] == "./+seed=1"


def test_the_table_is_cut_short_for_the_eye_and_the_csv_is_not(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    make_sweep(finished_run.path, tmp_path / "sweep", 1000)
    completed = compare("sweep")
    assert (completed.returncode, completed.stderr) == (0, "")
    losses = [float(line["best loss/valid"]) for line in results(tmp_path / "sweep")]
    assert len(losses) == 1000
    assert losses == sorted(losses)
    assert "and 960 more" in completed.stdout


def test_a_thousand_runs_take_not_twice_the_work_of_a_hundred(
    finished_run: FinishedRun, tmp_path: Path, compare: Compare
) -> None:
    """Counted in calls of functions, which are as many on a slow machine: most are the picture's,
    and a few hundred come to them for each run.
    """

    def calls(runs: int) -> int:
        make_sweep(finished_run.path, tmp_path / str(runs), runs)
        count = 0

        def note(frame: object, event: str, arg: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(note)
        try:
            completed = compare(str(runs))
        finally:
            sys.setprofile(None)
        assert (completed.returncode, completed.stderr) == (0, "")
        return count

    calls(2)  # what is imported and looked up once
    assert calls(1000) < 2 * calls(100)
