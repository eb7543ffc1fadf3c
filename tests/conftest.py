"""Fixtures that more than one file of the specification uses."""

import gzip
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import pytest
import torch
from hypothesis import settings

import experiments.data.mnist as mnist_module
from experiments.config.compose import CONF, validate
from experiments.config.hydra_versions import VERSION_BASE
from experiments.data import Data, Split
from experiments.training.sizes import with_sizes

# an example's time says nothing on a shared machine
settings.register_profile("specification", deadline=None)
settings.load_profile("specification")


# neither a person's own settings of git nor a hook that the tests run in may change a result
for name in [name for name in os.environ if name.startswith("GIT_")]:
    del os.environ[name]
os.environ |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}

# what one core does, two that are shared with others do no faster
torch.set_num_threads(1)

# Seconds that no command takes on any machine: a guard against waiting for ever, no measure.
PATIENCE = 600

# The command as it is, and a word at its end if it has imported torch, which takes seconds.
WATCHED = """
import sys
from experiments.__main__ import main
from experiments.config.compose import validate
from experiments.config.compose import CONF
try:
    main()
finally:
    if "torch" in sys.modules:
        print("torch was imported", file=sys.stderr)
"""


class FinishedRun(NamedTuple):
    """A run of the real command: what it printed and where it lies."""

    completed: subprocess.CompletedProcess[str]
    path: Path


@pytest.fixture(scope="session")
def mnist() -> Data:
    """The data set inside the package."""
    return mnist_module.load()


@pytest.fixture(scope="session")
def tiny(mnist: Data) -> Data:
    """A few hundred real rows, so that an epoch takes milliseconds."""

    def head(split: Split, rows: int) -> Split:
        return Split(split.x[:rows].clone(), split.y[:rows].clone())

    return Data(
        train=head(mnist.train, 320), valid=head(mnist.valid, 150), test=head(mnist.test, 100)
    )


@pytest.fixture(scope="session")
def written() -> Callable[[list[str]], dict[str, Any]]:
    """A command line's overrides to the config that is checked and resolved."""

    def written(overrides: list[str]) -> dict[str, Any]:
        with hydra.initialize_config_dir(str(CONF), "experiments", **VERSION_BASE):
            config = hydra.compose("config", overrides)
        return validate(config)

    return written


@pytest.fixture(scope="session")
def compose(
    written: Callable[[list[str]], dict[str, Any]],
) -> Callable[[list[str]], dict[str, Any]]:
    """The same with MNIST's sizes, as a run builds its parts from it."""
    sizes = {"in_features": 784, "out_features": 10}
    return lambda overrides: with_sizes(written(overrides), sizes)


@pytest.fixture(scope="session")
def cli_in() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The real command in a given directory: `cli_in(directory, *arguments)`."""

    def cli_in(
        directory: Path, *arguments: str, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "experiments", *arguments],
            cwd=directory,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    return cli_in


@pytest.fixture
def cli(
    tmp_path: Path, cli_in: Callable[..., subprocess.CompletedProcess[str]]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The real command in the test's own directory: `cli(*arguments)`."""

    def cli(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return cli_in(tmp_path, *arguments, env=env)

    return cli


@pytest.fixture(scope="session")
def small_mnist_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `data.path` with 600 rows to train on, 10,000 to validate and 200 to test."""
    folder = tmp_path_factory.mktemp("small-mnist")
    source = Path(mnist_module.__file__).parent
    for name in mnist_module.FILES:
        raw = gzip.decompress((source / name).read_bytes())
        header, row_size = (16, 28 * 28) if "images" in name else (8, 1)
        rows = 200 if name.startswith("t10k") else mnist_module.VALID_ROWS + 600
        small = raw[:4] + struct.pack(">I", rows) + raw[8 : header + rows * row_size]
        (folder / name).write_bytes(gzip.compress(small, compresslevel=1))
    return folder


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory,
    small_mnist_dir: Path,
    cli_in: Callable[..., subprocess.CompletedProcess[str]],
) -> FinishedRun:
    """Two short epochs through the real command, in a directory that it named itself."""
    directory = tmp_path_factory.mktemp("finished-run")
    completed = cli_in(
        directory, f"data.path={small_mnist_dir}", "trainer.epochs=2", "trainer.log_every=4"
    )
    assert completed.returncode == 0, completed.stderr
    [record] = directory.rglob("run.json")
    return FinishedRun(completed, record.parent)
