"""What happens to saves when a thread, a process or an interpreter ends; docs/lifecycle.md promises it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from textwrap import dedent

import pytest

import incckpt
from tests import programs
from tests.forks import PATIENCE
from tests.programs import run_script

pytestmark = pytest.mark.slow


def steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a store, after restoring the last one."""
    with incckpt.CheckpointManager(folder, read_only=True) as manager:
        found = [checkpoint.step for checkpoint in manager.checkpoints()]
    assert not found or incckpt.load(folder)["step"] == found[-1]
    return found


STATE = """
def state(step):
    return {"w": torch.full((1 << 20,), float(step)), "step": step}
"""


def test_sys_exit_with_saves_pending(tmp_path: Path) -> None:
    script = STATE + "m = M(d)\nfor step in range(2): m.save(step, state(step))\nsys.exit(3)"
    run_script(script, tmp_path, status=3)
    assert steps(tmp_path) == [0, 1]


def test_sys_exit_in_a_callback_ends_nothing(tmp_path: Path) -> None:
    """The callback is called in another thread than the main one, where `sys.exit` is an exception like another."""
    script = """
    with M(d) as m:
        future = m.save(0, state(0))
        future.add_done_callback(lambda _: sys.exit(3))
        future.result()
        print(m.save(1, state(1)).result().step)
    """
    assert run_script(STATE + dedent(script), tmp_path) == "1\n"
    assert steps(tmp_path) == [0, 1]


def test_os_exit_in_a_callback_keeps_what_was_announced(tmp_path: Path) -> None:
    script = """
    m = M(d)
    m.save(0, state(0)).add_done_callback(lambda _: os._exit(4))
    m.save(1, state(1))
    m.wait()
    """
    run_script(STATE + dedent(script), tmp_path, status=4)
    assert steps(tmp_path) == [0]
    with incckpt.CheckpointManager(tmp_path) as successor:
        assert successor.save(1, {"step": 1}).result().step == 1


def test_an_exception_with_saves_pending(tmp_path: Path) -> None:
    script = "with M(d) as m:\n    m.save(0, state(0))\n    raise SystemExit(5)"
    run_script(STATE + script, tmp_path, status=5)
    assert steps(tmp_path) == [0]


@pytest.mark.parametrize("last", ["", "del m", "del m; import gc; gc.collect()"])
def test_a_manager_dropped_without_close(tmp_path: Path, last: str) -> None:
    """Its pending saves are made; its thread ends."""
    script = f"""
    m = M(d)
    future = m.save(0, state(0))
    {last or "pass"}
    assert future.result().step == 0
    for thread in threading.enumerate():
        if thread.name.startswith("incckpt-save"):
            thread.join({PATIENCE})
            assert not thread.is_alive()
    """
    run_script(STATE + dedent(script), tmp_path)
    assert steps(tmp_path) == [0]


