"""What `incckpt.save` keeps from one call to the next: the attempts at the few runs that it saved to last.

A session only saves time. A call that finds one gives the same checkpoint as a call in a new process: the URL is looked
up anew, options other than the session's make another, and so does a store that is no longer the one it was. Between
calls a session has no threads and no buffers, and no more than `_MOST` are kept.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from incckpt.backends.base import Backend
from incckpt.backends.registry import open_backend
from incckpt.errors import BackendError, BackendPermissionError, OptionError, SaveError, StateError, StoreNotFoundError
from incckpt.options import checked_mapping
from incckpt.run.attempt import Attempt, IfExists, Origin
from incckpt.run.checkpoint import Checkpoint
from incckpt.run.report import SaveReport
from incckpt.run.snapshot import Snapshot
from incckpt.staging.baseline import live_contents
from incckpt.staging.detect import default_threads
from incckpt.staging.layout import DEFAULT_CHUNK_BYTES, Layout
from incckpt.staging.packed import PackedStage
from incckpt.state.flatten import FlatState
from incckpt.store.store import Store
from incckpt.threads import shielded

__all__ = ["save_state"]

log = logging.getLogger(__name__)

_MOST = 4

_Key = tuple[str, str]  # place of the store, name of the run


class Session:
    """An attempt at a run, for saves whose callers wait until they are durable.

    Parameters
    ----------
    backend
        Of the store; closed with the session.
    run
        Name of the run.
    options
        The storage options that the backend was made with.
    """

    def __init__(self, backend: Backend, run: str, options: object) -> None:
        self.options = options
        self.store = Store(backend)
        try:
            self.store.create()
        except BaseException:
            backend.close()
            raise
        self._run = run
        self._attempt: Attempt | None = None
        self.urls: set[str] = set()

    def _started_or_new(self) -> Attempt:
        """Return the attempt; until it has started, one that knows what the run holds now."""
        if self._attempt is None or not self._attempt.number:
            origin = Origin.latest(self.store.run(self._run).lineage())
            self._attempt = Attempt(self.store, self._run, origin, threads=default_threads())
        return self._attempt

    def save(
        self, flat: FlatState, step: int | None, metrics: Mapping[str, float], if_exists: IfExists = "error"
    ) -> Checkpoint:
        """Write a checkpoint; its memory is copied while it is written, a part at a time."""
        attempt = self._started_or_new()
        if step is None:
            attempt.start()
            step = 0 if attempt.last_step is None else attempt.last_step + 1
        if if_exists == "skip" and (existing := attempt.existing(step)) is not None:
            return Checkpoint.of(self._run, existing)
        attempt.check_step(step, if_exists)
        layout = Layout.of(flat.sizes, flat.kinds, DEFAULT_CHUNK_BYTES)
        contents = live_contents(flat, layout)
        packed = PackedStage(DEFAULT_CHUNK_BYTES, keep=False).stage(flat.packed)
        now = time.time()
        snapshot = Snapshot.of(step, metrics, now, flat.structure, flat.tensors, layout, contents, packed=packed)
        return Checkpoint.of(self._run, attempt.write(snapshot, SaveReport(step=step), if_exists))

    def interrupt(self) -> None:
        """End a save under way in another thread early."""
        if self._attempt is not None:
            self._attempt.interrupt()

    def rest(self) -> None:
        """Let go of threads and buffers until the next save."""
        if self._attempt is not None:
            self._attempt.close()

    def close(self) -> None:
        """Let go of connections, too."""
        self.rest()
        self.store.close()


class Sessions:
    """The sessions of this process; one thread at a time uses each.

    Parameters
    ----------
    most
        Sessions kept; the least recently used is closed first.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self.reset()

    def reset(self) -> None:
        """Begin without sessions."""
        self._changed = threading.Condition()
        self._idle: OrderedDict[_Key, Session] = OrderedDict()
        self._busy: dict[_Key, int] = {}  # thread by session in use

    def save(
        self,
        url: str,
        run: str,
        options: Mapping[str, Any] | None,
        flat: FlatState,
        step: int | None,
        metrics: Mapping[str, float],
        if_exists: IfExists = "error",
    ) -> Checkpoint:
        """Save to a run, in the session for it or a new one; return when it is durable.

        Raises
        ------
        OptionError, SupersededError, BackendError
        """
        used: list[Session] = []
        save = partial(self._save, used, url, run, options, flat, step, metrics, if_exists)

        def interrupt() -> None:
            for session in used:
                session.interrupt()

        return shielded(save, interrupt)

    def _save(
        self,
        used: list[Session],
        url: str,
        run: str,
        options: Mapping[str, Any] | None,
        flat: FlatState,
        step: int | None,
        metrics: Mapping[str, float],
        if_exists: IfExists,
    ) -> Checkpoint:
        """Do what `save` does, and add the sessions that it uses to `used`."""
        wanted = _frozen(checked_mapping("storage_options", options))
        place = self._place_of_url(url, run, wanted)
        backend = None
        if place is None:
            backend = open_backend(url, options)
            place = backend.place
        key = (place, run)
        with self._alone(key, url):
            session = self._take(key, wanted)
            if session is not None:
                if backend is not None:
                    backend.close()
                    backend = None
                used.append(session)
                try:
                    return self._use(key, url, session, flat, step, metrics, if_exists)
                except StoreNotFoundError as error:
                    log.warning("starting afresh at %s: %s", session.store.backend.url, error)
            session = Session(backend or open_backend(url, options), run, wanted)
            used.append(session)
            self._close_others(session, run)
            return self._use(key, url, session, flat, step, metrics, if_exists)

    def _use(
        self,
        key: _Key,
        url: str,
        session: Session,
        flat: FlatState,
        step: int | None,
        metrics: Mapping[str, float],
        if_exists: IfExists,
    ) -> Checkpoint:
        """Save in a session, and keep it unless it fails in a way that makes it useless."""
        keep = False
        try:
            checkpoint = session.save(flat, step, metrics, if_exists)
            keep = True
        except (StateError, OptionError, BackendError) as error:
            keep = not isinstance(error, BackendPermissionError)  # other credentials may be found next time
            raise
        finally:
            if keep:
                session.rest()
                if "://" in url:
                    session.urls.add(url)
                self._keep(key, session)
            else:
                session.close()
        return checkpoint

    def _place_of_url(self, url: str, run: str, options: object) -> str | None:
        """Return where `url` leads if an idle session was opened with it; paths are looked up every time."""
        if "://" not in url or url.startswith("file:"):
            return None
        with self._changed:
            for (place, name), session in self._idle.items():
                if name == run and url in session.urls and session.options == options:
                    return place
        return None

    @contextmanager
    def _alone(self, key: _Key, url: str) -> Iterator[None]:
        """Wait until no other thread uses the session."""
        me = threading.get_ident()
        with self._changed:
            if self._busy.get(key) == me:
                raise SaveError(f"a save to {url!r} from within a save to it; save to another run, or afterwards")
            self._changed.wait_for(lambda: key not in self._busy)
            self._busy[key] = me
        try:
            yield
        finally:
            with self._changed:
                del self._busy[key]
                self._changed.notify_all()

    def _take(self, key: _Key, options: object) -> Session | None:
        with self._changed:
            session = self._idle.pop(key, None)
        # A link may lead elsewhere by now: what counts is where it leads today.
        if session is not None and (session.options != options or session.store.backend.place != key[0]):
            session.close()
            return None
        return session

    def _keep(self, key: _Key, session: Session) -> None:
        with self._changed:
            self._idle[key] = session
            surplus = [self._idle.popitem(last=False)[1] for _ in range(len(self._idle) - self._most)]
        for one in surplus:
            one.close()

    def _close_others(self, session: Session, run: str) -> None:
        """Close idle sessions for the same run of the same store: the new one's attempt has superseded theirs."""
        with self._changed:
            others = [key for key, one in self._idle.items() if key[1] == run and one.store.id == session.store.id]
            superseded = [self._idle.pop(key) for key in others]
        for one in superseded:
            one.close()


def _frozen(value: object) -> object:
    """Return `value` with copies of its dicts and lists, to compare with later."""
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_frozen(item) for item in value]
    return value


_sessions = Sessions()
_inherited: list[object] = []  # the parent's sessions, in a forked child: to finalise them could cut its connections


def _forked() -> None:
    _inherited.append(dict(vars(_sessions)))
    _sessions.reset()  # with a new lock: the thread that held the old one is not in this process


os.register_at_fork(after_in_child=_forked)

save_state = _sessions.save
