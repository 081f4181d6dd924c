"""A save reads back what it is about to write."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

import incckpt
from incckpt.backends.local import LocalBackend
from incckpt.backends.memory import MemoryBackend
from incckpt.errors import StateError
from incckpt.run import writer as writing
from incckpt.run.attempt import Attempt, Origin
from incckpt.run.report import SaveReport
from incckpt.run.snapshot import Snapshot
from incckpt.staging.layout import Layout
from incckpt.store.lineage import Lineage
from incckpt.store.store import Store
from incckpt.testing.compare import assert_same_state
from tests.stores import object_keys

_S = namedtuple("_S", "a")


def test_what_one_save_accepts_the_next_restore_reads(tmp_path: Path) -> None:
    weight = torch.zeros(2)
    state = {"w": weight, "b": [_S(1)]}
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": weight}).result()
        manager.save(2, state).result()
    with incckpt.CheckpointManager(tmp_path) as manager:
        assert manager.restore({"w": weight}) == 2
        manager.save(3, {"w": weight}).result()
    assert_same_state(incckpt.load(tmp_path, step=2), state)


def snapshot(structure: Any, tensors: Any = ()) -> Snapshot:
    return Snapshot(1, {}, 0.0, structure, tuple(tensors), Layout.of([], [], 1 << 20), ())


@pytest.mark.parametrize(
    ("structure", "tensors", "place"),
    [
        ({"dict": [["a", {"list": [{"tensor": 0}]}]]}, [], r"state\['a'\]\[0\]: there is no tensor 0"),
        ({"tensor": 0}, [{"name": "w", "dtype": "float32", "shape": [2], "pieces": [{"range": 0}]}], "'w'.*range 0"),
        ({"tensor": 0}, [{"name": "w", "dtype": "float33", "shape": [0]}], "'w'.*float33"),
    ],
)
def test_a_save_that_no_reader_would_take_writes_nothing(
    tmp_path: Path, structure: Any, tensors: Any, place: str
) -> None:
    backend = MemoryBackend(str(tmp_path))
    attempt = Attempt(Store(backend), "default", Origin.nothing(Lineage.empty()))
    with pytest.raises(StateError, match=rf"step 1 was not saved.*{place}"):
        attempt.write(snapshot(structure, tensors), SaveReport(step=1))
    assert object_keys(backend) == set()
    assert attempt.write(snapshot({"list": []}), SaveReport(step=1)).step == 1
    attempt.close()


def test_a_manifest_beyond_what_readers_take_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "LIST_BYTES", 2000)
    state = {"w": torch.ones(3), "names": {f"name {i}": i for i in range(200)}}
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": torch.ones(3)}).result()
        with pytest.raises(StateError, match=r"step 2 was not saved: its manifest would have .* readers take 2,000"):
            manager.save(2, state).result()
        with pytest.raises(StateError, match="step 2"):
            manager.save(3, {"w": torch.ones(3)})
        manager.save(4, {"w": torch.ones(3)}).result()
    assert [ref.step for ref in Store(LocalBackend(str(tmp_path))).run("default").lineage().live] == [1, 4]
