"""How long a save blocks training, when it is durable, and what memory it takes, beside PyTorch's own savers.

    python benchmarks/bench_save.py                   # half a gigabyte of bfloat16, about five minutes
    python benchmarks/bench_save.py --scale 0.01      # in seconds
    python benchmarks/bench_save.py --device cuda

The state is a decoder-only transformer's weights in bfloat16. Between two saves the named share of its bytes changes:
whole tensors, as when some layers are trained and the others are frozen; "1% spread" changes a hundredth of *every*
tensor instead, so that every chunk is dirty.

Contenders, each warm, each durable before the next begins, in another order every round:

- ``incckpt``: `CheckpointManager.save` to a local store, all bytes fsynced;
- ``torch.save`` to a file; it blocks until the file is written. Durable is after an fsync;
- ``async_save``: ``torch.distributed.checkpoint.async_save`` with its defaults;
- ``async_save cached``: the same with a ``DefaultStager`` kept from save to save, so that its host buffers are.

A save's blocking time is what the call takes; the ratio is incckpt's to that of the faster ``async_save``.
Memory is what a process of its own gains over holding the state alone, as the kernel counts it (Linux only).
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save

import incckpt

State = dict[str, dict[str, Tensor]]

SHARES = ("0%", "1%", "30%", "100%", "1% spread")
WARM_UP = 2


def transformer(scale: float, device: str) -> State:
    """Return the weights of a decoder-only transformer of about `scale` times half a gigabyte."""
    width = max(64, round(1536 * math.sqrt(scale) / 64) * 64)
    inner, vocabulary = width * 8 // 3, max(256, round(32_000 * math.sqrt(scale)))
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (vocabulary, width)}
    for layer in range(7):
        shapes |= {f"layers.{layer}.attention.{name}.weight": (width, width) for name in ("q", "k", "v", "o")}
        shapes |= {f"layers.{layer}.mlp.{name}.weight": (inner, width) for name in ("gate", "up")}
        shapes |= {f"layers.{layer}.mlp.down.weight": (width, inner)}
        shapes |= {f"layers.{layer}.{name}.weight": (width,) for name in ("attention_norm", "mlp_norm")}
    shapes["norm.weight"] = (width,)
    torch.manual_seed(0)
    bf16 = torch.bfloat16
    return {"model": {k: torch.empty(v, dtype=bf16, device=device).normal_(std=0.02) for k, v in shapes.items()}}


def nbytes(state: State) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.nbytes for tensor in state["model"].values())


class Changer:
    """Changes a share of the state's bytes, as a step of the optimizer would: by about the precision of the weights."""

    def __init__(self, state: State, share: str) -> None:
        self.parts: list[Tensor] = []
        fraction = float(share.partition("%")[0]) / 100
        tensors = sorted(state["model"].values(), key=lambda tensor: tensor.nbytes)
        if share.endswith("spread"):
            self.parts = [tensor.view(-1)[: max(1, round(tensor.numel() * fraction))] for tensor in tensors]
        else:
            left = nbytes(state) * fraction
            for tensor in reversed(tensors):  # the largest first, the last one in part
                count = min(tensor.numel(), round(left / tensor.itemsize))
                left -= count * tensor.itemsize
                if count:
                    self.parts.append(tensor.view(-1)[:count])
        self.noise = torch.empty(1 << 20, dtype=torch.bfloat16, device=tensors[0].device).normal_(std=1e-4)

    def __call__(self) -> None:
        for part in self.parts:
            for piece in torch.split(part, len(self.noise)):
                piece.add_(self.noise[: len(piece)])


class Saver(Protocol):
    """A contender."""

    def start(self, state: State) -> Callable[[], object]:
        """Save; return what waits until it is durable."""

    def close(self) -> None:
        """Let go of everything."""


class Incremental:
    """incckpt."""

    def __init__(self, folder: Path) -> None:
        self.manager = incckpt.CheckpointManager(folder, keep_last_n=2)
        self.steps = itertools.count()

    def start(self, state: State) -> Callable[[], object]:
        return self.manager.save(next(self.steps), state).result

    def close(self) -> None:
        self.manager.close()


class TorchSave:
    """torch.save."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "state.pt"

    def start(self, state: State) -> Callable[[], object]:
        torch.save(state, self.path)
        return self.sync

    def sync(self) -> None:
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def close(self) -> None:
        self.path.unlink()


class AsyncSave:
    """torch.distributed.checkpoint.async_save, into one folder again and again."""

    def __init__(self, folder: Path, stager: DefaultStager | None = None) -> None:
        self.folder, self.stager = folder, stager

    def start(self, state: State) -> Callable[[], object]:
        future: Any = async_save(state, checkpoint_id=self.folder, async_stager=self.stager, no_dist=True)
        wait: Callable[[], object] = future.result
        return wait

    def close(self) -> None:
        if self.stager is not None:
            self.stager.close()


def cached_stager(device: str) -> DefaultStager:
    """Return a stager that keeps its host buffers, pinned where there is a GPU."""
    cuda = device != "cpu"
    options = StagingOptions(
        use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
    )
    return DefaultStager(options)


def contenders(device: str) -> dict[str, Callable[[Path], Saver]]:
    """Return what makes each contender, given an empty folder."""
    return {
        "incckpt": Incremental,
        "torch.save": TorchSave,
        "async_save": AsyncSave,
        "async_save cached": lambda folder: AsyncSave(folder, cached_stager(device)),
    }


@dataclass
class Timing:
    """Seconds of one contender's saves."""

    blocked: list[float]
    durable: list[float]


