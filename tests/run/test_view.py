"""Reading beside a writer that prunes: another checkpoint is taken, and nothing reads as damage."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import incckpt
from incckpt.backends.memory import MemoryBackend
from incckpt.errors import CheckpointNotFoundError, MissingObjectError
from incckpt.run.reader import Reader
from incckpt.run.view import RunView
from incckpt.store.manifest import Manifest
from incckpt.store.objects import OBJECTS
from incckpt.store.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture
def writer(tmp_path: Path) -> incckpt.CheckpointManager:
    """Return a manager that keeps only the last checkpoint, and has saved step 1."""
    manager = incckpt.CheckpointManager(tmp_path, keep_last_n=1)
    manager.save(1, {"w": torch.zeros(100)}).result()
    return manager


def test_loads_beside_a_writer_that_keeps_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.children.pruning_writer", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        assert writer.stdout.readline() == "saved\n"
        seen: list[int] = []
        target: dict[str, Any] = {"w": torch.zeros(1000, dtype=torch.int64), "step": 0}
        with incckpt.CheckpointManager(tmp_path, read_only=True) as reader:
            for _ in range(80):
                state = incckpt.load(tmp_path)
                assert (state["w"] == state["step"]).all()
                step = reader.restore(target)
                assert step is not None
                assert target["step"] == step
                assert (target["w"] == step).all()
                seen += [state["step"], step]
        writer.stdin.close()
        assert int(writer.stdout.readline()) >= seen[-1]
    assert writer.returncode == 0
    assert seen == sorted(seen)
    assert len(set(seen)) > 10


def pruning(writer: incckpt.CheckpointManager, times: int) -> Callable[[Reader, Manifest], int]:
    """Return a way to read that finds objects missing, since the writer prunes them before, so many times."""
    left = iter(range(times))

    def read(reader: Reader, manifest: Manifest) -> int:
        if next(left, None) is not None:
            writer.save(manifest.step + 1, {"w": torch.full((100,), float(manifest.step))}).result()
            raise MissingObjectError("an object is missing")
        return manifest.step

    return read


def test_a_pruned_checkpoint_is_no_damage(tmp_path: Path, writer: incckpt.CheckpointManager) -> None:
    with writer, Store.open(str(tmp_path)) as store, RunView(store, "default", threads=1) as view:
        _, found = view.read(None, pruning(writer, 3))
        assert found is not None
        assert found[2] == 4
        with pytest.raises(CheckpointNotFoundError, match=r"step 4 was pruned while it was read;.* it has step 5"):
            view.read(4, pruning(writer, 1))
        with pytest.raises(CheckpointNotFoundError, match="pruned while it was read; let its writer keep more"):
            view.read("latest", pruning(writer, 10**6))


def test_falls_back_from_damage(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    def read(reader: Reader, manifest: Manifest) -> int:
        if manifest.step > 1:
            raise MissingObjectError(f"an object of {manifest.step} is missing")
        return manifest.step

    for step in range(4):
        incckpt.save({"step": step}, tmp_path)
    with Store.open(str(tmp_path)) as store, RunView(store, "default", threads=1) as view:
        with caplog.at_level(logging.ERROR):
            _, found = view.read(None, read, fall_back=True)
        assert found is not None
        assert found[2] == 1
        assert "step 3 cannot be read, falling back" in caplog.text
        assert "step 2 cannot be read, falling back" in caplog.text
        with pytest.raises(MissingObjectError, match="an object of 3"):
            view.read(None, read)


def test_damage_is_no_pruning() -> None:
    backend = MemoryBackend("test-damage")
    incckpt.save({"w": torch.zeros(100)}, backend.url)
    backend.delete([entry.key for entry in backend.list(OBJECTS)])
    with pytest.raises(MissingObjectError, match="missing"):
        incckpt.load(backend)
