"""Models whose pace a test sets, so that nothing depends on how fast the machine is."""

import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from torch import nn

from experiments.training import models

SLOW_BATCH = 0.15  # seconds; longer than a bar waits before it is drawn again

# Python writes a byte there when a signal arrives, so that none is missed between two looks.
_signals, _wakeup = socket.socketpair()
_wakeup.setblocking(False)
built = 0


def environment(*, held_after: int | None = None, held_runs: int = 0) -> dict[str, str]:
    """What a command needs in its environment for `_target_: paced.held` and `paced.slow`."""
    found = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    held = {} if held_after is None else {"HELD_AFTER": f"{held_runs} {held_after}"}
    return {"PYTHONPATH": os.pathsep.join(filter(None, found)), **held}


def held(**options: Any) -> nn.Module:
    """`experiments.models.mlp`, to the bit, which holds still in the midst of its training.

    HELD_AFTER="RUNS STEPS" in the environment holds each run but the first RUNS of a process
    after STEPS steps, until a signal arrives or the working directory has a file `released`.
    """
    global built
    model = models.mlp(**options)
    built += 1
    runs, limit = map(int, os.environ.get("HELD_AFTER", "0 0").split())
    if built <= runs or limit == 0:
        return model
    signal.set_wakeup_fd(_wakeup.fileno())
    steps = 0

    def hold(module: nn.Module, args: Any) -> None:
        nonlocal steps
        # the steps on which the parts are tried before training do not count
        frame, trying = sys._getframe(), False
        while frame is not None and not trying:
            trying, frame = frame.f_code.co_name == "check_state", frame.f_back  # type: ignore[assignment]
        steps += module.training and not trying
        while steps > limit and not Path("released").exists():
            if select.select([_signals], [], [], 0.05)[0]:
                break

    model.register_forward_pre_hook(hold)
    return model


def slow(**options: Any) -> nn.Module:
    """`experiments.models.mlp`, each of whose training batches takes its time."""
    model = models.mlp(**options)

    def wait(module: nn.Module, args: Any) -> None:
        time.sleep(SLOW_BATCH * module.training)

    model.register_forward_pre_hook(wait)
    return model
