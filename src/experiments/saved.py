"""Loads a saved run: config, record, metrics and model.

Nothing in the directory is executed, so it may be untrusted (see directory/trust.py).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.directory import statistics
from experiments.directory.identity import code_changes, identify
from experiments.directory.metrics import read_metrics, rows_by_step
from experiments.directory.record import read_record
from experiments.directory.saved_config import read_config
from experiments.directory.trust import check_objects, resume_command
from experiments.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class SavedRun:
    """A run loaded from its directory.

    config: resolved, as nested dicts
    record: run.json
    metrics: one row per logged step, for `pandas.DataFrame(run.metrics)`
    model: the checkpoint's weights, on the CPU, in evaluation mode
    step: number of optimizer steps at that checkpoint
    loss_state: the loss's parameters and buffers at that checkpoint
    statistics: what the data computed on its training split, to encode new rows with, as
        `experiments.data.tables.encode` does; None if there is nothing
    """

    path: Path
    config: dict[str, Any]
    record: dict[str, Any]
    metrics: list[dict[str, float]]
    model: "nn.Module"
    step: int
    loss_state: dict[str, Any] = field(default_factory=dict)
    statistics: Any = None


def load_run(
    path: str | Path,
    checkpoint: Literal["best", "last"] = "best",
    trust: Sequence[str] = (),
) -> SavedRun:
    """Load a run directory, with its model ready for inference: `load_run(path).model(x)`.

    trust: modules that its config may use besides experiments, torch.nn and torch.optim.

    Raises UsageError if the directory holds no run or no checkpoint, or uses another module.
    """
    path = Path(path)
    config = read_config(path, trust)
    from experiments.directory.checkpoints import Checkpoints, restoring
    from experiments.training.parts import build_model

    check_objects(config, trust)
    checkpoints = Checkpoints(path / "checkpoints")
    content = checkpoints.load(checkpoint) or checkpoints.load("last")
    if content is None:
        command = resume_command(path, config)
        raise UsageError(f"{path}: has no checkpoint yet; go on with: {command}")
    record = read_record(path)
    for change in code_changes(record, identify(config, record)["code"]):
        print(f"warning: {change} since the run: its model may compute something else",
              file=sys.stderr)  # fmt: skip
    model = build_model(config)
    with restoring(path):
        model.load_state_dict(content["model"])
    return SavedRun(
        path=path,
        config=config,
        record=record,
        metrics=rows_by_step(read_metrics(path)),
        model=model.eval(),
        step=content["state"]["step"],
        loss_state=content.get("loss", {}),
        statistics=statistics.read(path),
    )
