"""Attempts and lineage, pins and commits: the protocol that lets many processes use one store without a lock.

``docs/safety.md`` says what it promises and why that holds. Every function is synchronous and makes one request after
the other, with an injected clock, so that a simulation can interleave and stop it between any two requests.
"""

from __future__ import annotations

import logging
import math
import os
import re
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from incckpt.backends.base import Backend
from incckpt.errors import BackendError, CorruptionError, KeyNotFoundError, LineageError, SupersededError
from incckpt.store.document import Fields, dump_document, parse_document
from incckpt.store.refs import (
    Ref,
    RefName,
    Tombstone,
    create_once,
    exists,
    inherited_from_json,
    is_stray,
    lineage_document,
    list_pins,
    list_refs,
    new_nonce,
    validate_run,
)
from incckpt.store.rereading import reread
from incckpt.store.untrusted import MemoryLimit, fetch

__all__ = ["Lineage", "Run"]

log = logging.getLogger(__name__)

_ATTEMPT = re.compile(r"([0-9]{6})(\.from)?")

COPY_SECONDS = 900.0  # a delayed copy of a request takes effect within this time, or never


@dataclass(frozen=True)
class Lineage:
    """The checkpoints of a run, as seen at one time.

    Attributes
    ----------
    attempt
        The highest attempt; 0 if the run was never written.
    sealed
        The highest attempt that has recorded what it continues; its lineage is the run's.
    live
        The lineage's checkpoints, by step.
    abandoned
        Checkpoints abandoned by rewinding, or replaced by another of their step, ordered by step.
    known
        Contents of refs, as far as the lineage tells them (the others have to be read).
    seen
        All checkpoints that showed, those included that no lineage holds.
    """

    attempt: int
    sealed: int
    live: tuple[RefName, ...]
    abandoned: tuple[RefName, ...]
    known: Mapping[RefName, Ref] = field(repr=False)
    seen: frozenset[RefName] = field(repr=False)

    @property
    def latest(self) -> RefName | None:
        """The checkpoint with the highest step."""
        return self.live[-1] if self.live else None

    @classmethod
    def empty(cls) -> Lineage:
        """Return the lineage of a run that was never written."""
        return cls(0, 0, (), (), {}, frozenset())

    def including(self, name: RefName) -> Lineage:
        """Return the same with checkpoint `name` as an abandoned one, if it is neither that nor live."""
        if name in self.live or name in self.abandoned:
            return self
        return replace(self, abandoned=(*self.abandoned, name))

    def at(self, step: int) -> tuple[RefName, ...]:
        """The checkpoints of `step` that stand: the one in the lineage first, then abandoned ones, the latest first."""
        live = [name for name in self.live if name.step == step]
        abandoned = [name for name in self.abandoned if name.step == step]
        return (*live, *reversed(abandoned))


