"""Writers, pruners and collectors on one store, killed at random and restarted, for as long as you like.

Eight writers save to eight runs as fast as they can, pruning as they go; two collectors sweep the whole store all the
time. One of them after the other is killed with SIGKILL at a random moment and started again. In the end every
checkpoint that was announced and not pruned has to restore bit for bit, and a last sweep has to leave nothing that no
checkpoint needs.

    python -m tests.soak --seconds 600 --kills 2000
    python -m tests.soak --url s3://bucket/soak --endpoint http://127.0.0.1:9000
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import select
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import incckpt
from incckpt.errors import CollectionError
from incckpt.store.gc import Collector
from incckpt.store.store import Store
from tests.stores import orphans

KEEP_LAST = 2


def state_at(run: str, step: int) -> dict[str, Any]:
    """Return the state of a run at a step: a frozen part that all runs share, one that changes in part, a small one."""
    seed = sum(run.encode())
    changing = torch.arange(seed, seed + 270_000, dtype=torch.float32)
    changing[: 100 * (step % 50)] = float(step)
    return {"frozen": torch.full((270_000,), 0.5), "changing": changing, "small": torch.full((5,), step), "step": step}


def matches(state: dict[str, Any], run: str, step: int) -> bool:
    """Say whether a restored state is that of a run at a step."""
    expected = state_at(run, step)
    return all(
        torch.equal(state[name], value) if isinstance(value, torch.Tensor) else state[name] == value
        for name, value in expected.items()
    )


@dataclass
class Soak:
    """One soak.

    Attributes
    ----------
    url, options
        The store.
    folder
        Where the processes write down what they announced, and what went wrong.
    """

    url: str
    options: dict[str, Any]
    folder: Path
    writers: int = 8
    collectors: int = 2
    kills: int = 0
    starts: Counter[str] = field(default_factory=Counter)

    def write(self, run: str) -> None:
        """Save as fast as possible, for ever."""
        log = os.open(self.folder / f"{run}.announced", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with incckpt.CheckpointManager(
            self.url, run=run, keep_last_n=KEEP_LAST, threads=1, storage_options=self.options
        ) as manager:
            state = state_at(run, 0)
            start = manager.restore(state)
            if start is not None and not matches(state, run, start):
                raise AssertionError(f"{run}: step {start} came back wrong")
            step = start or 0
            while True:
                step += 1
                manager.save(step, state_at(run, step)).result()
                os.write(log, f"{step}\n".encode())

    def collect(self, name: str) -> None:
        """Sweep the whole store, for ever."""
        with Store.open(self.url, self.options) as store:
            collector = Collector(store)
            while True:
                try:
                    collector.sweep()
                except CollectionError as error:
                    raise AssertionError(f"a collector met something unreadable: {error}") from error

    def start(self, name: str) -> int:
        """Fork a process that writes or collects."""
        self.starts[name] += 1
        child = os.fork()
        if child:
            return child
        try:
            torch.set_num_threads(1)
            logging.disable(logging.WARNING)
            (self.collect if name.startswith("collector") else self.write)(name)
        except BaseException:  # noqa: BLE001 -- written down, and looked at in the end
            (self.folder / f"{name}.{os.getpid()}.failed").write_text(traceback.format_exc())
        finally:
            os._exit(1)

    def run(self, seconds: float, kills: int, pace: Callable[[], float]) -> None:
        """Start everything; kill and restart until both `seconds` and `kills` are reached."""
        gc.freeze()  # or each process would copy all of this memory as it collects garbage
        names = [f"run{index}" for index in range(self.writers)]
        names += [f"collector{index}" for index in range(self.collectors)]
        processes = {name: self.start(name) for name in names}
        until = time.monotonic() + seconds
        while time.monotonic() < until or self.kills < kills:
            select.select([], [], [], pace())  # the pace of the killing, not a wait for anything
            name = random.choice(names)
            os.kill(processes[name], signal.SIGKILL)
            _, status = os.waitpid(processes[name], 0)
            if not os.WIFSIGNALED(status):
                del processes[name]  # it had ended by itself, which none should: `check` says why
                break
            self.kills += 1
            processes[name] = self.start(name)
        for process in processes.values():
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)

    def check(self) -> dict[str, Any]:
        """Check everything; return the figures.

        Raises
        ------
        AssertionError
            If anything was lost.
        """
        failures = [path.read_text() for path in sorted(self.folder.glob("*.failed"))]
        assert not failures, "\n\n".join(failures[:3])
        announced = checked = 0
        for index in range(self.writers):
            run = f"run{index}"
            log = self.folder / f"{run}.announced"
            steps = [int(line) for line in log.read_text().split()] if log.exists() else []
            announced += len(steps)
            with incckpt.CheckpointManager(self.url, run=run, read_only=True, storage_options=self.options) as reader:
                live = [checkpoint.step for checkpoint in reader.checkpoints()]
            for step in steps[-KEEP_LAST:]:
                assert step in live or len([other for other in live if other > step]) >= KEEP_LAST, (run, step, live)
            for step in live:
                state = incckpt.load(self.url, run=run, step=step, storage_options=self.options)
                assert matches(state, run, step), (run, step)
                checked += 1
            with incckpt.CheckpointManager(
                self.url, run=run, keep_last_n=KEEP_LAST, storage_options=self.options
            ) as manager:
                step = (manager.restore(state_at(run, 0)) or 0) + 1
                manager.save(step, state_at(run, step)).result()
        with Store.open(self.url, self.options) as store:
            Collector(store).sweep()
            left = orphans(store.backend)
            assert not left, f"{len(left)} objects that no checkpoint needs: {sorted(left)[:5]}"
        return {"kills": self.kills, "starts": sum(self.starts.values()), "announced": announced, "restored": checked}


def main() -> None:
    """Run a soak and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--kills", type=int, default=2000)
    parser.add_argument("--pause", type=float, default=0.25, help="mean seconds between kills")
    parser.add_argument("--url", help="a store; a temporary folder by default")
    parser.add_argument("--endpoint", help="of an S3 server; key test, secret testtest")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    options = {}
    if arguments.endpoint:
        options = {"key": "test", "secret": "testtest", "endpoint_url": arguments.endpoint}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "log").mkdir()
        soak = Soak(arguments.url or f"{folder}/store", options, Path(folder) / "log")
        started = time.monotonic()
        soak.run(arguments.seconds, arguments.kills, lambda: random.expovariate(1 / arguments.pause))
        took = time.monotonic() - started
        figures = soak.check() | {"seconds": round(took), "seed": arguments.seed}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
