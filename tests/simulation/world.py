"""The programs that simulated processes run, all of them the library's own code, and the promises that must hold."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import SimpleNamespace, TracebackType
from typing import TypeVar
from unittest import mock

import numpy as np
import numpy.typing as npt

from incckpt.codec import objects as codec
from incckpt.errors import (
    BackendError,
    CollectionError,
    CorruptionError,
    MissingObjectError,
    OptionError,
    StoreNotFoundError,
    SupersededError,
)
from incckpt.retention import KeepLast, Policy
from incckpt.run.attempt import Attempt, IfExists, Origin
from incckpt.run.chunk_index import ChunkIndex
from incckpt.run.inventory import lineage_or_damage
from incckpt.run.reader import ChunkRead, Reader
from incckpt.run.recovery import Recoverer, RecoveryPlan
from incckpt.run.report import SaveReport
from incckpt.run.shards import Brief, ShardWriter
from incckpt.run.snapshot import Snapshot, Source
from incckpt.run.transfer import Transfer
from incckpt.run.upload import Known, Uploader
from incckpt.run.verify import Checker
from incckpt.staging.baseline import Baseline, Slot
from incckpt.staging.content import Content
from incckpt.staging.layout import Layout
from incckpt.store.gc import Collector
from incckpt.store.lineage import Lineage, Run
from incckpt.store.manifest import Chunk, Manifest
from incckpt.store.objects import DELTAS, OBJECTS, manifest_keys
from incckpt.store.refs import CondemnedLists, Ref, RefName, Tombstone
from incckpt.store.store import Store
from incckpt.testing.shuffle import SpawningProcess
from incckpt.testing.simulation import (
    Process,
    Program,
    Request,
    Server,
    SimulatedBackend,
    Violation,
    current,
    run_alone,
)

RUN = "r"

Bytes = npt.NDArray[np.uint8]


# -- what is saved -----------------------------------------------------------------------------------------------------


@functools.cache
def chunk_bytes(name: str) -> Bytes:
    """Return the bytes of chunk `name`; ``"b1"``, ``"b2"`` differ so little from ``"b"`` that they become deltas."""
    values = np.random.default_rng(ord(name[0])).standard_normal(256).astype(np.float32)
    if name[1:]:
        values = values * np.float32(1 + int(name[1:]) * 2**-22)
    raw = values.view(np.uint8)
    _names[codec.digest(raw).identity.hex()] = name
    return raw


_names: dict[str, str] = {}


# -- the library, made deterministic -----------------------------------------------------------------------------------


T = TypeVar("T")
R = TypeVar("R")


class Inline:
    """A pipeline without threads."""

    cpu: AbstractContextManager[None] = nullcontext()

    def each(self, items: Iterable[T], weight: Callable[[T], int], work: Callable[[T], None]) -> None:
        for item in items:
            work(item)

    def together(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        return [function(item) for item in items]

    def close(self) -> None:
        pass


class InlinePool:
    """A pool of threads without threads."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> InlinePool:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        return [function(item) for item in items]


class Heartbeat:
    """In place of the heartbeat: a thread of the simulated process where it can have several, else nothing."""

    def __init__(self, run: Run, name: RefName, seconds: float) -> None:
        self._run = run
        self._name = name
        self._done = False
        self._join: Callable[[], None] | None = None

    def __enter__(self) -> None:
        process = current()
        if isinstance(process, SpawningProcess):
            self._join = process.spawn(self._beat)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done = True
        if self._join is not None:
            self._join()

    def _beat(self, process: Process) -> None:
        run = open_store(process).run(self._run.name)
        while True:
            process.pause()
            if self._done:
                return
            with suppress(BackendError):
                run.pin(self._name)


@contextmanager
def simulated() -> Iterator[None]:
    """Take chance, time, threads and its log out of the library."""
    chance = SimpleNamespace(token_hex=lambda nbytes: current().nonce(nbytes))
    with (
        mock.patch("incckpt.store.refs.secrets", chance),
        mock.patch("incckpt.store.store.secrets", chance),
        mock.patch("incckpt.store.store.ThreadPoolExecutor", InlinePool),
        mock.patch("incckpt.run.writer._Heartbeat", Heartbeat),
        mock.patch("incckpt.run.writer.time", SimpleNamespace(perf_counter=lambda: 0.0)),  # manifests say what it took
        mock.patch("incckpt.run.scrub.LOOKS", 0),  # looks that only add requests
        mock.patch("incckpt.run.upload.process_index", ChunkIndex),  # simulated processes share no memory
    ):
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def open_store(process: Process) -> Store:
    """Return the store as a process sees it."""
    return Store(process.backend, clock=lambda: 0.0, monotonic=process.time)


