"""The checkpoints of a whole store."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import incckpt
from incckpt.errors import CheckpointNotFoundError, CorruptionError, OptionError, StoreNotFoundError


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError):
        incckpt.list_checkpoints(tmp_path)
    incckpt.save({"x": 1}, tmp_path, run="a")
    with pytest.raises(CheckpointNotFoundError, match="the store has run a"):
        incckpt.list_checkpoints(tmp_path, run="b")
    with pytest.raises(OptionError, match="leave out"):
        incckpt.list_checkpoints(f"{tmp_path}#a@3")


def test_an_unreadable_checkpoint_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        incckpt.save({"x": step}, tmp_path, step=step)
    [ref] = (tmp_path / "refs" / "default").glob("*-000000000002-*")
    ref.write_bytes(ref.read_bytes()[:-3] + b"???")
    with caplog.at_level(logging.ERROR):
        assert [checkpoint.step for checkpoint in incckpt.list_checkpoints(tmp_path)] == [1, 3]
    assert "step 2" in caplog.text


def test_an_inherited_checkpoint_keeps_its_attempt(tmp_path: Path) -> None:
    incckpt.save({"x": 1}, tmp_path, step=1)
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.load()
        manager.save(2, {"x": 2}).result()
    assert [(found.step, found.attempt) for found in incckpt.list_checkpoints(tmp_path)] == [(1, 1), (2, 2)]


def test_a_run_whose_lineage_is_damaged_does_not_hide_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    incckpt.save({"x": 1}, tmp_path, run="a")
    incckpt.save({"x": 1}, tmp_path, run="b")
    [seal] = tmp_path.glob("runs/a/attempts/*.from")
    seal.write_bytes(b"{}")
    with caplog.at_level(logging.ERROR):
        assert [found.run for found in incckpt.list_checkpoints(tmp_path)] == ["b"]
    assert "runs/a/attempts" in caplog.text
    with pytest.raises(CorruptionError):
        incckpt.list_checkpoints(tmp_path, run="a")
    found = incckpt.usage(tmp_path)
    assert "runs/a/attempts" in found.unreadable[0]
    assert (len(found.checkpoints), found.unneeded_objects) == (2, 0)
