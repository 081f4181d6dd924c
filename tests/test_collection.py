"""`incckpt.collect`: what it asks of its arguments and of the store, and that it works beside living writers."""

from __future__ import annotations

import math
import os
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

import incckpt
from incckpt.backends.local import LocalBackend
from incckpt.backends.memory import MemoryBackend
from incckpt.errors import CollectionError, OptionError, ReadOnlyError, StoreNotFoundError
from incckpt.store.objects import OBJECTS
from incckpt.testing.faults import CountingBackend
from tests.stores import orphans

GARBAGE = f"{OBJECTS}ab/{'c' * 62}.{'1' * 16}"


def put_garbage(root: Path) -> Path:
    path = root / GARBAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"12345")
    os.utime(path, (time.time() - 7200,) * 2)
    return path


def test_a_dry_run_deletes_nothing_and_the_real_one_what_it_said(tmp_path: Path) -> None:
    for run in ("a", "b"):
        incckpt.save({"w": torch.ones(3)}, tmp_path, run=run)
    garbage = put_garbage(tmp_path)
    plan = incckpt.collect(tmp_path)
    assert isinstance(plan, incckpt.CollectionPlan)
    assert plan.objects == {GARBAGE}
    assert plan.done is None
    assert "would delete 1 objects" in str(plan)
    assert garbage.exists()
    carried_out = incckpt.collect(str(tmp_path), dry_run=False)
    assert carried_out.done is not None
    assert carried_out.done.deleted == plan.objects
    assert not garbage.exists()
    assert incckpt.collect(tmp_path).removals == ()
    for run in ("a", "b"):
        assert incckpt.load(tmp_path, run=run, progress=False)["w"].sum() == 3


def test_beside_a_living_writer(tmp_path: Path) -> None:
    put_garbage(tmp_path)
    with incckpt.CheckpointManager(tmp_path, keep_last_n=2, threads=1) as manager:
        for step in range(6):
            saved = manager.save(step, {"w": torch.full((1000,), float(step))})
            if step == 0:
                saved.result()  # which makes the store
            incckpt.collect(tmp_path, dry_run=False, min_age=0)
        manager.wait()
        assert incckpt.load(tmp_path, progress=False)["w"][0] == 5
        assert incckpt.collect(tmp_path, dry_run=False, min_age=0).done is not None
    assert orphans(tmp_path) == set()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    incckpt.save({"w": torch.ones(3)}, tmp_path)
    put_garbage(tmp_path)
    counting = CountingBackend(LocalBackend(tmp_path))
    incckpt.collect(counting)
    assert counting.calls.keys() <= {"get", "list", "head"}
    counting.writable = False
    assert incckpt.collect(counting).objects == {GARBAGE}
    with pytest.raises(ReadOnlyError):
        incckpt.collect(counting, dry_run=False)


def test_where_there_is_no_store(tmp_path: Path) -> None:
    for dry_run in (True, False):
        with pytest.raises(StoreNotFoundError, match="no incckpt store"):
            incckpt.collect(tmp_path / "none", dry_run=dry_run)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_create_exclusively_is_left_alone() -> None:
    backend = MemoryBackend(uuid.uuid4().hex)
    with incckpt.CheckpointManager(backend) as manager:
        manager.save(1, {"w": 1}).result()
    backend.put(GARBAGE, b"12345")
    backend.exclusive = False
    with pytest.raises(CollectionError, match="exclusive creation"):
        incckpt.collect(backend, dry_run=False, min_age=0)
    assert backend.get(GARBAGE) == b"12345"


@pytest.mark.parametrize(
    "options",
    [
        {"dry_run": 0},
        {"dry_run": "no"},
        {"min_age": -1},
        {"min_age": math.nan},
        {"min_age": math.inf},
        {"min_age": "1h"},
        {"min_age": True},
    ],
)
def test_options_that_are_none(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        incckpt.collect(tmp_path / "not looked at", **options)


def test_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="whole store"):
        incckpt.collect(f"{tmp_path}#default")
