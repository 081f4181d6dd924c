"""Model checking of the code itself: tries every order in which processes can make their requests.

A process is a deterministic function of the replies it has received. So a state consists of the server's content and
the progress of each process. Its next request is found by letting it go on, or, where it has gone another way
meanwhile, by running it from the start with those replies.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from incckpt.testing.coroutine import Coroutine
from incckpt.testing.lies import PAGE, wrong_answers
from incckpt.testing.simulation import (
    LOST,
    WRITES,
    Failure,
    Process,
    Program,
    Reply,
    Request,
    Server,
    Violation,
)

__all__ = ["Explored", "Explorer"]


@dataclass(slots=True)
class _Point:
    """The progress of a process: its next request (``None`` at its end), and the events since the one before."""

    before: tuple[int, Reply] | None
    request: Request | None
    events: tuple[object, ...]
    after: dict[Reply, int] = field(default_factory=dict)


class _Table:
    """A program as a table from the replies so far to the next request."""

    def __init__(self, name: str, number: int, program: Program) -> None:
        self.name = name
        self.points: list[_Point] = []
        self.requests: set[Request] = set()
        self._start: Callable[[list[Reply]], Coroutine[Process]] = partial(
            Coroutine, partial(Process, name, number), program
        )
        self._process = self._start([])
        self._at = self._add(None, 0)

    def follow(self, point: int, reply: Reply) -> int:
        """Return the point that the process reaches after `reply`."""
        after = self.points[point].after
        found = after.get(reply)
        if found is None:
            if self._at != point:
                self._replay(point)
            told = len(self._process.process.events)
            self._process.answer(reply)
            found = after[reply] = self._at = self._add((point, reply), told)
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._at = -1

    def _replay(self, point: int) -> None:
        """Run the process again up to a point."""
        self._process.kill()
        replies: list[Reply] = []
        step = self.points[point].before
        while step is not None:
            replies.append(step[1])
            step = self.points[step[0]].before
        self._process = self._start(replies[::-1])
        self._at = point
        assert self._process.request == self.points[point].request, f"{self.name} is not deterministic"

    def _add(self, before: tuple[int, Reply] | None, told: int) -> int:
        if self._process.error is not None:
            raise self._process.error
        request = self._process.request
        self.points.append(_Point(before, request, tuple(self._process.process.events[told:])))
        if request is not None:
            self.requests.add(request)
        return len(self.points) - 1


@dataclass(frozen=True, slots=True)
class _State:
    server: Server
    points: tuple[int, ...]
    deleted: tuple[int, ...]  # by process, how many keys its delete in progress has removed
    copies: tuple[Request, ...]  # requests that may still be done, although their clients have given up
    faults: int
    advances: int
    lies: int
    damages: int
    told: frozenset[object]
    running: int
    switches: int

    @property
    def mark(self) -> int:
        return hash(
            (
                self.server.mark,
                self.server.time,
                self.points,
                self.deleted,
                self.copies,
                self.faults,
                self.advances,
                (self.lies, self.damages),
                self.told,
                (self.running, self.switches) if self.switches >= 0 else None,
            )
        )


class _Label(NamedTuple):
    """A step, described for people."""

    who: str
    request: Request | None = None
    reply: Reply = None
    note: str = ""

    def __str__(self) -> str:
        request = "" if self.request is None else f": {self.request}"
        reply = f" -> {self.reply.message}" if isinstance(self.reply, Failure) else ""
        return f"{self.who}{request}{reply}{self.note}"


@dataclass
class Explored:
    """What an exploration covered.

    Attributes
    ----------
    states
        Distinct states seen.
    steps
        Steps from one state to the next, each a request or a fault.
    histories
        Distinct sequences of replies that processes received.
    complete
        Whether every state within the bounds was seen.
    """

    states: int = 0
    steps: int = 0
    histories: int = 0
    complete: bool = True

    def __add__(self, other: Explored) -> Explored:
        return Explored(
            self.states + other.states,
            self.steps + other.steps,
            self.histories + other.histories,
            self.complete and other.complete,
        )


class _MetConflictError(Exception):
    """A request conflicts with one of another process that was taken for independent."""


class Explorer:
    """Tries every order in which processes can make their requests.

    Orders that no process can tell apart are tried once: a request is done at once if it conflicts with no request
    that any other process ever makes. Those become known on the way; if a request turns out to have been wrongly
    treated so, the exploration starts again.

    Parameters
    ----------
    server
        The server at the start.
    programs
        The processes, by name. Each must be a deterministic function of its replies.
    check
        Called in every state with the server and all events so far; raises `Violation`.
    changed
        Called with the server before and after every step that changes it; returns further events.
    faults
        The most faults in one order: a request dropped, its reply lost, or done after its process stopped waiting.
    faulty
        Which kinds of fault: ``dropped`` (an error, and not done), ``lost`` (done, and an error), ``late`` (an error,
        and done later), ``again`` (a delete is answered, and done once more later).
    faulty_at
        Prefixes of the keys at which faults occur.
    lies
        How many wrong answers there may be: what :func:`~incckpt.testing.lies.wrong_answers` yields, by the server as
        it was at first; and a write that is answered, and not done. Of that, ``("gone", key)`` is told.
    lying_at
        How the keys begin about which there are lies.
    damages
        How many keys may be removed, or replaced by a web page, between any two requests. Of that,
        ``("damaged", key)`` is told. Only with `switches`.
    damaged_at
        How these keys begin.
    advances
        How often the server's clock may jump by `jump` seconds. No copy of a put or create outlives a jump.
    switches
        How often another process may take over from one that could go on; by default without limit.
    limit
        Number of states after which to give up.
    opening
        Names of processes, each of which runs to its next pause before the exploration begins; by default each process
        once, in their order.
    """

    def __init__(
        self,
        server: Server,
        programs: Mapping[str, Program],
        *,
        check: Callable[[Server, frozenset[object]], None],
        changed: Callable[[Server, Server, Request], Iterable[object]] = lambda before, after, request: (),
        faults: int = 0,
        faulty: Collection[str] = ("dropped", "lost", "late", "again"),
        faulty_at: tuple[str, ...] = ("",),
        lies: int = 0,
        lying_at: tuple[str, ...] = ("",),
        damages: int = 0,
        damaged_at: tuple[str, ...] = ("",),
        advances: int = 0,
        jump: int = 7200,
        switches: int | None = None,
        limit: int | None = None,
        seed: int | None = None,
        opening: Sequence[str] | None = None,
    ) -> None:
        self._processes = [_Table(name, n, program) for n, (name, program) in enumerate(programs.items(), 16)]
        self._check = check
        self._changed = changed
        self._faulty = frozenset(faulty)
        self._faulty_at = faulty_at
        self._lying_at = lying_at
        self._damaged_at = damaged_at
        assert not damages or switches is not None, "damage may come between requests that are done at once"
        self._private: list[dict[Request, bool]] = [{} for _ in programs]
        self._checked = [0] * len(self._processes)
        self._met_conflict = False
        self._jump = jump
        self._limit = limit
        self._random = None if seed is None else random.Random(seed)
        points = (0,) * len(self._processes)
        bound = -1 if switches is None else switches
        self._first = _State(server, points, points, (), faults, advances, lies, damages, frozenset(), -1, bound)
        names = list(programs)
        for name in names if opening is None else opening:
            self._first = self._run_to_pause(self._first, names.index(name))

    def explore(self) -> Explored:
        """Visit every state.

        Raises
        ------
        Violation
            If a promise is broken; lists the steps that led there.
        """
        explored = Explored()
        try:
            while True:
                try:
                    self._explore(explored)
                    break
                except _MetConflictError:
                    explored.states = 0
        finally:
            for process in self._processes:
                process.close()
        explored.histories = sum(len(process.points) for process in self._processes)
        return explored

    def _explore(self, explored: Explored) -> None:
        seen = {self._first.mark}
        checked = {(self._first.server.mark, self._first.told)}  # all that a check is told
        self._check(self._first.server, self._first.told)
        path: list[tuple[_Label, Iterator[tuple[_Label, _State]]]] = [(_Label("start"), self._steps(self._first))]
        while path:
            step = next(path[-1][1], None)
            if step is None:
                path.pop()
                continue
            label, state = step
            explored.steps += 1
            mark = state.mark
            if mark in seen:
                continue
            seen.add(mark)
            what = state.server.mark, state.told
            try:
                if what not in checked:
                    self._check(state.server, state.told)
                    checked.add(what)
            except Violation as violation:
                steps = "\n  ".join([str(label) for label, _ in path[1:]] + [str(label)])
                raise Violation(f"{violation}, after:\n  {steps}") from violation
            if self._limit is not None and len(seen) >= self._limit:
                explored.complete = False
                break
            path.append((label, self._steps(state)))
        explored.states = len(seen)

    def _is_private(self, number: int, request: Request, advances: int) -> bool:
        """Whether no other process can tell when `request` is done, as far as known."""
        if request.op in WRITES and advances and request.keys[0].startswith(self._first.server.timed):
            return False  # its time shows
        for other, process in enumerate(self._processes):
            if len(process.requests) != self._checked[other]:
                self._checked[other] = len(process.requests)
                for mine, private in enumerate(self._private):
                    for earlier, is_private in private.items():
                        if is_private and mine != other and any(map(earlier.conflicts, process.requests)):
                            private[earlier] = False
                            self._met_conflict = True
        if self._met_conflict:
            self._met_conflict = False
            raise _MetConflictError
        known = self._private[number].get(request)
        if known is None:
            others = (process.requests for other, process in enumerate(self._processes) if other != number)
            known = not any(request.conflicts(theirs) for requests in others for theirs in requests)
            self._private[number][request] = known
        return known

    def _run_to_pause(self, state: _State, number: int) -> _State:
        process = self._processes[number]
        while True:
            request = process.points[state.points[number]].request
            if request is None:
                return state
            server = state.server.fork()
            reply = server.perform(request)
            state = self._moved(state, number, server, reply, request, switches=state.switches)
            if request.op == "pause":
                return state

    def _steps(self, state: _State) -> Iterator[tuple[_Label, _State]]:
        if state.switches < 0:
            for number, process in enumerate(self._processes):
                request = process.points[state.points[number]].request
                if request is not None and self._is_private(number, request, state.advances):
                    return self._requests(state, number, request, -1)
        found = list(self._all_steps(state))
        if self._random is not None:
            self._random.shuffle(found)
        return iter(found)

    def _all_steps(self, state: _State) -> Iterator[tuple[_Label, _State]]:
        running = state.running
        goes_on = running >= 0 and self._processes[running].points[state.points[running]].request is not None
        for number, process in enumerate(self._processes):
            request = process.points[state.points[number]].request
            if request is None:
                continue
            switches = state.switches
            if switches >= 0 and goes_on and number != running:
                if not switches:
                    continue
                switches -= 1
            yield from self._requests(state, number, request, switches)
        for position, request in enumerate(state.copies):
            server = state.server.fork()
            server.perform(request)
            copies = (*state.copies[:position], *state.copies[position + 1 :])
            told = self._told(state, server, request)
            yield _Label("late", request), _replace(state, server=server, copies=copies, told=told)
        if state.advances and all(request.op == "delete" for request in state.copies):
            server = state.server.fork()
            server.time += self._jump
            yield _Label("time passes"), _replace(state, server=server, advances=state.advances - 1)

        if state.damages:
            for key in sorted(key for key in state.server.values if key.startswith(self._damaged_at)):
                for request in (Request("delete", (key,)), Request("put", (key,), PAGE)):
                    server = state.server.fork()
                    server.perform(request)
                    told = state.told | {("damaged", key)}
                    damaged = _replace(state, server=server, damages=state.damages - 1, told=told)
                    yield _Label("damage", request), damaged

    def _requests(self, state: _State, number: int, request: Request, switches: int) -> Iterator[tuple[_Label, _State]]:
        name = self._processes[number].name
        if request.op == "turn":
            for key in request.keys:
                left = switches - (switches >= 0 and int(key) != request.start)
                if left >= min(switches, 0):
                    moved = self._moved(state, number, state.server, int(key), request, switches=left)
                    yield _Label(name, note=f": its thread {key} goes on"), moved
            return
        server = state.server.fork() if request.op in WRITES else state.server
        faults = self._faulty if state.faults and request.keys and request.keys[0].startswith(self._faulty_at) else ()
        if request.op == "delete":
            at = state.deleted[number]
            single = Request("delete", (request.keys[at],))
            server.perform(single)
            label = _Label(name, single)
            if at + 1 < len(request.keys):
                told = self._told(state, server, single)
                deleted = _with(state.deleted, number, at + 1)
                yield (
                    label,
                    _replace(state, server=server, deleted=deleted, told=told, running=number, switches=switches),
                )
            else:
                yield label, self._moved(state, number, server, None, single, switches=switches)
            if "again" in faults and at + 1 == len(request.keys):
                for key in request.keys:
                    copy = Request("delete", (key,))
                    fault = self._moved(state, number, server, None, single, switches=switches, copy=copy, faults=1)
                    yield label._replace(note=f" (and {key} again, later)"), fault
        else:
            single = request
            reply = server.perform(request)
            label = _Label(name, request, reply)
            yield label, self._moved(state, number, server, reply, request, switches=switches)
        if request.op in WRITES and "lost" in faults:
            fault = self._moved(state, number, server, LOST, single, switches=switches, faults=1)
            yield label._replace(note=" (reply lost)"), fault
        if "dropped" in faults:
            fault = self._moved(state, number, state.server, LOST, single, switches=switches, faults=1)
            yield label._replace(note=" (not done)"), fault
        if request.op in WRITES and "late" in faults:
            fault = self._moved(state, number, state.server, LOST, single, switches=switches, faults=1, copy=single)
            yield label._replace(note=" (given up, on its way)"), fault
        if state.lies and request.keys and request.keys[0].startswith(self._lying_at):
            yield from self._lies(state, number, request, switches, label)

    def _lies(
        self, state: _State, number: int, request: Request, switches: int, label: _Label
    ) -> Iterator[tuple[_Label, _State]]:
        if request.op not in WRITES:
            for note, reply in wrong_answers(request, label.reply, self._first.server):
                lie = self._moved(state, number, state.server, reply, request, switches=switches, lies=1)
                yield label._replace(reply=None, note=f" ({note})"), lie
        elif not state.deleted[number] and not isinstance(label.reply, Failure):
            gone = frozenset(("gone", key) for key in request.keys)
            lie = self._moved(state, number, state.server, None, request, switches=switches, lies=1)
            yield label._replace(note=" (answered, and not done)"), _replace(lie, told=lie.told | gone)

    def _moved(
        self,
        state: _State,
        number: int,
        server: Server,
        reply: Reply,
        request: Request,
        *,
        switches: int,
        faults: int = 0,
        lies: int = 0,
        copy: Request | None = None,
    ) -> _State:
        process = self._processes[number]
        point = process.follow(state.points[number], reply)
        told = self._told(state, server, request)
        if events := process.points[point].events:
            told |= frozenset(events)
        while (following := process.points[point].request) is not None and following.op == "time":
            point = process.follow(point, server.time)
            if events := process.points[point].events:
                told |= frozenset(events)
        return _State(
            server,
            _with(state.points, number, point),
            _with(state.deleted, number, 0),
            state.copies if copy is None else (*state.copies, copy),
            state.faults - faults,
            state.advances,
            state.lies - lies,
            state.damages,
            told,
            number,
            switches,
        )

    def _told(self, state: _State, server: Server, request: Request) -> frozenset[object]:
        if server.mark == state.server.mark:
            return state.told
        return state.told | frozenset(self._changed(state.server, server, request))


def _with(values: tuple[int, ...], position: int, value: int) -> tuple[int, ...]:
    return (*values[:position], value, *values[position + 1 :])


def _replace(state: _State, **fields: Any) -> _State:
    names = _State.__slots__
    return _State(**{name: fields[name] if name in fields else getattr(state, name) for name in names})
