"""A power cut at any system call of a save and prune loop, on a disk that keeps only what was synced."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import incckpt
from incckpt.backends.local import LocalBackend
from incckpt.errors import SaveError
from incckpt.manager import CheckpointManager
from incckpt.testing.disk import PowerCut, StopAt, UnsyncedDisk
from tests.children.save_loop import equals, state_at
from tests.effort import every
from tests.stores import orphans

pytestmark = pytest.mark.slow

STEPS = 3


def save_until_the_cut(root: Path, disk: UnsyncedDisk, nth: int) -> tuple[list[int], int]:
    """Save and prune in a loop until the `nth` system call; return the steps announced and the calls made."""
    calls = StopAt(nth, inner=disk)
    announced: list[int] = []
    try:
        with CheckpointManager(LocalBackend(str(root / "store"), calls=calls), keep_last_n=1, threads=1) as manager:
            for step in range(1, STEPS + 1):
                manager.save(step, state_at(step)).result()
                announced.append(step)
    except (PowerCut, SaveError):
        pass
    return announced, calls.count


@pytest.mark.timeout(900)
@pytest.mark.parametrize("keep_entries", [False, True], ids=["nothing unsynced", "entries but not content"])
def test_what_was_announced_survives(tmp_path: Path, keep_entries: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    root = tmp_path / "whole"
    root.mkdir()
    announced, calls = save_until_the_cut(root, UnsyncedDisk(root), 0)
    assert announced == list(range(1, STEPS + 1))
    for nth in range(2, calls, every(9)):
        root = tmp_path / str(nth)
        root.mkdir()
        disk = UnsyncedDisk(root)
        announced, _ = save_until_the_cut(root, disk, nth)
        disk.crash(keep_entries=keep_entries)
        store = root / "store"
        with CheckpointManager(store, read_only=True) as reader:
            listed = [checkpoint.step for checkpoint in reader.checkpoints()]
        assert not announced or max(listed, default=0) >= announced[-1], (nth, announced, listed)
        for step in listed:
            assert equals(incckpt.load(store, step=step), step)
        with CheckpointManager(store, keep_last_n=1) as manager:
            manager.save(10, state_at(10)).result()
        assert equals(incckpt.load(store), 10)
        assert orphans(store) == set()


@pytest.mark.timeout(900)
def test_a_sync_left_out_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Leaving out one fsync of the last save loses it, for at least most of them: the model is no rubber stamp."""
    caplog.set_level(logging.CRITICAL)
    root = tmp_path / "whole"
    root.mkdir()
    disk = UnsyncedDisk(root)
    save_until_the_cut(root, disk, 0)
    lost = 0
    for skipped in range(1, disk.fsyncs + 1):
        root = tmp_path / str(skipped)
        root.mkdir()
        mutant = UnsyncedDisk(root, skip_fsync=skipped)
        announced, _ = save_until_the_cut(root, mutant, 0)
        assert announced[-1] == STEPS
        mutant.crash()
        try:
            lost += not equals(incckpt.load(root / "store"), STEPS)
        except incckpt.IncckptError:
            lost += 1
    assert lost >= 4, "the marker's, the last objects', the manifest's and the ref's syncs at least"


def test_objects_of_another_process_that_were_just_put(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A save that reuses an object whose name is not yet durable is not announced before it is."""
    caplog.set_level(logging.CRITICAL)
    root = tmp_path / "dry"
    root.mkdir()
    calls = StopAt(0, inner=UnsyncedDisk(root))
    with CheckpointManager(LocalBackend(root / "store", calls=calls), run="first", threads=1) as manager:
        before = calls.count
        manager.save(1, state_at(1)).result()
        objects = manager.history[-1].put_objects
    reused = 0
    for nth in range(before, calls.count, every(3)):
        root = tmp_path / str(nth)
        root.mkdir()
        disk = UnsyncedDisk(root)
        try:
            backend = LocalBackend(root / "store", calls=StopAt(nth, inner=disk))
            with CheckpointManager(backend, run="first", threads=1) as manager:
                manager.save(1, state_at(1)).result()
        except (PowerCut, SaveError):
            pass
        backend = LocalBackend(root / "store", calls=disk)
        with CheckpointManager(backend, run="second", threads=1) as manager:
            saved = manager.save(1, state_at(1)).result()
            reused += manager.history[-1].put_objects < objects
        disk.crash()
        assert equals(incckpt.load(root / "store", run="second", step=saved.step), 1), nth
    assert reused > 0


VALUES = [(f"{folder}/k{number}", bytes([number]) * 5000) for folder in ("a", "b") for number in range(3)]


def read(root: Path) -> dict[str, bytes]:
    backend = LocalBackend(root / "store")
    return {entry.key: backend.get(entry.key) for entry in backend.list()}


@pytest.mark.parametrize("keep_entries", [False, True], ids=["nothing unsynced", "entries but not content"])
def test_values_put_together_survive_and_are_whole(tmp_path: Path, keep_entries: bool) -> None:
    """At every system call of a put of many; once it has returned, all of them are there."""
    nth, done = 0, False
    while not done:
        nth += 1
        root = tmp_path / str(nth)
        root.mkdir()
        disk = UnsyncedDisk(root)
        try:
            LocalBackend(root / "store", calls=StopAt(nth, inner=disk)).put_many(VALUES)
            done = True
        except PowerCut:
            pass
        disk.crash(keep_entries=keep_entries)
        found = read(root) if (root / "store").exists() else {}
        assert found.items() <= dict(VALUES).items(), f"cut at call {nth}: a value is there in part"
        assert not done or found == dict(VALUES), "what a put of many has announced is lost"
    assert nth > 30


def test_each_sync_of_a_put_of_many_is_needed(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    disk = UnsyncedDisk(tmp_path / "whole")
    LocalBackend(tmp_path / "whole" / "store", calls=disk).put_many(VALUES)
    for skipped in range(1, disk.fsyncs + 1):
        root = tmp_path / str(skipped)
        root.mkdir()
        mutant = UnsyncedDisk(root, skip_fsync=skipped)
        LocalBackend(root / "store", calls=mutant).put_many(VALUES)
        mutant.crash()
        assert not (root / "store").exists() or read(root) != dict(VALUES), f"sync {skipped} does nothing"
