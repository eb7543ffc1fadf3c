"""The launcher of sweeps, `hydra/launcher=workers`, in the place where Hydra looks for plugins."""

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class WorkersLauncher(Launcher):
    """Runs the jobs of a sweep in worker processes: Hydra's side of experiments.sweep."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from experiments.sweep import Sweep

        self.sweep = Sweep(config, hydra_context, self.workers)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        return self.sweep.launch([list(overrides) for overrides in job_overrides], initial_job_idx)
