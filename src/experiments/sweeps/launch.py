"""A sweep as a command line asks for it: check the grid, run the jobs, report the results."""

import gc
import os
import shlex
import signal
import sys
from argparse import Namespace

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from experiments.config.compose import compose, compose_unresolved, enter, explained, validate
from experiments.config.grid import (
    first_values,
    override_parser,
    parse_grid,
    reject_repeated,
    shared_config,
    sweeper_params,
    with_params,
)
from experiments.config.names import KEEP_CHANGED
from experiments.config.schema import check_value, rule_for
from experiments.errors import Interrupted
from experiments.sweeps.fork_server import start_fork_server

IN_SWEEP = "hydra.mode=MULTIRUN"


def check_grid(args: Namespace) -> tuple[DictConfig, list[Override]]:
    """Validate every swept value; returns the first job's composed config and the overrides.

    Each value is checked on its own, with the first values of the other keys: against the schema
    if its key is there, else by composing the config. Raises UsageError.
    """
    grid = parse_grid(args, args.overrides)
    reject_repeated([override for override, _ in grid])
    composed = compose_unresolved(args, [*first_values(grid), IN_SWEEP])
    if params := sweeper_params(composed):
        grid = parse_grid(args, with_params(params, args.overrides))
        reject_repeated([override for override, _ in grid])
        composed = compose_unresolved(args, [*first_values(grid), IN_SWEEP])
    first_job = [*first_values(grid), IN_SWEEP]
    enter(composed, number=0)
    config = validate(composed)
    parser = override_parser(args)
    for position, (override, values) in enumerate(grid):
        key = override.key_or_group
        for assignment in values[1:]:
            if rule_for(key, config) is not None and not override.package:
                check_value(key, parser.parse_override(assignment).value())
            else:
                job = [*first_job[:position], assignment, *first_job[position + 1 :]]
                compose(args, job, number=0)
    overrides = [override for override, _ in grid] + [parser.parse_override(IN_SWEEP)]
    return composed, overrides


def launch_sweep(args: Namespace) -> None:
    """Check the grid, choose a directory, have Hydra's launcher run the jobs, report the results.

    Exits with 1 if a run failed, with 128 + the signal's number after a signal, else with 0.
    """
    composed, overrides = check_grid(args)
    if args.keep_changed:
        os.environ[KEEP_CHANGED] = "1"
    choices = composed.hydra.runtime.choices
    if (choices["hydra/launcher"], choices["hydra/sweeper"]) == ("workers", "basic"):
        start_fork_server()  # first: it imports torch while this process imports the rest
    from experiments import job
    from experiments.directory.paths import display_path
    from experiments.sweeps import hydra_sweep, sweep

    shared = shared_config(args, composed, overrides)
    with explained(args, args.overrides):
        hydra_sweep.name_runs(shared)
        hydra_sweep.reject_intervals(shared, overrides)
        hydra_sweep.reject_shared_directories(shared, overrides)
        directory = hydra_sweep.choose_directory(shared)
    gc.freeze()
    gc.enable()  # composed configs are full of reference cycles
    signal_number = 0
    with sweep.locked(directory):
        failed = False
        try:
            with explained(args, args.overrides):
                failed = hydra_sweep.run(shared, job.run_in_sweep)
        except Interrupted as interrupted:
            signal_number = interrupted.signal_number
        except KeyboardInterrupt:
            signal_number = signal.SIGINT
        failed |= sweep.report_results(directory)
    if signal_number:
        name = shlex.quote(f"hydra.sweep.dir={display_path(directory)}")
        print(f"interrupted; the same command with {name} goes on", file=sys.stderr)
        sys.exit(128 + signal_number)
    sys.exit(1 if failed else 0)
