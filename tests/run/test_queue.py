"""Saves in the background: every future resolves and every wait ends, whatever is cancelled, interrupted or exiting."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import incckpt
from incckpt.errors import ManagerClosedError, SaveError
from incckpt.run.queue import BackgroundQueue
from incckpt.threads import Future
from tests.forks import exit_code, fork, forks
from tests.programs import run_script

pytestmark = pytest.mark.slow


class Gate:
    """A part of a state whose ``state_dict`` lets the test act in the middle of a save."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def state_dict(self) -> dict[str, int]:
        self.action()
        return {"x": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take nothing."""


# -- the queue by itself


def test_jobs_of_many_threads_are_done_in_order() -> None:
    queue = BackgroundQueue(3, "test")
    done: list[tuple[int, int]] = []
    turn = threading.Lock()

    def put(thread: int) -> None:
        for number in range(50):
            with turn:
                queue.wait_for_room()
                queue.put(partial(done.append, (thread, number)), Future())
            if number % 7 == thread:
                queue.wait()
                assert (thread, number) in done

    threads = [threading.Thread(target=put, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.stop()
    assert len(done) == 200
    for thread_number in range(4):
        assert [number for thread, number in done if thread == thread_number] == list(range(50))


def test_a_queue_without_jobs_has_no_thread() -> None:
    before = threading.active_count()
    queue = BackgroundQueue(1, "test")
    queue.put(lambda: None, Future())
    queue.wait()
    for thread in threading.enumerate():
        if thread.name == "test":
            thread.join()
    assert threading.active_count() == before


def test_a_stopped_queue_takes_nothing() -> None:
    queue = BackgroundQueue(1, "test")
    queue.stop()
    with pytest.raises(ManagerClosedError, match="closed while a save was being made"):
        queue.put(lambda: None, Future())
    queue.wait()


# -- futures


def test_cancelling_has_no_effect(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path) as manager:
        futures = [manager.save(step, {"step": step}) for step in (1, 2, 3)]
        assert [future.cancel() for future in futures] == [False] * 3
    assert [future.result().step for future in futures] == [1, 2, 3]
    assert incckpt.load(tmp_path) == {"step": 3}


def test_a_future_can_be_awaited_and_given_up(tmp_path: Path) -> None:
    reading = threading.Event()

    async def train(manager: incckpt.CheckpointManager) -> None:
        saved = asyncio.wrap_future(manager.save(1, {"step": 1}))
        assert (await saved).step == 1
        manager.save(2, {"step": 2}).add_done_callback(lambda _: reading.wait())
        given_up = manager.save(3, {"step": 3})
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(given_up), 0.01)
        assert not given_up.done()
        reading.set()

    with incckpt.CheckpointManager(tmp_path) as manager:
        asyncio.run(train(manager))
    assert incckpt.load(tmp_path) == {"step": 3}


@pytest.mark.parametrize("call", ["wait", "save", "restore", "close"])
def test_a_callback_that_would_wait_for_itself(tmp_path: Path, call: str) -> None:
    """It is told so, whether the main thread is in a call or not."""
    manager = incckpt.CheckpointManager(tmp_path)
    ready = threading.Event()
    raised: list[Exception] = []

    def callback(_: object) -> None:
        ready.wait()
        calls: dict[str, Callable[[], object]] = {
            "wait": manager.wait,
            "save": lambda: manager.save(3, {"x": 3}),
            "restore": lambda: manager.restore({"x": 3}),
            "close": manager.close,
        }
        try:
            calls[call]()
        except SaveError as error:
            raised.append(error)

    manager.save(1, {"gate": Gate(lambda: None)}).add_done_callback(callback)
    pending = manager.save(2, {"x": 2})
    ready.set()
    manager.close()
    assert pending.result().step == 2
    assert len(raised) == 1


# -- calls at the same time


def test_closing_during_another_threads_save(tmp_path: Path) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def meet() -> None:
        inside.set()
        go_on.wait()

    manager = incckpt.CheckpointManager(tmp_path)
    saving = threading.Thread(target=manager.save, args=(1, {"gate": Gate(meet)}))
    saving.start()
    inside.wait()
    closing = threading.Thread(target=manager.close)
    closing.start()
    go_on.set()
    saving.join()
    closing.join()
    assert incckpt.load(tmp_path) == {"gate": {"x": 1}}
    with pytest.raises(ManagerClosedError):
        manager.save(2, {})


@pytest.mark.parametrize("call", ["save", "restore", "close"])
def test_a_call_in_a_signal_handler_during_a_save(tmp_path: Path, call: str) -> None:
    manager = incckpt.CheckpointManager(tmp_path)
    calls = {"save": lambda: manager.save(2, {}), "restore": lambda: manager.restore({}), "close": manager.close}
    previous = signal.signal(signal.SIGUSR1, lambda *_: calls[call]())
    try:
        with pytest.raises(SaveError, match="by a signal handler"):
            manager.save(1, {"gate": Gate(lambda: signal.raise_signal(signal.SIGUSR1))})
    finally:
        signal.signal(signal.SIGUSR1, previous)
    manager.save(1, {"x": 1})
    manager.close()
    assert incckpt.load(tmp_path) == {"x": 1}


@forks
def test_a_forked_childs_wait_ends(tmp_path: Path) -> None:
    saved = threading.Event()
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"x": 1}).add_done_callback(lambda _: saved.wait())
        manager.save(2, {"x": 2})

        def child() -> None:
            manager.wait()
            with pytest.raises(ManagerClosedError, match="forked"):
                manager.save(3, {})
            manager.close()

        assert exit_code(fork(child)) == 0
        saved.set()
    assert incckpt.load(tmp_path) == {"x": 2}


# -- interruptions and exits


def test_ctrl_c_as_the_thread_is_started(tmp_path: Path) -> None:
    script = """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in what it runs with `&`
    def at(frame, event, argument):
        if event == "call" and frame.f_code is incckpt.threads.start.__code__:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)
    try:
        with M(d) as m:
            sys.setprofile(at)
            m.save(1, {"w": torch.zeros(3)})
    except KeyboardInterrupt:
        print("interrupted")
    """
    assert run_script(script, tmp_path) == "interrupted\n"
    assert incckpt.save({"x": 1}, tmp_path).step in (0, 2)


def test_where_no_thread_can_be_started(tmp_path: Path) -> None:
    script = """
    def refuse(thread):
        raise RuntimeError("can't start new thread")
    threading.Thread.start = refuse
    with M(d) as m:
        for step in range(3):
            assert m.save(step, {"w": torch.full((1 << 21,), float(step))}).result().step == step
    print(incckpt.load(d)["w"][0].item())
    """
    assert run_script(script, tmp_path) == "2.0\n"


def test_a_thread_that_trains_on_after_the_main_thread(tmp_path: Path) -> None:
    script = """
    def train():
        threading.main_thread().join()
        m = M(d)
        for step in range(3):
            m.save(step, {"w": torch.full((1 << 21,), float(step))})
        print(m.save(3, {"w": torch.zeros(1)}).result().step, flush=True)
        m.save(4, {"w": torch.zeros(1)})
    threading.Thread(target=train).start()
    """
    assert run_script(script, tmp_path) == "3\n"
    assert [checkpoint.step for checkpoint in incckpt.CheckpointManager(tmp_path, read_only=True).checkpoints()] == [
        *range(5)
    ]


def test_a_manager_used_on_by_a_thread_after_the_main_thread(tmp_path: Path) -> None:
    script = """
    m = M(d)
    m.save(0, {"w": torch.zeros(1 << 21)})
    def train():
        threading.main_thread().join()
        m.save(1, {"w": torch.ones(1 << 21)}).result()
        m.close()
        print("closed", flush=True)
    threading.Thread(target=train).start()
    """
    assert run_script(script, tmp_path) == "closed\n"
    assert incckpt.load(tmp_path)["w"][0] == 1


def test_a_save_in_atexit(tmp_path: Path) -> None:
    script = """
    m = M(d)
    m.save(0, {"w": torch.zeros(1 << 21)})
    def last():
        print(m.save(1, {"w": torch.ones(1 << 21)}).result().step, flush=True)
        m.close()
        incckpt.save({"x": 1}, d, run="other")
    atexit.register(last)
    """
    assert run_script(script, tmp_path) == "1\n"
    assert incckpt.load(tmp_path)["w"][0] == 1
    assert incckpt.load(tmp_path, run="other") == {"x": 1}


def test_pending_saves_are_made_at_exit(tmp_path: Path) -> None:
    run_script("m = M(d)\nfor step in range(2): m.save(step, {'w': torch.zeros(1 << 20), 'step': step})", tmp_path)
    assert incckpt.load(tmp_path, keys="step") == {"step": 1}


@pytest.mark.parametrize("shown", [None, True])
def test_progress_without_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: bool | None) -> None:
    incckpt.save({"x": torch.zeros(10)}, tmp_path)
    logging.disable(logging.CRITICAL)
    monkeypatch.setattr(sys, "stderr", None)
    try:
        incckpt.load(tmp_path, progress=shown)
        with incckpt.CheckpointManager(tmp_path, read_only=True) as reader:
            assert reader.restore({"x": torch.zeros(10)}, progress=shown) == 0
        assert incckpt.verify(tmp_path, progress=shown)
    finally:
        logging.disable(logging.NOTSET)
