"""The manager from a trainer's side: saves in the background, restores in place, errors that reach the loop."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import incckpt
from incckpt.backends.memory import MemoryBackend
from incckpt.errors import (
    BackendError,
    BacklogFullError,
    CheckpointNotFoundError,
    CorruptionError,
    ManagerClosedError,
    OptionError,
    ReadOnlyError,
    SaveError,
    StateError,
    StateMismatchError,
    StoreNotFoundError,
    SupersededError,
)
from incckpt.run.scrub import LOOKS
from incckpt.staging.hostmem import HostPool
from incckpt.store.gc import Collector
from incckpt.store.store import Store
from incckpt.testing.faults import CountingBackend, Fail, Fault, FaultyBackend, Pause
from tests import programs
from tests.stores import orphans


def training_state(seed: int = 0) -> dict[str, Any]:
    """Return a model, its optimizer and scheduler after a few real steps, and the random number generators."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 600), torch.nn.GELU(), torch.nn.BatchNorm1d(600), torch.nn.Linear(600, 8)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    app = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "rng": incckpt.RngState(), "epoch": seed}
    train(app, 3)
    return app


def train(app: dict[str, Any], steps: int) -> float:
    """Train; return the last loss."""
    loss = torch.tensor(0.0)
    for _ in range(steps):
        inputs = torch.randn(16, 64)
        loss = app["model"](inputs).square().mean()
        app["optimizer"].zero_grad()
        loss.backward()
        app["optimizer"].step()
        app["scheduler"].step()
    return loss.item()


def assert_same(left: Any, right: Any, path: str = "state") -> None:
    """Check that two states are the same, bit for bit."""
    assert type(left) is type(right), path
    if isinstance(left, dict):
        assert list(left) == list(right), path
        for key in left:
            assert_same(left[key], right[key], f"{path}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{path}[{index}]")
    elif isinstance(left, torch.Tensor):
        assert (left.dtype, left.shape, left.stride()) == (right.dtype, right.shape, right.stride()), path
        same = (
            left.detach().contiguous().view(-1).view(torch.uint8),
            right.detach().contiguous().view(-1).view(torch.uint8),
        )
        assert torch.equal(*same), path
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype, path
        assert left.tobytes() == right.tobytes(), path
    elif hasattr(left, "state_dict"):
        assert_same(left.state_dict(), right.state_dict(), path)
    else:
        assert left == right, path


def test_a_real_training_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    app = training_state()
    with incckpt.CheckpointManager(tmp_path) as manager:
        assert manager.restore(app) is None
        manager.save(3, app, metrics={"loss": 1.0})
    losses = [train(app, 1) for _ in range(5)]

    other = training_state(seed=7)
    with incckpt.CheckpointManager(tmp_path) as manager:
        assert manager.restore(other) == 3
    assert other["epoch"] == 0
    assert [train(other, 1) for _ in range(5)] == losses
    assert_same(app["model"], other["model"])
    assert_same(app["optimizer"], other["optimizer"])
    assert_same(app["scheduler"], other["scheduler"])


def test_restoring_keeps_the_objects(tmp_path: Path) -> None:
    app = training_state()
    weight = app["model"][0].weight
    buffer = torch.zeros(5)
    app["buffer"] = buffer
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, app).result()
        with torch.no_grad():
            weight.add_(1)
            buffer.add_(1)
        manager.restore(app)
        assert app["model"][0].weight is weight
        assert app["buffer"] is buffer
        assert torch.equal(buffer, torch.zeros(5))


def test_the_first_save_after_a_restore_is_incremental(tmp_path: Path) -> None:
    state = {"big": torch.randn(3 << 20), "small": torch.randn(10)}
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, state).result()
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.restore(state)
        state["small"][0] = 7
        manager.save(2, state).result()
        report = manager.history[-1]
    assert report.changed_chunks == 1
    assert report.put_objects == 1
    assert report.put_bytes < 1000