# -- programs ----------------------------------------------------------------------------------------------------------


class Base(Baseline):
    """A baseline of chunks by name, without a state to cut them from."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.slots: defaultdict[int, Slot] = defaultdict(Slot)

    def full(self, layout: Layout, index: int) -> Content | None:
        return self.slots[index].full

    def settle(self, layout: Layout, contents: Sequence[Content]) -> None:
        for index, content in enumerate(contents):
            self.slots[index].settle(content)

    def go_on_from(self, manifest: Manifest) -> None:
        """Go on from a checkpoint that was read."""
        for index, chunk in enumerate(manifest.chunks):
            full = chunk.identity if chunk.base is None else chunk.base.identity
            self.slots[index].full = Content.of_full(chunk_bytes(_names[full]), chunk)

    def snapshot(self, step: int, time: float, chunks: Sequence[str]) -> Snapshot:
        """Return what a save of these chunks is given."""
        contents = [self._content(index, name) for index, name in enumerate(chunks)]
        return Snapshot(step, {}, time, None, (), Layout.of([], [], 1 << 20), contents)

    def _content(self, index: int, name: str) -> Content:
        slot = self.slots[index]
        raw = chunk_bytes(name)
        held = slot.latest or slot.full
        if held is not None and held.raw is not None and np.array_equal(held.raw, raw):
            return held
        slot.latest = Content(raw, 4)
        return slot.latest


def names_of(manifest: Manifest) -> tuple[str, ...]:
    """Return the names of a checkpoint's chunks."""
    return tuple(_names[chunk.identity] for chunk in manifest.chunks)


class Trainer:
    """A process that restores and saves: an `Attempt`, and in place of the state the names of its chunks."""

    def __init__(self, process: Process, run: str = RUN, policy: Policy | None = None) -> None:
        self.process = process
        self.run = run
        self.store = open_store(process)
        self.policy = policy
        self._saves = 0
        self._base = Base()
        self._run = self.store.run(run)
        with suppress(StoreNotFoundError):
            self.store.check()
        self.lineage = self._run.lineage()
        self.attempt: Attempt

    def _attempt(self, origin: Origin) -> Attempt:
        return Attempt(
            self.store,
            self.run,
            origin,
            policy=self.policy,
            baseline=self._base,
            pipeline=Inline(),  # type: ignore[arg-type]
        )

    def append(self) -> None:
        """Go on after the latest checkpoint without restoring it."""
        self.attempt = self._attempt(Origin.latest(self.lineage))

    def restore(self, step: int | None = None) -> int | None:
        """Go on from the latest checkpoint, or from that of `step`; returns its step."""
        name = self.lineage.latest if step is None else next(iter(self.lineage.at(step)), None)
        if name is None:
            if not self.lineage.live:
                self.process.emit(("saw none", self.run))
            self.attempt = self._attempt(Origin.nothing(self.lineage))
            return None
        manifest = None
        ref = self.lineage.known.get(name) or self._run.read(name)
        if isinstance(ref, Ref):
            try:
                manifest = self.store.manifest(ref)
            except MissingObjectError:
                if isinstance(self._run.read(name), Ref):
                    self.process.emit(("unreadable", f"{name} is listed, and its manifest is missing"))
        self.attempt = self._attempt(Origin.restored(self._run, self.lineage, name, manifest))
        if manifest is not None:
            self._base.go_on_from(manifest)
        return name.step

    def start(self) -> None:
        """Take the run over, and tell what of it this process has seen."""
        if not self.attempt.number:
            self.attempt.start()
            seen = frozenset(map(str, (*self.lineage.live, *self.lineage.abandoned)))
            appends = self.attempt._origin.appends
            before = None if appends else self.lineage.attempt
            self.process.emit(("took over", self.process.name, self.run, self.attempt.number, before, seen))

    def save(self, step: int, *chunks: str, if_exists: IfExists = "error") -> bool:
        """Save a checkpoint of these chunks, and tell how it ended."""
        return self._write(self._snapshot(step, self._time(), chunks), chunks, if_exists)

    def copy(self, source: Store, ref: Ref) -> bool:
        """Copy a checkpoint of another store, and tell how it ended."""
        manifest = source.manifest(ref)
        return self._write(Transfer(source, manifest, ref.step, self._time()), names_of(manifest), "error")

    def _time(self) -> float:
        self._saves += 1
        return -float(self._saves)  # its clock goes backwards

    def _write(self, snapshot: Snapshot | Source, chunks: tuple[str, ...], if_exists: IfExists) -> bool:
        step = snapshot.step
        try:
            self.start()
            self.process.emit(("saving", self.run, self.attempt.number, step, chunks))
            replaced = frozenset(str(name) for name in self.attempt._history if name.step == step)
            ref = self.attempt.write(snapshot, SaveReport(), if_exists)
        except SupersededError:
            self.process.emit(("superseded", self.process.name, self.run, step))
            return False
        except BackendError:
            self.process.emit(("failed", self.run, step))
            return False
        except OptionError:
            if not self.attempt._origin.appends:  # else another process has come to that step meanwhile
                raise
            return False
        self.process.emit(("announced", self.run, str(ref.name)))
        if replaced:
            self.process.emit(("replaced", self.run, replaced))
        return True

    def close(self) -> None:
        self.attempt.close()

    def _snapshot(self, step: int, time: float, chunks: Sequence[str]) -> Snapshot | Source:
        return self._base.snapshot(step, time, chunks)