class Run:
    """The attempts, lineage, pins and refs of one run.

    Parameters
    ----------
    backend
        Of the store.
    name
        Of the run.
    clock
        Returns seconds since the epoch; only written down, never compared.
    monotonic
        Returns seconds since any moment, for time limits within this process.
    """

    def __init__(
        self,
        backend: Backend,
        name: str,
        *,
        clock: Callable[[], float],
        monotonic: Callable[[], float] = time.monotonic,
        memory: MemoryLimit,
    ) -> None:
        self.backend = backend
        self.name = validate_run(name)
        self._memory = memory
        self._clock = clock
        self._monotonic = monotonic
        self._committed: dict[RefName, float] = {}
        self._buried: dict[RefName, float] = {}

    # -- looking

    def ref_key(self, name: RefName) -> str:
        """Return the key of a ref."""
        return f"refs/{self.name}/{name}"

    def pin_key(self, name: RefName) -> str:
        """Return the key of the pin that announces a ref."""
        return f"pins/{self.name}/{name}"

    def seal_key(self, attempt: int) -> str:
        """Where an attempt writes down what it continues."""
        return f"runs/{self.name}/attempts/{attempt:06d}.from"

    def attempts(self) -> tuple[int, int]:
        """Return the highest attempt, and the highest that has recorded what it continues; 0 if there is none."""
        made, sealed = self.listed_attempts()
        return max(made, default=0), max(sealed, default=0)

    def listed_attempts(self) -> tuple[set[int], set[int]]:
        """Return all attempts that are listed, and those that have chosen what they continue."""
        made: set[int] = set()
        sealed: set[int] = set()
        for entry in self.backend.list(f"runs/{self.name}/attempts/"):
            match = _ATTEMPT.fullmatch(entry.key.rpartition("/")[2])
            if match is None:
                if is_stray(self.backend, entry.key):
                    continue
                raise CorruptionError(f"not an attempt: {entry.key} (written by a later version of incckpt?)")
            made.add(int(match[1]))
            if match[2]:
                sealed.add(int(match[1]))
        return made, sealed

    def lineage(self, *, twice: bool = False) -> Lineage:
        """Return the checkpoints of the run: two listings and one read, however long its history.

        A writer killed while replacing a checkpoint leaves two of one step: the newer counts.

        A listing takes time, and may be wrong. If nothing shows, or another attempt seems to have taken over meanwhile,
        it looks again, until it sees something or the same as before. For `twice` see `list_twice`.

        Raises
        ------
        LineageError
            If refs stand of attempts that do not show, or have not chosen: what the run continues is lost.
        """
        before = None
        while True:
            attempt, sealed = self.attempts()
            view, listed = self._look(attempt, sealed, twice)
            latest = max((name.attempt for name, _ in listed), default=0)
            if view.live and latest <= sealed:
                return view
            if (sealed, listed) == before:
                break
            before = sealed, listed
        if latest > sealed:  # a ref is committed or aborted only after its attempt has chosen
            raise self._damaged(f"{self.seal_key(latest)} is gone, though refs of that attempt stand")
        return view

    def _damaged(self, what: str) -> LineageError:
        return LineageError(
            f"run {self.name!r} at {self.backend.url} is damaged: {what}. Put it back from a copy, or see what "
            f"incckpt.recover({self.backend.url!r}, run={self.name!r}) would make of the checkpoints that are whole"
        )

    def _look(self, attempt: int, sealed: int, twice: bool) -> tuple[Lineage, frozenset[tuple[RefName, bool]]]:
        """Return the lineage as attempt `sealed` has it, and all refs listed, with whether they are tombstones."""
        try:
            inherited, left = self.read_seal(sealed) if sealed else ({}, {})
        except (KeyNotFoundError, CorruptionError) as error:
            raise self._damaged(str(error)) from error
        live: list[RefName] = []
        abandoned: list[RefName] = []
        listed: set[tuple[RefName, bool]] = set()
        for _, name, key, tombstone in list_refs(self.backend, self.name, twice=twice):
            if name is None:
                log.warning("%s is not a ref that this version of incckpt knows; it is ignored", key)
                continue
            listed.add((name, tombstone))
            if tombstone:
                continue
            if name.attempt == sealed or name in inherited:
                live.append(name)
            elif name in left:
                abandoned.append(name)
        known = {name: ref for name, ref in (inherited | left).items() if ref is not None}
        live, replaced = self._newest(live, known)
        abandoned += replaced
        abandoned.sort(key=lambda name: (name.step, name.attempt, known[name].time if name in known else 0.0))
        seen = frozenset(name for name, tombstone in listed if not tombstone)
        return Lineage(attempt, sealed, tuple(live), tuple(abandoned), known, seen), frozenset(listed)

    def _newest(self, names: Iterable[RefName], known: Mapping[RefName, Ref]) -> tuple[list[RefName], list[RefName]]:
        """Return the newest checkpoint of each step, by step, and those that these replaced."""
        by_step: defaultdict[int, list[RefName]] = defaultdict(list)
        for name in names:
            by_step[name.step].append(name)
        newest: list[RefName] = []
        replaced: list[RefName] = []
        for _, same in sorted(by_step.items()):
            if len(same) > 1:
                same = self._by_age(same, known)
            newest += same[-1:]
            replaced += same[:-1]
        return newest, replaced

    def _by_age(self, names: Iterable[RefName], known: Mapping[RefName, Ref]) -> list[RefName]:
        """Return the checkpoints that still exist, the newest last: each has a later time than what it replaced."""
        times: dict[RefName, float] = {}
        for name in names:
            try:
                found = known.get(name) or self.read(name)
            except ValueError:
                times[name] = -math.inf  # one that is readable counts before it
                continue
            if isinstance(found, Ref):
                times[name] = found.time
        return sorted(times, key=lambda name: (name.attempt, times[name], name.nonce))

    def ancestry(self, lineage: Lineage, name: RefName) -> tuple[RefName, ...]:
        """Return the lineage up to checkpoint `name`, which may be abandoned, by step."""
        if name in lineage.live:
            return tuple(other for other in lineage.live if other.step <= name.step)
        others = [other for other in (*lineage.live, *lineage.abandoned) if other.step < name.step]
        own = [other for other in others if other.attempt == name.attempt]
        try:
            inherited: Collection[RefName] = self.read_seal(name.attempt)[0]
        except (KeyNotFoundError, CorruptionError) as error:
            log.warning("step %d of run %r: what its attempt went on from is lost: %s", name.step, self.name, error)
            first = min((other.step for other in own), default=name.step)
            inherited = {other for other in others if other.attempt < name.attempt and other.step < first}
        names = [*(other for other in others if other in own or other in inherited), name]
        return tuple(self._newest(names, lineage.known)[0])

    def read_seal(self, attempt: int) -> tuple[dict[RefName, Ref | None], dict[RefName, Ref | None]]:
        """Return what an attempt inherited and abandoned, as it wrote down; ``None`` for a ref that it could not read.

        Raises
        ------
        KeyNotFoundError
            If the attempt has not chosen.
        CorruptionError, FormatError
            If it is unreadable.
        """
        key = self.seal_key(attempt)

        def read() -> tuple[dict[RefName, Ref | None], dict[RefName, Ref | None]]:
            fields = Fields(parse_document(self._memory.fetch_list(self.backend, key), "lineage", key), key)
            if fields.count("attempt") != attempt:
                raise CorruptionError(f"{key} says that it is of attempt {fields.count('attempt')}")
            inherited, abandoned = (
                dict(inherited_from_json(item, key) for item in fields.list(part)) for part in ("refs", "abandoned")
            )
            return inherited, abandoned

        return reread(read)

    def read(self, name: RefName) -> Ref | Tombstone | None:
        """Return what is at a ref's key now.

        Raises
        ------
        CorruptionError, FormatError
            If it is unreadable.
        """
        key = self.ref_key(name)

        def read() -> Ref | Tombstone:
            data = fetch(self.backend, key)
            for tombstone in Tombstone:
                if data == tombstone.value:
                    return tombstone
            return Ref.from_json(data, key)

        try:
            return reread(read)
        except KeyNotFoundError:
            return None

    def stands(self, name: RefName) -> bool:
        """Return whether a checkpoint is there now, readable or not."""
        try:
            return isinstance(self.read(name), Ref)
        except ValueError:
            return True

    # -- an attempt

    def _attempt_key(self, attempt: int) -> str:
        return f"runs/{self.name}/attempts/{attempt:06d}"

    def new_attempt(self) -> bytes:
        """Return the document of a new attempt, which no other has."""
        me = {"time": self._clock(), "host": socket.gethostname(), "pid": os.getpid(), "nonce": new_nonce()}
        return dump_document("attempt", me)

    def start_attempt(self, document: bytes, after: int | None = None) -> tuple[int, bool]:
        """Become the run's writer: create the next attempt, then abort all saves of lower attempts in flight.

        The caller then reads the run, chooses what to continue, and records that with `seal`. Called again with the
        same arguments, this continues the same attempt.

        Parameters
        ----------
        document
            From `new_attempt`.
        after
            The attempt must be the one right after this; by default it is the next free one.

        Returns
        -------
        attempt, unfinished
            The attempt, and whether a lower one left a pin.

        Raises
        ------
        SupersededError
            If another process has made that attempt; it is not disturbed.
        """
        attempt = (self.attempts()[0] if after is None else after) + 1
        while create_once(self.backend, self._attempt_key(attempt), document) is not None:
            if after is not None:
                raise self._moved_on(attempt, "has taken it over")
            attempt += 1
        pins = list_pins(self.backend, self.name, twice=True)  # who is missed commits what no lineage holds
        lower = [pin.name for pin in pins if pin.name.attempt < attempt]
        for name in lower:
            self.abort(name)
        return attempt, bool(lower)

    def standing(self, seen: Lineage) -> frozenset[RefName]:
        """Return the checkpoints of a lineage seen earlier that still exist.

        Raises
        ------
        SupersededError
            If the run has moved on since: by a checkpoint that was not seen, or by an attempt other than the
            caller's, which is the one right after those that were seen.
        LineageError
            If the lineage seen is gone.
        """
        _, sealed = self.attempts()
        if sealed < seen.sealed:
            _, sealed = self.attempts()
        if sealed < seen.sealed:
            raise self._damaged(f"{self.seal_key(seen.sealed)} was there, and is gone")
        if sealed not in (seen.sealed, seen.attempt + 1):
            raise self._moved_on(sealed, "has taken it over")
        known = {*seen.live, *seen.abandoned}
        refs = list_refs(self.backend, self.name, twice=True)  # what it misses is lost for good
        standing = {name for _, name, _, tombstone in refs if name and not tombstone}
        newer = [name for name in standing - seen.seen if name.attempt <= seen.sealed]
        if newer:
            raise self._moved_on(seen.sealed, f"has committed step {max(name.step for name in newer)}")
        return frozenset(standing & known)

    def _moved_on(self, attempt: int, what: str) -> SupersededError:
        return SupersededError(
            f"run {self.name!r} at {self.backend.url} has moved on since it was restored here: attempt "
            f"{attempt}{self._writer_of(attempt)} {what}. Nothing was saved, and nothing of the run is lost: restore() "
            "again to go on from where it is now, or save to another run"
        )

    def _writer_of(self, attempt: int) -> str:
        """Return who made an attempt, for messages."""
        key = self._attempt_key(attempt)
        try:
            fields = Fields(parse_document(fetch(self.backend, key), "attempt", key), key)
            return f" (process {fields.count('pid')} on {fields.string('host')})"
        except (BackendError, ValueError):
            return ""

    def seal(self, attempt: int, inherited: Iterable[Ref | RefName], abandoned: Iterable[Ref | RefName]) -> None:
        """Record what `attempt` continues; from now on this is the run's lineage.

        For an unreadable ref, only the name is recorded; for all of them, if the document would be too long to read.
        """
        self.backend.put(self.seal_key(attempt), lineage_document(attempt, list(inherited), list(abandoned)))

    def check_not_superseded(self, attempt: int) -> None:
        """Check that there is no higher attempt.

        Raises
        ------
        SupersededError
            If there is one.
        LineageError
            If `attempt`, or what it continues, is not there any more.
        """
        highest, sealed = self.attempts()
        if sealed < attempt:
            highest, sealed = self.attempts()
        if sealed < attempt:
            raise self._damaged(f"{self.seal_key(attempt)} is gone, though this process is writing the run")
        if highest > attempt:
            raise SupersededError(
                f"run {self.name!r} at {self.backend.url} was taken over from attempt {attempt} by attempt "
                f"{highest}{self._writer_of(highest)}. Stop this process, or restore() again to go on from there"
            )

    # -- a save

    def pin(self, name: RefName) -> None:
        """Announce the ref that a save will commit; putting it again is the heartbeat."""
        body = {"time": self._clock(), "host": socket.gethostname(), "pid": os.getpid()}
        self.backend.put(self.pin_key(name), dump_document("pin", body))

    def check_pinned(self, name: RefName) -> None:
        """Check that a pin that was put is there, without which others delete what its save uses (one request).

        Raises
        ------
        BackendError
            If the store does not keep what it takes.
        """
        if not exists(self.backend, self.pin_key(name)):
            raise BackendError(
                f"{self.backend.url} has taken {self.pin_key(name)}, and does not have it. Does something answer "
                "in the server's place? Nothing was saved"
            )

    def commit(self, ref: Ref) -> Tombstone | None:
        """Create the ref: this, and nothing else, makes the checkpoint exist.

        Returns
        -------
        Tombstone or None
            ``None`` if the checkpoint is committed; ``EXPIRED`` if it was, and has been pruned since; ``ABORTED`` if it
            was aborted before, and can no longer be committed under this name.

        Raises
        ------
        BackendError
            If the outcome is unknown; a request in flight may still commit it.
        """
        key = self.ref_key(ref.name)
        found = create_once(self.backend, key, ref.to_json())
        if found is None:
            self._committed[ref.name] = self._monotonic()
            return None
        for tombstone in Tombstone:
            if found == tombstone.value:
                return tombstone
        raise CorruptionError(f"{key} holds what no save has put there: {found[:80]!r}")

    def abort(self, name: RefName) -> bool:
        """Make sure that a ref is never committed, unless it already was.

        Returns
        -------
        bool
            Whether it is aborted; ``False`` if it was committed before.
        """
        return create_once(self.backend, self.ref_key(name), Tombstone.ABORTED.value) is None

    def expire(self, names: Iterable[RefName]) -> None:
        """Prune checkpoints.

        A copy of the request that created a ref may still arrive, and would bring the checkpoint back without its
        objects. So the ref is overwritten with ``EXPIRED``, or deleted if this process committed it long enough ago.
        """
        now = self._monotonic()
        deletable: list[RefName] = []
        for name in names:
            committed = self._committed.get(name)
            if committed is not None and now - committed >= COPY_SECONDS:
                deletable.append(name)
            else:
                self.backend.put(self.ref_key(name), Tombstone.EXPIRED.value)
                if committed is not None:
                    self._buried[name] = committed
                    del self._committed[name]
        if deletable:
            self.backend.delete([self.ref_key(name) for name in deletable])
            for name in deletable:
                del self._committed[name]

    def take_tombstones(self) -> list[str]:
        """Return, once, the keys of tombstones that may be deleted, since nothing can bring their checkpoints back."""
        if not self._buried:
            return []
        now = self._monotonic()
        done = [name for name, committed in self._buried.items() if now - committed >= COPY_SECONDS]
        for name in done:
            del self._buried[name]
        return [self.ref_key(name) for name in done]
