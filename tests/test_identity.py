"""Identity: a run is the same run only with the same code, data and versions."""

import csv
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest

from experiments.directory import identity
from experiments.directory.identity import differences, identify, own_modules

pytestmark = pytest.mark.long

Command = Callable[..., subprocess.CompletedProcess[str]]

NET = """
from torch import nn
from layers import activation
def make(in_features=784, out_features=10):
    return nn.Sequential(nn.Linear(in_features, 8), activation(), nn.Linear(8, out_features))
"""


RULES = """
from omegaconf import OmegaConf
OmegaConf.register_new_resolver("rule", lambda: 1, replace=True)
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of own modules on the path: `owned_net` imports a package and numpy."""
    package = tmp_path / "owned_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("from . import other\nfrom .deep import thing\n")
    (package / "other.py").write_text("import json\n")
    (package / "deep.py").write_text("thing = 1\n")
    (package / "unused.py").write_text("")
    (tmp_path / "owned_late.py").write_text("")
    (tmp_path / "owned_net.py").write_text(
        "import numpy\nfrom owned_package.part import thing\n"
        "def make():\n    import importlib\n    importlib.import_module('owned_late')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    identity._identify.cache_clear()
    return tmp_path


def model(target: str) -> dict[str, Any]:
    return {"model": {"_target_": target, "hidden": [8]}}


# What belongs to an identity


def test_own_code_is_what_the_targets_modules_import_and_nothing_else(sources: Path) -> None:
    code, others = own_modules(["owned_net.make"])
    names = {"owned_net", "owned_late", "owned_package"}
    assert set(code) == names | {f"owned_package.{part}" for part in ("part", "other", "deep")}
    assert others == {"numpy"}


def test_own_code_in_nested_folders_without_init_is_found(sources: Path) -> None:
    folder = sources / "owned_space" / "nested" / "deeper"
    folder.mkdir(parents=True)
    (folder / "net.py").write_text("")
    code, _ = own_modules(["owned_space.nested.deeper.net.make", "owned_space.nested.missing.x"])
    assert code == {"owned_space.nested.deeper.net": folder / "net.py"}


def test_own_code_is_also_a_compiled_module_and_an_archive(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = sources / f"owned_fast{EXTENSION_SUFFIXES[0]}"
    compiled.write_bytes(b"\x7fELF\0")
    archive = sources / "owned.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("owned_packed.py", "")
    monkeypatch.syspath_prepend(archive)
    code, _ = own_modules(["owned_fast.make", "owned_packed.make"])
    assert code == {"owned_fast": compiled, "owned_packed": archive}


def test_packages_of_another_site_packages_folder_are_no_own_code(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = sources / "site-packages"
    other.mkdir()
    (other / "elsewhere.py").write_text("")
    monkeypatch.syspath_prepend(other)
    assert own_modules(["elsewhere.make"]) == ({}, {"elsewhere"})


def test_a_target_in_a_list_or_a_nested_node_counts(sources: Path) -> None:
    nested = {"model": {"_target_": "torch.nn.Sequential", "parts": [{"_target_": "owned_late.x"}]}}
    assert set(identify(nested)["code"]) == {"owned_late"}
    assert set(identify({"model": {"activation": "owned_late.x"}})["code"]) == {"owned_late"}


def test_finding_own_code_executes_nothing(sources: Path) -> None:
    (sources / "owned_late.py").write_text("raise SystemExit('executed')\n")
    assert "owned_late" in identify(model("owned_net.make"))["code"]
    assert "owned_net" not in sys.modules


def test_installed_packages_python_and_this_project_are_no_own_code() -> None:
    targets = ["experiments.training.models.mlp", "torch.optim.SGD", "json.loads", "numpy.array"]
    assert own_modules(targets)[0] == {}


def test_versions_are_those_of_what_computes_and_of_what_own_code_imports(sources: Path) -> None:
    plain = identify(model("torch.nn.Linear"))["versions"]
    assert set(plain) == {"python", "torch", "numpy", "experiments"}
    (sources / "owned_net.py").write_text("import hypothesis\n")
    own = identify(model("owned_net.make"))["versions"]
    assert set(own) - set(plain) == {"hypothesis"}


# How two identities differ


def test_equal_identities_do_not_differ(sources: Path) -> None:
    now = identify(model("owned_net.make"))
    assert differences({**now, "data": {"train": "a"}}, {**now, "data": {"train": "a"}}) == []


def test_what_differs_is_named() -> None:
    record = {
        "code": {"net": "1", "gone": "1"}, "versions": {"torch": "2.12", "scipy": "1"},
        "data": {"train": "a", "valid": "b"},
    }  # fmt: skip
    now = {
        "code": {"net": "2", "pkg.new": "1"}, "versions": {"torch": "2.13"},
        "data": {"train": "a", "valid": "c"},
    }  # fmt: skip
    assert differences(record, now) == [
        "pkg/new.py was not recorded", "net.py has changed", "gone.py is not used any more",
        "torch was 2.12, is 2.13", "scipy was 1, is missing", "the valid rows have changed",
    ]  # fmt: skip


def test_a_record_from_before_identities_is_compared_by_its_packages() -> None:
    record = {"python": "3.11", "packages": {"torch": "2.12", "hydra-core": "1.3"}}
    now = {"code": {}, "versions": {"python": "3.11", "torch": "2.13", "experiments": "0.1.0"}}
    assert differences(record, now) == ["torch was 2.12, is 2.13"]


# Sweeps that continue


class Project:
    """A project of one's own in a folder, whose sweep of two runs is continued."""

    def __init__(self, folder: Path, data: Path, cli_in: Command) -> None:
        self.folder, self.data, self.cli_in = folder, folder / "data", cli_in
        shutil.copytree(data, self.data)
        (folder / "net.py").write_text(NET)
        (folder / "layers.py").write_text("from torch.nn import ReLU as activation\n")

    def sweep(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        net = ["~model.hidden", "~model.dropout", "model._target_=net.make"]
        small = [f"data.path={self.data}", "trainer.epochs=1", "loader.batch_size=100"]
        completed = self.cli_in(self.folder, "-m", "sweep=s", "seed=0,1", *net, *small, *arguments)
        assert completed.returncode == 0, completed.stderr
        return completed

    def command(self, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A module of the package as a command in the project's folder."""
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=self.folder, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def states(self) -> list[str]:
        """What the table says of each run."""
        table = (self.folder / "outputs" / "s" / "results.csv").read_text().splitlines()
        column = table[0].split(",").index("state")
        return sorted(line.split(",")[column] for line in table[1:])

    def records(self) -> dict[str, str]:
        """When each run started, by the name of its directory."""
        return {
            file.parent.name: json.loads(file.read_text())["started"]
            for file in self.folder.glob("outputs/s/*/run.json")
        }


@pytest.fixture
def project(tmp_path: Path, small_mnist_dir: Path, cli_in: Command) -> Project:
    return Project(tmp_path, small_mnist_dir, cli_in)


def test_a_sweep_of_the_same_code_and_data_is_kept(project: Project) -> None:
    project.sweep()
    before = project.records()
    continued = project.sweep()
    assert "changed" not in continued.stderr
    assert project.records() == before


def test_after_an_edit_of_an_imported_module_the_runs_are_run_again_beside_the_old_ones(
    project: Project,
) -> None:
    project.sweep()
    before = project.records()
    (project.folder / "layers.py").write_text("from torch.nn import Tanh as activation\n")
    continued = project.sweep()
    lines = [line for line in continued.stderr.splitlines() if line.startswith("changed: ")]
    assert len(lines) == 2
    assert all("layers.py has changed; run again beside it" in line for line in lines)
    after = project.records()
    assert len(after) == 4
    assert before.items() <= after.items()
    assert project.states() == ["finished", "finished", "superseded", "superseded"]
    again = project.sweep()
    assert again.stderr == ""
    assert project.records() == after


def test_runs_whose_code_is_changed_back_count_again(project: Project) -> None:
    project.sweep()
    first = project.records()
    layers = project.folder / "layers.py"
    before = layers.read_text()
    layers.write_text("from torch.nn import Tanh as activation\n")
    project.sweep()
    layers.write_text(before)
    assert project.sweep().stderr == ""
    after = project.records()
    with (project.folder / "outputs" / "s" / "results.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    finished = {Path(row["directory"]).name for row in rows if row["state"] == "finished"}
    assert finished == set(first)
    assert project.states() == ["finished", "finished", "superseded", "superseded"]
    assert len(after) == 4
    layers.write_text("from torch.nn import Tanh as activation\n")  # and once more
    assert project.sweep().stderr == ""
    with (project.folder / "outputs" / "s" / "results.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    finished = {Path(row["directory"]).name for row in rows if row["state"] == "finished"}
    assert finished == set(after) - set(first)


def test_a_search_does_not_go_on_with_other_code(project: Project) -> None:
    search = ("hydra/sweeper=tpe", "hydra.sweeper.trials=2", "hydra.sweeper.workers=1")
    project.sweep(*search)
    before = project.records()
    (project.folder / "layers.py").write_text("from torch.nn import Tanh as activation\n")
    arguments = ("-m", "sweep=s", "seed=0,1", "~model.hidden", "~model.dropout", *search)
    continued = project.cli_in(
        project.folder, *arguments, "model._target_=net.make", f"data.path={project.data}",
        "trainer.epochs=1", "loader.batch_size=100",
    )  # fmt: skip
    assert continued.returncode == 2
    assert "outputs/s: layers.py has changed since its search began" in continued.stderr
    assert "--keep-changed" in continued.stderr
    project.sweep(*search, "--keep-changed")
    assert project.records() == before


def test_keep_changed_keeps_the_runs_and_says_so(project: Project) -> None:
    project.sweep()
    before = project.records()
    (project.folder / "layers.py").write_text("from torch.nn import Tanh as activation\n")
    continued = project.sweep("--keep-changed")
    assert continued.stderr.count("layers.py has changed; kept all the same") == 2
    assert project.records() == before


def test_a_module_of_resolvers_is_own_code(project: Project) -> None:
    rules = project.folder / "rules.py"
    rules.write_text(RULES)
    project.sweep("--resolvers", "rules")
    before = project.records()
    assert project.sweep("--resolvers", "rules").stderr == ""
    rules.write_text(RULES + "import torch; torch.nn.ReLU = torch.nn.Tanh\n")
    continued = project.sweep("--resolvers", "rules")
    assert continued.stderr.count("rules.py has changed; run again beside it") == 2
    assert before.items() < project.records().items()


def test_rows_that_changed_are_run_again(project: Project) -> None:
    project.sweep()
    labels = project.data / "train-labels-idx1-ubyte.gz"
    images = project.data / "train-images-idx3-ubyte.gz"
    # one pixel of the first row
    import gzip

    raw = bytearray(gzip.decompress(images.read_bytes()))
    raw[16] ^= 255
    images.write_bytes(gzip.compress(bytes(raw), compresslevel=1))
    assert labels.exists()
    continued = project.sweep()
    assert continued.stderr.count("the train rows have changed; run again beside it") == 2
    assert len(project.records()) == 4


def test_under_a_launcher_of_hydras_a_changed_run_fails_with_a_remedy_and_is_kept(
    project: Project,
) -> None:
    project.sweep("hydra/launcher=basic")
    before = project.records()
    (project.folder / "layers.py").write_text("from torch.nn import Tanh as activation\n")
    arguments = ("-m", "sweep=s", "seed=0,1", "~model.hidden", "~model.dropout")
    continued = project.cli_in(
        project.folder, *arguments, "model._target_=net.make", f"data.path={project.data}",
        "trainer.epochs=1", "loader.batch_size=100", "hydra/launcher=basic",
    )  # fmt: skip
    assert "layers.py has changed since this run; use another sweep= or --keep-changed" in (
        continued.stderr
    )
    assert project.records() == before


# Resuming, evaluating, reproducing


def test_resume_evaluate_and_reproduce_tell_of_changed_code(project: Project) -> None:
    run = ["~model.hidden", "~model.dropout", "model._target_=net.make", "trainer.epochs=3",
           f"data.path={project.data}", "loader.batch_size=100"]  # fmt: skip
    first = project.cli_in(project.folder, *run, "hydra.run.dir=run")
    assert first.returncode == 0, first.stderr
    record = project.folder / "run" / "run.json"
    assert set(json.loads(record.read_text())["code"]) == {"net", "layers"}
    (project.folder / "layers.py").write_text("from torch.nn import Tanh as activation\n")
    command = project.command
    trusted = ("--trust", "net", "--trust", "layers")
    evaluated = command("experiments.evaluate", "run", *trusted)
    assert "warning: layers.py has changed since the run" in evaluated.stderr
    reproduced = command("experiments.reproduce", "run", *trusted)
    assert reproduced.returncode == 1
    assert "note          layers.py has changed" in reproduced.stdout
    # as if it had been killed after its last epoch's checkpoint
    record.write_text(record.read_text().replace('"finished"', '"running"', 1))
    resumed = command("experiments", "resume=run", *trusted)
    assert "warning: layers.py has changed: bits may differ" in resumed.stderr


def test_what_reads_a_run_needs_no_resolvers_and_knows_their_modules(project: Project) -> None:
    rules = project.folder / "rules.py"
    rules.write_text(RULES)
    first = project.cli_in(
        project.folder, "model=linear", "trainer.epochs=${rule:}", "hydra.run.dir=run",
        f"data.path={project.data}", "--resolvers", "rules",
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    reproduced = project.command("experiments.reproduce", "run")
    assert (reproduced.returncode, "note" in reproduced.stdout) == (0, False), reproduced.stdout
    assert project.command("experiments.evaluate", "run").stderr == ""
    rules.write_text(RULES.replace("1", "2"))
    assert "rules.py has changed" in project.command("experiments.reproduce", "run").stdout
    assert "rules.py has changed" in project.command("experiments.evaluate", "run").stderr


def test_a_run_that_begins_anew_without_its_resolvers_keeps_them_in_its_identity(
    project: Project,
) -> None:
    (project.folder / "rules.py").write_text(RULES)
    project.sweep("--resolvers", "rules")
    run = next(project.folder.glob("outputs/s/*/run.json")).parent
    run.joinpath("run.json").write_text(
        (run / "run.json").read_text().replace('"finished"', '"interrupted"', 1)
    )
    shutil.rmtree(run / "checkpoints")
    resumed = project.cli_in(project.folder, f"resume={run}", "--trust", "net", "--trust", "layers")
    assert resumed.returncode == 0, resumed.stderr
    assert project.sweep("--resolvers", "rules").stderr == ""
