"""Sharded models of every kind, saved by so many processes and loaded by so many; and ranks killed while they save.

python -m tests.sharding                    every kind, saved and loaded by 1, 2, 3 and 4 processes
python -m tests.sharding --kills 50         a rank of four killed in each of 50 saves, and the job started again
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import incckpt


def command(processes: int, *arguments: str) -> list[str]:
    """Return the command that runs `tests.integrations.sharded` in so many processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, "-m", "tests.integrations.sharded", *arguments]


def environment() -> dict[str, str]:
    """Return the environment of these processes: one thread each, and no warnings."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def reshard(folder: Path, worlds: Sequence[int], most: int) -> None:
    """Save by `most` processes and load by each number, then the reverse."""
    for world in worlds:
        loads = [str(most)] if world != most else [str(other) for other in worlds]
        done = subprocess.run(
            command(world, str(folder), "save", *([] if world != most else loads[:-1])),
            env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        print(done.stdout, end="", flush=True)
    for world in worlds[:-1]:
        done = subprocess.run(
            command(world, str(folder), "load", str(most)),
            env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        print(done.stdout, end="", flush=True)


def kill(folder: Path, kills: int, seconds: float) -> None:
    """Kill a rank at random while a job of four saves, start the job again, and so on; read every checkpoint."""
    store, started, done = folder / "store", time.monotonic(), 0
    announced: set[int] = set()
    found: list[int] = []
    dice = random.Random(0)
    while done < kills and time.monotonic() - started < seconds:
        job = subprocess.Popen(
            command(4, str(store), "train"), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, start_new_session=True,
        )  # fmt: skip
        assert job.stdout is not None
        ranks: list[int] = []
        wanted = dice.randint(1, 6)
        for line in job.stdout:
            word, _, number = line.partition(" ")
            if word == "pid":
                ranks.append(int(number))
            elif word == "saved":
                announced.add(int(number))
                wanted -= 1
            if word == "saving" and wanted <= 0 and len(ranks) == 4:
                time.sleep(dice.uniform(0, 0.15))
                os.kill(dice.choice(ranks), signal.SIGKILL)
                done += 1
                break
        for line in job.stdout:
            word, _, number = line.partition(" ")
            if word == "saved":
                announced.add(int(number))
        job.wait()
        found = [checkpoint.step for checkpoint in incckpt.list_checkpoints(str(store))]
        assert max(announced) in found, f"step {max(announced)} was announced, and lost: {found}"
        for step in found[-2:]:
            state = incckpt.load(str(store), step=step)
            wrong = {name for name, tensor in state["model"].items() if not bool((tensor == step).all())}
            assert not wrong, f"step {step} mixes saves: {wrong}"
    result = incckpt.verify(str(store), level="hashes")
    assert result.ok, result
    print(
        f"{done} kills in {time.monotonic() - started:.0f} s, {len(announced)} announced, {len(found)} found, all whole"
    )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seconds", type=float, default=3600)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.kills is None:
            reshard(Path(folder), arguments.worlds, max(arguments.worlds))
        else:
            kill(Path(folder), arguments.kills, arguments.seconds)


if __name__ == "__main__":
    main()
