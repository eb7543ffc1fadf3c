"""Deferred handling of SIGINT and SIGTERM between training steps, and of a closed stdout."""

import os
import select
import signal
from types import FrameType, TracebackType
from typing import Self

from experiments.errors import Interrupted


class Interrupt:
    """A context in which the first SIGINT or SIGTERM only sets `number`; a second one takes effect.

    Raises Interrupted if standard output is a pipe that was closed by its reader.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous_handlers = {
            number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
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
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        if isinstance(error, BrokenPipeError) and stdout_closed():
            raise Interrupted(signal.SIGPIPE) from None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.__exit__(None, None, None)


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