def test_a_deferred_save_keeps_the_state_as_it_was(tmp_path: Path) -> None:
    """Lesson 2 of the seed: a save queued behind a pending one must not see later data, nor the earlier one's."""
    state = {"w": torch.zeros(2 << 20), "v": torch.zeros(100)}
    pause = Pause()
    backend = FaultyBackend(MemoryBackend(str(tmp_path)), [Fault("put", "objects/*", do=pause)])
    with incckpt.CheckpointManager(backend, max_pending=3) as manager:
        futures = []
        for step in (1, 2, 3):
            state["w"].fill_(step)
            state["v"].fill_(-step)
            futures.append(manager.save(step, state))
        state["w"].fill_(99)
        assert not futures[0].done()
        pause.resume.set()
        for step, future in zip((1, 2, 3), futures, strict=True):
            assert future.result().step == step
        with incckpt.CheckpointManager(backend.inner, read_only=True) as reader:
            for step in (1, 2, 3):
                target = {"w": torch.empty(2 << 20), "v": torch.empty(100)}
                reader.restore(target, step=step)
                assert (target["w"] == step).all()
                assert (target["v"] == -step).all()


def test_save_blocks_when_the_backlog_is_full(tmp_path: Path) -> None:
    pause = Pause()
    backend = FaultyBackend(MemoryBackend(str(tmp_path)), [Fault("put", "objects/*", do=pause)])
    state = {"w": torch.zeros(10)}
    with incckpt.CheckpointManager(backend, max_pending=2) as manager:
        first = manager.save(1, state)
        state["w"].fill_(2)
        manager.save(2, state)
        entered, returned = threading.Event(), threading.Event()

        def third() -> None:
            entered.set()
            manager.save(3, {"w": torch.ones(10)})
            returned.set()

        thread = threading.Thread(target=third)
        thread.start()
        assert entered.wait(10)
        assert pause.reached.wait(10)
        assert not first.done()
        assert not returned.is_set()
        pause.resume.set()
        thread.join(30)
        assert returned.is_set()


def test_a_full_backlog_can_skip(tmp_path: Path) -> None:
    pause = Pause()
    backend = FaultyBackend(MemoryBackend(str(tmp_path)), [Fault("put", "objects/*", do=pause)])
    with incckpt.CheckpointManager(backend, max_pending=1, on_backlog="skip") as manager:
        first = manager.save(1, {"w": torch.zeros(10)})
        skipped = manager.save(2, {"w": torch.ones(10)})
        assert isinstance(skipped.exception(), BacklogFullError)
        pause.resume.set()
        assert first.result().step == 1
        manager.wait()
        assert manager.save(2, {"w": torch.ones(10)}).result().step == 2


@pytest.mark.slow
@pytest.mark.parametrize("key", ["objects/*", "deltas/*", "refs/*", "pins/*"])
def test_a_failed_save_reaches_the_trainer_and_the_next_one_mends_it(tmp_path: Path, key: str) -> None:
    fault = Fault("*", key, times=4, do=Fail(BackendError("no space on the moon")))
    backend = FaultyBackend(MemoryBackend(str(tmp_path)))
    state = {"a": torch.randn(1 << 19), "b": torch.randn(1 << 19), "c": torch.randn(3)}
    with incckpt.CheckpointManager(backend) as manager:
        manager.save(1, state).result()
        backend.inner = FaultyBackend(backend.inner, [fault])
        state["b"][:10].add_(1)
        state["c"].add_(1)
        failed = manager.save(2, state)
        assert isinstance(failed.exception(), BackendError)
        with pytest.raises(SaveError, match="moon"):
            manager.save(3, state)
        backend.inner = backend.inner.inner
        assert manager.save(3, state).result().step == 3
        expected = {name: value.clone() for name, value in state.items()}
    with incckpt.CheckpointManager(MemoryBackend(str(tmp_path)), read_only=True) as reader:
        target = {name: torch.empty_like(value) for name, value in state.items()}
        assert reader.restore(target) == 3
        assert_same(target, expected)


def test_close_raises_a_failure_not_raised_yet(tmp_path: Path) -> None:
    backend = FaultyBackend(MemoryBackend(str(tmp_path)), [Fault("put", "objects/*", times=None)])
    manager = incckpt.CheckpointManager(backend)
    manager.save(1, {"w": torch.zeros(3)})
    with pytest.raises(SaveError):
        manager.close()
    manager.close()


