"""Child processes by plain fork, as a data loader's workers are; tests that use them must take the mark `forks`."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable

import pytest

PATIENCE = 120  # seconds

forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def fork(function: Callable[[], object]) -> int:
    """Call `function` in a forked child, which ends with status 0 if it returned, 1 if it raised; return its pid.

    A child that takes longer than `PATIENCE` is killed, so that it cannot keep the servers of a broken test alive.
    """
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(PATIENCE)
    try:
        function()
    except BaseException:  # noqa: BLE001 - it must not get back into the test run
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def exit_code(pid: int) -> int:
    """Wait for a child; return its status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
