"""Saves, or sweeps, stops itself with SIGSTOP at a request, and goes on when it is told to.

    python -m tests.children.stopper save|sweep STORE RUN STEP OPERATION KEY-PATTERN [clock offset in seconds]

A line is printed at the end: what became of it.
"""

from __future__ import annotations

import signal
import sys
import threading
import time

_offset = float(sys.argv[7]) if __name__ == "__main__" and len(sys.argv) > 7 else 0.0
_true_time = time.time
time.time = lambda: _true_time() + _offset  # before the library takes it: a host whose clock is off

import torch  # noqa: E402

from incckpt.backends.local import LocalBackend  # noqa: E402
from incckpt.errors import IncckptError  # noqa: E402
from incckpt.manager import CheckpointManager  # noqa: E402
from incckpt.store.gc import Collector  # noqa: E402
from incckpt.store.store import Store  # noqa: E402
from incckpt.testing.faults import Call, Fault, FaultyBackend  # noqa: E402


def state_at(step: int) -> dict[str, torch.Tensor | int]:
    """Return the state of a step; the frozen part is the same in every run."""
    return {"frozen": torch.full((300_000,), 0.5), "changing": torch.full((10,), float(step)), "step": step}


def main() -> None:
    """Do it."""
    what, folder, run, step, operation, pattern = sys.argv[1:7]
    # To this very thread: it takes a signal before it goes on, where another thread's could come a request too late.
    stop = Call(lambda _: signal.pthread_kill(threading.get_ident(), signal.SIGSTOP))
    script = [Fault(operation, pattern, do=stop)] if operation != "-" else []
    backend = FaultyBackend(LocalBackend(folder), script)
    try:
        if what == "sweep":
            collected = Collector(Store(backend)).sweep()
            print("swept", len(collected.deleted))
        else:
            with CheckpointManager(backend, run=run, keep_last_n=1, threads=1) as manager:
                manager.restore(state_at(0))
                manager.save(int(step), state_at(int(step))).result()
            print("saved", step)
    except IncckptError as error:
        print(type(error).__name__)


if __name__ == "__main__":
    main()