def test_an_exception_in_the_loop_is_not_hidden(tmp_path: Path) -> None:
    backend = FaultyBackend(MemoryBackend(str(tmp_path)), [Fault("put", "objects/*", times=None)])
    with pytest.raises(ZeroDivisionError), incckpt.CheckpointManager(backend) as manager:  # noqa: PT012
        manager.save(1, {"w": torch.zeros(3)})
        raise ZeroDivisionError


@pytest.mark.slow
def test_the_interpreter_exits_with_saves_pending(tmp_path: Path) -> None:
    program = """
import sys, torch, incckpt
manager = incckpt.CheckpointManager(sys.argv[1])
for step in range(1, 4):
    manager.save(step, {"w": torch.full((3 << 20,), float(step))})
"""
    done = programs.run("-c", program, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for step in (1, 2, 3):
        assert (incckpt.load(tmp_path, step=step)["w"] == step).all()


def test_steps_must_grow(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.save(5, {"x": 1})
        with pytest.raises(OptionError, match="step 5 already"):
            manager.save(5, {"x": 1})
        with pytest.raises(OptionError, match="step must be an integer"):
            manager.save(-1, {"x": 1})
        with pytest.raises(OptionError, match="step must be an integer"):
            manager.save(6.0, {"x": 1})  # type: ignore[arg-type]
    with incckpt.CheckpointManager(tmp_path) as manager, pytest.raises(OptionError, match="Restore an earlier step"):
        manager.save(4, {"x": 1})
    with incckpt.CheckpointManager(tmp_path) as manager:
        assert manager.save(6, {"x": 2}).result().step == 6
    assert incckpt.load(tmp_path) == {"x": 2}


def test_going_back_abandons_what_came_after(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path) as manager:
        for step in (10, 20, 30):
            manager.save(step, {"x": step})
    app = {"x": 0}
    with incckpt.CheckpointManager(tmp_path) as manager:
        assert manager.restore(app, step=10) == 10
        assert app == {"x": 10}
        assert [c.step for c in manager.checkpoints()] == [10, 20, 30], "nothing is abandoned before the first save"
        manager.save(15, {"x": 15}).result()
        assert [(c.step, c.abandoned) for c in manager.checkpoints(abandoned=True)] == [
            (10, False),
            (15, False),
            (20, True),
            (30, True),
        ]
        manager.save(25, {"x": 25}).result()
        manager.wait()
        assert [(c.step, c.abandoned) for c in manager.checkpoints(abandoned=True)] == [
            (10, False),
            (15, False),
            (25, False),
            (30, True),
        ]
    assert incckpt.load(tmp_path) == {"x": 25}


def test_retention_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: 3.0, 6: 4.0}
    with incckpt.CheckpointManager(tmp_path, keep_last_n=2, keep_best_n=2, metric="loss") as manager:
        for step, loss in losses.items():
            manager.save(step, {"w": torch.full((1000,), float(step))}, metrics={"loss": loss})
        manager.wait()
        assert [c.step for c in manager.checkpoints()] == [2, 4, 5, 6]
    assert incckpt.load(f"{tmp_path}#@best", metric="loss")["w"][0] == 2
    assert incckpt.load(tmp_path, step="best", mode="max")["w"][0] == 6
    assert orphans(tmp_path) == set()


def test_other_runs_of_the_store_are_never_touched(tmp_path: Path) -> None:
    shared = torch.randn(1 << 19)
    with incckpt.CheckpointManager(tmp_path, run="other") as other:
        other.save(1, {"shared": shared, "x": torch.zeros(9)}).result()
        with incckpt.CheckpointManager(tmp_path, run="mine", keep_last_n=1) as mine:
            for step in range(1, 5):
                mine.save(step, {"shared": shared + (step > 1), "y": torch.full((5,), float(step))}).result()
            mine.wait()
            assert mine.history[0].put_objects == 1, "the shared tensor is stored already"
    assert torch.equal(incckpt.load(tmp_path, run="other")["shared"], shared)
    assert incckpt.load(f"{tmp_path}#mine")["y"][0] == 4


def test_a_read_only_manager_does_not_take_over(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path) as writer:
        writer.save(1, {"x": 1}).result()
        with incckpt.CheckpointManager(tmp_path, read_only=True) as reader:
            app = {"x": 0}
            assert reader.restore(app) == 1
            with pytest.raises(ReadOnlyError):
                reader.save(2, app)
        writer.save(2, {"x": 2}).result()


def test_two_writers_one_lineage(tmp_path: Path) -> None:
    with pytest.raises(SupersededError), incckpt.CheckpointManager(tmp_path) as first:  # noqa: PT012
        first.save(1, {"x": 1}).result()
        with incckpt.CheckpointManager(tmp_path) as second:
            assert second.restore({"x": 0}) == 1
            second.save(2, {"x": 2}).result()
            assert isinstance(first.save(2, {"x": "lost"}).exception(), SupersededError)
        first.save(3, {"x": "lost"})
    assert incckpt.load(tmp_path) == {"x": 2}


def test_abandoned_checkpoints_are_read_by_their_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with incckpt.CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3, 4):
            manager.save(step, {"x": step})
    with incckpt.CheckpointManager(tmp_path) as manager:
        assert manager.restore({"x": 0}, step=2) == 2
        manager.save(3, {"x": 30}).result()
    assert incckpt.load(f"{tmp_path}#@4") == {"x": 4}
    assert "step 4" in caplog.text
    assert "is abandoned" in caplog.text
    with incckpt.CheckpointManager(tmp_path, read_only=True) as reader:
        app = {"x": 0}
        assert reader.restore(app, step=4) == 4
        assert app == {"x": 4}
    with pytest.raises(CheckpointNotFoundError, match="it has steps 1, 2, 3; abandoned: step 4"):
        incckpt.load(tmp_path, step=7)


