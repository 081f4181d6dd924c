"""Random orders of requests, drawn from a seed: for many simulated processes and long runs.

One process runs at a time.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from incckpt.backends.base import Entry
from incckpt.testing.coroutine import Coroutine
from incckpt.testing.simulation import LOST, WRITES, Process, Program, Reply, Request, Server

__all__ = ["Chances", "Shuffle", "SpawningProcess"]


@dataclass(frozen=True)
class Chances:
    """Probabilities of what happens when a request is about to be done.

    Attributes
    ----------
    dropped, lost, late, again
        Of the faults of `Explorer`.
    lands
        That a late request is done first.
    switch
        That the process moves to another place in the queue. The process at the head runs, so each runs in bursts with
        long interruptions.
    """

    dropped: float = 0.0
    lost: float = 0.0
    late: float = 0.0
    again: float = 0.0
    lands: float = 0.05
    switch: float = 0.05


class _Thread(Coroutine["SpawningProcess"]):
    """A process, or a thread of one, with its place in the queue."""

    def __init__(self, shuffle: Shuffle, name: str, number: int, program: Program) -> None:
        self.awaited: _Thread | None = None
        self.children: list[_Thread] = []
        self.remaining: list[str] = []  # keys of the delete in progress
        self.listed: tuple[Entry, ...] | None = None  # what the listing in progress found when it began
        self.rank = shuffle.random.random()
        super().__init__(partial(SpawningProcess, shuffle, name, number), program)

    @property
    def ready(self) -> bool:
        return self.request is not None and (self.awaited is None or self.awaited.request is None)

    def answer(self, reply: Reply) -> None:
        self.awaited = None
        self.listed = None
        super().answer(reply)

    def kill(self) -> None:
        super().kill()
        for child in self.children:
            child.kill()


class SpawningProcess(Process):
    """A process that can start threads."""

    def __init__(self, shuffle: Shuffle, name: str, number: int, exchange: Callable[[Request], Reply]) -> None:
        super().__init__(name, number, exchange)
        self._shuffle = shuffle

    def spawn(self, program: Program) -> Callable[[], None]:
        """Run a program in another thread of this process; return a function that waits for its end."""
        parent = self._shuffle.threads[self.name]
        child = self._shuffle.start(f"{self.name}/{len(parent.children)}", program)
        parent.children.append(child)

        def join() -> None:
            parent.awaited = child
            self.pause()

        return join


class Shuffle:
    """Runs processes in threads, one request at a time, in an order drawn from a seed.

    Listings are not atomic: a key that is created or deleted during one may be in it or not. Nor are deletes of several
    keys.

    Parameters
    ----------
    server
        The server at the start.
    seed
        For all random choices.
    chances
        Probabilities of faults and interruptions.

    Attributes
    ----------
    threads
        The processes that have not ended, by name.
    requests
        Number of requests done.
    faults
        Number of faults.
    """

    def __init__(self, server: Server, seed: int, chances: Chances | None = None) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.chances = chances or Chances()
        self.threads: dict[str, _Thread] = {}
        self.requests = 0
        self.faults = 0
        self._copies: list[Request] = []
        self._started = 0

    def start(self, name: str, program: Program) -> _Thread:
        """Start a process, and run it up to its first request."""
        self._started += 1
        return self.threads.setdefault(name, _Thread(self, name, 0x100 + self._started, program))

    def kill(self, name: str) -> None:
        """Kill a process where it is."""
        thread = self.threads.pop(name)
        thread.kill()
        for child in thread.children:
            self.threads.pop(child.process.name, None)

    def close(self) -> None:
        """Kill all processes."""
        for name in list(self.threads):
            if name in self.threads:
                self.kill(name)

    def pass_time(self, seconds: int) -> None:
        """Advance the server's clock; late puts and creates are done before."""
        while any(request.op != "delete" for request in self._copies):
            self._land()
        self.server.time += seconds

    def step(self) -> tuple[list[Request], list[object]]:
        """Let one process make one request, or do a late one.

        Returns
        -------
        done, events
            The requests that the server has done, and the events that the process emitted after them.
        """
        if self._copies and self.random.random() < self.chances.lands:
            return [self._land()], []
        ready = [thread for thread in self.threads.values() if thread.ready]
        if not ready:
            return [], []
        thread = min(ready, key=lambda thread: thread.rank)
        if self.random.random() < self.chances.switch:
            thread.rank = self.random.random()
        done = self._serve(thread)
        events, thread.process.events = thread.process.events, []
        if thread.request is None:
            self.threads.pop(thread.process.name, None)
            if thread.error is not None:
                raise thread.error
        return done, events

    def _land(self) -> Request:
        request = self._copies.pop(self.random.randrange(len(self._copies)))
        self.server.perform(request)
        return request

    def _serve(self, thread: _Thread) -> list[Request]:
        request = thread.request
        assert request is not None
        if request.op not in ("pause", "time"):
            self.requests += 1
        if request.op == "list":
            return self._serve_listing(thread, request)
        if request.op == "delete":
            if not thread.remaining:
                thread.remaining = list(request.keys)
                self.random.shuffle(thread.remaining)
            request = Request("delete", (thread.remaining.pop(),))
        fault = self._fault(request)
        if fault == "dropped":
            thread.remaining = []
            thread.answer(LOST)
            return []
        if fault == "late":
            self._copies.append(request)
            thread.remaining = []
            thread.answer(LOST)
            return []
        reply = self.server.perform(request)
        if fault == "again":
            self._copies.append(request)
        if fault == "lost":
            thread.remaining = []
            thread.answer(LOST)
        elif not thread.remaining:
            thread.answer(reply)
        return [request]

    def _serve_listing(self, thread: _Thread, request: Request) -> list[Request]:
        now = self.server.perform(request)
        assert isinstance(now, tuple)
        if thread.listed is None:
            thread.listed = now
            return []
        if self._fault(request) is not None:
            thread.answer(LOST)
            return []
        before, after = ({entry.key: entry for entry in entries} for entries in (thread.listed, now))
        seen = {}
        for key in sorted(before.keys() | after.keys()):
            if (key in before and key in after) or self.random.random() < 0.5:
                seen[key] = self.random.choice([entries[key] for entries in (before, after) if key in entries])
        thread.answer(tuple(seen.values()))
        return []

    def _fault(self, request: Request) -> str | None:
        drawn = self.random.random()
        kinds = ["dropped"]
        if request.op in WRITES:
            kinds += ["lost", "late"]
        if request.op == "delete":
            kinds += ["again"]
        if request.op in ("pause", "time"):
            kinds = []
        for kind in kinds:
            chance = getattr(self.chances, kind)
            if drawn < chance:
                self.faults += 1
                return kind
            drawn -= chance
        return None
