"""Forks, on request, a process that saves and prunes in a loop until it is killed at a given system call.

Everything is imported once, here, and no kernel is ever run before the fork: a request costs milliseconds, and the
children's OpenMP starts from nothing.

Requests, one a line: ``folder nth``. Replies: a line for every checkpoint that a future announced, ``announced step``,
then ``ended how calls``, where `how` is ``killed``, ``finished`` or what went wrong.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Mapping

import numpy as np
import torch

from incckpt.backends.local import LocalBackend
from incckpt.manager import CheckpointManager
from incckpt.testing.disk import StopAt
from incckpt.testing.faults import kill_process

STEPS = 4
KEEP_LAST = 2


def state_at(step: int) -> dict[str, torch.Tensor | int]:
    """Return the state of a step, the same in every process: one large tensor changes in part, one small one wholly."""
    large = torch.arange(270_000, dtype=torch.float32)
    large[: 1000 * step] = float(step)
    frozen = torch.full((30_000,), 0.25)
    return {"large": large, "frozen": frozen, "small": torch.full((7,), float(step)), "step": step}


def equals(state: Mapping[str, object], step: int) -> bool:
    """Say whether a restored state is that of `step`, bit for bit."""
    expected = state_at(step)
    return state.keys() == expected.keys() and all(
        torch.equal(value, torch.as_tensor(state[name])) if isinstance(value, torch.Tensor) else value == state[name]
        for name, value in expected.items()
    )


def run(folder: str, nth: int) -> None:
    """Save and prune until the `nth` system call."""
    calls = StopAt(nth, kill_process)
    with CheckpointManager(LocalBackend(folder, calls=calls), keep_last_n=KEEP_LAST, threads=1) as manager:
        state = state_at(0)
        start = manager.restore(state)
        for step in range((start or 0) + 1, (start or 0) + STEPS + 1):
            future = manager.save(step, state_at(step))
            future.result()
            print("announced", step, flush=True)
    print("calls", calls.count, flush=True)


def main() -> None:
    """Serve requests until the input ends."""
    assert np.__version__
    torch.set_num_threads(1)
    gc.freeze()  # or each child would copy all of this memory as it collects garbage
    print("ready", flush=True)
    for line in sys.stdin:
        folder, nth = line.rsplit(" ", 1)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run(folder, int(nth))
                status = 0
            except BaseException:  # noqa: BLE001 -- the parent is told by the exit status and the traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            print("ended killed", flush=True)
        else:
            print(f"ended {'finished' if os.WEXITSTATUS(status) == 0 else 'failed'}", flush=True)


if __name__ == "__main__":
    main()