def test_where_two_attempts_have_a_step_the_lineages_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unpruned = FaultyBackend(MemoryBackend(str(tmp_path)), [Fault("put", "refs/*", times=None)])
    for start, value in ((None, 3), (2, 30)):
        with incckpt.CheckpointManager(unpruned) as manager:
            manager.restore({"x": 0}, step=start)
            for step in range((start or 0) + 1, 4):
                manager.save(step, {"x": value})
    assert incckpt.load(unpruned, step=3) == {"x": 30}
    assert "reading that of attempt 2; there is an abandoned one of attempt 1" in caplog.text


def test_going_on_from_an_abandoned_checkpoint(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3, 5):
            manager.save(step, {"x": step})
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.restore({"x": 0}, step=2)
        manager.save(4, {"x": 40}).result()
    with incckpt.CheckpointManager(tmp_path) as manager:
        assert manager.restore({"x": 0}, step=5) == 5
        manager.save(6, {"x": 6}).result()
        manager.wait()
        assert [(c.step, c.attempt) for c in manager.checkpoints(abandoned=True)] == [(1, 1), (2, 1), (5, 1), (6, 3)]


@pytest.mark.parametrize(
    "look", ["restore", "a step that is not there", "a state that does not fit", "load", "nothing"]
)
def test_looking_stops_no_writer(tmp_path: Path, look: str) -> None:
    backend = CountingBackend(MemoryBackend(str(tmp_path)))
    with incckpt.CheckpointManager(backend) as writer:
        writer.save(1, {"w": torch.zeros(3)}).result()
        writes = backend.calls["put"], backend.calls["create"], backend.calls["delete"]
        with incckpt.CheckpointManager(backend) as other:
            if look == "restore":
                assert other.restore({"w": torch.ones(3)}) == 1
            elif look == "a step that is not there":
                with pytest.raises(CheckpointNotFoundError):
                    other.restore({"w": torch.ones(3)}, step=999)
            elif look == "a state that does not fit":
                with pytest.raises(StateMismatchError):
                    other.restore({"w": torch.ones(4)})
            elif look == "load":
                other.load(1)
            assert other.delete(999) is False
        assert (backend.calls["put"], backend.calls["create"], backend.calls["delete"]) == writes
        writer.save(2, {"w": torch.ones(3)}).result()


def test_a_save_from_what_was_restored_before_others_went_on(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path) as writer, incckpt.CheckpointManager(tmp_path) as other:
        writer.save(1, {"x": 1}).result()
        other.restore({"x": 0})
        writer.save(2, {"x": 2}).result()
        with pytest.raises(SupersededError, match=rf"attempt 1 \(process {os.getpid()} on .*\) has committed step 2"):
            other.save(5, {"x": "lost"}).result()
        writer.save(3, {"x": 3}).result()  # not disturbed
        with pytest.raises(SupersededError, match="restore"):
            other.save(5, {"x": "lost"})
        assert other.restore({"x": 0}) == 3
        assert other.save(5, {"x": 5}).result().step == 5
    assert incckpt.load(tmp_path) == {"x": 5}


