"""One process of a training: started, preempted at a moment, and what it said meanwhile."""

from __future__ import annotations

import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from multiprocessing.context import ForkServerProcess as Process
from pathlib import Path
from typing import Any

from tests.preemption.clouds import Aws, Cloud, Reply, cloud
from tests.preemption.training import PROCESSES, train

__all__ = ["KINDS", "Life", "Plan", "live"]

KINDS = ("SIGTERM", "aws", "SIGTERM", "gcp", "SIGTERM", "azure")  # in turn: half of them are signals

FORECAST = re.compile(
    r"([\d.]+) s are left, and step (\d+) is expected to be saved in (?:([\d.]+) s|an unknown time)( \(by what)?"
)
SAVED = re.compile(r"step (\d+) was saved with (-?[\d.]+) s left")
DURABLE = re.compile(r"step (\d+) is durable")
BAD: tuple[bytes | Reply, ...] = (b"", b"HTTP/1.1 \r\n\r\n", (500, b"", {}), (503, b"<html>", {}), (429, b"", {}))


@dataclass(frozen=True)
class Plan:
    """How a process is preempted.

    Attributes
    ----------
    kind
        ``"SIGTERM"``, or the cloud whose notice it is.
    after
        Seconds from the first step to the announcement; from the start of the process if `early`.
    grace
        Seconds from the announcement to the end.
    rate
        Bytes per second that the bucket takes.
    every
        Steps between saves.
    """

    kind: str
    after: float
    early: bool
    grace: float
    rate: float
    every: int

    @classmethod
    def drawn(cls, kind: str, chance: random.Random) -> Plan:
        """Draw one at random."""
        return cls(
            kind=kind,
            after=round(chance.uniform(0, 12), 2),
            early=kind == "SIGTERM" and chance.random() < 0.1,
            grace=round(chance.uniform(2, 30), 2),
            rate=round(10 ** chance.uniform(5.5, 6.7)),  # 0.3 to 5 MB/s
            every=chance.choice([10, 50, 250]),
        )

    @classmethod
    def short(cls) -> Plan:
        """Return one that only shows where a training goes on."""
        return cls(kind="SIGTERM", after=0, early=False, grace=30, rate=0, every=1_000_000)


@dataclass
class Life:
    """What a process did.

    Attributes
    ----------
    status
        That it ended with.
    first, last
        Step that it began and ended with, 0 if none.
    durable
        Steps whose checkpoints it announced.
    left
        Seconds left when it had ended, negative if it had to be killed; ``None`` if nobody announced its end.
    forecast
        Seconds left, and expected until the last save is made, as last logged; the second ``None`` if not known.
    carried_over
        Whether that was expected by what the save of the process before took.
    took
        How long that has taken; ``None`` if it was given up.
    wrong
        Steps whose loss is not that of the undisturbed training.
    """

    plan: Plan | None
    status: int = 0
    first: int = 0
    last: int = 0
    durable: list[int] = field(default_factory=list)
    left: float | None = None
    forecast: tuple[float, float | None] | None = None
    carried_over: bool = False
    took: float | None = None
    wrong: list[int] = field(default_factory=list)
    losses: dict[int, str] = field(default_factory=dict)
    log: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return what a table needs."""
        return {name: value for name, value in asdict(self).items() if name not in ("losses", "log")}

    def read(self, log: str) -> None:
        """Take in what the process has logged."""
        self.log = log
        self.durable = [int(step) for step in DURABLE.findall(log)]
        forecasts, saved = FORECAST.findall(log), dict(SAVED.findall(log))
        if forecasts:
            left, step, expected, another = forecasts[-1]
            self.carried_over = bool(another)
            self.forecast = float(left), float(expected) if expected else None
            if step in saved and float(saved[step]) >= 0:
                self.took = float(left) - float(saved[step])


def live(plan: Plan | None, url: str, options: Sequence[str], environment: Mapping[str, str], seed: int = 0) -> Life:
    """Train until the end, or until the process was preempted as planned."""
    life, arguments, notices = Life(plan), [url, *options], None
    with ExitStack() as stack:
        announce: Callable[[Process], float] = _terminate(30.0)
        if plan is not None:
            arguments += ["--grace", str(plan.grace), "--every", str(plan.every)]
            announce = _terminate(plan.grace)
            if plan.kind != "SIGTERM":
                service = stack.enter_context(cloud(plan.kind))
                notices = plan.kind, service.url
                announce = _notice(service, plan.grace, random.Random(seed))
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log"
        lines, output = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=train, args=(arguments, notices, output, str(log), environment))
        process.start()
        output.close()
        end = _Ending(process, announce)
        if plan is not None and plan.early:
            end.begin_in(plan.after)
        with os.fdopen(os.dup(lines.fileno())) as text:
            for line in text:
                if not life.losses and plan is not None and not plan.early:
                    end.begin_in(plan.after)
                _, step, _, loss = line.split()
                life.losses[int(step)] = loss
        lines.close()
        process.join()
        life.left = end.left()
        assert process.exitcode is not None
        life.status = process.exitcode
        life.first, life.last = min(life.losses, default=0), max(life.losses, default=0)
        life.read(log.read_text() if log.exists() else "")
    return life


class _Ending:
    """Announces the end of a process, and brings it about."""

    def __init__(self, process: Process, announce: Callable[[Process], float]) -> None:
        self._process, self._announce = process, announce
        self._timers: list[threading.Timer] = []
        self._end: float | None = None  # by `time.time`

    def begin_in(self, seconds: float) -> None:
        self._start(seconds, self._begin)

    def left(self) -> float | None:
        """Return how long before the end it is now, once the process has ended."""
        now = time.time()
        for timer in self._timers:
            timer.cancel()
        return None if self._end is None else self._end - now

    def _begin(self) -> None:
        if self._process.exitcode is None:
            self._end = self._announce(self._process)
            self._start(self._end - time.time(), self._process.kill)

    def _start(self, seconds: float, what: Callable[[], object]) -> None:
        self._timers.append(threading.Timer(max(0.0, seconds), what))
        self._timers[-1].start()


def _terminate(grace: float) -> Callable[[Process], float]:
    def announce(process: Process) -> float:
        end = time.time() + grace
        process.terminate()
        return end

    return announce


def _notice(service: Cloud, grace: float, chance: random.Random) -> Callable[[Process], float]:
    """Answer badly at times until the notice; then take the token back that was given out, and announce."""
    lock = threading.Lock()  # requests come from several threads

    def fault() -> bytes | Reply | None:
        with lock:
            return chance.choice(BAD) if chance.random() < 0.3 else None

    service.fault = fault

    def announce(_: Process) -> float:
        service.fault = None
        if isinstance(service, Aws):
            service.expire()
        return service.announce(grace)

    return announce
