"""Loads a saved run: config, record, metrics and model.

Nothing in the directory is executed, so it may be untrusted (see directory/trust.py).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
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

    from experiments.training.objective import Objective


@dataclass(frozen=True)
class SavedRun:
    """A run loaded from its directory.

    config: resolved, as nested dicts
    record: run.json
    metrics: one row per logged step, for `pandas.DataFrame(run.metrics)`
    model: the checkpoint's weights, on the CPU, in evaluation mode
    step: number of optimizer steps at that checkpoint
    objective: the model with its loss and step, as `evaluate` takes it
    statistics: what the data computed on its training split, to encode new rows with, as
        `experiments.data.tables.encode` does; None if there is nothing
    """

    path: Path
    config: dict[str, Any]
    record: dict[str, Any]
    metrics: list[dict[str, float]]
    model: "nn.Module"
    step: int
    objective: "Objective"
    statistics: Any = None

    @property
    def loss_state(self) -> dict[str, Any]:
        """The loss's parameters and buffers at that checkpoint."""
        return self.objective.loss_func.state_dict()


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
    from experiments.training.callbacks import averaged_weights
    from experiments.training.class_weights import saved_weights, with_weights
    from experiments.training.own_state import load_state
    from experiments.training.parts import build_loss, build_model, build_objective
    from experiments.training.sizes import with_sizes

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
    config = with_sizes(config, record.get("sizes", {}))
    weights = saved_weights(config, content.get("loss", {}))
    model, loss_func = build_model(config), build_loss(with_weights(config, weights))
    objective = build_objective(config, model, loss_func)
    with restoring(path):
        model.load_state_dict({**content["model"], **averaged_weights(content)})
        loss_func.load_state_dict(content.get("loss") or loss_func.state_dict())
        load_state(objective.step, content.get("step") or {})
    return SavedRun(
        path=path,
        config=config,
        record=record,
        metrics=rows_by_step(read_metrics(path)),
        model=model.eval(),
        step=content["state"]["step"],
        objective=objective.eval(),
        statistics=statistics.read(path),
    )