@pytest.mark.slow
def test_of_two_that_have_restored_the_same_the_first_to_save_goes_on(tmp_path: Path) -> None:
    incckpt.save({"x": 1}, tmp_path, step=1)
    with incckpt.CheckpointManager(tmp_path) as first, incckpt.CheckpointManager(tmp_path) as second:
        first.restore({"x": 0})
        second.restore({"x": 0})
        second.save(2, {"x": 2}).result()
        with pytest.raises(SupersededError, match=r"attempt 2 .* has taken it over"):
            first.save(3, {"x": 3}).result()
        second.save(3, {"x": 33}).result()
        with pytest.raises(SupersededError):
            first.close()


def test_what_was_restored_is_deleted_before_the_first_save(tmp_path: Path) -> None:
    backend = MemoryBackend(str(tmp_path))
    state = {"frozen": torch.randn(300_000), "x": torch.zeros(3)}
    with incckpt.CheckpointManager(backend) as writer, incckpt.CheckpointManager(backend) as other:
        writer.save(1, {"frozen": torch.zeros(3)})
        writer.save(2, state).result()
        other.restore(state)
        assert writer.delete(2)
        assert other.save(3, state).result().step == 3
        assert [c.step for c in other.checkpoints()] == [1, 3]
    assert torch.equal(incckpt.load(backend)["frozen"], state["frozen"])


def test_the_store_is_gone_before_the_first_save(tmp_path: Path) -> None:
    store = tmp_path / "store"
    incckpt.save({"x": 1}, store, step=1)
    manager = incckpt.CheckpointManager(store)
    manager.restore({"x": 0})
    shutil.rmtree(store)
    assert isinstance(manager.save(2, {"x": 2}).exception(), StoreNotFoundError)
    with pytest.raises(SaveError, match="is gone"):
        manager.close()


def test_a_lineage_that_is_gone_before_the_first_save(tmp_path: Path) -> None:
    incckpt.save({"x": 1}, tmp_path, step=1)
    manager = incckpt.CheckpointManager(tmp_path)
    manager.restore({"x": 0})
    (tmp_path / "runs/default/attempts/000001.from").unlink()
    assert isinstance(manager.save(2, {"x": 2}).exception(), CorruptionError)
    with pytest.raises(CorruptionError, match=r"000001.from was there"):
        manager.close()


def test_a_first_save_whose_start_fails_is_made_again(tmp_path: Path) -> None:
    faults = [Fault("put", "runs/*", do=Fail(BackendError("the reply was lost", transient=True), after_work=True))]
    faulty = FaultyBackend(MemoryBackend(str(tmp_path)), faults)
    with incckpt.CheckpointManager(faulty) as manager:
        manager.restore({"x": 0})
        assert isinstance(manager.save(1, {"x": 1}).exception(), BackendError)
        with pytest.raises(SaveError):
            manager.save(1, {"x": 1})
        assert manager.save(1, {"x": 1}).result().attempt == 1