def test_a_daemon_thread_that_saves_as_the_interpreter_exits(tmp_path: Path) -> None:
    """The process ends, and what it saved can be restored. It may abort, if the thread is in torch's C++ code."""
    script = """
    import sys, threading, torch, incckpt
    M, d = incckpt.CheckpointManager, sys.argv[1]
    m, begun = M(d), threading.Event()
    saved = []
    def train():
        step = 0
        while True:
            m.save(step, state(step)).result()
            saved.append(step)
            begun.set()
            step += 1
    threading.Thread(target=train, daemon=True).start()
    begun.wait()
    print(saved[-1], flush=True)
    """
    done = programs.run("-c", STATE + dedent(script), tmp_path)
    if done.returncode != -signal.SIGABRT:
        assert done.returncode == 0, done.stderr
    else:
        assert done.stderr.strip() == "terminate called without an active exception"
    assert steps(tmp_path)[: int(done.stdout) + 1] == list(range(int(done.stdout) + 1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_and_its_parent_go_on(tmp_path: Path) -> None:
    """The child is refused and can be left; with a manager of its own it saves; the parent does not notice.

    The child makes no large tensors: OpenMP does not survive a fork.
    """
    script = f"""
    import warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    m = M(d)
    m.restore(state(0))
    pending = m.save(0, state(0))
    pid = os.fork()
    if not pid:
        signal.alarm({PATIENCE})
        m.wait()
        for call in (lambda: m.save(1, 0), lambda: m.restore([0]), lambda: m.delete(0)):
            try:
                call()
            except incckpt.errors.ManagerClosedError:
                pass
            else:
                os._exit(1)
        m.close()
        with M(d, run="child") as own:
            own.save(7, dict(step=7)).result()
        incckpt.save(dict(step=8), d, run="child")
        sys.exit(0)
    assert pending.result().step == 0
    m.save(1, state(1))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    m.close()
    """
    run_script(STATE + dedent(script), tmp_path)
    assert steps(tmp_path) == [0, 1]
    assert incckpt.load(tmp_path, run="child")["step"] == 8


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_by_multiprocessing_save(tmp_path: Path, method: str) -> None:
    if sys.platform == "win32" and method != "spawn":
        pytest.skip("there is no fork here")
    module = tmp_path / "training.py"
    module.write_text(
        dedent("""
        import multiprocessing, sys, warnings
        import torch, incckpt

        def train(url, run):
            with incckpt.CheckpointManager(url, run=run) as manager:
                manager.save(1, {"step": 1})

        if __name__ == "__main__":
            warnings.simplefilter("ignore", DeprecationWarning)
            context = multiprocessing.get_context(sys.argv[2])
            with incckpt.CheckpointManager(sys.argv[1]) as manager:
                manager.save(0, {"w": torch.zeros(1 << 20), "step": 0})
                children = [context.Process(target=train, args=(sys.argv[1], f"child{number}")) for number in range(2)]
                for child in children:
                    child.start()
                manager.save(1, {"w": torch.ones(1 << 20), "step": 1})
                for child in children:
                    child.join()
                    assert child.exitcode == 0
        """)
    )
    store = tmp_path / "store"
    done = programs.run(module, store, method)
    assert done.returncode == 0, done.stderr
    assert steps(store) == [0, 1]
    for number in range(2):
        assert incckpt.load(store, run=f"child{number}") == {"step": 1}


def test_asyncio_cancelled_while_a_save_is_awaited(tmp_path: Path) -> None:
    script = """
    import asyncio
    async def train():
        with M(d) as m:
            for step in range(3):
                awaited = asyncio.wrap_future(m.save(step, state(step)))
                if step == 1:
                    awaited.cancel()
                else:
                    assert (await awaited).step == step
    asyncio.run(train())
    """
    run_script(STATE + dedent(script), tmp_path)
    assert steps(tmp_path) == [0, 1, 2]


def test_ctrl_c_while_an_event_loop_saves(tmp_path: Path) -> None:
    script = """
    import asyncio
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in what it runs with `&`
    async def train(m):
        step = 0
        while True:
            saved = await asyncio.wrap_future(m.save(step, state(step)))
            step += 1
            if step == 3:
                signal.raise_signal(signal.SIGINT)
    try:
        with M(d) as m:
            asyncio.run(train(m))
    except KeyboardInterrupt:
        print("interrupted")
    """
    assert run_script(STATE + dedent(script), tmp_path) == "interrupted\n"
    assert steps(tmp_path)[:3] == [0, 1, 2]


def test_incckpt_save_in_a_signal_handler_during_incckpt_save(tmp_path: Path) -> None:
    """Both are made, one after the other."""
    script = """
    incckpt.save(state(0), d)
    signal.signal(signal.SIGALRM, lambda *_: print(incckpt.save(state(1), d).step))
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    steps = [incckpt.save(state(2), d).step for _ in range(3)]
    assert steps == sorted(steps)
    """
    assert run_script(STATE + dedent(script), tmp_path) in {"1\n", "2\n", "3\n", "4\n"}