class JointTrainer(Trainer):
    """The coordinator of two ranks, which store the first half of the chunks and the second one.

    The ranks' requests come one after the other, between those of other processes: no two of them concern one key.
    """

    def __init__(self, process: Process, run: str = RUN, policy: Policy | None = None) -> None:
        super().__init__(process, run, policy)
        self._number = 0
        self._previous: tuple[int, RefName] | None = None
        self._ranks = [
            ShardWriter(open_store(process), threads=1, chunk_bytes=1 << 20, delta=False, pipeline=Inline())  # type: ignore[arg-type]
            for _ in range(2)
        ]

    def save(self, step: int, *chunks: str, if_exists: IfExists = "error") -> bool:
        self._number += 1
        saved = super().save(step, *chunks, if_exists=if_exists)
        if saved:
            name = max((name for name in self.attempt._history), key=lambda name: name.step)
            self._previous = self._number, name
        else:
            self.attempt.give_up()
        return saved

    def _snapshot(self, step: int, time: float, chunks: Sequence[str]) -> Snapshot | Source:
        return _Joint(step, time, self._base.snapshot(step, time, chunks).contents, self)

    def stored(self, contents: Sequence[Content], tried: list[str]) -> list[Chunk]:
        """Let each rank store its half, as it does once the coordinator's pin is put."""
        chunks: list[Chunk] = []
        brief = Brief(self._number, self.store.id, self.run, self._previous)
        for rank, half in zip(
            self._ranks, (contents[: len(contents) // 2], contents[len(contents) // 2 :]), strict=True
        ):
            part = Snapshot(0, {}, 0.0, {"dict": []}, (), Layout.of([], [], 1 << 20), half)
            try:
                chunks += rank.put(part, brief, self._number).chunks
            finally:
                tried += rank.tried
        return chunks


@dataclass(frozen=True)
class _Joint:
    """What the ranks of a `JointTrainer` save."""

    step: int
    time: float
    contents: Sequence[Content]
    trainer: JointTrainer

    def store(self, uploader: Uploader, nonce: str, known: Known, report: SaveReport) -> list[Chunk]:
        return self.trainer.stored(self.contents, uploader.tried)

    def manifest_as(self, run: str, name: RefName, chunks: Sequence[Chunk]) -> Manifest:
        return Manifest(run, name.attempt, name.step, name.nonce, self.time, {}, 1 << 20, None, (), (), tuple(chunks))


def saver(
    *saves: Sequence[object],
    run: str = RUN,
    policy: Policy | None = None,
    step: int | None = None,
    ready: int | Sequence[int] = (),
    restored: bool = False,
    restores: bool = True,
    if_exists: IfExists = "error",
    joint: bool = False,
) -> Program:
    """Return a program that restores, and saves: ``(step, chunk, ...)`` each.

    Parameters
    ----------
    step
        Which to restore; the latest by default.
    ready
        Pause before the save of this number, or of each of these, with the run taken over.
    restored
        Pause when it has restored. Without this and `ready` it pauses before everything.
    restores
        Whether it restores at all, or appends.
    if_exists
        Of its saves.
    joint
        Whether two ranks save, and the process is their coordinator.
    """

    def program(process: Process) -> None:
        pauses = (ready,) if isinstance(ready, int) else ready
        if not pauses and not restored:
            process.pause()
        trainer = (JointTrainer if joint else Trainer)(process, run, policy)
        if restores:
            trainer.restore(step)
        else:
            trainer.append()
        if restored:
            process.pause()
        for number, (at, *chunks) in enumerate(saves):
            if number in pauses:
                trainer.start()
                process.pause()
            assert isinstance(at, int)
            replaces = if_exists == "replace" and trainer.attempt.holds(at)
            if replaces or at > (trainer.attempt.last_step or 0):  # else the writer before this one has got there
                trainer.save(at, *map(str, chunks), if_exists=if_exists)
        trainer.close()

    return surviving(program)


def copier(*saves: Sequence[object], ready: int | None = None, policy: Policy | None = None) -> Program:
    """Return a program that copies checkpoints, ``(step, chunk, ...)`` each, from a store that only it uses.

    Parameters
    ----------
    ready
        Pause before the copy of this number, with the run taken over. Without this it pauses before everything.
    """

    def program(process: Process) -> None:
        if ready is None:
            process.pause()
        source, refs = _source(tuple(map(tuple, saves)))
        trainer = Trainer(process, policy=policy)
        trainer.restore()
        for number, ref in enumerate(refs):
            if number == ready:
                trainer.start()
                process.pause()
            if ref.step > (trainer.attempt.last_step or 0):
                trainer.copy(source, ref)
        trainer.close()

    return surviving(program)


@functools.cache
def _source(saves: Sequence[Sequence[object]]) -> tuple[Store, list[Ref]]:
    """Return a store with these checkpoints, which a simulated process reads without being stopped."""
    server = Server(timed=())
    run_alone(server, saver(*saves), number=0xC)
    store = Store(SimulatedBackend(server.perform))
    run = store.run(RUN)
    refs = [run.read(name) for name in run.lineage().live]
    assert len(refs) == len(saves)
    return store, [ref for ref in refs if isinstance(ref, Ref)]


def looker(step: int | None = None) -> Program:
    """Return a program that restores, and that is all."""

    def program(process: Process) -> None:
        process.pause()
        Trainer(process).restore(step)

    return surviving(program)


def collector(turns: int = 2) -> Program:
    """Return a program that sweeps the store."""

    def program(process: Process) -> None:
        process.pause()
        worker = Collector(open_store(process))
        worker.sweep()
        for _ in range(turns - 1):
            worker.finish()

    return surviving(program)


def recoverer(run: str = RUN) -> Program:
    """Return a program that recovers a run; where that was needed, the run must be whole from then on.

    What makes it needed is damage, of which there must be no more after it.
    """

    def program(process: Process) -> None:
        process.pause()
        store = open_store(process)
        reader = Reader(store, threads=1)

        def recover() -> RecoveryPlan:
            return Recoverer(store, run, Checker(store, reader, "sizes", set())).carry_out()

        if recover().needed:
            wrong = lineage_or_damage(store.run(run))[1]
            if wrong is not None:
                process.emit(Violation(f"{run} was recovered, and is damaged: {wrong}"))
            if recover().needed:
                process.emit(Violation(f"{run} was recovered, and needs it again"))

    return surviving(program)


def deleter(step: int, run: str = RUN) -> Program:
    """Return a program that takes a run over and deletes a checkpoint."""

    def program(process: Process) -> None:
        process.pause()
        trainer = Trainer(process, run)
        trainer.restore()
        process.emit(("deleting", run, step))
        trainer.attempt.delete(step)

    return surviving(program)


def reader(run: str = RUN, times: int = 1) -> Program:
    """Return a program that reads the latest checkpoint, whole."""

    def program(process: Process) -> None:
        process.pause()
        for _ in range(times):
            read_latest(process, run)

    return surviving(program)


def read_latest(process: Process, run: str = RUN) -> None:
    """Read the latest checkpoint; tell of a violation if that fails though the checkpoint is there."""
    lineage = open_store(process).run(run).lineage()
    if lineage.latest is None:
        process.emit(("saw none", run))
    else:
        read(process, run, lineage, lineage.latest)


def read(process: Process, run: str, lineage: Lineage, name: RefName) -> None:
    """Read a checkpoint; tell of a violation if that fails though the checkpoint is there."""
    store = open_store(process)
    owner = store.run(run)
    try:
        ref = lineage.known.get(name) or owner.read(name)
        if not isinstance(ref, Ref):
            return  # pruned
        manifest = store.manifest(ref)
        reads = Reader(store, threads=1)
        reads._pipeline = Inline()  # type: ignore[assignment]
        outs = [np.empty(chunk.nbytes, np.uint8) for chunk in manifest.chunks]
        reads.read(ChunkRead(chunk, out) for chunk, out in zip(manifest.chunks, outs, strict=True))
    except MissingObjectError as error:
        if isinstance(owner.read(name), Ref):
            process.emit(("unreadable", f"{name} is there, but not all that it needs: {error}"))
    except CorruptionError as error:
        process.emit(("unreadable", str(error)))
    else:
        process.emit(("read", run, name, tuple(_names[codec.digest(out).identity.hex()] for out in outs)))


def surviving(program: Program) -> Program:
    """Return a program that tells how `program` ended; ending in anything but a failure of the store is a violation."""

    def outer(process: Process) -> None:
        try:
            program(process)
            process.emit(("done", process.name))
        except (BackendError, SupersededError, CollectionError) as error:
            process.emit(("ended", process.name, type(error).__name__))
        except (CorruptionError, StoreNotFoundError) as error:
            process.emit(("unreadable", f"{process.name} ended in {error!r}"))
        except Exception as error:  # noqa: BLE001 -- whatever else comes out breaks a promise
            process.emit(Violation(f"{process.name} ended in {error!r}"))

    return outer


STEP = 19  # attempt and step in the name of a ref

# -- promises ----------------------------------------------------------------------------------------------------------


class Promises:
    """What must hold in every state; remembers what it has found out about contents of the server."""

    def __init__(
        self,
        *,
        leaks: int = 0,
        restarts: bool = False,
        all_done: Iterable[str] | None = None,
        undisturbed: Iterable[str] = (),
        replaces: bool = False,
        remember: bool = True,
        standing: Iterable[str] = (),
        lies: bool = False,
    ) -> None:
        self._remember = remember
        self._all_done = None if all_done is None else frozenset(("done", name) for name in all_done)
        self._undisturbed = frozenset(undisturbed)
        self._replaces = replaces
        self._seals: dict[tuple[str, bytes], frozenset[str]] = {}
        self._leaks = leaks
        self._restarts = restarts
        self._needs: dict[bytes, frozenset[str]] = {}
        self._visible: dict[tuple[int, frozenset[str]], dict[str, frozenset[str]]] = {}
        self._standing = frozenset(standing)  # keys of refs
        self._lies = lies
        self.swept = 0

    def changed(self, before: Server, after: Server, request: Request) -> Iterator[object]:
        """Tell which checkpoints a step has pruned."""
        for key in request.keys:
            if key.startswith("refs/") and is_live(before, key):
                if key not in after.values or after.values[key][0] == Tombstone.EXPIRED.value:
                    yield ("pruned", key)
                elif after.values[key][0] != before.values[key][0]:
                    yield Violation(f"{key} was overwritten")

    def check(self, server: Server, told: frozenset[object]) -> None:
        """Check that all promises are kept.

        Raises
        ------
        Violation
        """
        spoilt = frozenset(event[1] for event in told if isinstance(event, tuple) and event[0] in ("gone", "damaged"))
        visible = self.visible(server, spoilt)
        if self._all_done is not None and self._all_done <= told:
            check_known(server, self.needed(server))
        latest: dict[str, str] = {}
        owners: dict[object, object] = {}
        deleting = any(isinstance(event, tuple) and event[0] == "deleting" for event in told)
        for event in told:
            if isinstance(event, Violation):
                raise event
            assert isinstance(event, tuple)
            if event[0] == "saw none":
                # Pruning leaves the latest: what began with checkpoints is never empty, whoever replaces them.
                began = [key for key in self._standing if key.startswith(f"refs/{event[1]}/")]
                if any(is_live(server, key) for key in began) or (began and not deleting and not spoilt):
                    raise Violation(f"{event[1]} passed for empty, and refs stand")
            if event[0] == "unreadable":
                self._check_excuse(event[1], spoilt)
            if event[0] == "pruned" and is_live(server, event[1]) and event[1] not in spoilt:
                raise Violation(f"{event[1]} was pruned, and has come back")
            if event[0] == "superseded" and event[1] in self._undisturbed:
                raise Violation(f"{event[1]} was stopped by a process that had no right to its run")
            if event[0] == "replaced":
                live = frozenset(map(str, _lineage(server, event[1]).live))
                if live & event[2]:
                    raise Violation(f"a checkpoint was replaced, and is read still: {', '.join(live & event[2])}")
            if event[0] == "took over":
                _, who, run, attempt, before, seen = event
                if owners.setdefault((run, attempt), who) != who and not spoilt:
                    raise Violation(f"attempt {attempt} of {run} is both {who}'s and {owners[run, attempt]}'s")
                if f"runs/{run}/attempts/{attempt:06d}.from" not in spoilt:
                    self.check_takeover(server, run, attempt, before, seen)
            if event[0] == "announced":
                _, run, name = event
                latest[run] = max(name[:STEP], latest.get(run, ""))
                self._check_standing(server, told, spoilt, visible, f"refs/{run}/{name}")
        for key in self._standing:
            self._check_standing(server, told, spoilt, visible, key)
        if not deleting and not spoilt:
            for run, name in latest.items():
                if max(visible[run], default="")[:STEP] < name:
                    raise Violation(f"{name} was the latest announced of {run}, and is gone")

    @staticmethod
    def _check_standing(
        server: Server,
        told: frozenset[object],
        spoilt: frozenset[str],
        visible: dict[str, frozenset[str]],
        key: str,
    ) -> None:
        """Check that a checkpoint is in the lineage, or that this is an error; unless it was pruned or damaged."""
        if key in spoilt:
            return
        _, run, name = key.split("/")
        if is_live(server, key):
            if run in visible and name not in visible[run]:
                raise Violation(f"{key} was announced, and the lineage does not show it")
        elif ("pruned", key) not in told:
            raise Violation(f"{key} was announced, and is gone")

    def _check_excuse(self, what: str, spoilt: frozenset[str]) -> None:
        """Check that an error has a reason, and tells a way out."""
        if not self._lies or not spoilt:
            raise Violation(what)
        if not re.search(r"recover\(|[Pp]ut it back|delete |missing|is gone|damaged|not an? |is not ", what):
            raise Violation(f"an error that tells no way out: {what}")

    def check_takeover(self, server: Server, run: str, attempt: int, before: int | None, seen: Set[str]) -> None:
        """Check that an attempt has followed the one that its process saw, and left behind only what that saw.

        Raises
        ------
        Violation
        """
        if before is None:
            return  # it has appended, and abandoned nothing
        if attempt != before + 1:
            raise Violation(f"attempt {attempt} of {run} has taken over from others than attempt {before}, as it saw")
        key = f"runs/{run}/attempts/{attempt:06d}.from"
        data = server.values[key][0] if key in server.values else b'{"abandoned": []}'
        left = self._seals.get((key, data))
        if left is None:
            abandoned = json.loads(data)["abandoned"]
            left = self._seals[key, data] = frozenset(item["ref"] for item in abandoned)
        if left - seen:
            raise Violation(f"attempt {attempt} of {run} has abandoned what it did not know: {sorted(left - seen)}")

    def visible(self, server: Server, spoilt: frozenset[str] = frozenset()) -> dict[str, frozenset[str]]:
        """Check what depends on the server's content alone, but for the keys that are `spoilt`.

        Returns
        -------
        dict
            The checkpoints visible in each run; without those runs whose lineage is an error since it was spoilt.
        """
        visible = self._visible.get((server.mark, spoilt))
        if visible is None:
            visible = self._look(server, spoilt)
            if self._remember:
                self._visible[server.mark, spoilt] = visible
        return visible

    def _look(self, server: Server, spoilt: frozenset[str]) -> dict[str, frozenset[str]]:
        needed = self.needed(server, spoilt)
        missing = needed - server.values.keys() - spoilt
        if missing:
            raise Violation(f"needed, and missing: {', '.join(sorted(missing))}")
        visible: dict[str, frozenset[str]] = {}
        for run in {key.split("/")[1] for key in server.values if key.startswith("refs/")}:
            try:
                names = _visible(server, run)
            except CorruptionError as error:
                if not spoilt:
                    raise Violation(f"the lineage of {run} is an error: {error}") from error
                continue
            if not self._replaces and len({(name.attempt, name.step) for name in names}) != len(names):
                raise Violation(f"an attempt at {run} has a step twice: {', '.join(map(str, names))}")
            visible[run] = frozenset(map(str, names))
        if self._leaks and server.mark % self._leaks == 0:
            self.swept += 1
            check_sweep(server, needed)
            if self._restarts:
                check_restart(server)
        return visible

    def needed(self, server: Server, spoilt: frozenset[str] = frozenset()) -> set[str]:
        """Return the keys of all objects that a committed checkpoint needs, if it is not `spoilt` itself."""
        live = [key for key in server.values if key.startswith("refs/") and is_live(server, key)]
        return {needed for key in live if key not in spoilt for needed in self._needed(server, key, spoilt)}

    def _needed(self, server: Server, key: str, spoilt: frozenset[str]) -> frozenset[str]:
        data = server.values[key][0]
        found = self._needs.get(data)
        if found is None:
            ref = Ref.from_json(data, key)
            try:
                manifest = Store(SimulatedBackend(server.perform)).manifest(ref)
            except CorruptionError as error:
                if ref.manifest in spoilt:
                    return frozenset()  # what it needed cannot be told
                raise Violation(f"{key} is committed, but {error}") from error
            found = self._needs[data] = manifest_keys(manifest) | {ref.manifest}
        return found


def is_live(server: Server, key: str) -> bool:
    """Whether a committed checkpoint stands at the key of a ref."""
    return key in server.values and len(server.values[key][0]) != 7


def _lineage(server: Server, run: str) -> Lineage:
    return Store(SimulatedBackend(server.perform)).run(run).lineage()


def _visible(server: Server, run: str) -> list[RefName]:
    lineage = _lineage(server, run)
    steps = [name.step for name in lineage.live]
    if len(set(steps)) != len(steps):
        raise Violation(f"the lineage of {run} has a step twice: {', '.join(map(str, lineage.live))}")
    return [*lineage.live, *lineage.abandoned]


def check_sweep(server: Server, needed: set[str]) -> None:
    """Check that with everybody dead a sweep leaves what is needed, and nothing else.

    Raises
    ------
    Violation
    """
    server = server.fork()
    server.time += 100_000
    run_alone(server, collector())
    _check_clean(server, needed, "a last sweep")


def check_restart(server: Server) -> None:
    """Check that after everybody's death a restart and one save leave what is needed, and nothing else.

    Raises
    ------
    Violation
    """
    server = server.fork()
    run_alone(server, saver((10_000, "z"), policy=KeepLast(2)))
    promises = Promises()
    promises.check(server, frozenset())
    _check_clean(server, promises.needed(server), "a restart")


def check_known(server: Server, needed: Set[str]) -> None:
    """Check that the next process is told of everything that is not needed: if no process failed, it is on a list.

    Raises
    ------
    Violation
    """
    objects = {key for key in server.values if key.startswith((OBJECTS, DELTAS))}
    listed = frozenset().union(*CondemnedLists(SimulatedBackend(server.perform)).read().values())
    left = sorted(objects - needed - listed) + [key for key in server.values if key.startswith("pins/")]
    if left:
        raise Violation(f"at the end no list names {', '.join(left)}")


def _check_clean(server: Server, needed: Set[str], who: str) -> None:
    objects = {key for key in server.values if key.startswith((OBJECTS, DELTAS))}
    if needed - objects:
        raise Violation(f"{who} deleted what is needed: {', '.join(sorted(needed - objects))}")
    left = sorted(objects - needed) + [key for key in server.values if key.startswith("pins/")]
    for name, keys in CondemnedLists(SimulatedBackend(server.perform)).read().items():
        if not keys & needed:
            left.append(CondemnedLists.key(name))
    if left:
        raise Violation(f"{who} left {', '.join(left)}")
