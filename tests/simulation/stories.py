"""Long stories of many processes, checked against a dictionary of what was announced."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from incckpt.errors import OptionError
from incckpt.retention import KeepAll, KeepEvery, KeepLast, Policy
from incckpt.store.gc import Collector
from incckpt.store.objects import DELTAS, OBJECTS
from incckpt.store.refs import RefName, Tombstone
from incckpt.testing.shuffle import Chances, Shuffle
from incckpt.testing.simulation import Process, Program, Request, Server, Violation, run_alone
from tests.simulation.world import (
    STEP,
    Promises,
    Trainer,
    check_sweep,
    is_live,
    open_store,
    read,
    read_latest,
    surviving,
)

POLICIES: dict[str, Policy] = {
    "one": KeepLast(1),
    "two": KeepLast(2),
    "every": KeepEvery(steps=50) | KeepLast(1),
    "all": KeepAll(),
}
DELETING = "two"  # the run in which checkpoints are deleted by name, too


@dataclass
class Model:
    """What has been promised so far.

    Attributes
    ----------
    saved
        The contents that were given to a save, by run, attempt and step.
    announced
        The checkpoints that were announced and not pruned since, by run.
    """

    saved: dict[tuple[str, int, int], set[tuple[str, ...]]] = field(default_factory=lambda: defaultdict(set))
    announced: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    latest: dict[str, str] = field(default_factory=dict)
    pruned: set[str] = field(default_factory=set)
    reads: int = 0
    announcements: int = 0


class Story:
    """Processes that come, go, are killed and stall, until so many requests have been made.

    Parameters
    ----------
    seed
        For everything that is drawn.
    """

    def __init__(self, seed: int) -> None:
        self.server = Server()
        chances = Chances(dropped=0.004, lost=0.004, late=0.004, again=0.02, lands=0.02)
        self.shuffle = Shuffle(self.server, seed, chances)
        self.random = self.shuffle.random
        self.model = Model()
        self._promises = Promises(remember=False, replaces=True)
        self._born = 0
        self.collected = 0
        self.killed = 0
        for run in POLICIES:
            process = run_alone(self.server, self._trainer(run, 1))
            self._check([], process.events)

    def tell(self, requests: int) -> None:
        """Let so many requests be made, then end it all and look at what is left.

        Raises
        ------
        Violation
        """
        try:
            while self.shuffle.requests < requests:
                self._something_happens()
                done, events = self.shuffle.step()
                self._check(done, events)
        finally:
            self.shuffle.close()
        needed = self._promises.needed(self.server)
        check_sweep(self.server, needed)
        for run in POLICIES:
            self._check([], run_alone(self.server, _reader_of_all(run)).events)

    def _something_happens(self) -> None:
        drawn = self.random.random()
        if drawn < 0.01 and len(self.shuffle.threads) < 7:
            self._born += 1
            kind, program = self._program()
            self.shuffle.start(f"{kind}{self._born}", program)
        elif drawn < 0.0103 and self.shuffle.threads:
            self.shuffle.kill(self.random.choice([name for name in self.shuffle.threads if "/" not in name]))
            self.killed += 1
        elif drawn < 0.011:
            self.shuffle.pass_time(self.random.choice((1000, 7200)))

    def _program(self) -> tuple[str, Program]:
        kind = self.random.choice(("trainer", "trainer", "trainer", "reader", "collector"))
        run = self.random.choice(list(POLICIES))
        if kind == "trainer":
            saves = self.random.randrange(1, 5)
            back = self.random.random() if self.random.random() < 0.3 else None
            return kind, self._trainer(run, saves, back)
        if kind == "reader":
            return kind, surviving(lambda process: self._read(process, run))
        return kind, surviving(self._collect)

    # -- programs

    def _trainer(self, run: str, saves: int, back: float | None = None) -> Program:
        return surviving(lambda process: self._train(process, run, saves, back))

    def _train(self, process: Process, run: str, saves: int, back: float | None) -> None:
        trainer = Trainer(process, run, POLICIES[run])
        live = trainer.lineage.live
        step = None if back is None or not live else live[int(back * len(live))].step
        if self.random.random() < 0.2:
            trainer.append()
            at = 0
        else:
            at = trainer.restore(step) or 0
        chunks = [self.random.choice("abc") for _ in range(2)]
        for _ in range(saves):
            at = max(at, trainer.attempt.last_step or 0) + 10
            chunks[self.random.randrange(2)] = self.random.choice("abcd")
            chunks[0] = chunks[0][0] + self.random.choice(("", "", "1"))
            try:
                if live and self.random.random() < 0.2:  # one of another time again
                    trainer.save(self.random.choice(live).step, *chunks, if_exists="replace")
                if not trainer.save(at, *chunks) and self.random.random() < 0.3:
                    trainer.save(at, *reversed(chunks))  # the same step again, another state
                if run == DELETING and live and self.random.random() < 0.1:
                    trainer.attempt.delete(self.random.choice(live).step)
            except OptionError:
                pass  # an earlier save that was said to have failed is there after all
        trainer.close()

    def _read(self, process: Process, run: str) -> None:
        for _ in range(3):
            if run == DELETING:
                lineage = open_store(process).run(run).lineage()
                if lineage.live:
                    read(process, run, lineage, self.random.choice(lineage.live))
            else:
                read_latest(process, run)

    def _collect(self, process: Process) -> None:
        collector = Collector(open_store(process))
        for _ in range(2):
            collector.sweep(min_age=self.random.choice((0, 0, 1000)))
            for _ in range(3):
                collector.finish()

    # -- checks

    def _check(self, done: Iterable[Request], events: Sequence[object]) -> None:
        touched = False
        for request in done:
            touched |= self._note(request)
        for event in events:
            if isinstance(event, Violation):
                raise event
            assert isinstance(event, tuple)
            if event[0] == "saving":
                _, run, attempt, step, chunks = event
                self.model.saved[run, attempt, step].add(tuple(chunks))
            elif event[0] == "took over":
                self._promises.check_takeover(self.server, *event[2:])
            elif event[0] == "announced":
                self._note_announced(event[1], event[2])
                touched = True
            elif event[0] == "saw none":
                if event[1] != DELETING and event[1] in self.model.latest:
                    raise Violation(f"{event[1]} passed for empty, and had a checkpoint")
            elif event[0] == "read":
                _, run, name, chunks = event
                assert isinstance(name, RefName)
                self.model.reads += 1
                if chunks not in self.model.saved[run, name.attempt, name.step]:
                    raise Violation(f"{name} of {run} was read as {chunks}, which was never saved")
        if touched:
            visible = self._promises.visible(self.server)
            for run, announced in self.model.announced.items():
                if announced - visible[run]:
                    raise Violation(f"announced, and gone from {run}: {announced - visible[run]}")
                if run != DELETING and max(visible[run], default="")[:STEP] < self.model.latest.get(run, ""):
                    raise Violation(f"the latest announced of {run} is gone: {self.model.latest[run]}")

    def _note(self, request: Request) -> bool:
        """Take note of what a request did; returns whether it can break a promise."""
        touched = False
        for key in request.keys:
            if key.startswith("refs/"):
                _, run, name = key.split("/")
                touched = True
                expires = request.op == "delete" or request.data == Tombstone.EXPIRED.value
                if expires and not is_live(self.server, key):
                    self.model.pruned.add(key)
                    self.model.announced[run].discard(name)
                if key in self.model.pruned and is_live(self.server, key):
                    raise Violation(f"{key} was pruned, and has come back")
            elif key.startswith("runs/") or (key.startswith((OBJECTS, DELTAS)) and request.op == "delete"):
                touched = True
                self.collected += not key.startswith("runs/")
        return touched

    def _note_announced(self, run: str, name: str) -> None:
        self.model.announcements += 1
        self.model.latest[run] = max(name[:STEP], self.model.latest.get(run, ""))
        key = f"refs/{run}/{name}"
        if is_live(self.server, key):
            self.model.announced[run].add(name)
        elif key not in self.model.pruned:
            raise Violation(f"{key} was announced, and is not there")


def _reader_of_all(run: str) -> Program:
    def program(process: Process) -> None:
        lineage = open_store(process).run(run).lineage()
        for name in (*lineage.live, *lineage.abandoned):
            read(process, run, lineage, name)

    return program