def test_what_to_do_about_a_step_that_is_there(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(step, {"x": step})
        with pytest.raises(OptionError, match="has a checkpoint of step 2 already; give if_exists='replace'"):
            manager.save(2, {"x": 20})
        assert manager.save(3, {"x": 30}, if_exists="skip").result().step == 3
        manager.wait()
        assert len(manager.history) == 3
        old = manager.checkpoints()[1]
        new = manager.save(2, {"x": 20}, if_exists="replace").result()
        assert new.time > old.time
        with pytest.raises(OptionError, match="is at step 3 already; step 0 is not beyond it"):
            manager.save(0, {"x": 0}, if_exists="replace")
        assert manager.save(4, {"x": 4}, if_exists="replace").result().step == 4
        with pytest.raises(OptionError, match="if_exists must be"):
            manager.save(5, {"x": 5}, if_exists="overwrite")  # type: ignore[arg-type]
        assert [c.step for c in manager.checkpoints(abandoned=True)] == [1, 2, 3, 4]
    assert incckpt.load(tmp_path, step=2) == {"x": 20}
    assert incckpt.load(tmp_path) == {"x": 4}
    assert incckpt.save({"x": 0}, tmp_path, step=3, if_exists="skip").time == pytest.approx(
        incckpt.CheckpointManager(tmp_path, read_only=True).checkpoints()[2].time
    )
    incckpt.save({"x": 40}, tmp_path, step=4, if_exists="replace")
    assert incckpt.load(tmp_path) == {"x": 40}


def test_skipping_a_step_takes_no_run_over(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path) as writer, incckpt.CheckpointManager(tmp_path) as other:
        first = writer.save(1, {"x": 1}).result()
        other.restore({"x": 0})
        assert other.save(1, {"x": 10}, if_exists="skip").result() == first
        writer.save(2, {"x": 2}).result()


def test_a_replaced_checkpoint_that_cannot_be_expired_counts_no_longer(tmp_path: Path) -> None:
    backend = MemoryBackend(str(tmp_path))
    faulty = FaultyBackend(backend, [Fault("put", "refs/*")])
    with incckpt.CheckpointManager(faulty) as manager:
        for value in (1, 2):
            manager.save(1, {"x": value}, if_exists="replace").result()
        assert faulty.struck == 1
        assert [(c.step, c.abandoned) for c in manager.checkpoints(abandoned=True)] == [(1, False), (1, True)]
        assert incckpt.load(backend, step=1) == {"x": 2}
    with incckpt.CheckpointManager(backend) as manager:
        app = {"x": 0}
        assert manager.restore(app) == 1
        assert app == {"x": 2}
        manager.save(2, {"x": 3}).result()
        manager.wait()
        assert [c.step for c in manager.checkpoints(abandoned=True)] == [1, 2]
    assert orphans(backend) == set()


def test_not_for_what_does_not_exist(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path / "none", read_only=True) as reader:
        assert reader.checkpoints() == []
        assert reader.restore({}) is None
        with pytest.raises(StoreNotFoundError):
            reader.restore({}, step=3)
    assert not (tmp_path / "none").exists()
    with pytest.raises(FileNotFoundError, match="no incckpt store"):
        incckpt.load(tmp_path / "none")
    incckpt.save({"x": 1}, tmp_path / "some")
    with pytest.raises(CheckpointNotFoundError, match="it has step 0"):
        incckpt.load(tmp_path / "some", step=7)
    with pytest.raises(CheckpointNotFoundError, match="run 'other'"):
        incckpt.load(tmp_path / "some", run="other")


def test_a_state_that_does_not_fit(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"model": torch.nn.Linear(3, 4), "w": torch.zeros(3)}).result()
        with pytest.raises(StateMismatchError, match="w"):
            manager.restore({"w": torch.zeros(4)})
        with pytest.raises(StateMismatchError, match="bias"):
            manager.restore({"model": torch.nn.Linear(3, 4, bias=False)})
        assert manager.save(2, {"w": torch.zeros(3)}).result().step == 2


