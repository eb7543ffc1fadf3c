"""Hydra plugins, discovered by Hydra: the launcher of sweeps and the TPE sweeper."""

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class WorkersLauncher(Launcher):
    """Runs the jobs of a sweep in worker processes, through experiments.sweeps.sweep."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from experiments.sweeps.sweep import Sweep

        self.sweep = Sweep(config, hydra_context, self.workers)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        return self.sweep.launch([list(overrides) for overrides in job_overrides], initial_job_idx)


class TPESweeper(Sweeper):
    """Searches hyperparameters with Optuna, through experiments.sweeps.search."""

    def __init__(self, trials: int, seed: int, prune: bool, workers: int | None) -> None:
        self.trials, self.seed, self.prune, self.workers = trials, seed, prune, workers

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config, self.hydra_context = config, hydra_context

    def sweep(self, arguments: list[str]) -> None:
        from experiments.sweeps.search import search
        from experiments.sweeps.sweep import Sweep

        config, context = self.config, self.hydra_context
        assert config is not None
        assert context is not None
        search(
            lambda: Sweep(config, context, self.workers),
            arguments,
            self.trials,
            seed=self.seed,
            prune=self.prune,
        )
