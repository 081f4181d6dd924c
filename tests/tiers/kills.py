"""Kill a process of two tiers at points of its copying, and lose its machine at random; look at what is left.

    python -m tests.tiers.kills --kills 200

Each round forks a process that restores, saves and copies, and dies at one of its requests to the bucket. Then, now and
then, its local folder is deleted. What must hold: a restore gives the newest checkpoint that was announced and that a
tier still has, or a later one, bit for bit; every checkpoint that the bucket lists is whole.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import incckpt
from incckpt.backends import open_backend
from incckpt.testing.faults import Call, Fault, FaultyBackend, kill_process
from tests.forks import exit_code, fork
from tests.stores import orphans

KILLED = -9
MEMORY = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None


def state_at(step: int) -> dict[str, torch.Tensor]:
    """Return a state of a tensor that stays, one that changes a little, and one that is new each time."""
    moving = torch.arange(20_000, dtype=torch.float32)
    moving[: 10 * step] *= 1 + step
    return {"fixed": torch.arange(20_000), "moving": moving, "small": torch.full((9,), float(step))}


class Round:
    """One life of the process, and its machine.

    Parameters
    ----------
    folder
        Where the tiers are, and what the process has announced.
    """

    def __init__(self, folder: Path) -> None:
        self.bucket, self.local, self._said = folder / "bucket", folder / "local", folder / "said"

    def live(self, saves: int, kill_at: int) -> bool:
        """Save a few times, and die at a request to the bucket; return whether it died."""
        self._said.write_text("")
        code = exit_code(fork(lambda: self._train(saves, kill_at)))
        assert code in (0, KILLED), f"the process failed with {code}"
        return code == KILLED

    def _train(self, saves: int, kill_at: int) -> None:
        faults = [Fault(nth=kill_at, do=Call(kill_process, after_work=kill_at % 2 == 0))]
        bucket = FaultyBackend(open_backend(self.bucket), faults)
        tier = incckpt.LocalTier(self.local, keep_last_n=2)
        with incckpt.CheckpointManager(bucket, local=tier, keep_last_n=3, threads=1) as manager:
            state = state_at(0)
            start = manager.restore(state) or 0
            for step in range(start + 1, start + 1 + saves):
                manager.save(step, state_at(step)).result()
                with self._said.open("a") as said:
                    said.write(f"{step}\n")

    @property
    def announced(self) -> int:
        """The last step that the process announced in its last life; 0 if it did none."""
        return max(map(int, self._said.read_text().split()), default=0)

    def lose_the_machine(self) -> None:
        """Delete the local folder."""
        shutil.rmtree(self.local, ignore_errors=True)

    def check(self, least: int) -> None:
        """Check in a process of its own what is left."""
        code = exit_code(fork(lambda: self._check(least)))
        assert code == 0, "what is left is not what was announced (see above)"

    def _check(self, least: int) -> None:
        listed = (
            [checkpoint.step for checkpoint in incckpt.list_checkpoints(self.bucket)] if self.bucket.exists() else []
        )
        for step in listed:
            self._same(incckpt.load(self.bucket, step=step, threads=1), step)
        with incckpt.CheckpointManager(self.bucket, local=self.local, read_only=True, threads=1) as manager:
            state = state_at(0)
            found = manager.restore(state) or 0
        assert found >= max([least, *listed]), f"restored {found}; announced {least}, in the bucket {listed}"
        if found:
            self._same(state, found)

    @staticmethod
    def _same(state: Any, step: int) -> None:
        for name, expected in state_at(step).items():
            assert torch.equal(state[name], expected), f"{name} of step {step} is wrong"


def main() -> None:
    """Kill, look, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after this time, with fewer kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=MEMORY, help="in memory by default: a kill needs no fsync")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    torch.set_num_threads(1)
    done: Counter[str] = Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="incckpt-tiers-", dir=options.folder) as folder:
        life = Round(Path(folder))
        least = 0
        while done["kills"] < options.kills and time.monotonic() - began < options.seconds:
            done["kills"] += life.live(saves=chance.randint(1, 4), kill_at=chance.randint(1, 60))
            done["lives"] += 1
            least = max(least, life.announced)
            done["saves"] += len(life._said.read_text().split())
            if chance.random() < 0.25:
                life.lose_the_machine()
                done["machines lost"] += 1
                least = 0  # the bucket's newest is all there is; `check` compares with that
            life.check(least)
        life.live(saves=3, kill_at=1_000_000)
        left = len(orphans(life.bucket)) + len(orphans(life.local))
        assert not left, f"{left} objects that nothing needs are left at the end"
    figures = ", ".join(f"{count} {name}" for name, count in done.items())
    print(f"{figures} in {time.monotonic() - began:.0f} s; nothing unreadable, nothing announced lost, no orphans")


if __name__ == "__main__":
    main()
