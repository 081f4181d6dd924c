"""Collection: deletes the objects that no checkpoint needs, while any number of writers continue.

First condemn keys by putting a list of them. Then find the saves in flight that may not have seen the list. Once they
are over, read the refs again and delete what is still not needed. ``docs/safety.md`` says why this is enough.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from incckpt.backends.base import Backend, Entry, Leftover
from incckpt.errors import BackendError, CollectionError, CorruptionError, FormatError, KeyNotFoundError
from incckpt.store.objects import DELTAS, OBJECTS, is_object, manifest_keys
from incckpt.store.plan import Collected, CollectionPlan, Reason, Removal
from incckpt.store.refs import Pin, Ref, RefName, Tombstone, create_once, list_pins, list_refs, new_nonce
from incckpt.store.rereading import reread
from incckpt.store.store import Store
from incckpt.store.untrusted import fetch

__all__ = ["STALE_SECONDS", "Collector"]

log = logging.getLogger(__name__)

STALE_SECONDS = 3600.0
PROBES = "probe/"

_TOMBSTONES = frozenset(tombstone.value for tombstone in Tombstone)


@dataclass
class _List:
    """A condemned list of this collector.

    Attributes
    ----------
    keys
        The keys on it.
    blockers
        Refs of the saves in flight that may not have seen it; ``None`` before the first look.
    takes_over
        Other collectors' lists whose keys are on this one too -> those of their keys that still exist.
    """

    keys: frozenset[str]
    blockers: frozenset[str] | None = None
    takes_over: Mapping[str, frozenset[str]] = field(default_factory=dict)


class Collector:
    """Collects in one store. Remembers what manifests, which are immutable, list, so that each is read only once.

    Parameters
    ----------
    store
        The store.
    stale_seconds
        Time after its last heartbeat, by the server's clock, at which a save in flight is given up.
    discard
        Called with the keys of lists and pins that are no longer needed, to delete them now or later.
    progress
        Called with how many of how many manifests are read, from any thread.
    """

    def __init__(
        self,
        store: Store,
        *,
        stale_seconds: float = STALE_SECONDS,
        discard: Callable[[list[str]], None] | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._store = store
        self._discard = discard or store.backend.delete
        self._stale_seconds = stale_seconds
        self._progress = progress
        self._needs: dict[str, frozenset[str]] = {}
        # How many of the refs in `_needs` need a key: in all runs, and by run.
        self._users: Counter[str] = Counter()
        self._users_in: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._shared: dict[str, str] = {}  # one string per key: every manifest parses its own copies
        self._buried: set[str] = set()  # keys of refs where a tombstone was seen
        self._lists: dict[str, _List] = {}
        self._looked = False
        self._over: list[str] = []  # pins last listed whose saves are over
        self._fresh: str | None = None  # a key put since the server's time was last read

    @property
    def _backend(self) -> Backend:
        return self._store.backend

    # -- what is needed

    def note(self, ref_key: str, keys: frozenset[str]) -> None:
        """Note what a ref that was just committed needs, so that its manifest need not be read."""
        self._know(ref_key, keys)
        self._fresh = ref_key

    def _know(self, ref_key: str, keys: frozenset[str]) -> None:
        self._drop(ref_key)
        keys = frozenset(self._shared.setdefault(key, key) for key in keys)
        self._needs[ref_key] = keys
        for users in (self._users, self._users_in[_run_of(ref_key)]):
            users.update(keys)

    def _drop(self, ref_key: str) -> None:
        keys = self._needs.pop(ref_key, frozenset())
        for users in (self._users, self._users_in[_run_of(ref_key)]):
            for key in keys:
                users[key] -= 1
                if not users[key]:
                    del users[key]
        for key in keys:
            if key not in self._users:
                del self._shared[key]

    def expired(self, ref_keys: Iterable[str]) -> None:
        """Note that these refs need nothing any more."""
        for ref_key in ref_keys:
            self._drop(ref_key)
            self._buried.add(ref_key)

    def needs(self, ref_key: str) -> frozenset[str]:
        """Return the keys that the ref at `ref_key` needs: its manifest object, and all that the manifest lists.

        Raises
        ------
        CollectionError
            If the ref or its manifest is unreadable.
        """
        known = self._needs.get(ref_key)
        if known is None:
            known = self._read_needs(ref_key)
            if known is None:
                return frozenset()
            self._know(ref_key, known)
        return known

    def _read_needs(self, ref_key: str) -> frozenset[str] | None:
        """Return what a ref needs, read anew; ``None`` if it is a tombstone, or pruned since it was listed."""

        def read() -> Ref | None:
            data = fetch(self._backend, ref_key)
            return None if data in _TOMBSTONES else Ref.from_json(data, ref_key)

        try:
            ref = reread(read)
            if ref is None:
                return None
            return manifest_keys(self._store.manifest(ref)) | {ref.manifest}
        except FileNotFoundError as error:
            if not self._stands(ref_key):
                return None
            raise self._refuse(ref_key, error) from error
        except (CorruptionError, FormatError) as error:
            raise self._refuse(ref_key, error) from error

    def _stands(self, ref_key: str) -> bool:
        try:
            return fetch(self._backend, ref_key) not in _TOMBSTONES
        except KeyNotFoundError:
            return False

    def _refuse(self, ref_key: str, error: Exception) -> CollectionError:
        advice = "update incckpt"
        _, run, name = ref_key.split("/", 2)
        ref = RefName.parse(name)
        if ref is not None and not isinstance(error, FormatError):
            manager = f"CheckpointManager({self._backend.url!r}, run={run!r})"
            advice = f"if that checkpoint is lost, delete it: {manager}.delete({ref.step})"
        return CollectionError(
            f"nothing was collected at {self._backend.url}: it is unknown what {ref_key} needs ({error}); {advice}"
        )

    def _look(self, *, twice: bool = False) -> set[str]:
        """List the refs of every run, learn what new ones need, and return the keys of all, tombstones included.

        For `twice` see `list_twice`.
        """
        buried: set[str] = set()
        live: set[str] = set()
        for _, name, key, tombstone in list_refs(self._backend, twice=twice):
            if name is None:
                raise CollectionError(
                    f"nothing was collected at {self._backend.url}: {key} is not a ref that this version knows; "
                    "update incckpt"
                )
            (buried if tombstone else live).add(key)
        for key in self._needs.keys() - live:
            # Pruned by another process, or left out by something that answers in the server's place.
            if key not in buried and self._stands(key):
                raise CollectionError(
                    f"nothing was collected at {self._backend.url}: {key} exists, but a listing left it out. Is there "
                    "a proxy or a cache in between?"
                )
            self._drop(key)
        # A listing reveals tombstones only by their size, and a damaged ref may have it too.
        unknown = sorted((live - self._needs.keys()) | (buried - self._buried))
        done = itertools.count(1)

        def read(key: str) -> frozenset[str] | None:
            known = self._read_needs(key)
            self._progress(next(done), len(unknown))
            return known

        for key, known in zip(unknown, self._store.each(read, unknown), strict=True):
            if known is not None:
                self._know(key, known)
        self._buried = buried
        self._looked = True
        return buried | live

    # -- collecting

    def condemn(self, doomed: Sequence[str]) -> None:
        """Condemn what only the refs at `doomed` need within their run; these may be expired right after.

        Deletion later checks whether another run needs it. If condemning did, two runs that prune their last users of a
        key at the same time would leave it to each other.

        Raises
        ------
        CollectionError
            If a ref or manifest is unreadable.
        """
        if not self._looked:
            self._look()
        freed: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for ref_key in doomed:
            freed[_run_of(ref_key)].update(self.needs(ref_key))
        keys = {
            key for run, counts in freed.items() for key, count in counts.items() if self._users_in[run][key] <= count
        }
        if keys:
            self._put_list(frozenset(keys))

    def condemn_keys(self, keys: Iterable[str]) -> None:
        """Condemn objects, except those that a ref is known to need."""
        condemned = frozenset(key for key in keys if key not in self._users)
        if condemned:
            self._put_list(condemned)

    def _put_list(self, keys: frozenset[str], takes_over: Mapping[str, frozenset[str]] | None = None) -> None:
        name = self._store.condemned.put(keys)
        self._lists[name] = _List(keys, takes_over=takes_over or {})
        self._fresh = self._store.condemned.key(name)

    # -- the whole store

    def sweep(self, *, min_age: float = 0.0) -> Collected:
        """Collect in the whole store, including what killed saves, killed collectors and lost pins left.

        Parameters
        ----------
        min_age
            Leave objects younger than this, in seconds by the server's clock.

        Raises
        ------
        CollectionError
            If a ref, manifest or list is unreadable; nothing was deleted.
        """
        done = self.carry_out(self.plan(min_age=min_age)).done
        assert done is not None
        return done

    def plan(self, *, min_age: float = 0.0, clock: Callable[[], float] | None = None) -> CollectionPlan:
        """Find out what a collection of the whole store would delete now.

        Parameters
        ----------
        min_age
            Leave objects younger than this, in seconds.
        clock
            Returns seconds since the epoch, to measure ages by. By default the server's time is used, which is read by
            putting a key and deleting it; with a clock, nothing is written.

        Raises
        ------
        CollectionError
            If a ref, manifest or list is unreadable.
        """
        self._look()  # fail early: listing everything is expensive
        try:
            lists = self._store.condemned.read()
        except (CorruptionError, FormatError) as error:
            raise CollectionError(
                f"nothing was collected: {error}. If no other process collects at {self._backend.url}, remove that list"
            ) from error
        others = {name: keys for name, keys in lists.items() if name not in self._lists}
        there = self._objects()
        if self._backend.remote and any(not keys <= there.keys() for keys in others.values()):
            there = {**self._objects(), **there}  # a list is over, and removed, when none of its keys is there
        pins, waiting = self._pins()
        leftovers = self._leftovers()
        now = None
        if min_age > 0 or waiting or leftovers:
            now = self._server_time() if clock is None else clock()
        stale = [pin for pin in waiting if self._is_stale(pin, now)]
        in_flight = frozenset(pin.ref_key for pin in waiting) - {pin.ref_key for pin in stale}
        under_way = frozenset(ref_key.rpartition("-")[2] for ref_key in in_flight)
        still = {name: keys & there.keys() for name, keys in others.items()}
        condemned = {key for keys in still.values() for key in keys if key not in self._users}
        # Objects of saves in flight would be spared anyway; condemning them would only make later saves put them again.
        garbage = {
            key for key in there if key not in self._users and key.rpartition(".")[2] not in under_way
        } - condemned
        young = {key for key in garbage if now is not None and min_age > _age(there[key], now)}
        doomed = [
            *_removals(Reason.UNREFERENCED, (there[key] for key in garbage - young), now),
            *_removals(Reason.CONDEMNED, (there[key] for key in condemned), now),
            *_removals(Reason.STALE_PIN, stale, now),
            *_removals(Reason.FINISHED_PIN, (pin for pin in pins if pin not in waiting), now),
            *(
                Removal(self._store.condemned.key(name), Reason.LIST)
                for name, keys in still.items()
                if keys.isdisjoint(self._users)
            ),
            *_removals(Reason.LEFTOVER, (item for item in leftovers if self._is_stale(item, now)), now),
        ]
        return CollectionPlan(
            self._backend.url,
            tuple(doomed),
            in_flight,
            min_age,
            len(young),
            sum(there[key].size for key in young),
            still,
        )

    def _objects(self) -> dict[str, Entry]:
        """List all objects; other people's files are left out."""
        listed = (entry for space in (OBJECTS, DELTAS) for entry in self._backend.list(space))
        return {entry.key: entry for entry in listed if is_object(entry.key)}

    def carry_out(self, plan: CollectionPlan) -> CollectionPlan:
        """Delete what a plan lists, except what a checkpoint needs by now or a save in flight may rely on.

        Raises
        ------
        CollectionError
            If a ref or manifest is unreadable; nothing was deleted.
        """
        self._over = []
        if plan.objects:
            self._put_list(plan.objects, {name: keys for name, keys in plan.lists.items() if keys})
        elif not self._lists and plan.of(Reason.STALE_PIN, Reason.FINISHED_PIN):
            self._in_flight()
        collected = self.finish()
        spent = [self._store.condemned.key(name) for name, keys in plan.lists.items() if not keys] + self._over
        if spent:
            self._discard(spent)
        self._remove_leftovers(plan.of(Reason.LEFTOVER), collected)
        return replace(plan, done=collected)

    def _leftovers(self) -> list[Entry | Leftover]:
        """Return temporary files, unfinished uploads and the like, including those of living processes."""
        try:
            return [*self._backend.leftovers(), *self._backend.list(PROBES)]
        except BackendError as error:
            log.warning("could not look for temporary files or unfinished uploads of dead processes: %s", error)
            return []

    def _remove_leftovers(self, removals: Iterable[Removal], collected: Collected) -> None:
        try:
            for removal in removals:
                if removal.name.startswith(PROBES):
                    self._backend.delete([removal.name])
                else:
                    self._backend.remove_leftover(Leftover(removal.name, None))
                collected.leftovers += 1
        except BackendError as error:
            log.warning("could not remove temporary files or unfinished uploads of dead processes: %s", error)

    # -- what is condemned

    def finish(self) -> Collected:
        """Delete what this collector's lists condemn, except what a checkpoint needs or a save in flight may rely on.

        Raises
        ------
        CollectionError
            If a ref or manifest is unreadable; nothing was deleted.
        """
        collected = Collected()
        if not self._lists:
            return collected
        in_flight = self._in_flight()
        renewed = self._renew_lost_lists()
        done: dict[str, _List] = {}
        for name, own in self._lists.items():
            if name in renewed:
                collected.waiting += len(own.keys)
                continue
            own.blockers = in_flight if own.blockers is None else own.blockers & in_flight
            if own.blockers:
                collected.waiting += len(own.keys)
            else:
                collected.deleted.update(key for key in own.keys if key not in self._users)
                done[name] = own
        if collected.deleted:
            self._backend.delete(sorted(collected.deleted))
        spent = list(done)
        for own in done.values():
            spent += [name for name, keys in own.takes_over.items() if keys <= collected.deleted]
        if spent:
            self._discard([self._store.condemned.key(name) for name in spent])
        for name in done:
            del self._lists[name]
        return collected

    def _renew_lost_lists(self) -> Set[str]:
        """Put lists again that are not there, though they were put; return their new names.

        Saves since cannot have seen them: it all begins again for these keys.
        """
        if not self._backend.remote:
            return frozenset()
        before = set(self._lists)
        lost = [name for name in self._lists if not self._store.condemned.stands(name)]
        for name in lost:
            log.warning("%s was put, and is gone; its keys are condemned again", self._store.condemned.key(name))
            own = self._lists.pop(name)
            self._put_list(own.keys, own.takes_over)
        return self._lists.keys() - before

    def _in_flight(self) -> frozenset[str]:
        """Give up saves without a heartbeat; return the keys of the refs that the other saves in flight will commit.

        For every other pinned save it is then known whether it was committed, and what it needs.
        """
        pins, waiting = self._pins(twice=True)
        given_up = self._give_up_stale(waiting) if waiting else set()
        in_flight = frozenset(pin.ref_key for pin in waiting if pin.ref_key not in given_up)
        self._over = [pin.key for pin in pins if pin.ref_key not in in_flight]
        return in_flight

    def _pins(self, *, twice: bool = False) -> tuple[list[Pin], list[Pin]]:
        """Return all pins, and those whose refs do not exist: of saves in flight, or of killed ones."""
        # List pins before refs: a save that finishes in between already has a visible ref.
        pins = list_pins(self._backend, twice=twice)
        existing = self._look(twice=twice)
        return pins, [pin for pin in pins if pin.ref_key not in existing]

    def _is_stale(self, item: Pin | Entry | Leftover, now: float | None) -> bool:
        """Whether a pin or a leftover is so old that its process must be dead."""
        return now is not None and item.modified is not None and now - item.modified >= self._stale_seconds

    def _give_up_stale(self, pins: Iterable[Pin]) -> set[str]:
        """Abort saves without a heartbeat; return the keys of their refs."""
        now = self._server_time()
        given_up: set[str] = set()
        for pin in pins:
            if not self._is_stale(pin, now):
                continue
            log.warning("giving up the save of step %d in run %r: no heartbeat", pin.name.step, pin.run)
            if create_once(self._backend, pin.ref_key, Tombstone.ABORTED.value) is not None:
                self.needs(pin.ref_key)  # it was committed just before: from here on its objects count as needed
            given_up.add(pin.ref_key)
        return given_up

    def _server_time(self) -> float | None:
        """Return the server's time: that of a key put a moment ago, or of one put for this purpose."""
        fresh, self._fresh = self._fresh, None
        if fresh is not None:
            try:
                return self._backend.head(fresh).modified
            except KeyNotFoundError:
                pass  # pruned by a successor
        key = f"{PROBES}{new_nonce()}"
        self._backend.put(key, b"what time is it?")
        try:
            modified = self._backend.head(key).modified
        except KeyNotFoundError:
            return None  # another collector took it for a leftover; the next turn asks again
        self._backend.delete([key])
        return modified


def _run_of(ref_key: str) -> str:
    return ref_key.split("/")[1]


def _age(item: Entry | Pin | Leftover, now: float) -> float:
    """Return the seconds since `item` changed; infinite if the server does not say."""
    return math.inf if item.modified is None else now - item.modified


def _removals(reason: Reason, items: Iterable[Entry | Pin | Leftover], now: float | None) -> Iterator[Removal]:
    for item in items:
        name = item.name if isinstance(item, Leftover) else item.key
        age = None if now is None or item.modified is None else now - item.modified
        yield Removal(name, reason, item.size if isinstance(item, Entry) else None, age)
