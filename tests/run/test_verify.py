"""Verification finds what is missing, short or wrong, and goes on where it stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import incckpt
from incckpt.backends.local import LocalBackend
from incckpt.codec import objects as codec
from incckpt.errors import CheckpointNotFoundError, OptionError, StoreNotFoundError
from incckpt.run.verify import Level, Verified, verify
from incckpt.store.objects import ObjectKey
from incckpt.store.refs import Ref
from incckpt.store.store import Store
from incckpt.testing.faults import Call, CountingBackend, Fault, FaultyBackend
from tests.store.test_corruption import flip, objects_of, save_three, truncate

pytestmark = pytest.mark.slow


def problems(folder: Path, level: Level) -> dict[int, int]:
    return {checkpoint.step: len(checkpoint.problems) for checkpoint in verify(folder, level=level).checkpoints}


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
    found = {checkpoint.step: checkpoint.problems for checkpoint in verify(tmp_path, level=level).checkpoints}
    assert len(found[3]) == len(found[1]) == 0
    assert len(found[2]) == 1
    assert "at state['a']: there is no tensor 99" in found[2][0]


def test_going_on_reads_nothing_twice(tmp_path: Path) -> None:
    """A call that is broken off after the first checkpoint, and another that skips what was found sound."""
    save_three(tmp_path)
    backend = CountingBackend(LocalBackend(str(tmp_path)))
    found: list[Verified] = []

    def report(checkpoint: Verified) -> None:
        found.append(checkpoint)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(backend, report=report)
    assert [checkpoint.step for checkpoint in found] == [3]
    assert found[0].ok
    backend.reset()
    assert verify(backend, skip=found[0].keys)
    assert not set(backend.keys("get")) & found[0].keys


def test_one_step(tmp_path: Path) -> None:
    save_three(tmp_path)

    def steps(url: str | Path, **options: Any) -> list[int]:
        return [checkpoint.step for checkpoint in verify(url, level="list", **options).checkpoints]

    assert steps(tmp_path, step=2) == [2]
    assert steps(f"{tmp_path}#default@latest") == [3]
    with incckpt.CheckpointManager(tmp_path, run="scored") as manager:
        for step, loss in ((1, 0.1), (2, 0.5)):
            manager.save(step, {"step": step}, {"loss": loss}).result()
    assert steps(f"{tmp_path}#scored@best") == [1]
    assert steps(f"{tmp_path}#scored@best", metric="loss", mode="max") == [2]
    assert steps(f"{tmp_path}#scored") == [2, 1]


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    """An answer about nothing would be true."""
    with pytest.raises(StoreNotFoundError):
        verify(tmp_path / "none")
    save_three(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint of step 999; it has steps 1, 2, 3"):
        verify(tmp_path, step=999)
    with pytest.raises(CheckpointNotFoundError, match=r"'other' .*the store has run default"):
        verify(tmp_path, run="other")
    with pytest.raises(CheckpointNotFoundError, match="none was saved with metrics"):
        verify(f"{tmp_path}#@best")
    with pytest.raises(CheckpointNotFoundError, match="metric 'loss'"):
        verify(f"{tmp_path}#@best", metric="loss")
    for level in ("hash", "Hashes", "", None, 3):
        with pytest.raises(OptionError, match="level must be 'list', 'sizes' or 'hashes'"):
            verify(tmp_path, level=level)  # type: ignore[arg-type]


def test_the_result_reads_well(tmp_path: Path) -> None:
    save_three(tmp_path)
    assert str(verify(tmp_path)) == (f"run 'default' at file://{tmp_path}: 3 of 3 checkpoints sound (level 'hashes')")
    lost = objects_of(tmp_path, 2)["object"]
    lost.unlink()
    result = verify(tmp_path, level="list")
    assert not result
    assert list(result.problems) == [2]
    key = lost.relative_to(tmp_path)
    assert str(result).splitlines()[1] == f"step 2: object {key} is missing (needed by tensor weight)"
    assert f"object {key}" in str(verify(tmp_path).problems[2])


def test_rot_in_a_base_that_no_delta_shows(tmp_path: Path) -> None:
    """What a restore keeps as the base of the next deltas is relied on whole."""
    weight = torch.randn(400_000)
    with incckpt.CheckpointManager(tmp_path, keep_last_n=1) as manager:
        manager.save(1, {"weight": weight}).result()
        weight[:10] += 1e-3
        manager.save(2, {"weight": weight}).result()
    (base,) = [path for path in (tmp_path / "objects").rglob("*") if path.is_file() and path.stat().st_size > 1_000_000]
    assert list((tmp_path / "deltas").rglob("*"))
    flip(base)
    result = verify(tmp_path)
    assert [name in str(result) for name in (base.name, "weight")] == [True, True]


@pytest.mark.parametrize("keys", ["refs/*", "objects/*"])
def test_pruned_meanwhile_is_no_problem(tmp_path: Path, keys: str) -> None:
    with incckpt.CheckpointManager(tmp_path, keep_last_n=1) as writer:
        writer.save(1, {"w": torch.zeros(1000)}).result()

        def prune(_: object) -> None:
            writer.save(2, {"w": torch.ones(1000)}).result()
            writer.wait()

        backend = FaultyBackend(LocalBackend(str(tmp_path)), [Fault("get", keys, do=Call(prune))])
        assert [checkpoint.step for checkpoint in verify(backend).checkpoints] == [2]
