"""Sharded models of every kind, saved by so many processes and loaded by so many; and ranks killed while they save.

python -m tests.sharding                    every kind, saved and loaded by 1, 2, 3 and 4 processes
python -m tests.sharding --kills 50         a rank of four killed in each of 50 saves, and the job started again
python -m tests.sharding --stops 10         a rank of four stopped in each of 10 saves until the job has gone on without
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import incckpt
from tests.programs import Program, rank_variables


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


def kill(folder: Path, kills: int, seconds: float, seed: int) -> None:
    """Kill a rank at random while a job of four saves, start the job again, and so on; read every checkpoint."""
    store, started, done = folder / "store", time.monotonic(), 0
    announced: set[int] = set()
    dice = random.Random(seed)
    while done < kills and time.monotonic() - started < seconds:
        job = Job(store, timeout=60)
        wanted = dice.randint(1, 6)
        told = job.steps()
        for word, step in told:
            if word == "saved":
                announced.add(step)
                wanted -= 1
            elif wanted <= 0:
                time.sleep(dice.uniform(0, 0.15))
                dice.choice(job.ranks).send_signal(signal.SIGKILL)
                done += 1
                break
        announced.update(step for word, step in told if word == "saved")
        job.end(job.ranks, 60)
        tell("kills", done, started, announced, check(store, announced))


def tell(what: str, done: int, started: float, announced: set[int], found: Sequence[int]) -> None:
    """Print what has been done so far."""
    seconds = time.monotonic() - started
    print(f"{done} {what} in {seconds:.0f} s, {len(announced)} announced, {len(found)} found, all whole", flush=True)


def check(store: Path, announced: set[int]) -> list[int]:
    """Check that the run is not behind what was announced, and every checkpoint whole; return their steps."""
    found = [checkpoint.step for checkpoint in incckpt.list_checkpoints(str(store))]
    assert found[-1] >= max(announced), f"step {max(announced)} was announced, and lost: {found}"
    for step in found:
        state = incckpt.load(str(store), step=step)
        wrong = {name for name, tensor in state["model"].items() if not bool((tensor == step).all())}
        assert not wrong, f"step {step} mixes saves: {wrong}"
    result = incckpt.verify(str(store), level="hashes")
    assert result.ok, result
    return found


@dataclass
class Job:
    """Four ranks without a launcher, which would kill those that are left, or stopped.

    Parameters
    ----------
    store
        Where they save.
    timeout
        Seconds that they wait for each other.
    """

    store: Path
    timeout: float
    ranks: list[Program] = field(default_factory=list)

    def __post_init__(self) -> None:
        words = "-m", "tests.integrations.sharded", self.store, "train", "--timeout", self.timeout
        reading, writing = os.pipe()
        self._output = os.fdopen(reading)
        with os.fdopen(writing, "w") as told, open(os.devnull, "w") as nothing:
            for rank, variables in enumerate(rank_variables(4)):
                output = told if rank == 0 else nothing
                self.ranks.append(Program(*words, output=output, error=nothing, environment=environment() | variables))

    def steps(self) -> Iterator[tuple[str, int]]:
        """Yield what rank 0 says: ``saving`` or ``saved``, and the step."""
        for line in self._output:
            word, _, number = line.partition(" ")
            if word in ("saving", "saved"):
                yield word, int(number)

    def end(self, ranks: Sequence[Program], seconds: float = 0) -> None:
        """Wait for ranks to end by themselves, and kill those that do not."""
        limit = time.monotonic() + seconds
        for rank in ranks:
            try:
                rank.wait(max(0.01, limit - time.monotonic()))
            except TimeoutError:
                rank.send_signal(signal.SIGKILL)
                rank.wait()


def stop(folder: Path, stops: int, seconds: float, seed: int) -> None:
    """Stop a rank at random in a save, past all time limits, and let it go on when another job has saved meanwhile."""
    store, started, done = folder / "store", time.monotonic(), 0
    announced: set[int] = set()
    dice = random.Random(seed)
    while done < stops and time.monotonic() - started < seconds:
        job = Job(store, timeout=10)
        wanted = dice.randint(1, 4)
        stopped = dice.choice(job.ranks)
        told = job.steps()
        for word, step in told:
            if word == "saved":
                announced.add(step)
                wanted -= 1
            elif wanted <= 0:
                time.sleep(dice.uniform(0, 0.15))
                stopped.send_signal(signal.SIGSTOP)
                break
        others = [rank for rank in job.ranks if rank is not stopped]
        job.end(others, 60)  # they wait in vain, for ten seconds
        another = Job(store, timeout=60)
        for count, (word, step) in enumerate(another.steps()):
            if word == "saved":
                announced.add(step)
            if count > 6:
                break
        incckpt.collect(str(store), dry_run=False)
        stopped.send_signal(signal.SIGCONT)
        job.end([stopped], 60)
        announced.update(step for word, step in told if word == "saved")
        another.end(another.ranks)
        done += 1
        tell("stops", done, started, announced, check(store, announced))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--kills", type=int)
    parser.add_argument("--stops", type=int)
    parser.add_argument("--seconds", type=float, default=3600, help="begin nothing new after so long")
    parser.add_argument("--seed", type=int, default=0, help="another one for another part")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.kills is not None:
            kill(Path(folder), arguments.kills, arguments.seconds, arguments.seed)
        elif arguments.stops is not None:
            stop(Path(folder), arguments.stops, arguments.seconds, arguments.seed)
        else:
            reshard(Path(folder), arguments.worlds, max(arguments.worlds))


if __name__ == "__main__":
    main()
