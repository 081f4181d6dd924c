"""Trainings preempted at random moments over a slow S3 server: ``python -m tests.preemption --rounds 50``.

Every round starts ``examples/preemptible.py`` in a process of its own, which resumes from the bucket, and sends it
SIGTERM after a random time, with a random grace. A process that has not ended by then is killed, and has failed. In the
end the training is finished, and its losses have to be those of one that nobody disturbed. Estimates are printed beside
what happened.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import s3fs

from benchmarks.bench_tiers import slowed
from tests.servers.processes import python_server

EXAMPLE = Path(__file__).parents[2] / "examples" / "preemptible.py"
SAVED = re.compile(r"step (\d+) was saved in ([\d.]+) s, where (\S+) s expected; (-?[\d.]+) s are left")


@dataclass
class Life:
    """What one process did."""

    status: int
    losses: dict[int, str]
    log: str
    late: bool
    estimates: list[tuple[float, float]] = field(default_factory=list)


def live(url: str, options: list[str], environment: dict[str, str], after: float | None, grace: float) -> Life:
    """Train until the end, or until SIGTERM and the grace have passed."""
    command = [sys.executable, str(EXAMPLE), url, "--grace", str(grace), *options]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,
    ):
        losses: dict[int, str] = {}
        late = threading.Event()
        timers: list[threading.Timer] = []

        def kill() -> None:
            late.set()
            process.kill()

        def preempt() -> None:
            process.send_signal(signal.SIGTERM)
            timers.append(threading.Timer(grace, kill))
            timers[-1].start()

        assert process.stdout is not None
        for line in process.stdout:
            if not losses and after is not None:  # handlers are installed by then
                timers.append(threading.Timer(after, preempt))
                timers[-1].start()
            _, step, _, loss = line.split()
            losses[int(step)] = loss
        status = process.wait()
        for timer in timers:
            timer.cancel()
        log.seek(0)
        text = log.read()
    made = [(float(took), float(expected)) for _, took, expected, _ in SAVED.findall(text) if expected != "unknown"]
    return Life(status, losses, text, late.is_set(), made)


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--width", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=1e6, help="bytes per second that the bucket takes")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    options = ["--steps", str(given.steps), "--every", "200", "--width", str(given.width)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    end = time.monotonic() + given.seconds
    with tempfile.TemporaryDirectory() as folder, python_server("s3_server") as port, slowed(port) as (relay, limit):
        expected = live(f"{folder}/undisturbed", options, environment, None, 30).losses
        limit["rate"] = given.rate
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testtest", "AWS_DEFAULT_REGION": "us-east-1"}
        environment |= {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{relay}"}
        endpoint = f"http://127.0.0.1:{port}"
        s3fs.S3FileSystem(key="test", secret="testtest", endpoint_url=endpoint).mkdir("preempted")
        losses: dict[int, str] = {}
        lives: list[Life] = []
        while len(lives) < given.rounds and time.monotonic() < end:
            grace = chance.uniform(2, 30)
            life = live("s3://preempted/run", options, environment, chance.uniform(0, 15), grace)
            lives.append(life)
            again = [step for step in life.losses if losses.get(step, life.losses[step]) != life.losses[step]]
            assert not again, f"other losses after a restart: steps {again}"
            losses |= life.losses
            reached = max(life.losses, default=0)
            saved = "gave up" if "not saved in the time" in life.log else "saved"
            took = ", ".join(f"{seconds:.1f} ({one:.1f})" for seconds, one in life.estimates)
            print(
                f"{len(lives)}: grace {grace:.1f} s, status {life.status}, step {reached}, "
                f"{'LATE' if life.late else 'in time'}, {saved}; saves took (expected) {took or 'nothing'}",
                flush=True,
            )
            if life.status == os.EX_OK:
                break
        if lives[-1].status != os.EX_OK:
            losses |= live("s3://preempted/run", options, environment, None, 30).losses
    late = sum(life.late for life in lives)
    wrong = sum(took > 1.5 * one for life in lives for took, one in life.estimates)
    total = sum(len(life.estimates) for life in lives)
    same = losses == expected
    print(f"{len(lives)} preemptions, {late} late; {wrong} of {total} saves took over 1.5 times what was expected")
    print("losses are identical" if same else "LOSSES DIFFER")
    return 0 if same and not late else 1


if __name__ == "__main__":
    sys.exit(main())
