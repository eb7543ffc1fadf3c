"""Signals as a request to stop between training steps, also in the processes of a DataLoader."""

import contextlib
import multiprocessing
import os
import select
import signal
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Self

from experiments.errors import Interrupted

# Ctrl-C, and what schedulers, service managers and a closed terminal send before they kill.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
ALWAYS_HANDLED = (signal.SIGINT, signal.SIGTERM)
# `timeout`, systemd and others send a signal twice, or two signals at once, for one request.
REPEAT_SECONDS = 1.0


class Interrupt:
    """A context in which a stop signal only sets `number`; a second one, at least REPEAT_SECONDS
    after the first, takes effect. In a child process of ours none does: its parent decides.

    A signal that is ignored, as SIGHUP under nohup, or that has a handler of the user's own stays
    as it is. Raises Interrupted if standard output is a pipe that was closed by its reader.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._first = 0.0
        self._in_child = multiprocessing.parent_process() is not None
        self._previous_handlers = {
            number: handler
            for number in STOP_SIGNALS
            if (handler := signal.getsignal(number)) is signal.SIG_DFL
            or (number in ALWAYS_HANDLED and handler not in (ignore, None))
        }

    def __enter__(self) -> Self:
        for number in self._previous_handlers:
            signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore_handlers()
        if isinstance(error, BrokenPipeError) and stdout_closed():
            raise Interrupted(signal.SIGPIPE) from None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._first = number, now
        elif now - self._first >= REPEAT_SECONDS and not self._in_child:
            self._restore_handlers()
            signal.raise_signal(number)

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)


def ignore(number: int, frame: FrameType | None) -> None:
    """A handler that does nothing. Unlike SIG_IGN it is not inherited by the programs that a
    process starts.
    """


def ignore_stop_signals(*numbers: signal.Signals) -> None:
    """Ignore these signals, which reach the whole process group: the parent process handles them.
    One that had been ignored before stays so.
    """
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN or number is signal.SIGINT:
            signal.signal(number, ignore)


@contextlib.contextmanager
def starting_loader_workers() -> Iterator[None]:
    """While a DataLoader starts its worker processes, which must call `start_loader_worker` first.

    A stop signal to the process group must not end a worker, or the run would end as failed
    instead of at a checkpoint. The signals are blocked until the workers ignore them. SIGTERM,
    with which DataLoader ends a worker that hangs, is replaced by SIGKILL.
    """
    before = multiprocessing.active_children()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for process in multiprocessing.active_children():
        if process not in before:
            process.terminate = process.kill  # type: ignore[method-assign]


def start_loader_worker(worker: int = 0) -> None:
    """A DataLoader's `worker_init_fn`: ignore stop signals. Workers end with their parent."""
    ignore_stop_signals(*STOP_SIGNALS)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def stdout_closed() -> bool:
    """Whether standard output is a pipe that its reader has closed, as in `| head`; if so,
    redirects it to /dev/null.
    """
    output = select.poll()
    output.register(1, 0)
    closed = any(event & select.POLLERR for _, event in output.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return closed
