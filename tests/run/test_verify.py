"""Verification finds what is missing, short or wrong, and goes on where it stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from incckpt.backends.local import LocalBackend
from incckpt.codec import objects as codec
from incckpt.errors import StoreNotFoundError
from incckpt.run.verify import Level, verify
from incckpt.store.objects import ObjectKey
from incckpt.store.refs import Ref
from incckpt.store.store import Store
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


def rewrite_structure(folder: Path, step: int, structure: Any) -> None:
    """Let the ref of a checkpoint name a sound manifest with another structure."""
    with Store(LocalBackend(str(folder))) as store:
        run = store.run("default")
        (name,) = run.lineage().at(step)
        ref = run.read(name)
        assert isinstance(ref, Ref)
        document = replace(store.manifest(ref), structure=structure).to_json()
        digest = codec.digest(document)
        key, data = ObjectKey(digest.identity.hex(), name.nonce), codec.encode_document(document, digest=digest)
        store.objects.put(key, data)
        store.backend.delete([run.ref_key(name)])
        run.commit(replace(ref, manifest=str(key), manifest_size=len(data)))


@pytest.mark.parametrize("level", ["list", "sizes", "hashes"])
def test_a_structure_that_no_reader_takes_is_a_problem(tmp_path: Path, level: Level) -> None:
    save_three(tmp_path)
    rewrite_structure(tmp_path, 2, {"dict": [["a", {"tensor": 99}]]})
    found = {result.step: result.problems for result in verify(tmp_path, level=level)}
    assert len(found[3]) == len(found[1]) == 0
    assert len(found[2]) == 1
    assert "at state['a']: there is no tensor 99" in found[2][0]


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
