"""The sweeper that searches, `hydra/sweeper=tpe`, in the place where Hydra looks for plugins."""

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class TPESweeper(Sweeper):
    """Asks Optuna for each next run: Hydra's side of experiments.search."""

    def __init__(self, trials: int, seed: int, prune: bool, workers: int | None) -> None:
        self.trials, self.seed, self.prune, self.workers = trials, seed, prune, workers

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config, self.hydra_context = config, hydra_context

    def sweep(self, arguments: list[str]) -> None:
        from experiments.search import search
        from experiments.sweep import Sweep

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
