"""Hyperparameter search with Optuna's TPE sampler, each trial a run of the sweep.

Tree-structured Parzen estimator: J. Bergstra et al., "Algorithms for Hyper-Parameter
Optimization", 2011. The study is stored in the sweep's directory, so that a search can be
continued. Hydra's own Optuna plugin supports neither this nor pruning, and requires Optuna below 3.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from experiments.errors import UsageError
from experiments.sweeps.jobs import Job
from experiments.sweeps.study import (
    STUDY,
    assignments,
    check_trials,
    describe,
    first_values,
    open_study,
)
from experiments.sweeps.sweep import Sweep

if TYPE_CHECKING:
    import optuna

MAX_DUPLICATES = 20  # in a row: then the search space is taken to be exhausted


def search(
    make_sweep: Callable[[], Sweep], arguments: list[str], trials: int, *, seed: int, prune: bool
) -> None:
    """Run trials until the study has `trials` that are complete or pruned.

    make_sweep: starts the worker processes; called once the arguments are known to be valid.
    arguments: overrides; the searched keys are intervals, ranges or choices.

    Raises UsageError if Optuna is not installed, nothing is searched, or the study was made with
    other settings; Interrupted after a signal.
    """
    try:
        from optuna.storages.journal import JournalFileBackend  # noqa: F401
    except ImportError:
        raise UsageError(
            "hydra/sweeper=tpe needs Optuna: pip install 'experiments[search]'"
        ) from None
    fixed, space = search_space(arguments)
    if not space:
        raise UsageError(
            "hydra/sweeper=tpe: nothing to search; give a key as optimizer.lr=interval(a,b), say"
        )
    sweep = make_sweep()

    def compose(overrides: list[str]) -> DictConfig:
        return sweep.loader.pop(sweep.config, overrides)

    setting = describe(compose, fixed, space)
    if not sweep.continuation.keep_changed:
        first = assignments(first_values(space))
        check_trials(
            sweep.directory,
            setting,
            lambda: sweep.continuation.read_data(compose([*fixed, *first])),
        )
    study = open_study(sweep.directory / STUDY, setting, seed=seed, prune=prune)
    Search(study, sweep, fixed, space, trials_left(study, trials)).run()


def trials_left(study: "optuna.Study", trials: int) -> int:
    """The number of trials to run until `trials` are complete or pruned."""
    from optuna.trial import TrialState

    ended = len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)))
    return max(trials - ended, 0)


@dataclass
class Search:
    """A running search: asks the study for trials, runs them as jobs, reports their results.

    fixed: the overrides that all trials share. space: the distribution of each searched key.
    trials: number of trials to run. reported: paths whose result the study has.
    """

    study: "optuna.Study"
    sweep: Sweep
    fixed: list[str]
    space: dict[str, "optuna.distributions.BaseDistribution"]
    trials: int
    trials_by_path: dict[Path, "optuna.Trial"] = field(default_factory=dict)
    reported: set[Path] = field(default_factory=set)

    def run(self) -> None:
        """Run all trials. Raises Interrupted after a signal."""
        self.sweep.run_all(
            self.jobs, self.trials, should_prune=self.should_prune, on_job_end=self.report
        )

    def jobs(self, placed: list[Job]) -> Iterator[Job]:
        """A job for each new trial, also appended to `placed`."""
        from optuna.trial import TrialState

        left, duplicates = self.trials, 0
        while left > 0 and duplicates < MAX_DUPLICATES:
            trial = self.study.ask(self.space)
            job = self.place(trial)
            if job.path in self.trials_by_path and job.path not in self.reported:
                # a trial with the same values is running
                self.study.tell(trial, state=TrialState.FAIL)
                duplicates += 1
                continue
            left, duplicates = left - 1, 0
            self.trials_by_path[job.path] = trial
            self.reported.discard(job.path)
            placed.append(job)
            yield job

    def place(self, trial: "optuna.Trial") -> Job:
        """The job of a trial, with its directory."""
        searched = map(unresolved_in_names, assignments(trial.params))
        composed = self.sweep.loader.pop(self.sweep.config, [*self.fixed, *searched])
        return self.sweep.place(composed, trial.number)

    def should_prune(self, job: Job, epoch: int, value: float) -> bool:
        """Report a job's monitored value after an epoch; returns whether to prune its trial."""
        trial = self.trials_by_path[job.path]
        trial.report(value, epoch)
        return trial.should_prune()

    def report(self, job: Job) -> None:
        """Tell the study how a job ended; an interrupted trial stays running, to be continued."""
        from optuna.trial import TrialState

        trial = self.trials_by_path[job.path]
        self.reported.add(job.path)
        if job.state == "finished":
            self.study.tell(trial, job.value)
        elif job.state in ("pruned", "diverged"):
            self.study.tell(trial, state=TrialState.PRUNED)
        elif job.state == "failed":
            self.study.tell(trial, state=TrialState.FAIL)


def search_space(
    arguments: list[str],
) -> tuple[list[str], dict[str, "optuna.distributions.BaseDistribution"]]:
    """The fixed overrides, and Optuna's distribution of each searched key."""
    fixed, space = [], {}
    for override in OverridesParser.create().parse_overrides(arguments):
        if override.is_sweep_override():
            space[override.get_key_element()] = distribution(override)
        else:
            fixed.append(unresolved_in_names(str(override.input_line)))
    return fixed, space


def unresolved_in_names(word: str) -> str:
    """An override as Hydra's own sweeper passes it on: the name of a run then has the reference
    that was given, and not its value, which may be a secret.
    """
    if "${" not in word:
        return word
    override = OverridesParser.create().parse_override(word)
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def distribution(override: Override) -> Any:
    """Optuna's distribution for a sweep override: an interval or integer range, on a log scale if
    tagged `log`, or else a choice.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep: Any = override.value()
    log = "log" in getattr(sweep, "tags", ())
    if override.is_interval_sweep():
        return FloatDistribution(sweep.start, sweep.end, log=log)
    if override.is_range_sweep():
        bounds = (sweep.start, sweep.stop, sweep.step)
        if all(isinstance(bound, int) for bound in bounds):
            last = sweep.start + (sweep.stop - 1 - sweep.start) // sweep.step * sweep.step
            return IntDistribution(sweep.start, last, step=sweep.step, log=log)
    choices: list[Any] = [
        OverridesParser.create().parse_override(f"x={text}").value()
        for text in override.sweep_string_iterator()
    ]
    return CategoricalDistribution(choices)
