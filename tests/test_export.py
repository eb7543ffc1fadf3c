"""Exporting a run's model: a program that computes the same in a process without this project."""

import csv
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jobs
import numpy as np
import pytest
import torch
from conftest import PATIENCE
from PIL import Image
from saved_runs import SMALL, call, go_on
from torch import Tensor, nn

from experiments import StepOutput, export, job, load_run
from experiments.config.schema import check
from experiments.data import Data, Split
from experiments.data.tables import encode
from experiments.errors import UsageError
from experiments.export import export_run
from experiments.training.program import Pixels

Compose = Callable[[list[str]], dict[str, Any]]

# What another program does: it has torch, and neither this project nor its modules.
READER = """
import sys
sys.modules["experiments"] = None
import torch
extra = {"metadata.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
calls = torch.load(sys.argv[2])
torch.save([program(*args) for args in calls], sys.argv[2])
print(extra["metadata.json"])
"""


def read_elsewhere(file: Path, *calls: tuple[Any, ...]) -> tuple[list[Any], dict[str, Any]]:
    """The outputs of an exported program for some calls, and its metadata, in a process of its own
    in which neither this project nor a module of a person's can be imported.
    """
    passed = file.with_suffix(".pt")
    torch.save(list(calls), passed)
    command = [sys.executable, "-I", "-c", READER, str(file), str(passed)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert found.returncode == 0, found.stderr
    return torch.load(passed), json.loads(found.stdout)


def exported(config: dict[str, Any], data: Data, path: Path, *trust: str) -> Path:
    """The file of a run made here."""
    go_on(path, config, data)
    file, _ = export_run(path, "best", trust)
    return file


@pytest.fixture
def of_tiny(tiny: Data, monkeypatch: pytest.MonkeyPatch) -> Data:
    """A few hundred rows of MNIST, also for the commands."""
    monkeypatch.setattr(job, "load_data", lambda config: tiny)
    return tiny


@pytest.mark.parametrize("overrides", [[], ["trainer.precision=bfloat16"]])
def test_pixels_are_bytes_whatever_the_split_holds_and_any_number_of_rows_goes_through(
    overrides: list[str], compose: Compose, mnist: Data, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def held(split: Split) -> Split:
        return Split(split.x[:100].clone(), split.y[:100].clone(), pixels=True)

    data = Data(*map(held, (mnist.train, mnist.valid, mnist.test)))
    monkeypatch.setattr(job, "load_data", lambda config: data)
    run = tmp_path / "run"
    file = exported(compose([*SMALL, *overrides]), data, run)
    pixels = (data.test.x * 255).round().to(torch.uint8)
    outputs, metadata = read_elsewhere(file, (pixels[:1],), (pixels[:33],), (pixels[:0],))
    with torch.no_grad():
        expected = load_run(run).model(data.test.x[:33])
    torch.testing.assert_close(outputs[1], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[0], expected[:1], rtol=1e-2, atol=1e-2)
    assert outputs[2].shape == (0, 10)
    assert metadata["inputs"] == {
        "input" if not overrides else "x":
            {"shape": ["rows", 784], "dtype": "uint8", "values": "pixels in 0..255"}
    }  # fmt: skip
    assert metadata["outputs"] == {"outputs": {"shape": ["rows", 10], "dtype": "float32"}}


def test_bytes_are_scaled_with_the_bits_of_training() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(Pixels()(pixels), pixels / 255)
    assert torch.equal(Pixels()(pixels), pixels.float().div_(255))


def test_scaled_pixels_are_refused_by_the_program(
    compose: Compose, mnist: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = Split((mnist.valid.x[:80] * 255).to(torch.uint8), mnist.valid.y[:80], pixels=True)
    data = Data(split, split, split)
    monkeypatch.setattr(job, "load_data", lambda config: data)
    file = exported(compose(SMALL), data, tmp_path / "run")
    program = torch.export.load(file).module()
    with pytest.raises(RuntimeError, match="dtype mismatch"):
        program(mnist.valid.x[:2])


def test_numbers_between_0_and_1_that_no_one_calls_pixels_stay_as_they_are(
    compose: Compose, of_tiny: Data, tmp_path: Path
) -> None:
    file = exported(compose(SMALL), of_tiny, tmp_path / "run")
    [outputs], _ = read_elsewhere(file, (of_tiny.test.x,))
    with torch.no_grad():
        expected = load_run(tmp_path / "run").model(of_tiny.test.x)
    torch.testing.assert_close(outputs, expected)


def write_table(file: Path, *, missing: bool) -> None:
    """A table with numbers of far different size, a category and a class."""
    generator = np.random.default_rng(0)
    with file.open("w", newline="") as opened:
        rows = csv.writer(opened)
        rows.writerow(["age", "seconds", "city", "class"])
        for row in range(200):
            age = "" if missing and row % 9 == 0 else generator.integers(20, 80)
            seconds = 1_700_000_000 + int(generator.integers(1000))
            city = ["Bonn", "Köln", "Ulm"][int(generator.integers(3))]
            rows.writerow([age, seconds, city, ["no", "yes"][row % 2]])


def test_a_program_for_a_table_takes_its_numbers_as_they_are(
    written: Compose, tmp_path: Path
) -> None:
    write_table(tmp_path / "people.csv", missing=False)
    config = written([*SMALL, "data=table", f"data.path={tmp_path / 'people.csv'}",
                      "data.target=class", "data.categories=[]"])  # fmt: skip
    file = exported(config, job.load_data(config), tmp_path / "run")
    saved = load_run(tmp_path / "run")
    columns = {"age": [31, 64], "seconds": [1_700_000_123, 1_700_000_999]}
    raw = torch.tensor(list(zip(*columns.values(), strict=True)), dtype=torch.float64)
    [outputs], metadata = read_elsewhere(file, (raw,))
    with torch.no_grad():
        expected = saved.model(encode(columns, saved.statistics))
    torch.testing.assert_close(outputs, expected)
    assert metadata["numbers"] == ["age", "seconds"]
    assert metadata["classes"] == ["no", "yes"]
    assert metadata["inputs"]["input"]["dtype"] == "float64"


class Embedding(nn.Module):
    """A linear model of numbers and one embedded category."""

    def __init__(self, cardinalities: Any, out_features: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(cardinalities[0], 3)
        self.head = nn.Linear(5, out_features)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        codes = self.embed(x["categories"][:, 0])
        return self.head(torch.cat([x["numbers"], codes], 1))  # type: ignore[no-any-return]


def test_categories_are_codes_that_the_file_explains_and_missing_numbers_are_filled(
    written: Compose, tmp_path: Path
) -> None:
    write_table(tmp_path / "people.csv", missing=True)
    config = written([*SMALL, "data=table", f"data.path={tmp_path / 'people.csv'}",
                      "data.target=class", "data.missing=fill"])  # fmt: skip
    model = {"_target_": f"{__name__}.Embedding", "cardinalities": "auto", "out_features": "auto"}
    config = check({**config, "model": model})
    file = exported(config, job.load_data(config), tmp_path / "run", __name__)
    saved = load_run(tmp_path / "run", trust=[__name__])
    columns: dict[str, Any] = {
        "age": [31, None, 50],
        "seconds": [1_700_000_123] * 3,
        "city": ["Ulm", "Rom", None],
    }
    numbers = torch.tensor([[31, 1_700_000_123], [torch.nan, 1_700_000_123], [50, 1_700_000_123]],
                           dtype=torch.float64)  # fmt: skip
    metadata = export_run(tmp_path / "run", "best", [__name__])[1]
    city = metadata["categories"]["city"]
    assert city["codes"].keys() == {"Bonn", "Köln", "Ulm"}
    codes = torch.tensor([[city["codes"]["Ulm"]], [city["unknown"]], [city["missing"]]])
    # in an order of its own
    [outputs], _ = read_elsewhere(file, ({"categories": codes, "numbers": numbers},))
    with torch.no_grad():
        expected = saved.model(encode(columns, saved.statistics))
    torch.testing.assert_close(outputs, expected)


def test_images_are_bytes(compose: Compose, tmp_path: Path) -> None:
    for number in range(24):
        folder = tmp_path / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(256, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    config = compose([*SMALL, "data=images", f"data.path={tmp_path / 'images'}", "loader=torch",
                      "loader.batch_size=6", "callbacks=[ema]"])  # fmt: skip
    model = {"_target_": "experiments.training.models.images.ConvNet", "in_channels": 3,
             "out_features": 2, "channels": [4]}  # fmt: skip
    config = check({**config, "model": model})
    file = exported(config, job.load_data(config), tmp_path / "run")
    decoded = np.array(Image.open(tmp_path / "images" / "a" / "0.png"))
    x = torch.from_numpy(decoded).permute(2, 0, 1)[None]
    [outputs], metadata = read_elsewhere(file, (x,))
    with torch.no_grad():
        expected = load_run(tmp_path / "run").model(x / 255)
    torch.testing.assert_close(outputs, expected)
    assert metadata["classes"] == ["a", "b"]


def test_the_file_says_which_weights_of_which_run_it_holds(
    compose: Compose, of_tiny: Data, tmp_path: Path
) -> None:
    go_on(tmp_path / "run", compose(SMALL), of_tiny)
    which: Literal["best", "last"]
    for which in ("best", "last"):
        file, metadata = export_run(tmp_path / "run", which)
        extra = {"metadata.json": ""}
        torch.export.load(file, extra_files=extra)
        assert json.loads(extra["metadata.json"]) == metadata
        assert (metadata["run"], metadata["checkpoint"]) == ("run", which)
    final = json.loads((tmp_path / "run" / "run.json").read_text())["weights"]["final"]
    assert metadata["weights"] == final
    assert metadata["step"] == load_run(tmp_path / "run", "last").step
    assert metadata["packages"]["torch"] == torch.__version__


Pair = namedtuple("Pair", ["first", "second"])


class Nests(nn.Module):
    """Two inputs, one by name, and a named tuple, a list and a number for outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, numbers: Tensor, scale: float, *, codes: Tensor) -> Any:
        y = self.layer(numbers) * scale
        return Pair(y, {"codes": [codes + 1, codes.float().mean(1)], "scale": scale})


def nests_step(model: nn.Module, batch: Any, loss_func: nn.Module) -> StepOutput:
    x, y = batch
    outputs = model(x["numbers"], 0.5, codes=x["codes"]).first
    return StepOutput(loss_func(outputs, y), outputs, y)


def own_job(compose: Compose, name: str = "", **parts: Any) -> dict[str, Any]:
    """A config with a model of this file, for `jobs.two_inputs` unless `parts` say otherwise."""
    config = compose([*SMALL, "loader.batch_size=16"])
    data = {"data": {"_target_": "jobs.two_inputs"}}
    return check({**config, **data, "model": {"_target_": f"{__name__}.{name}"}, **parts})


def test_inputs_and_outputs_are_nests_of_any_form(compose: Compose, tmp_path: Path) -> None:
    config = own_job(compose, "Nests", step={"_target_": f"{__name__}.nests_step"})
    data = jobs.two_inputs()
    file = exported(config, data, tmp_path / "run", __name__, "jobs")
    x = data.test.x
    program = torch.export.load(file).module()
    outputs = program(x["numbers"][:5], 0.5, codes=x["codes"][:5])
    with torch.no_grad():
        model = load_run(tmp_path / "run", trust=[__name__, "jobs"]).model
        expected = model(x["numbers"][:5], 0.5, codes=x["codes"][:5])
    assert type(outputs) is tuple
    torch.testing.assert_close(outputs[0], expected.first)
    assert torch.equal(outputs[1]["codes"][0], x["codes"][:5] + 1)


def test_a_dict_of_tensors_goes_through(compose: Compose, tmp_path: Path) -> None:
    config = own_job(compose, model={"_target_": "jobs.TwoInputs", "out_features": 2})
    data = jobs.two_inputs()
    file = exported(config, data, tmp_path / "run", "jobs")
    [outputs], metadata = read_elsewhere(file, (data.test.x,))
    with torch.no_grad():
        expected = load_run(tmp_path / "run", trust=["jobs"]).model(data.test.x)
    torch.testing.assert_close(outputs, expected)
    assert metadata["inputs"].keys() == {"x.numbers", "x.codes"}


def test_sizes_that_differ_between_batches_may_differ_elsewhere(
    compose: Compose, tmp_path: Path
) -> None:
    config = own_job(
        compose, data={"_target_": "jobs.sequences"},
        model={"_target_": f"{__name__}.MeanOfIds"}, step={"_target_": "jobs.bag_step"},
        loss={"_target_": "torch.nn.MSELoss"},
        loader={**compose(["loader=torch"])["loader"], "batch_size": 16},
    )  # fmt: skip
    file = exported(config, jobs.sequences(), tmp_path / "run", "jobs", __name__)
    program = torch.export.load(file).module()
    model = load_run(tmp_path / "run", trust=["jobs", __name__]).model
    for length in (2, 3, 9):
        ids = torch.arange(length).remainder(5).repeat(4, 1)
        torch.testing.assert_close(program(ids), model(ids))


class MeanOfIds(nn.Module):
    """The mean of embedded ids of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).mean(1))  # type: ignore[no-any-return]


def test_a_model_that_draws_in_an_evaluation_draws_in_the_program_too(
    compose: Compose, tmp_path: Path
) -> None:
    config = own_job(
        compose, data={"_target_": "jobs.points"},
        model={"_target_": "jobs.Vae", "in_features": 2}, step={"_target_": "jobs.vae_step"},
        loss={"_target_": "experiments.training.objective.NoLoss"},
    )  # fmt: skip
    file = exported(config, jobs.points(), tmp_path / "run", "jobs")
    program = torch.export.load(file).module()
    x = torch.zeros(3, 2)
    assert not torch.equal(program(x)[0], program(x)[0])


class Reshaping(nn.Module):
    """A model that asks for the number of rows with len."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        numbers = x["numbers"]
        return self.layer(numbers.reshape(len(numbers), 2, 2).flatten(1))  # type: ignore[no-any-return]


def test_a_model_may_ask_for_the_number_of_rows(compose: Compose, tmp_path: Path) -> None:
    data = jobs.two_inputs()
    file = exported(own_job(compose, "Reshaping"), data, tmp_path / "run", __name__, "jobs")
    program = torch.export.load(file).module()
    with torch.no_grad():
        expected = load_run(tmp_path / "run", trust=[__name__, "jobs"]).model(data.test.x)
    torch.testing.assert_close(program(data.test.x), expected)


class Writing(nn.Module):
    """A model that writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.layer(x["numbers"].mul_(2))  # type: ignore[no-any-return]


def test_a_model_that_writes_to_its_input_is_compared_on_what_it_was_given(
    compose: Compose, tmp_path: Path
) -> None:
    data = jobs.two_inputs()
    file = exported(own_job(compose, "Writing"), data, tmp_path / "run", __name__, "jobs")
    model = load_run(tmp_path / "run", trust=[__name__, "jobs"]).model
    program = torch.export.load(file).module()
    x = data.test.x
    with torch.no_grad():
        expected = model({"numbers": x["numbers"].clone(), "codes": x["codes"]})
    torch.testing.assert_close(program(x), expected)


class Listed(nn.Module):
    """A model that is given a list of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.EmbeddingBag(5, 1)

    def forward(self, rows: list[Tensor]) -> Tensor:
        return self.layer(torch.stack(rows)).squeeze(1)  # type: ignore[no-any-return]


def listed_step(model: nn.Module, batch: dict[str, Any], loss_func: nn.Module) -> Tensor:
    loss: Tensor = loss_func(model([*batch["ids"]]), batch["y"])
    return loss


def test_a_list_with_an_entry_for_each_row_is_told(compose: Compose, tmp_path: Path) -> None:
    config = own_job(
        compose, "Listed", data={"_target_": "jobs.sequences"},
        step={"_target_": f"{__name__}.listed_step"}, loss={"_target_": "torch.nn.MSELoss"},
        loader={**compose(["loader=torch"])["loader"], "batch_size": 16},
    )  # fmt: skip
    config["metrics"] = {}
    go_on(tmp_path / "run", config, jobs.sequences())
    with pytest.raises(UsageError, match="takes lists or dicts whose lengths differ"):
        export_run(tmp_path / "run", "best", ["jobs", __name__])


class Choosing(nn.Module):
    """A model whose layer depends on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        y = self.layer(x["numbers"])
        if y.sum() > 0:
            y = y * 2
        return y  # type: ignore[no-any-return]


class CountingRows(nn.Module):
    """A model that is not the same for each number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        rows = x["numbers"].shape[0]
        return self.layer(x["numbers"]) * (1.0 if rows > 1 else 2.0)  # type: ignore[no-any-return]


class ThroughLists(nn.Module):
    """A model that leaves torch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        numbers = [[2 * number for number in row] for row in x["numbers"].tolist()]
        return self.layer(torch.tensor(numbers))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("Choosing", r"torch\.export cannot trace it \(.*data-dependent.*test_export\.py, line"),
        ("CountingRows", "the exported program differs from the model for 1 rows"),
        ("ThroughLists", r"torch\.export cannot trace it \(.*specialized it to be a constant"),
    ],
)
def test_a_model_that_cannot_be_exported_is_refused_in_one_line_and_leaves_no_file(
    model: str, reason: str, compose: Compose, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    go_on(tmp_path / "run", own_job(compose, model), jobs.two_inputs())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=reason) as refused:
        export_run(tmp_path / "run", "best", [__name__, "jobs"])
    assert "\n" not in str(refused.value)
    capfd.readouterr()
    assert call(export.main, tmp_path / "run", "--trust", __name__, "--trust", "jobs") == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_step_that_calls_only_parts_of_its_model_is_told(
    compose: Compose, tmp_path: Path
) -> None:
    config = own_job(
        compose, data={"_target_": "jobs.points"}, model={"_target_": "jobs.Gan"},
        step={"_target_": "jobs.GanStep"},
        loss={"_target_": "experiments.training.objective.NoLoss"},
        scheduler={"_target_": "experiments.training.schedules.constant", "_partial_": True},
    )  # fmt: skip
    go_on(tmp_path / "run", config, jobs.points())
    with pytest.raises(UsageError, match=r"model\._target_=jobs\.Gan: the step calls parts of"):
        export_run(tmp_path / "run", "best", ["jobs"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--output", "{run}/model.onnx"], "expected a name that ends in .pt2"),
        (["{run}", "--output", "{run}/nowhere/model.pt2"], "there is no folder"),
        (["{run}/nowhere"], "holds no run"),
        (["{run}", "--checkpoint", "first"], "invalid choice"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(
    arguments: list[str], message: str, compose: Compose, of_tiny: Data, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    go_on(tmp_path / "run", compose(SMALL), of_tiny)
    capsys.readouterr()
    filled = [text.format(run=tmp_path / "run") for text in arguments]
    assert call(export.main, *filled) == 2
    error = capsys.readouterr().err
    assert error.startswith("experiments.export: ")
    assert message in error


def test_a_strangers_model_is_not_imported(compose: Compose, tmp_path: Path) -> None:
    go_on(tmp_path / "run", own_job(compose, "Choosing"), jobs.two_inputs())
    with pytest.raises(UsageError, match="not built from a saved run"):
        export_run(tmp_path / "run", "best")


def test_the_command_says_what_the_program_takes(
    compose: Compose, of_tiny: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go_on(tmp_path / "run", compose(SMALL), of_tiny)
    capsys.readouterr()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert call(export.main, tmp_path / "moved", "--output", tmp_path / "a.pt2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        "takes    input: float32 (rows, 784)",
        "returns  outputs: float32 (rows, 10)",
    ]
    assert lines[3].endswith("a.pt2")
    assert (tmp_path / "a.pt2").exists()
