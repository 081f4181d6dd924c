"""Trainings preempted at random moments over a slow S3 server.

    python -m tests.preemption --rounds 100                                          # moto
    python -m tests.preemption --rounds 50 --endpoint http://127.0.0.1:8055          # a Ceph gateway (test/testtest)
    python -m tests.preemption --table one.jsonl two.jsonl                           # of what --results has kept

Every round runs ``examples/preemptible.py`` in a process of its own, which resumes from the bucket, and announces its
end: by SIGTERM and by the notices of AWS, GCP and Azure in turn, at a random moment, with 2 to 30 seconds left, at a
random upload rate. A process that has not ended by then is killed, and has failed. A training that is done is followed
by another one. Every loss has to be that of a training that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from urllib.parse import urlsplit

import s3fs

from tests.preemption.lives import KINDS, Life, Plan, live
from tests.preemption.table import Row, failures, tables
from tests.servers.processes import python_server
from tests.servers.slow_relay import slowed

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testtest", "AWS_DEFAULT_REGION": "us-east-1"}
PREEMPTED = os.EX_TEMPFAIL
FAST = 1e9


class Training:
    """A training that goes on from process to process.

    Parameters
    ----------
    expected
        The losses of an undisturbed one, by step.
    """

    def __init__(self, url: str, expected: dict[int, str]) -> None:
        self.url = url
        self._expected = expected
        self._newest = 0  # step that was announced as durable
        self._open: list[tuple[Life, Row]] = []  # of which the next process will show what was lost
        self.done = False

    def add(self, life: Life) -> Row:
        """Take in what a process has done; return what is known of it so far."""
        life.wrong = [step for step, loss in life.losses.items() if self._expected[step] != loss]
        if life.losses:
            for before, row in self._open:
                row["resumed"] = life.first - 1 >= row["newest"]
                row["lost"] = before.last - (life.first - 1) if before.losses else 0
            self._open = []
        self._newest = max([self._newest, *life.durable])
        row = {**life.to_json(), "newest": self._newest, "resumed": None, "lost": None}
        if life.status == os.EX_OK:
            self.done = True
        else:
            self._open.append((life, row))
        return row


@contextmanager
def s3(endpoint: str | None) -> Iterator[str]:
    """Yield the URL of an S3 server: of the given one, or of moto."""
    if endpoint is not None:
        yield endpoint
        return
    with python_server("s3_server") as port:
        yield f"http://127.0.0.1:{port}"


def undisturbed(options: list[str], steps: int, kept: Path | None) -> dict[int, str]:
    """Return the losses of a training that nobody disturbs, or those that an earlier run has kept."""
    if kept is not None and kept.exists():
        return {int(step): loss for step, loss in json.loads(kept.read_text()).items()}
    with tempfile.TemporaryDirectory() as folder:
        losses = live(None, f"{folder}/store", [*options, "--every", str(steps)], {}).losses
    assert len(losses) == steps, "the undisturbed training did not get to its end"
    if kept is not None:
        kept.write_text(json.dumps(losses))
    return losses


def run(given: argparse.Namespace) -> Iterator[list[Row]]:
    """Preempt trainings; yield, again and again, what is known so far of each process that was preempted."""
    chance = random.Random(given.seed)
    options = ["--steps", str(given.steps), "--width", str(given.width)]
    os.environ["OMP_NUM_THREADS"] = "1"
    end = time.monotonic() + given.seconds
    rows: list[Row] = []
    kinds = islice(cycle(KINDS), chance.randrange(len(KINDS)), None)
    with s3(given.endpoint) as server:
        expected = undisturbed(options, given.steps, given.undisturbed)
        bucket = f"preempted-{time.time_ns()}"
        s3fs.S3FileSystem(key="test", secret="testtest", endpoint_url=server).mkdir(bucket)
        parts = urlsplit(server)
        assert parts.port is not None
        with slowed(parts.port, FAST, parts.hostname or "") as (relay, limit):
            environment = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{relay}"}
            trainings = (Training(f"s3://{bucket}/run{count}", expected) for count in range(given.rounds + 1))
            training = next(trainings)
            while len(rows) < given.rounds and time.monotonic() < end:
                plan = Plan.drawn(next(kinds), chance)
                plan = plan if given.rate is None else replace(plan, rate=given.rate)
                limit.rate = plan.rate
                life = live(plan, training.url, options, environment, chance.randrange(1 << 30))
                row = training.add(life)
                if life.left is not None:
                    rows.append(row)
                    print(f"{len(rows)}: {told(life)}", flush=True)
                    if life.wrong or life.left < 0 or life.status not in (os.EX_OK, PREEMPTED, -signal.SIGTERM):
                        print(life.log, flush=True)
                    yield rows
                if training.done:
                    training = next(trainings)
            limit.rate = FAST  # one more process shows where it goes on
            training.add(live(Plan.short(), training.url, options, environment))
            yield rows


def told(life: Life) -> str:
    """Return a line about a process."""
    assert life.plan is not None
    plan, forecast = life.plan, life.forecast
    words = "nothing was to be saved"
    if forecast is not None:
        left, expected = forecast
        happened = "given up" if life.took is None else f"took {life.took:.1f} s"
        words = f"{left:.1f} s left, expected {'unknown' if expected is None else f'{expected:.1f} s'}, {happened}"
    return (
        f"{plan.kind} {plan.grace:.1f} s at {plan.rate / 1e6:.1f} MB/s, every {plan.every}: steps {life.first} to "
        f"{life.last}, status {life.status}, {words}; ended with {life.left or 0:.1f} s left"
        f"{', OTHER LOSSES' if life.wrong else ''}"
    )


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="preemptions")
    parser.add_argument("--steps", type=int, default=2000, help="of a training")
    parser.add_argument("--width", type=int, default=1000, help="of the model")
    parser.add_argument("--rate", type=int, help="bytes per second; by default another one for each process")
    parser.add_argument("--endpoint", help="of an S3 server whose keys are test and testtest; moto by default")
    parser.add_argument("--seconds", type=float, default=7200, help="stop after this time, with fewer rounds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, help="append what became of each preemption to this file")
    parser.add_argument("--undisturbed", type=Path, help="keep the losses of the undisturbed training in this file")
    parser.add_argument("--table", type=Path, nargs="+", help="only print the table of such files")
    given = parser.parse_args()
    if given.table:
        rows = [json.loads(line) for file in given.table for line in file.read_text().splitlines()]
    else:
        results = given.results
        earlier = results.read_text() if results is not None and results.exists() else ""
        rows = []
        for rows in run(given):
            if results is not None:
                results.write_text(earlier + "".join(json.dumps(row) + "\n" for row in rows))
    print(tables(rows))
    return 1 if failures(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
