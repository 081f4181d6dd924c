"""Signals: noted, passed on, and given back; nothing else is done in the handler."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import incckpt
from incckpt.errors import OptionError
from tests.forks import exit_code, fork, forks
from tests.programs import run_script


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def sent(number: int = signal.SIGUSR1) -> None:
    os.kill(os.getpid(), number)
    signal.sigpending()  # a call, between which and the next the handler runs


def test_a_signal_is_noted_passed_on_and_given_back(tmp_path: Path) -> None:
    passed: list[int] = []
    noticed = threading.Event()
    notices: list[incckpt.Notice] = []

    def on_notice(notice: incckpt.Notice) -> None:
        notices.append(notice)
        noticed.set()

    def before(number: int, frame: Any) -> None:
        passed.append(number)

    signal.signal(signal.SIGUSR1, before)
    preemption = incckpt.Preemption(signals=[signal.SIGUSR1], grace=20, margin=2, on_notice=on_notice)
    with incckpt.CheckpointManager(tmp_path, preemption=preemption) as manager:
        assert not manager.preempted
        assert manager.deadline is None
        start = time.monotonic()
        sent()
        assert manager.preempted
        assert manager.deadline is not None
        assert start + 17 < manager.deadline <= time.monotonic() + 18
        deadline = manager.deadline
        sent()
        assert manager.deadline == deadline, "the end does not move away"
        assert noticed.wait(30)
        assert notices[0].source == "SIGUSR1"
        manager.save(1, {"w": torch.ones(3)})
    assert passed == [signal.SIGUSR1] * 2
    assert signal.getsignal(signal.SIGUSR1) is before
    assert incckpt.load(tmp_path)["w"].equal(torch.ones(3))


@forks
@pytest.mark.parametrize("before", ["default", "handler"])
def test_a_forked_process_is_ended_as_if_nobody_watched(tmp_path: Path, before: str) -> None:
    """`multiprocessing.Pool` ends its processes by SIGTERM, and waits for them."""
    signal.signal(signal.SIGUSR1, signal.SIG_DFL if before == "default" else lambda *_: os._exit(7))
    preemption = incckpt.Preemption(signals=[signal.SIGUSR1])
    with incckpt.CheckpointManager(tmp_path, preemption=preemption) as manager:

        def child() -> None:
            sent()
            os._exit(1)

        code = exit_code(fork(child))
        assert code == (-signal.SIGUSR1 if before == "default" else 7), "the signal did nothing"
        assert not manager.preempted


@forks
def test_a_forked_process_watches_for_itself(tmp_path: Path) -> None:
    preemption = incckpt.Preemption(signals=[signal.SIGUSR1])
    with incckpt.CheckpointManager(tmp_path / "parent", preemption=preemption) as manager:
        sent()
        assert manager.preempted

        def child() -> None:
            with incckpt.CheckpointManager(tmp_path / "child", preemption=preemption) as own:
                assert not own.preempted
                sent()
                assert own.preempted

        assert exit_code(fork(child)) == 0


def test_one_that_was_closed_in_another_thread_can_be_used_again(tmp_path: Path) -> None:
    preemption = incckpt.Preemption(signals=[signal.SIGUSR1])
    manager = incckpt.CheckpointManager(tmp_path, preemption=preemption)
    closing = threading.Thread(target=manager.close)
    closing.start()
    closing.join()
    with incckpt.CheckpointManager(tmp_path, preemption=preemption) as manager:
        sent()
        assert manager.preempted


@pytest.mark.parametrize("late", [1, 3600, 1e9])
def test_a_notice_whose_time_has_passed_leaves_the_grace(tmp_path: Path, late: float) -> None:
    """The clock of one of the two is wrong, or the end is late; to give everything up would be the one sure loss."""
    preemption = incckpt.Preemption(signals=(), grace=20, margin=2)
    with incckpt.CheckpointManager(tmp_path, preemption=preemption) as manager:
        start = time.monotonic()
        preemption.announce(incckpt.Notice("test", time.time() - late, "the machine goes"))
        assert manager.deadline is not None
        assert start + 18 <= manager.deadline <= time.monotonic() + 18


def test_a_handler_that_came_later_stays(tmp_path: Path) -> None:
    def later(number: int, frame: Any) -> None:
        """Do nothing."""

    with incckpt.CheckpointManager(tmp_path, preemption=incckpt.Preemption(signals=[signal.SIGUSR1])):
        signal.signal(signal.SIGUSR1, later)
    assert signal.getsignal(signal.SIGUSR1) is later


def test_managers_that_share_one(tmp_path: Path) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    preemption = incckpt.Preemption(signals=[signal.SIGUSR1])
    with incckpt.CheckpointManager(tmp_path / "a", preemption=preemption) as first:
        with incckpt.CheckpointManager(tmp_path / "b", preemption=preemption) as second:
            pass
        sent()
        assert first.preempted
        assert second.preempted
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN


@pytest.mark.slow
def test_a_manager_that_is_dropped_is_freed_at_once(tmp_path: Path) -> None:
    manager = incckpt.CheckpointManager(tmp_path)
    manager.save(1, {"w": torch.ones(3)}).result()
    dropped = weakref.ref(manager), weakref.ref(manager._base)
    gc.collect()
    gc.disable()
    try:
        del manager
        assert [one() for one in dropped] == [None, None], "its copy of the state stays in memory"
    finally:
        gc.enable()


def test_off_unless_asked(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with incckpt.CheckpointManager(tmp_path) as manager:
        assert {number: signal.getsignal(number) for number in before} == before
        assert not manager.preempted


def test_the_main_thread_only(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def make() -> None:
        try:
            incckpt.CheckpointManager(tmp_path, preemption=True)
        except OptionError as error:
            errors.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"signals": ["TERM"]},
        {"signals": 15},
        {"signals": [signal.SIGKILL]},
        {"grace": -1},
        {"grace": "soon"},
        {"margin": float("nan")},
    ],
)
def test_arguments_that_are_unusable(arguments: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(arguments))):
        incckpt.Preemption(**arguments)


def test_an_option_that_is_unusable(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="preemption"):
        incckpt.CheckpointManager(tmp_path, preemption="yes")  # type: ignore[arg-type]


LOOP = """
    import time
    from incckpt.testing.faults import Fault, FaultyBackend, Pause
    from incckpt.backends.local import LocalBackend
    hang = Fault("put", "pins/*", nth=2, times=None, do=Pause(limit=3600))
    backend = FaultyBackend(LocalBackend(d), [hang] if sys.argv[2] == "hangs" else [])
    manager = M(backend, preemption=incckpt.Preemption(grace=3, margin=1))
    manager.save(1, {"w": torch.zeros(9)}).result()
    print("saved", flush=True)
    manager.save(2, {"w": torch.ones(9)})
    os.kill(os.getpid(), signal.SIGTERM)
    assert manager.preempted
    start = time.monotonic()
    try:
        manager.save(3, {"w": torch.full((9,), 3.0)})
        if sys.argv[3] == "close":
            manager.close()
    except incckpt.errors.DeadlineError as error:
        print(type(error).__name__)
    print("ends")
"""


@pytest.mark.slow
@pytest.mark.parametrize("leaves", ["close", "exit"])
@pytest.mark.parametrize("store", ["answers", "hangs"])
def test_a_process_ends_in_time_whatever_its_store_does(tmp_path: Path, store: str, leaves: str) -> None:
    output = run_script(LOOP, tmp_path, store, leaves).split()
    assert output[0] == "saved"
    assert output[-1] == "ends"
    assert ("DeadlineError" in output) == (store == "hangs" and leaves == "close")
    assert incckpt.list_checkpoints(tmp_path)[-1].step == (3 if store == "answers" else 1)
