"""Hydra plugins, discovered by Hydra: the launcher of sweeps, the TPE sweeper, the search path."""

from collections.abc import Mapping, Sequence

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ExperimentsSearchPath(SearchPathPlugin):
    """Adds --config-dir and conf/ to the search path of the command; nothing to other programs'."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        from experiments.config.search_path import entries

        for provider, path in entries:
            search_path.append(provider, path)


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

    def __init__(
        self,
        trials: int,
        seed: int,
        prune: bool,
        workers: int | None,
        params: Mapping[str, str] | None = None,
    ) -> None:
        self.trials, self.seed, self.prune, self.workers = trials, seed, prune, workers
        self.params = params

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config, self.hydra_context = config, hydra_context

    def sweep(self, arguments: list[str]) -> None:
        from experiments.config.grid import with_params
        from experiments.sweeps.search import search
        from experiments.sweeps.sweep import Sweep

        config, context = self.config, self.hydra_context
        assert config is not None
        assert context is not None
        search(
            lambda: Sweep(config, context, self.workers),
            with_params(self.params, arguments),
            self.trials,
            seed=self.seed,
            prune=self.prune,
        )
