"""Interrupt calls at chosen instants, and check after each that nothing hangs, nothing is lost and the next save works.

Usage: python -m tests.children.interrupted CALLS HOWS FIRST STRIDE URL [S3-ENDPOINT]

CALLS are keys of `CALLS`, with commas; all if empty. HOWS are, with commas, ``exception`` (KeyboardInterrupt) and
``handler``: a signal whose handler saves to the manager in the middle of a call, and to another run of the store.

An instant is a call or return of a Python function, or the return of one written in C, in the main thread: the
interpreter looks for signals there. Left out are those inside functions that have nothing to do with the state of this
library or of its threads, and those whose innermost `DEPTH` frames stand where those of an earlier one stood. Every
STRIDE-th of the others from the FIRST is tried, with a manager of its own, until none is left. Prints where each is, so
that the last line tells which one hung, and after each call ``done`` with what came of them. The interpreter exits with
a manager that has a save pending and was never closed.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import Any

import aiobotocore.session
import torch

import incckpt
from incckpt.errors import ManagerClosedError, OptionError, SaveError
from incckpt.run import queue

DEPTH = 5
SECONDS = 60.0  # for one instant, on a busy machine; more is a hang
PER_RUN = 8  # instants in one run, whose attempts add up
EVENTS = frozenset({"call", "return", "c_return"})
INSIDE = re.compile(r"/(incckpt|concurrent|asyncio|fsspec|logging)/|/(threading|contextlib|weakref|queue)\.py$")

Manager = incckpt.CheckpointManager
Saved = Future[incckpt.Checkpoint]


class Series:
    """Instants of one call, one after the other."""

    def __init__(self, name: str, how: str, first: int, stride: int, url: str, options: dict[str, Any] | None) -> None:
        self.name = name
        self.how = how
        self.url = url
        self.options = options
        self.run = ""
        self.step = 0
        self.announced = 0  # the last step whose future resolved
        self.outcomes: Counter[str] = Counter()
        self.futures: list[Saved] = []
        self.manager: Manager | None = None
        self.handled = False
        self.seen: set[int] = set()
        self.until_next = first
        self.stride = stride

    def state(self) -> dict[str, Any]:
        """Return a state that tells the step which it was made for."""
        model = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(model.weight, self.step)
        return {"w": torch.full((1000,), float(self.step)), "model": model, "step": self.step, "log": ["x"] * 9}

    def new_manager(self) -> Manager:
        return Manager(self.url, run=self.run, threads=2, keep_last_n=3, max_pending=1, storage_options=self.options)

    def save(self) -> Saved:
        assert self.manager is not None
        self.step += 1
        future = self.manager.save(self.step, self.state())
        self.futures.append(future)
        return future

    def begin_run(self, number: int) -> None:
        """Go on in a new run."""
        self.run = f"{self.how}-{self.name}{number}"
        with self.new_manager() as self.manager:
            for _ in range(3):
                self.announced = self.save().result(SECONDS).step

    # -- one instant

    def interrupted(self) -> bool:
        """Interrupt the call at the next instant, and check; return whether there was one."""
        self.futures.clear()
        self.handled = False
        self.manager = None if self.name == "create" else self.new_manager()
        if self.name in ("next", "wait", "close"):
            self.save()
        reached = self.call()
        if self.manager is not None:
            self.check_manager(self.manager)
        self.check_store()
        return reached

    def call(self) -> bool:
        reached = False

        def profile(frame: FrameType, event: str, argument: object) -> None:
            nonlocal reached
            if event in EVENTS and INSIDE.search(frame.f_code.co_filename) and self.is_next(frame, event):
                sys.setprofile(None)
                reached = True
                print(event, frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname, flush=True)
                signal.raise_signal(signal.SIGINT if self.how == "exception" else signal.SIGUSR1)

        call = CALLS[self.name]
        try:
            sys.setprofile(profile)
            call(self)
        except KeyboardInterrupt:
            self.outcomes["interrupted"] += 1
        except SaveError as error:
            self.outcomes[f"call: {error}"] += 1
        except (OptionError, ManagerClosedError) as error:
            assert self.handled  # and the handler has saved that step, or closed
            self.outcomes[f"call: {error}"[:50]] += 1
        else:
            self.outcomes["finished"] += reached
        finally:
            sys.setprofile(None)
        return reached

    def is_next(self, frame: FrameType | None, event: str) -> bool:
        """Say whether an instant is the next to be tried."""
        place: list[object] = [event]
        for _ in range(DEPTH):
            if frame is None:
                break
            place += (frame.f_code, frame.f_lasti)
            frame = frame.f_back
        key = hash(tuple(place))
        if key in self.seen:
            return False
        self.seen.add(key)
        if self.until_next:
            self.until_next -= 1
            return False
        self.until_next = self.stride - 1
        return True

    def handle(self, *_: object) -> None:
        """Save from a signal handler."""
        assert not self.handled
        self.handled = True
        if self.manager is not None:
            try:
                self.save()
            except SaveError as error:
                self.outcomes[f"handler: {error}"] += 1
            except ManagerClosedError as error:
                assert self.name == "close"
                self.outcomes[f"handler: {error}"] += 1
            else:
                self.outcomes["handler saved"] += 1
        incckpt.save(self.state(), self.url, run=f"handler{self.run}", storage_options=self.options)

    def check_manager(self, manager: Manager) -> None:
        """Check that its saves end, that another works, and that it can be left."""
        manager.wait()
        try:
            with manager:
                try:
                    self.save().result(SECONDS)
                except SaveError as error:  # once, about an earlier save
                    self.outcomes[f"next save: {error}"] += 1
                    self.save().result(SECONDS)
        except ManagerClosedError:
            assert self.name == "close"
        manager.close()
        for future in self.futures:
            if future.exception(SECONDS) is None:
                self.announced = max(self.announced, future.result().step)
            else:
                self.outcomes[f"future: {future.exception()!r}"] += 1

    def check_store(self) -> None:
        """Check that what was announced restores, and that another manager saves."""
        self.manager = self.new_manager()
        with self.manager as successor:
            state = self.state()
            restored = successor.restore(state)
            assert restored is not None
            assert restored >= self.announced, (restored, self.announced)
            assert state["step"] == restored
            assert (state["w"] == restored).all()
            assert (state["model"].weight == restored).all()
            self.announced = self.save().result(SECONDS).step

    def check_process(self, files: int) -> None:
        """Check that nothing is left: no thread, no file, no job."""
        self.manager = None
        self.futures.clear()
        gc.collect()
        for thread in threading.enumerate():
            if thread.name.startswith("incckpt"):
                assert thread.ident is not None, f"{thread} was never started"
                thread.join(SECONDS)
                assert not thread.is_alive(), thread
        assert len(os.listdir("/proc/self/fd")) <= files + 8
        assert all(one.idle for one in queue._queues)
        if "://" not in self.url:
            assert not list(Path(self.url).rglob(".incckpt-tmp-*"))
        assert incckpt.verify(self.url, run=self.run, storage_options=self.options)


def _create(series: Series) -> None:
    series.manager = series.new_manager()


def _api_save(series: Series) -> None:
    incckpt.save(series.state(), series.url, run=f"api{series.run}", storage_options=series.options)


def _call(method: Callable[[Series, Manager], object]) -> Callable[[Series], object]:
    def call(series: Series) -> None:
        assert series.manager is not None
        method(series, series.manager)

    return call


CALLS: dict[str, Callable[[Series], object]] = {
    "first": Series.save,  # of a manager: it takes the run over
    "next": Series.save,  # with one pending, for whose end it waits
    "restore": _call(lambda series, manager: manager.restore(series.state())),
    "load": _call(lambda series, manager: manager.load()),
    "delete": _call(lambda series, manager: manager.delete(series.announced - 1)),
    "wait": _call(lambda series, manager: manager.wait()),
    "close": _call(lambda series, manager: manager.close()),
    "create": _create,
    "api_save": _api_save,
    "api_load": lambda series: incckpt.load(series.url, run=series.run, storage_options=series.options),
}


def main() -> None:
    """Try the instants."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    names, hows, first, stride, url, *endpoint = sys.argv[1:]
    options = None
    if endpoint:
        session = aiobotocore.session.AioSession()
        options = {"key": "test", "secret": "testtest", "endpoint_url": endpoint[0], "session": session}
    chosen = names.split(",") if names else list(CALLS)
    each = [(name, how) for how in hows.split(",") for name in chosen]
    series = [Series(name, how, int(first), int(stride), url, options) for name, how in each]
    for one in series:
        signal.signal(signal.SIGUSR1, one.handle)
        run_series(one)
    left = series[-1]
    left.manager = left.new_manager()
    left.save()


def run_series(series: Series) -> None:
    """Try the instants of one call, and print what came of them."""
    faulthandler.dump_traceback_later(SECONDS * 2, exit=True)
    series.begin_run(0)
    incckpt.save(series.state(), series.url, run="handler", storage_options=series.options)
    count, files = 0, len(os.listdir("/proc/self/fd"))
    while series.interrupted():
        faulthandler.dump_traceback_later(SECONDS * 2, exit=True)
        count += 1
        if count % PER_RUN == 0:
            series.check_process(files)
            series.begin_run(count)
    series.check_process(files)
    faulthandler.cancel_dump_traceback_later()
    outcomes = {"call": series.name, "by": series.how, "places": len(series.seen), "instants": count, **series.outcomes}
    print("done", json.dumps(outcomes), flush=True)


if __name__ == "__main__":
    main()
