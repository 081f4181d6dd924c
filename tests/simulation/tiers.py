"""A machine with a local tier, as a simulated process of two threads: one trains and saves, the other copies."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias, TypeVar
from unittest import mock

import numpy as np

from incckpt.errors import BackendError, CorruptionError, IncckptError, OptionError, SaveError, SupersededError
from incckpt.retention import Policy
from incckpt.run.reader import ChunkRead, Reader
from incckpt.run.report import SaveReport
from incckpt.run.view import RunView
from incckpt.store.manifest import Manifest
from incckpt.store.refs import Ref
from incckpt.store.store import Store
from incckpt.testing.simulation import (
    WRITES,
    FolderBackend,
    Process,
    Program,
    Request,
    Server,
    SimulatedBackend,
    Violation,
    current,
    run_alone,
)
from incckpt.testing.turns import TurnLock, Turns
from incckpt.threads import Future
from incckpt.tiers.copies import PendingCopy
from incckpt.tiers.local import LocalTier
from incckpt.tiers.position import TieredPosition
from tests.simulation.world import RUN, Base, Inline, Promises, is_live, names_of, surviving

Key: TypeAlias = tuple[int, tuple[str, ...]]
"""A checkpoint: its step and its chunks."""

BUCKET = "bucket/"

T = TypeVar("T")


# -- the library, made deterministic -----------------------------------------------------------------------------------


class TurnQueue:
    """In place of the background queue: its thread is one of the simulated process."""

    def __init__(self, max_pending: int, name: str) -> None:
        self._max_pending = max_pending
        self._jobs: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._worker: int | None = None

    def works_here(self) -> bool:
        turns = current().turns
        return turns is not None and self._worker == turns.running

    @property
    def full(self) -> bool:
        return len(self._jobs) >= self._max_pending

    def put(self, job: Callable[[], T], future: Future[T]) -> None:
        turns = current().turns
        assert turns is not None
        self._jobs.append((job, future))
        if self._worker is None:
            self._worker = turns.start(self._work)

    def _work(self) -> None:
        while self._jobs:
            job, future = self._jobs[0]
            try:
                future.set_result(job())
            except Exception as error:  # noqa: BLE001 -- as the queue does
                future.set_exception(error)
            self._jobs.pop(0)
        self._worker = None

    def wait(self, until: float | None = None, or_else: Callable[[], bool] | None = None) -> bool:
        turns = current().turns
        assert turns is not None
        turns.wait_until(lambda: not self._jobs)
        return True

    stop = wait


def _locally(url: str, *, max_bytes: int | None = None) -> Store:
    """Open the local tier of the simulated process."""
    return _store(current(), url.rpartition("/")[2] + "/")


def _store(process: Process, folder: str) -> Store:
    assert process.turns is not None
    backend = FolderBackend(process.turns.exchange, folder)
    return Store(backend, clock=lambda: 0.0, monotonic=lambda: float(backend._ask(Request("time"))))


@contextmanager
def with_tiers() -> Iterator[None]:
    """Take threads and folders out of the library, besides what `simulated` does."""
    here: Callable[..., Any] = lambda function, *_: function()  # noqa: E731
    with (
        mock.patch("incckpt.tiers.position.Store", SimpleNamespace(open=_locally)),
        mock.patch("incckpt.tiers.position.threading", SimpleNamespace(Lock=TurnLock)),
        mock.patch("incckpt.run.position.threading", SimpleNamespace(Lock=TurnLock)),
        mock.patch("incckpt.tiers.copies.BackgroundQueue", TurnQueue),
        mock.patch("incckpt.run.upload.Pipeline", return_value=Inline()),
        mock.patch("incckpt.run.reader.Pipeline", return_value=Inline()),
        mock.patch("incckpt.run.position.shielded", here),
        mock.patch("incckpt.run.view.shielded", here),
        mock.patch("incckpt.tiers.view.shielded", here),
    ):
        yield


# -- programs ----------------------------------------------------------------------------------------------------------


def at(folder: str, program: Program) -> Program:
    """Return a program that sees one of the server's stores, and tells of it."""

    def outer(process: Process) -> None:
        backend, emit = process.backend, process.emit
        process.backend = FolderBackend(backend._exchange, folder)
        process.emit = lambda event: emit((folder, event))  # type: ignore[method-assign]
        program(process)

    return outer


