"""What a save in the background takes from training, and what deltas cost a restore.

A training-like loop of small torch operations on one thread runs alone, beside another process that keeps a second core
busy with hashing (what any neighbour costs on this machine), and beside a save being hashed, encoded and put by one
other thread, in turns; and so does a loop of nothing but Python, whose slowdown is the share of time for which the
background holds the interpreter's lock. Then a state is restored from full objects and from deltas.

    python benchmarks/bench_background.py
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

import incckpt
from incckpt.backends.local import LocalBackend
from incckpt.testing.faults import CountingBackend

_WARM_UP = 12  # saves, after which nearly all folders that a store ever has are there
NEIGHBOUR = "import hashlib; print(flush=True)\nwhile True: hashlib.sha256(bytes(1 << 20))"


def small_operations(seconds: float) -> Callable[[Callable[[], bool]], float]:
    """Return a loop of small torch operations that runs while it is told to; it returns iterations per second."""
    weight = torch.randn(128, 128) / 12
    inputs = torch.randn(16, 128)

    def loop(running: Callable[[], bool]) -> float:
        x, count, started = inputs, 0, time.perf_counter()
        while running() or time.perf_counter() - started < seconds:
            for _ in range(50):
                x = torch.tanh(x @ weight + 0.1)
                count += 1
        return count / (time.perf_counter() - started)

    return loop


def python_only(seconds: float) -> Callable[[Callable[[], bool]], float]:
    """Return the same in plain Python."""

    def loop(running: Callable[[], bool]) -> float:
        count, started = 0, time.perf_counter()
        while running() or time.perf_counter() - started < seconds:
            for _ in range(1000):
                count += 1
        return count / (time.perf_counter() - started)

    return loop


def beside_a_save(name: str, make: Callable[[float], Any], megabytes: int, rounds: int) -> None:
    """Time a loop alone and beside a save, in turns."""
    torch.manual_seed(0)
    state = {f"w{i}": torch.randn(1 << 21) * 0.02 for i in range(megabytes // 8)}
    slowdowns: list[float] = []
    controls: list[float] = []
    busy: list[float] = []
    slept: list[int] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        incckpt.CheckpointManager(folder, threads=1, keep_last_n=1) as manager,
    ):
        for step in range(rounds + _WARM_UP):
            for value in state.values():
                value.add_(torch.randn_like(value) * 2e-5)
            if step < _WARM_UP:
                manager.save(step, state).result()
                manager.wait()
                continue
            alone_before = make(1.0)(lambda: False)
            saved: Future[Any] = manager.save(step, state)
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
            beside = make(0.0)(lambda saved=saved: not saved.done())
            slept.append(resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before)
            manager.wait()
            alone_after = make(1.0)(lambda: False)
            with subprocess.Popen([sys.executable, "-c", NEIGHBOUR], stdout=subprocess.PIPE) as neighbour:
                assert neighbour.stdout is not None
                neighbour.stdout.readline()
                beside_neighbour = make(1.0)(lambda: False)
                neighbour.kill()
            alone = statistics.mean([alone_before, alone_after])
            slowdowns.append(1 - beside / alone)
            controls.append(1 - beside_neighbour / alone)
            busy.append(manager.history[-1].seconds["store"])
    print(
        f"{name:24} slows by {statistics.median(slowdowns):6.2%} (median of {rounds}; {min(slowdowns):.2%} to "
        f"{max(slowdowns):.2%}) while {megabytes} MB are hashed, encoded and put in {statistics.median(busy):.2f} s; "
        f"it had to wait for the interpreter's lock {statistics.median(slept):.0f} times; "
        f"beside another process it slows by {statistics.median(controls):.2%} "
        f"({min(controls):.2%} to {max(controls):.2%})"
    )


def restore_of_deltas(megabytes: int, rounds: int) -> None:
    """Compare restoring full objects with restoring deltas."""
    torch.manual_seed(0)
    state = {f"w{i}": (torch.randn(1 << 22) * 0.02).bfloat16() for i in range(megabytes // 8)}
    with tempfile.TemporaryDirectory() as folder:
        with incckpt.CheckpointManager(folder) as manager:
            manager.save(1, state).result()
            for value in state.values():
                value.add_(torch.randn_like(value) * 2e-5)
            manager.save(2, state).result()
            manager.wait()
            ways = manager.history[-1].by_way
        fetched: dict[int, int] = {}
        times: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(rounds):
            for step, seconds in times.items():
                backend = CountingBackend(LocalBackend(folder))
                started = time.perf_counter()
                incckpt.load(backend, step=step, progress=False)
                seconds.append(time.perf_counter() - started)
                fetched[step] = backend.bytes_got
    ratio = statistics.median(b / a for a, b in zip(times[1], times[2], strict=True))
    deltas = ways["delta"].raw / sum(way.raw for way in ways.values())
    print(
        f"restore of {megabytes} MB bfloat16, {deltas:.0%} of it deltas: {fetched[2] / fetched[1]:.2f} x the bytes and "
        f"{ratio:.2f} x the time of full objects ({statistics.median(times[1]):.2f} s)"
    )


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    beside_a_save("small torch operations", small_operations, arguments.megabytes, arguments.rounds)
    beside_a_save("Python alone (the GIL)", python_only, arguments.megabytes, arguments.rounds)
    restore_of_deltas(arguments.megabytes, arguments.rounds)


if __name__ == "__main__":
    main()
