"""A run directory read back: its config, its record, its metrics, its model.

Nothing in the directory is executed, so it may come from anywhere (see directory/trust.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.directory.metrics import read_metrics, rows_by_step
from experiments.directory.record import read_record
from experiments.directory.saved_config import read_config
from experiments.directory.trust import check_objects
from experiments.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class SavedRun:
    """A run as it lies in its directory.

    config: resolved, as nested dicts
    record: run.json
    metrics: a row for each step at which something was logged, `pandas.DataFrame(run.metrics)`
    model: the checkpoint's weights, on the CPU, in evaluation mode
    step: optimizer steps done at that checkpoint
    """

    path: Path
    config: dict[str, Any]
    record: dict[str, Any]
    metrics: list[dict[str, float]]
    model: "nn.Module"
    step: int


def load_run(
    path: str | Path,
    checkpoint: Literal["best", "last"] = "best",
    trust: Sequence[str] = (),
) -> SavedRun:
    """Read a run directory, and its model ready to predict: `load_run(path).model(x)`.

    trust: modules, besides experiments, torch.nn and torch.optim, that its config may name.

    Raises UsageError where the directory holds no run, no checkpoint, or names anything else.
    """
    path = Path(path)
    config = read_config(path, trust)
    from experiments.directory.checkpoints import Checkpoints, restoring
    from experiments.training.parts import build_model

    check_objects(config, trust)
    checkpoints = Checkpoints(path / "checkpoints")
    content = checkpoints.load(checkpoint) or checkpoints.load("last")
    if content is None:
        raise UsageError(f"{path}: has no checkpoint yet; resume={path} goes on with it")
    model = build_model(config)
    with restoring(path):
        model.load_state_dict(content["model"])
    return SavedRun(
        path=path,
        config=config,
        record=read_record(path),
        metrics=rows_by_step(read_metrics(path)),
        model=model.eval(),
        step=content["state"]["step"],
    )