def _turns(process: Process, folder: str) -> Turns:
    """Return the turns of training and copying: where one changes the local tier, or the other uses it."""

    def shared(thread: int, request: Request) -> bool:
        return any(key.startswith(folder) for key in request.keys) and (thread > 0 or request.op in WRITES)

    return Turns(process, shared)


class Machine:
    """A process that restores, saves to its local tier, and copies that to the bucket.

    Parameters
    ----------
    process
        The process, which has its turns.
    folder
        The local tier's.
    keep
        How many checkpoints to keep locally.
    policy
        What to keep in the bucket.
    max_pending
        How many may wait to be copied.
    read_only
        Whether it only restores.
    """

    def __init__(
        self,
        process: Process,
        folder: str,
        *,
        keep: int = 1,
        policy: Policy | None = None,
        max_pending: int = 2,
        read_only: bool = False,
    ) -> None:
        self.process = process
        self.folder = folder
        self._base = Base()
        bucket = _store(process, BUCKET)
        self._position = TieredPosition(
            LocalTier("/" + folder.rstrip("/"), keep_last_n=keep, max_pending=max_pending),
            bucket,
            RunView(bucket, RUN, threads=1),
            policy=policy,
            threads=1,
            baseline=self._base,
            read_only=read_only,
            verify=True,
            max_bytes=None,
            metric=None,
            mode="min",
        )
        self._went_on_from: Key | None = None
        self._seen: tuple[int, frozenset[str]] | None = None  # of the bucket, when it was restored
        self._left: frozenset[str] = frozenset()  # what it may leave behind, having been told to go back
        self._own = 0  # the last attempt at the bucket's run that was made from here, then
        self._reports: list[SaveReport] = []
        self._refused = False  # by the bucket, which another process writes
        copies = self._position.copies
        copies._copy = functools.partial(self._copy, copies._copy)

    def restore(self, step: int | None = None) -> Key | None:
        """Go on from the newest checkpoint, or from that of `step`; return which that is."""
        found = self._position.read(step, _read)
        sight, follows = self._position._sight, self._position._follows
        self._own = 0 if follows is None else follows.attempt
        bucket = None if sight is None else sight.bucket
        if bucket is not None:
            self._seen = bucket.attempt, frozenset(map(str, (*bucket.live, *bucket.abandoned)))
            if step is not None:
                self._left = self._seen[1]
            elif bucket.latest is not None and (found is None or found[0].step < bucket.latest.step):
                self.process.emit(("unreadable", f"step {bucket.latest.step} of the bucket was passed over"))
        if found is None:
            return None
        self._base.go_on_from(found[1])
        self._went_on_from = found[0].step, names_of(found[1])
        return self._went_on_from

    def save(self, step: int, *chunks: str) -> None:
        """Save, and tell how it ended."""
        refused = self._refused
        self._position.check_step(step, "error", ())
        self.process.emit(("saving", (step, chunks), self._went_on_from, self._left))
        report = SaveReport(step=step)
        ref = self._position.write(self._base.snapshot(step, -float(step), chunks), report, "error")
        self._reports.append(report)
        self._went_on_from = step, chunks
        if refused:
            self.process.emit(Violation(f"step {step} was saved, and another process has the bucket's run"))
        folder = self.folder if report.tier("local").state == "durable" else BUCKET
        self.process.emit((folder, ("announced", RUN, str(ref.name))))

    def close(self) -> None:
        """Finish copying; without an error the bucket must have the newest checkpoint then."""
        self._position.close()
        states = [report.tier("bucket").state for report in self._reports]
        if states[-1:] not in ([], ["durable"]) or not {"durable", "skipped", "failed"}.issuperset(states):
            self.process.emit(Violation(f"all was copied, it is said, and these are {', '.join(states)}"))

    def _copy(self, copy: Callable[[PendingCopy], bool], item: PendingCopy) -> bool:
        """Copy a checkpoint, and tell how that ended."""
        step = item.ref.step
        try:
            there = copy(item)
        except BackendError:
            self.process.emit(("not copied", step))
            raise
        except OptionError as error:
            self.process.emit(Violation(f"step {step} of {self.folder} came too late: {error}"))
            raise
        except SupersededError:
            self.process.emit(("not copied", step))
            self._refused = True
            raise
        except CorruptionError as error:
            self.process.emit(("unreadable", f"step {step} could not be copied from {self.folder}: {error}"))
            raise
        finally:
            self._tell_attempt()
        attempt = self._position._bucket._attempt
        for name in () if attempt is None else attempt._history:
            if there and name.step == step:
                self.process.emit((BUCKET, ("announced", RUN, str(name))))
        return there

    def _tell_attempt(self) -> None:
        attempt = self._position._bucket._attempt
        if attempt is None or not attempt.number:
            return
        if self._seen is None:  # out of reach: what came from here is all it could know
            own = {str(name) for name in (*attempt._history, *attempt._abandoned) if name.attempt == self._own}
            self._seen = attempt.number - 1, frozenset(own)
        before, seen = self._seen
        self.process.emit((BUCKET, ("took over", self.process.name, RUN, attempt.number, before, seen)))


