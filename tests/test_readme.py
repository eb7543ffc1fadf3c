"""The README says what is so: its commands compose, its modules are there, its tree is the tree."""

import importlib.util
import itertools
import re
import shlex
import subprocess
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from experiments.config.compose import compose
from experiments.config.schema import SCHEMA

Cli = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(
    r"^    (?:\$ )?(python -m experiments.*)$", README.replace("\\\n", " "), re.MULTILINE
)


def block(first: str) -> str:
    """The first indented block of the README that begins with these words."""
    lines = README[README.index(f"    {first}") :].splitlines()
    inside = itertools.takewhile(lambda line: not line or line.startswith("    "), lines)
    return textwrap.dedent("\n".join(inside)).strip() + "\n"


def test_the_job_of_the_readme_trains_in_a_few_lines(cli_in: Cli, tmp_path: Path) -> None:
    code, config = (
        block("import torch\n    from torch import Tensor, nn\n\n    from exp"),
        block("# @pack"),
    )
    assert len(code.splitlines()) < 25
    assert len(config.splitlines()) <= 10
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "myjob.py").write_text(code)
    (tmp_path / "mine" / "experiment" / "myjob.yaml").write_text(config)
    completed = cli_in(tmp_path, "--config-dir", "mine", "experiment=myjob", "trainer.epochs=2",
                       "trainer.monitor=close/valid", "trainer.mode=max")  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    assert "close/valid" in completed.stdout


@pytest.fixture
def args(tmp_path: Path) -> Iterator[Namespace]:
    """Flags of a command with the README's own model in `mine/`."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "strided.yaml").write_text("_target_: mymodels.ConvNet\nchannels: 16\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "myjob.yaml").write_text(block("# @package _global_"))
    GlobalHydra.instance().clear()
    yield Namespace(config_dir=str(tmp_path), config_path=None, config_name=None)
    GlobalHydra.instance().clear()


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_composes(command: str, args: Namespace) -> None:
    module, *words = shlex.split(command)[2:]
    assert importlib.util.find_spec(module) is not None
    given = [word for word in words if re.match(r"[\w./+@]+=", word)]
    known = [word for word in given if not word.startswith(("sweep=", "resume="))]
    if module != "experiments" or "optimizer.lrr=0.1" in known:
        return
    first = []
    for override in OverridesParser.create().parse_overrides(known):
        if override.is_interval_sweep():
            continue
        if override.is_sweep_override():
            first.append(f"{override.key_or_group}={next(iter(override.sweep_string_iterator()))}")
        else:
            first.append(str(override.input_line))
    compose(args, first)


def test_every_key_in_the_tables_is_in_the_schema() -> None:
    keys = re.findall(r"`((?:seed|[a-z]+\.[a-z_]+))`", README.partition("## What a run leaves")[0])
    assert len(keys) >= 10
    for key in keys:
        if not key.endswith(".py"):
            assert key in SCHEMA, key


def test_the_source_tree_names_what_is_there() -> None:
    tree = README.partition("## Source tree")[2].partition("A line imports")[0]
    package = ROOT / "src" / "experiments"
    named: dict[Path, set[str]] = {ROOT: set(), package: set()}
    for line in filter(str.strip, tree.splitlines()):
        folder = ROOT if len(line) - len(line.lstrip()) == 4 else package
        # the names come before what is said about them, which stands behind wider space
        for name in re.match(r" *((?:[\w/.]+ {0,2})+)", line)[1].split():  # type: ignore[index]
            if re.search(r"\.py$|/$", name):
                assert (folder / name).exists(), name
                named[folder].add(name.rstrip("/"))
    modules = {
        path.name for path in package.glob("*") if path.name[0] != "_" and path.suffix != ".typed"
    }
    assert named[package] - {"__main__.py"} == modules - {"conf"}
    assert named[ROOT] >= {"conf", "src/experiments", "tests", "benchmarks", "docs", "outputs"}


def test_the_pictures_are_there() -> None:
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).read_bytes().startswith(b"\x89PNG")
