"""Whether memory, threads and descriptors grow: with saves, with managers, with stores that `incckpt.save` writes to.

    python benchmarks/bench_growth.py                                        # 5,000 saves, 500 managers, 200 stores
    python benchmarks/bench_growth.py --saves 100 --managers 20 --urls 20    # in seconds

Each part prints its figures eleven times, evenly spread. Resident memory, threads and descriptors are the kernel's
(Linux only); growth is from the second figure, when everything has been used once, to the last.

- *saves*: one manager with ``keep_last_n=3``, one tensor of sixteen changing each time;
- *saves kept*: the same without retention, so that every checkpoint stays;
- *managers*: one after the other on one store, each restored, saved to and dropped without being closed;
- *stores*: ``incckpt.save`` to a store of its own each time.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import incckpt

_MIB = 1 << 20
_FIGURES = 10


@dataclass(frozen=True)
class Figures:
    """What this process holds: resident bytes, threads, open descriptors."""

    resident: int
    threads: int
    descriptors: int

    @classmethod
    def now(cls) -> Figures:
        """Ask the kernel."""
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident = pages * os.sysconf("SC_PAGE_SIZE")
        return cls(resident, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")))


def measure(name: str, count: int, act: Callable[[int], None]) -> None:
    """Call `act` with 0, 1, …, and print what is held now and then."""
    print(f"\n{name}\n{'after':>8} {'MiB':>8} {'threads':>8} {'descriptors':>12}")
    marks = {round(count * part / _FIGURES) for part in range(1, _FIGURES + 1)} | {1}
    seen: list[tuple[int, Figures]] = []
    for index in range(count):
        act(index)
        if index + 1 in marks:
            figures = Figures.now()
            seen.append((index + 1, figures))
            print(f"{index + 1:8} {figures.resident / _MIB:8.1f} {figures.threads:8} {figures.descriptors:12}")
    (begin, first), (end, last) = seen[min(1, len(seen) - 1)], seen[-1]
    each = (last.resident - first.resident) / max(1, end - begin)
    print(
        f"growth {(last.resident - first.resident) / _MIB:+.1f} MiB ({each:+.0f} bytes each), "
        f"{last.threads - first.threads:+} threads, {last.descriptors - first.descriptors:+} descriptors"
    )


def saves(folder: Path, count: int, keep: int | None) -> None:
    """Save again and again with one manager."""
    state = {f"w{number}": torch.randn(1 << 16) for number in range(16)}
    with incckpt.CheckpointManager(folder, keep_last_n=keep) as manager:

        def save(step: int) -> None:
            state[f"w{step % 16}"].add_(1e-3)
            manager.save(step, state)

        def save_and_wait(step: int) -> None:
            save(step)
            manager.wait()

        measure("saves" if keep else "saves kept", count, save_and_wait)


def managers(folder: Path, count: int) -> None:
    """Make managers and drop them."""
    state = {"w": torch.randn(1 << 20)}

    def use(step: int) -> None:
        manager = incckpt.CheckpointManager(folder, keep_last_n=3)
        manager.restore(state)
        state["w"].add_(1e-3)
        manager.save(step, state).result()

    measure("managers", count, use)


def stores(folder: Path, count: int) -> None:
    """Save to one store after the other."""
    state = {"w": torch.randn(1 << 20)}
    measure("stores", count, lambda number: (incckpt.save(state, folder / str(number)), None)[1])


def main() -> None:
    """Measure all four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=5_000)
    parser.add_argument("--managers", type=int, default=500)
    parser.add_argument("--urls", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where the stores go; a temporary folder by default")
    arguments = parser.parse_args()
    logging.getLogger("incckpt").setLevel(logging.ERROR)
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        saves(folder / "saves", arguments.saves, keep=3)
        saves(folder / "kept", arguments.saves, keep=None)
        managers(folder / "managers", arguments.managers)
        stores(folder / "stores", arguments.urls)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