def _read(reader: Reader, manifest: Manifest) -> Manifest:
    """Read a checkpoint whole."""
    reader.read([ChunkRead(chunk, np.empty(chunk.nbytes, np.uint8)) for chunk in manifest.chunks])
    return manifest


def machine(
    *saves: Sequence[object],
    folder: str = "a/",
    keep: int = 1,
    policy: Policy | None = None,
    max_pending: int = 2,
    step: int | None = None,
    restored: bool = False,
) -> Program:
    """Return a program of a machine that restores, saves ``(step, chunk, ...)`` each, and finishes copying.

    Parameters
    ----------
    step
        Which to restore; the newest by default.
    restored
        Pause when it has restored, instead of before everything.
    """

    def program(process: Process) -> None:
        if not restored:
            process.pause()
        with _turns(process, folder):
            own = Machine(process, folder, keep=keep, policy=policy, max_pending=max_pending)
            newest = own.restore(step)
            if restored:
                process.pause()
            for number, *chunks in saves:
                assert isinstance(number, int)
                if newest is None or number > newest[0]:
                    own.save(number, *map(str, chunks))
            try:
                own.close()
            except SaveError as error:
                process.emit(("ended", process.name, type(error).__name__))

    return surviving(program)


def restoring(folder: str, found: list[Key | None]) -> Program:
    """Return a program of a machine that only restores, and adds what it found."""

    def program(process: Process) -> None:
        with _turns(process, folder):
            found.append(Machine(process, folder, read_only=True).restore())

    return program


def losing(folder: str) -> Program:
    """Return a program that removes a local tier."""

    def program(process: Process) -> None:
        process.pause()
        keys = [entry.key for entry in process.backend.list(folder)]
        process.emit(("lost", folder))
        process.backend.delete(keys)

    return program


# -- promises ----------------------------------------------------------------------------------------------------------


