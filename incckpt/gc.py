"""Collection: deleting the objects that no checkpoint needs, while any number of writers go on.

First condemn (put a list of keys), then look which saves in flight may not have seen the list, and only when those are
over read the refs again and delete what is still not needed. ``docs/safety.md`` says why this is enough.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from incckpt.backends.base import Backend
from incckpt.errors import CollectionError, FormatError, IncckptError
from incckpt.objects import DELTAS, OBJECTS, manifest_keys
from incckpt.refs import Pin, Ref, Tombstone, condemn, condemned_lists, create_once, list_pins, list_refs, new_nonce
from incckpt.store import Store

__all__ = ["STALE_SECONDS", "Collected", "Collector"]

log = logging.getLogger(__name__)

STALE_SECONDS = 3600.0


@dataclass
class Collected:
    """What a collection did.

    Attributes
    ----------
    deleted
        Keys of the objects deleted.
    waiting
        How many condemned keys wait for saves in flight to end.
    """

    deleted: set[str] = field(default_factory=set)
    waiting: int = 0


@dataclass
class _List:
    """An own condemned list, and the saves in flight that may not have seen it (``None``: not looked yet)."""

    keys: frozenset[str]
    blockers: frozenset[str] | None = None


class Collector:
    """Collects in one store. Keeps what it learned of immutable manifests, so that each is read once.

    Parameters
    ----------
    store
        To collect in.
    stale_seconds
        How long after its last heartbeat (by the server's clock) a save in flight is given up.
    """

    def __init__(self, store: Store, *, stale_seconds: float = STALE_SECONDS) -> None:
        self._store = store
        self._stale_seconds = stale_seconds
        self._needs: dict[str, frozenset[str]] = {}
        self._users: Counter[str] = Counter()  # how many refs need a key, as far as `_needs` goes
        self._lists: dict[str, _List] = {}
        self._looked = False

    @property
    def _backend(self) -> Backend:
        return self._store.backend

    def note(self, ref_key: str, keys: frozenset[str]) -> None:
        """Take note of what a ref needs, so that its manifest is not read again."""
        self._drop(ref_key)
        self._needs[ref_key] = keys
        self._users.update(keys)

    def _drop(self, ref_key: str) -> None:
        for key in self._needs.pop(ref_key, ()):
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]

    def needs(self, ref_key: str) -> frozenset[str]:
        """Return what the ref at `ref_key` needs: its manifest object and all that the manifest lists.

        Raises
        ------
        CollectionError
            If it cannot be found out.
        """
        known = self._needs.get(ref_key)
        if known is None:
            try:
                data = self._backend.get(ref_key)
                if any(data == tombstone.value for tombstone in Tombstone):
                    return frozenset()
                ref = Ref.from_json(data, ref_key)
                known = manifest_keys(self._store.manifest(ref)) | {ref.manifest}
            except FileNotFoundError as error:
                if not self._stands(ref_key):
                    return frozenset()  # pruned since it was listed
                raise self._refuse(ref_key, error) from error
            except IncckptError as error:
                raise self._refuse(ref_key, error) from error
            self.note(ref_key, known)
        return known

    def _stands(self, ref_key: str) -> bool:
        return any(
            entry.key == ref_key and entry.size > len(Tombstone.EXPIRED.value) for entry in self._backend.list(ref_key)
        )

    def _refuse(self, ref_key: str, error: Exception) -> CollectionError:
        advice = "update incckpt" if isinstance(error, FormatError) else "delete that checkpoint if it is lost"
        return CollectionError(
            f"nothing was collected at {self._backend.url}: what {ref_key} needs is not known ({error}); {advice}"
        )

    def condemn(self, doomed: Sequence[str]) -> None:
        """Condemn what, as far as is known, only the refs at `doomed` need; they may be expired right after.

        Raises
        ------
        CollectionError
            If a ref or manifest is unreadable.
        """
        if not self._looked:
            self._look()
        freed = Counter(key for ref_key in doomed for key in self.needs(ref_key))
        keys = frozenset(key for key, count in freed.items() if self._users[key] <= count)
        if keys:
            collection = new_nonce()
            condemn(self._backend, collection, keys)
            self._lists[collection] = _List(keys)

    def sweep(self, *, min_age: float = 0.0) -> Collected:
        """Collect in the whole store: what killed saves, killed collectors and lost pins have left, too.

        Parameters
        ----------
        min_age
            Leave objects younger than this, in seconds by the server's clock.
        """
        self._look()
        collection = new_nonce()
        condemn(self._backend, collection, ())
        now = self._backend.head(f"gc/{collection}/condemned").modified
        inherited = {name: keys for name, keys in condemned_lists(self._backend).items() if name not in self._lists}
        inherited.pop(collection, None)
        garbage: set[str] = set()
        there: set[str] = set()
        for space in (OBJECTS, DELTAS):
            for entry in self._backend.list(space):
                there.add(entry.key)
                old = now is None or entry.modified is None or now - entry.modified >= min_age
                if old and entry.key not in self._users:
                    garbage.add(entry.key)
        for keys in inherited.values():
            garbage.update(key for key in keys & there if key not in self._users)
        condemn(self._backend, collection, garbage)
        self._lists[collection] = _List(frozenset(garbage))
        collected = self.finish()
        self._remove_remains(inherited, there - collected.deleted)
        return collected

    def finish(self) -> Collected:
        """Delete what the own lists condemn and no checkpoint needs, as far as no save in flight may rely on it.

        Raises
        ------
        CollectionError
            If a ref or manifest is unreadable; nothing was deleted.
        """
        collected = Collected()
        if not self._lists:
            return collected
        pins = list_pins(self._backend)  # after every list was put
        existing = self._look()
        in_flight = {pin.ref_key for pin in pins if pin.ref_key not in existing}
        if in_flight:
            in_flight -= self._give_up_stale([pin for pin in pins if pin.ref_key in in_flight])
        done: list[str] = []
        for collection, own in self._lists.items():
            blockers = in_flight if own.blockers is None else own.blockers & in_flight
            own.blockers = frozenset(blockers)
            if blockers:
                collected.waiting += len(own.keys)
            else:
                collected.deleted.update(key for key in own.keys if key not in self._users)
                done.append(collection)
        if done:
            if collected.deleted:
                self._backend.delete(sorted(collected.deleted))
            self._backend.delete([f"gc/{collection}/condemned" for collection in done])
            for collection in done:
                del self._lists[collection]
        return collected

    def _look(self) -> set[str]:
        """List the refs of every run, learn what new ones need, and return the keys of all, tombstones included."""
        existing: set[str] = set()
        live: set[str] = set()
        for _, name, key, tombstone in list_refs(self._backend):
            if name is None:
                raise CollectionError(
                    f"nothing was collected at {self._backend.url}: {key} is not a ref that this version knows; "
                    "update incckpt"
                )
            existing.add(key)
            if not tombstone:
                live.add(key)
        for key in self._needs.keys() - live:
            self._drop(key)
        for key in live:
            self.needs(key)
        self._looked = True
        return existing

    def _give_up_stale(self, pins: Iterable[Pin]) -> set[str]:
        """Abort saves without a heartbeat; return the keys of their refs."""
        collection, own = next(iter(self._lists.items()))
        condemn(self._backend, collection, own.keys)  # put again for its time: now, by the server's clock
        now = self._backend.head(f"gc/{collection}/condemned").modified
        given_up: set[str] = set()
        for pin in pins:
            if now is None or pin.modified is None or now - pin.modified < self._stale_seconds:
                continue
            log.warning("giving up the save of step %d in run %r: no heartbeat", pin.name.step, pin.run)
            if create_once(self._backend, pin.ref_key, Tombstone.ABORTED.value).found is not None:
                self.needs(pin.ref_key)  # it was committed just before: from here on its objects count as needed
            given_up.add(pin.ref_key)
        return given_up

    def _remove_remains(self, inherited: Mapping[str, frozenset[str]], there: set[str]) -> None:
        """Remove lists none of whose keys exists, and pins whose saves are over."""
        spent = [f"gc/{name}/condemned" for name, keys in inherited.items() if not keys & there]
        existing = {key for _, _, key, _ in list_refs(self._backend)}
        spent += [pin.key for pin in list_pins(self._backend) if pin.ref_key in existing]
        if spent:
            self._backend.delete(spent)
