"""Verification finds what is missing, short or wrong, and goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from incckpt.backends.local import LocalBackend
from incckpt.errors import StoreNotFoundError
from incckpt.run.verify import Level, verify
from incckpt.testing.faults import CountingBackend
from tests.store.test_corruption import flip, objects_of, save_three, truncate


def problems(folder: Path, level: Level) -> dict[int, int]:
    return {result.step: len(result.problems) for result in verify(folder, level=level)}


@pytest.mark.parametrize("level", ["list", "sizes", "hashes"])
def test_a_sound_run(tmp_path: Path, level: Level) -> None:
    save_three(tmp_path)
    assert problems(tmp_path, level) == {3: 0, 2: 0, 1: 0}


def test_each_level_finds_its_own(tmp_path: Path) -> None:
    save_three(tmp_path)
    objects_of(tmp_path, 1)["object"].unlink()
    truncate(objects_of(tmp_path, 2)["object"])
    flip(objects_of(tmp_path, 3)["object"])
    assert problems(tmp_path, "list") == {3: 0, 2: 0, 1: 1}
    assert problems(tmp_path, "sizes") == {3: 0, 2: 1, 1: 1}
    assert problems(tmp_path, "hashes") == {3: 1, 2: 1, 1: 1}


@pytest.mark.parametrize("what", ["manifest", "ref"])
def test_unreadable_documents(tmp_path: Path, what: str) -> None:
    save_three(tmp_path)
    truncate(objects_of(tmp_path, 2)[what])
    assert problems(tmp_path, "list") == {3: 0, 2: 1, 1: 0}


def test_going_on_reads_nothing_twice(tmp_path: Path) -> None:
    save_three(tmp_path)
    backend = CountingBackend(LocalBackend(str(tmp_path)))
    first = next(verify(backend))
    assert first.ok
    assert first.step == 3
    backend.reset()
    list(verify(backend, skip=first.keys))
    assert not set(backend.keys("get")) & first.keys


def test_one_step(tmp_path: Path) -> None:
    save_three(tmp_path)
    assert [result.step for result in verify(tmp_path, step=2)] == [2]
    assert [result.step for result in verify(f"{tmp_path}#default@latest")] == [3]
    with pytest.raises(StoreNotFoundError):
        next(verify(tmp_path / "none"))