class TieredPromises:
    """What must hold in every state of the tiers, each of which is a store.

    Parameters
    ----------
    folders
        Of the local tiers.
    server
        At the start, with what stands in the tiers.
    copies
        Whether every copy must succeed: nothing disturbs it.
    saved
        What was saved before, each with what it went on from.
    """

    def __init__(
        self, folders: Sequence[str], server: Server, *, copies: bool, saved: Mapping[Key, Key | None], leaks: int
    ) -> None:
        self._folders = tuple(folders)
        self._copies = copies
        self._saved = saved
        self._tiers = {
            folder: Promises(
                leaks=leaks,
                standing=[key for key in here.values if key.startswith("refs/") and is_live(here, key)],
                lies=not leaks,
            )
            for folder, here in ((folder, tier(server, folder)) for folder in (BUCKET, *folders))
        }
        self._found: dict[int, _Found] = {}

    def changed(self, before: Server, after: Server, request: Request) -> Iterator[object]:
        """Tell which checkpoints a step has pruned."""
        for folder, promises in self._tiers.items():
            keys = tuple(key.removeprefix(folder) for key in request.keys if key.startswith(f"{folder}refs/"))
            if keys:
                here = dataclasses.replace(request, keys=keys)
                for event in promises.changed(tier(before, folder), tier(after, folder), here):
                    yield event if isinstance(event, Violation) else (folder, event)

    def check(self, server: Server, told: frozenset[object]) -> None:
        """Check that all promises are kept.

        Raises
        ------
        Violation
        """
        events = [event for event in told if isinstance(event, tuple)]
        lost = {event[1] for event in events if event[0] == "lost"}
        spoilt = {event[1] for event in events if event[0] in ("gone", "damaged")}
        for event in told:
            if isinstance(event, Violation):
                raise event
        for event in events:
            if event[0] == "unreadable" and not spoilt and not lost:
                raise Violation(event[1])
            if event[0] == "not copied" and self._copies:
                raise Violation(f"step {event[1]} was not copied, and nothing was in the way")
        for folder, promises in self._tiers.items():
            if folder not in lost:
                here = {event[1] for event in events if event[0] == folder}
                here |= {("damaged", key.removeprefix(folder)) for key in spoilt if key.startswith(folder)}
                promises.check(tier(server, folder), frozenset(here))
        self._check_restores(server, events, lost | {key.split("/")[0] + "/" for key in spoilt})

    def _check_restores(self, server: Server, events: Sequence[Any], excused: Set[str]) -> None:
        """Check that each machine restores what it should, and a new one what the bucket has.

        Of the local tiers that are `excused` not everything may be left.
        """
        found = self._restored(server)
        if found.new != found.bucket:
            raise Violation(f"a new machine restores {found.new}, and the bucket's latest is {found.bucket}")
        before: dict[Key, set[Key]] = {key: set() if one is None else {one} for key, one in self._saved.items()}
        for event in events:
            if event[0] == "saving" and event[2] is not None:
                before.setdefault(event[1], set()).add(event[2])
        left = {event[1]: event[3] for event in events if event[0] == "saving"}
        for folder, (latest, restored) in found.local.items():
            if folder in excused:
                right = found.bucket is None or found.bucket in _ancestry(restored, before)
            else:
                follows = found.bucket is None or found.bucket in _ancestry(latest, before)
                follows |= latest is not None and found.name in left.get(latest, ())
                right = restored == (latest if follows else found.bucket)
            if not right:
                raise Violation(
                    f"the machine of {folder} restores {restored}; locally the latest is {latest}, in the bucket "
                    f"{found.bucket}"
                )

    def _restored(self, server: Server) -> _Found:
        mark = server.mark ^ _marks(server)
        found = self._found.get(mark)
        if found is None:
            new = server.fork()
            for key in [key for key in new.values if not key.startswith(BUCKET)]:
                new.perform(Request("delete", (key,)))
            local = {folder: (_latest(server, folder)[1], _restore(server, folder)) for folder in self._folders}
            name, bucket = _latest(server, BUCKET)
            found = self._found[mark] = _Found(name, bucket, _restore(new, self._folders[0]), local)
        return found


@dataclass(frozen=True)
class _Found:
    """What is in the tiers.

    Attributes
    ----------
    name, bucket
        The bucket's latest checkpoint.
    new
        What a machine restores that has no local tier yet.
    local
        By folder, the latest checkpoint there, and what the machine restores.
    """

    name: str | None
    bucket: Key | None
    new: Key | str | None
    local: Mapping[str, tuple[Key | None, Key | str | None]]


def _marks(server: Server) -> int:
    """Return the part of the server's mark that restoring does not look at."""
    beside = Server(server.timed)
    for key, (data, modified) in server.values.items():
        if key.split("/")[1] in ("pins", "gc", "probe"):
            beside.time = modified
            beside.perform(Request("put", (key,), data))
    return beside.mark


def tier(server: Server, folder: str) -> Server:
    """Return one of the server's stores."""
    found = Server(tuple(key.removeprefix(folder) for key in server.timed if key.startswith(folder)))
    for key, (data, modified) in server.values.items():
        if key.startswith(folder):
            found.time = modified
            found.perform(Request("put", (key.removeprefix(folder),), data))
    found.time = server.time
    return found


def _latest(server: Server, folder: str) -> tuple[str, Key] | tuple[None, None]:
    """Return a store's latest checkpoint and its name; ``None`` if there is none, or it cannot be told."""
    store = Store(SimulatedBackend(tier(server, folder).perform))
    try:
        name = store.run(RUN).lineage().latest
        ref = None if name is None else store.run(RUN).read(name)
        return (str(name), (ref.step, names_of(store.manifest(ref)))) if isinstance(ref, Ref) else (None, None)
    except CorruptionError:
        return None, None


def _restore(server: Server, folder: str) -> Key | str | None:
    """Return what a machine restores, or why it does not."""
    found: list[Key | None] = []
    try:
        run_alone(server.fork(), restoring(folder, found))
    except IncckptError as error:
        return str(error)
    return found[0]


def _ancestry(key: Key | str | None, before: Mapping[Key, Set[Key]]) -> set[Key | str | None]:
    """Return what a checkpoint goes on from, itself included."""
    found: set[Key | str | None] = {key}
    todo = [key]
    while todo:
        one = todo.pop()
        for parent in before.get(one, ()) if isinstance(one, tuple) else ():
            if parent not in found:
                found.add(parent)
                todo.append(parent)
    return found