def test_a_state_that_cannot_be_saved(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path) as manager:
        with pytest.raises(StateError, match=r"\['a'\]\[1\]"):
            manager.save(1, {"a": [1, object()]})
        assert manager.save(1, {"a": [1, 2]}).result().step == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_pending": 0}, "max_pending"),
        ({"on_backlog": "drop"}, "on_backlog"),
        ({"threads": 0}, "threads"),
        ({"chunk_bytes": 1000}, "chunk_bytes"),
        ({"keep_last_n": 0}, "keep_last_n must be an integer of at least 1"),
        ({"keep_best_n": 3}, "metric"),
        ({"mode": "least"}, "mode"),
        ({"run": "a/b"}, "run name"),
        ({"keep_last_n": 1, "retention": incckpt.KeepAll()}, "retention"),
    ],
)
def test_bad_options(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        incckpt.CheckpointManager(tmp_path, **arguments)


@pytest.mark.parametrize("url", ["store#", "store#a b", "store#run@soon", "#run", "store#run@5"])
def test_bad_urls(tmp_path: Path, url: str) -> None:
    with pytest.raises(OptionError):
        incckpt.CheckpointManager(url)


def test_bad_metrics(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path) as manager:
        with pytest.raises(OptionError, match="'loss' is not a number"):
            manager.save(1, {}, metrics={"loss": "low"})  # type: ignore[dict-item]
        assert manager.save(1, {}, metrics={"loss": torch.tensor(0.5)}).result().metrics == {"loss": 0.5}  # type: ignore[dict-item]


def test_a_closed_manager(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path) as manager:
        pass
    with pytest.raises(ManagerClosedError):
        manager.save(1, {})


@pytest.mark.slow
def test_a_forked_child_is_told(tmp_path: Path) -> None:
    program = """
import os, sys, torch, incckpt
manager = incckpt.CheckpointManager(sys.argv[1])
manager.save(1, {"x": 1}).result()
child = os.fork()
if child == 0:
    try:
        manager.save(2, {"x": 2})
    except incckpt.errors.ManagerClosedError:
        os._exit(17)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
manager.save(2, {"x": 3}).result()
manager.close()
"""
    done = programs.run("-c", program, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert incckpt.load(tmp_path) == {"x": 3}


def test_saving_from_many_threads(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path) as manager:
        order = threading.Lock()
        step = 0

        def work() -> None:
            nonlocal step
            for _ in range(5):
                with order:
                    step += 1
                    manager.save(step, {"x": torch.full((4,), float(step))})

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert incckpt.load(tmp_path)["x"][0] == 20


@pytest.mark.slow
def test_requests_of_a_save_do_not_grow_with_history(tmp_path: Path) -> None:
    """Lesson 8 of the seed."""
    backend = CountingBackend(MemoryBackend(str(tmp_path)))
    state = {"w": torch.randn(1 << 19), "v": torch.zeros(4)}
    with incckpt.CheckpointManager(backend) as manager:
        counts, sizes = [], []
        for step in range(1, 40):
            state["v"].fill_(step)
            manager.wait()
            backend.reset()
            manager.save(step, state).result()
            manager.wait()
            counts.append(sum(backend.calls.values()))
            sizes.append(backend.bytes_put)
    assert counts[2] == counts[-1]
    assert abs(sizes[2] - sizes[-1]) < 50
    of_objects = [op for op in backend.operations if op.keys[0].startswith(("objects/", "deltas/"))]
    small = [op for op in backend.operations if op not in of_objects]
    assert len(small) <= 8, small
    assert {op.name for op in of_objects} == {"put", "head"}
    assert len([op for op in of_objects if op.name == "head"]) <= LOOKS


@pytest.mark.slow
def test_requests_of_a_prune(tmp_path: Path) -> None:
    inner = MemoryBackend(str(tmp_path))
    for number in range(20):  # other runs' checkpoints
        save_other(inner, f"other{number}")
    backend = CountingBackend(inner)
    counts: dict[bool, int] = {}
    for prunes in (False, True):
        with incckpt.CheckpointManager(
            backend, run=f"mine{prunes}", keep_last_n=2 if prunes else None, threads=1
        ) as manager:
            for step in range(1, 8):
                manager.wait()
                backend.reset()
                manager.save(step, {"v": torch.full((4,), float(step))}).result()
                manager.wait()
            counts[prunes] = sum(backend.calls.values())
            assert not [op for op in backend.operations if op.name == "list" and op.keys[0].startswith("objects")]
    assert counts[True] - counts[False] <= 6, counts


def save_other(backend: MemoryBackend, run: str) -> None:
    """Save a checkpoint of another run."""
    with incckpt.CheckpointManager(backend, run=run, threads=1) as manager:
        manager.save(1, {"x": torch.zeros(3)}).result()


def test_without_a_base(tmp_path: Path) -> None:
    state = {"w": torch.randn(1 << 19), "v": torch.zeros(4)}
    with incckpt.CheckpointManager(tmp_path, base=False) as manager:
        manager.save(1, state).result()
        state["v"].fill_(1)
        manager.save(2, state).result()
        manager.wait()
        assert manager.history[-1].changed_chunks == 2
        assert manager.history[-1].put_objects == 1
    assert_same(incckpt.load(tmp_path), state)


def test_pickle_only_when_asked_for_twice(tmp_path: Path) -> None:
    value = {"x": complex, "f": os.path.join}
    with incckpt.CheckpointManager(tmp_path) as manager, pytest.raises(StateError, match="allow_pickle"):
        manager.save(1, value)
    incckpt.save(value, tmp_path, allow_pickle=True)
    with pytest.raises(StateError, match="allow_pickle"):
        incckpt.load(tmp_path)
    assert incckpt.load(tmp_path, allow_pickle=True) == value


def test_save_and_load_as_torch_does(tmp_path: Path) -> None:
    model = torch.nn.Linear(700, 700)
    first = incckpt.save(model.state_dict(), tmp_path)
    second = incckpt.save(model.state_dict(), tmp_path, metrics={"loss": 0.5})
    assert (first.step, second.step, second.metrics) == (0, 1, {"loss": 0.5})
    assert second.written < 2000 < first.written
    assert_same(incckpt.load(tmp_path), model.state_dict())
    assert list(incckpt.load(tmp_path, keys="wei*")) == ["weight"]
    with pytest.raises(StateMismatchError, match="weight"):
        incckpt.load(tmp_path, keys="wait*")
    with pytest.raises(OptionError, match="step is 1 in the URL"):
        incckpt.load(f"{tmp_path}#default@1", step=0)


def test_the_report_of_a_save_that_was_aborted_and_made_again(tmp_path: Path) -> None:
    backend = MemoryBackend(str(tmp_path))
    pause = Pause()
    slow = FaultyBackend(backend, [Fault("put", "objects/*", do=pause)])
    with incckpt.CheckpointManager(slow) as manager:
        future = manager.save(1, {"w": torch.randn(1 << 16)})
        pause.reached.wait()
        Collector(Store(backend), stale_seconds=0.0).sweep()  # takes the save for dead
        pause.resume.set()
        future.result()
        assert manager.history[0].seconds["commit"] >= 0
        assert orphans(backend) == set()


def test_keys_read_only_what_they_need(tmp_path: Path) -> None:
    backend = CountingBackend(MemoryBackend(str(tmp_path)))
    state = {"model": {"w": torch.randn(1 << 19)}, "optimizer": {"m": torch.randn(1 << 20)}}
    with incckpt.CheckpointManager(backend) as manager:
        manager.save(1, state).result()
    backend.reset()
    assert_same(incckpt.load(backend, keys="model.*"), {"model": state["model"]})
    assert backend.bytes_got < (1 << 19) * 4 + 5000


def test_the_report_says_what_a_save_did(tmp_path: Path) -> None:
    state = {"w": torch.randn(1 << 20), "v": torch.zeros(4)}
    with incckpt.CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            state["v"].fill_(step)
            state["w"][:100] += 1
            manager.save(step, state)
        manager.wait()
        first, second = (json.loads(json.dumps(report.to_json())) for report in manager.history)
    assert all(seconds >= 0 for report in (first, second) for seconds in report["seconds"].values())
    assert (first["step"], first["chunks"], first["changed_chunks"], first["put_objects"]) == (1, 2, 2, 2)
    assert first["changed_bytes"] == first["nbytes"] == 4 * (1 << 20) + 16
    assert sum(way["raw"] for way in first["by_way"].values()) == first["nbytes"]
    assert second["by_way"]["delta"]["raw"] > 0
    assert 0 < second["put_bytes"] < first["put_bytes"] / 100
    assert set(first["seconds"]) >= {"wait", "flatten", "stage", "hash", "encode", "put", "store", "commit"}


@pytest.mark.slow
def test_memory_for_objects_is_bounded_whatever_their_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[HostPool, int] = {}
    take = HostPool.take

    def watched(pool: HostPool, nbytes: int) -> npt.NDArray[np.uint8]:
        taken = take(pool, nbytes)
        held[pool] = max(held.get(pool, 0), pool.used_bytes + pool.free_bytes)
        return taken

    monkeypatch.setattr(HostPool, "take", watched)
    state = {f"w{number}": torch.rand(1_000_000 + 64 * number) for number in range(60)}
    nbytes = sum(tensor.nbytes for tensor in state.values())
    with incckpt.CheckpointManager(tmp_path, threads=1) as manager:
        manager.save(1, state).result()
    by_size = sorted(held.values())
    assert len(by_size) == 2, "that of the base, and that of the objects"
    assert by_size[-1] == nbytes
    assert by_size[0] <= 2 * (64 << 20) < nbytes / 1.5
