"""A search through Optuna: each next run is where the runs so far make the best one likely.

Tree-structured Parzen estimator: J. Bergstra et al., "Algorithms for Hyper-Parameter
Optimization", 2011. The study lies in the sweep's directory, so a search goes on where it was.
Hydra's own Optuna plugin holds its users below Optuna 3 and knows neither of these.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from experiments.config.names import format_value
from experiments.errors import UsageError
from experiments.sweeps.jobs import Job, place_job
from experiments.sweeps.sweep import Sweep

if TYPE_CHECKING:
    import optuna

STUDY = "study.journal"
DUPLICATES = 20  # so many in a row mean that there is nothing new left to ask for


def search(
    make_sweep: Callable[[], Sweep], arguments: list[str], trials: int, *, seed: int, prune: bool
) -> None:
    """Run what Optuna asks for until the study has `trials` runs that ended.

    make_sweep: starts the processes, once it is clear that there is something to search.
    arguments: overrides, those of the search as intervals, ranges or choices.

    Raises UsageError where Optuna is not installed or nothing is searched, Interrupted after a
    signal.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise UsageError(
            "hydra/sweeper=tpe needs Optuna: pip install 'experiments[search]'"
        ) from None
    fixed, space = search_space(arguments)
    if not space:
        raise UsageError(
            "hydra/sweeper=tpe: nothing to search; give optimizer.lr=interval(a,b), say"
        )
    sweep = make_sweep()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directory = Path(sweep.config.hydra.sweep.dir)
    lowest = sweep.config.trainer.monitor.startswith("loss")
    backend = JournalFileBackend(str(directory / STUDY))
    storage = optuna.storages.JournalStorage(backend)
    known = sum(summary.n_trials for summary in optuna.get_all_study_summaries(storage))
    study = optuna.create_study(
        storage=storage,
        study_name="search",
        load_if_exists=True,
        # shifted by what is there: a search that goes on must not draw the first numbers again
        sampler=optuna.samplers.TPESampler(seed=seed + known),
        pruner=optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner(),
        direction="minimize" if lowest else "maximize",
    )
    states = optuna.trial.TrialState
    for trial in study.get_trials(states=(states.RUNNING,)):
        # of a search that was stopped: its directory has the checkpoint
        study.tell(trial.number, state=states.FAIL)
        study.enqueue_trial(trial.params)
    ended = len(study.get_trials(states=(states.COMPLETE, states.PRUNED)))
    trials_by_path: dict[Path, optuna.trial.Trial] = {}
    reported: set[Path] = set()

    def jobs(placed: list[Job]) -> Iterator[Job]:
        left, in_a_row = max(trials - ended, 0), 0
        while left > 0 and in_a_row < DUPLICATES:
            trial = study.ask(space)
            overrides = [
                *fixed,
                *(f"{key}={format_value(value)}" for key, value in trial.params.items()),
            ]
            job = place_job(directory, sweep.loader.pop(sweep.config, overrides), trial.number)
            if job.path in trials_by_path and job.path not in reported:
                # the same values are being run at this moment
                study.tell(trial, state=states.FAIL)
                in_a_row += 1
                continue
            left, in_a_row = left - 1, 0
            trials_by_path[job.path] = trial
            reported.discard(job.path)
            placed.append(job)
            yield job

    def should_prune(job: Job, epoch: int, value: float) -> bool:
        trials_by_path[job.path].report(value, epoch)
        return trials_by_path[job.path].should_prune()

    def report(job: Job) -> None:
        trial = trials_by_path[job.path]
        reported.add(job.path)
        if job.state == "finished":
            study.tell(trial, job.value)
        elif job.state in ("pruned", "diverged"):
            study.tell(trial, state=states.PRUNED)
        elif job.state == "failed":
            study.tell(trial, state=states.FAIL)

    sweep.run_all(jobs, max(trials - ended, 0), should_prune=should_prune, on_job_end=report)


def search_space(
    arguments: list[str],
) -> tuple[list[str], dict[str, "optuna.distributions.BaseDistribution"]]:
    """The overrides that stay the same, and Optuna's distribution of each that is searched."""
    fixed, space = [], {}
    for override in OverridesParser.create().parse_overrides(arguments):
        if override.is_sweep_override():
            space[override.get_key_element()] = distribution(override)
        else:
            fixed.append(str(override.input_line))
    return fixed, space


def distribution(override: Override) -> Any:
    """What Optuna draws a key from: an interval, with the tag `log` or without, or one of a few."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    swept: Any = override.value()
    log = "log" in getattr(swept, "tags", ())
    if override.is_interval_sweep():
        return FloatDistribution(swept.start, swept.end, log=log)
    if override.is_range_sweep():
        ends = (swept.start, swept.stop, swept.step)
        if all(isinstance(end, int) for end in ends):
            last = swept.start + (swept.stop - 1 - swept.start) // swept.step * swept.step
            return IntDistribution(swept.start, last, step=swept.step, log=log)
    choices: list[Any] = [
        OverridesParser.create().parse_override(f"x={text}").value()
        for text in override.sweep_string_iterator()
    ]
    return CategoricalDistribution(choices)