def measure(state: State, share: str, rounds: int, device: str, folder: Path) -> dict[str, Timing]:
    """Save with every contender, `rounds` times after warming up."""
    change = Changer(state, share)
    with ExitStack() as stack:
        savers: dict[str, Saver] = {}
        for name, make in contenders(device).items():
            place = folder / name.replace(" ", "-")
            place.mkdir()
            stack.callback(shutil.rmtree, place)
            savers[name] = make(place)
            stack.callback(savers[name].close)
        timings = {name: Timing([], []) for name in savers}
        for number in range(WARM_UP + rounds):
            change()
            names = list(savers)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                os.sync()
                if device != "cpu":
                    torch.cuda.synchronize()
                started = time.perf_counter()
                wait = savers[name].start(state)
                blocked = time.perf_counter() - started
                wait()
                if number >= WARM_UP:
                    timings[name].blocked.append(blocked)
                    timings[name].durable.append(time.perf_counter() - started)
    return timings


def resident() -> int:
    """Return the bytes of memory that this process has, as Linux counts them."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The most memory that this process had while this was entered, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        self.nbytes = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.003):
            self.nbytes = max(self.nbytes, resident())


def memory(name: str, scale: float, device: str, folder: Path) -> str:
    """Save in a fresh process, everything at first and then 30 and 100 % changed; return a row of the table."""
    state = transformer(scale, device)
    size = nbytes(state)
    changers = [Changer(state, share) for share in ("30%", "100%")]
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
    (folder / "warm").mkdir()
    warm = contenders(device)[name](folder / "warm")  # what is imported at the first use is no part of it
    warm.start({"model": {"warm": torch.zeros(1)}})()
    warm.close()
    before = resident()
    saver = contenders(device)[name](folder)
    row = f"{name:<18}"
    with Peak() as first:
        saver.start(state)()
    row += f" {(first.nbytes - before) / size:9.2f}"
    for change in changers:
        with Peak() as peak:
            for _ in range(3):
                change()
                saver.start(state)()
        row += f" {(peak.nbytes - before) / size:9.2f}"
    row += f" {(resident() - before) / size:9.2f}"
    if isinstance(saver, Incremental):
        used, free = saver.manager.host_bytes
        row += f"   its own count: {used / size:.2f} in use, {free / size:.2f} kept for recycling"
    saver.close()
    return row


def show(share: str, timings: dict[str, Timing]) -> None:
    """Print the rows of one share."""
    for name, timing in timings.items():
        median, least, most = statistics.median(timing.blocked), min(timing.blocked), max(timing.blocked)
        row = f"{share:<10} {name:<18} {median * 1e3:8.1f} {least * 1e3:8.1f} {most * 1e3:8.1f}"
        row += f" {statistics.median(timing.durable) * 1e3:8.0f}"
        if name == "incckpt":
            rivals = [other.blocked for rival, other in timings.items() if rival.startswith("async")]
            row += f" {median / min(map(statistics.median, rivals)):7.2f} {least / min(map(min, rivals)):7.2f}"
        print(row, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of the state, 1 is half a gigabyte")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="where the state is")
    parser.add_argument("--share", action="append", choices=SHARES, help="only this; may be repeated")
    parser.add_argument("--only", choices=("time", "memory"), help="measure only this")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the folder for temporary files)")
    options = parser.parse_args(arguments)

    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.only != "memory":
            show_time(options, Path(folder))
        if options.only != "time" and Path("/proc/self/statm").exists():
            show_memory(options, Path(folder))


def show_time(options: argparse.Namespace, folder: Path) -> None:
    """Measure and print blocking and durable times."""
    state = transformer(options.scale, options.device)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"{nbytes(state) / 1e6:.1f} MB of bfloat16 in {len(state['model'])} tensors on {options.device}, "
        f"{platform.machine()}, {threads} hardware threads, torch {torch.__version__}, {options.rounds} rounds"
    )
    print(f"{'':<29} {'blocked, ms':^26} {'durable':>8} {'ratio of':^15}")
    print(f"{'changed':<29} {'median':>8} {'least':>8} {'most':>8} {'median':>8} {'medians':>7} {'least':>7}")
    for share in options.share or SHARES:
        show(share, measure(state, share, options.rounds, options.device, folder))


def show_memory(options: argparse.Namespace, folder: Path) -> None:
    """Measure and print memory, each contender in a fresh process."""
    print(f"\n{'memory / state':<18} {'first':>9} {'30% peak':>9} {'100% peak':>9} {'after':>9}")
    for name in contenders(options.device):
        place = folder / f"memory-{name}"
        place.mkdir()
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.apply(memory, (name, options.scale, options.device, place)), flush=True)
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
