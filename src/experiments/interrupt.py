"""Ctrl-C and SIGTERM as a wish that the loop reads between two steps; output that nobody reads."""

import os
import select
import signal
from types import FrameType, TracebackType
from typing import Self

from experiments.errors import Interrupted


class Interrupt:
    """While it is entered, the first SIGINT or SIGTERM only sets `number`; a second one acts.

    Raises Interrupted where what is printed has no reader any more.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before = {
            number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def __enter__(self) -> Self:
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, BrokenPipeError) and reader_left():
            raise Interrupted(signal.SIGPIPE) from None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.__exit__(None, None, None)


def reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads, as after `| head`; then nothing more
    is written there.
    """
    output = select.poll()
    output.register(1, 0)
    left = any(event & select.POLLERR for _, event in output.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return left
