"""The fork server, whose children are the workers of a sweep: they start with torch in memory."""

import multiprocessing
from multiprocessing.connection import Connection

FORKING = multiprocessing.get_context("forkserver")


def start_fork_server() -> None:
    """Start the fork server, which imports torch while the jobs are being composed."""
    from multiprocessing import forkserver

    FORKING.set_forkserver_preload(["experiments.sweeps.worker"])
    forkserver.ensure_running()


def worker_main(pipe: Connection, device: int | None) -> None:
    """Entry point of a worker, defined here so that the parent need not import worker.py."""
    from experiments.sweeps.worker import main

    main(pipe, device)
