"""Damage: a clear error names the key and the tensor, nothing good is lost, an earlier checkpoint restores."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import incckpt
from incckpt.backends.local import LocalBackend
from incckpt.errors import BackendError, CorruptionError, FormatError, IncckptError, MissingObjectError, SaveError
from incckpt.manager import CheckpointManager
from incckpt.store.refs import Ref
from incckpt.store.store import Store
from incckpt.testing.disk import StopAt
from tests.effort import every
from tests.stores import object_keys, orphans

pytestmark = pytest.mark.slow

GOOD = {"weight": torch.arange(400_000, dtype=torch.float32), "bias": torch.ones(10)}


def save_three(folder: Path) -> None:
    """Save steps 1 to 3; the weight changes wholly with each, so every step has an object of its own."""
    with CheckpointManager(folder) as manager:
        for step in (1, 2, 3):
            manager.save(step, state_at(step))


def state_at(step: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(step)
    return {"weight": torch.randn(400_000), "bias": torch.full((10,), float(step))}


def objects_of(folder: Path, step: int) -> dict[str, Path]:
    """Return the manifest's file, and that of the weight's own object."""
    with Store(LocalBackend(str(folder))) as store:
        run = store.run("default")
        name = run.lineage().at(step)[0]
        ref = run.read(name)
        assert isinstance(ref, Ref)
        manifest = store.manifest(ref)
        chunk = max(manifest.chunks, key=lambda chunk: chunk.nbytes)
        key = next(key for key in object_keys(store.backend) if key.endswith(chunk.nonce) and chunk.identity[2:] in key)
        return {"manifest": folder / ref.manifest, "object": folder / key, "ref": folder / run.ref_key(name)}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 0x10
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    path.write_bytes(
        b"not one of ours, but of the same length "[:40] * (path.stat().st_size // 40)
        + b"." * (path.stat().st_size % 40)
    )


DAMAGE = [truncate, flip, empty, foreign, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("what", ["manifest", "object"])
def test_damage_is_named_and_the_checkpoint_before_restores(
    tmp_path: Path, what: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    save_three(tmp_path)
    path = objects_of(tmp_path, 3)[what]
    damage(path)
    error = MissingObjectError if damage is Path.unlink else CorruptionError
    with pytest.raises(error) as caught:
        incckpt.load(tmp_path)
    assert path.name in str(caught.value)
    assert ("weight" if what == "object" else "step 3") in str(caught.value)

    with CheckpointManager(tmp_path) as manager:
        target = state_at(0)
        with pytest.raises(error):
            manager.restore(target, step=3)
        with caplog.at_level(logging.ERROR):
            assert manager.restore(target) == 2
        assert "step 3 cannot be read" in caplog.text
        for name, value in state_at(2).items():
            assert torch.equal(target[name], value)
        manager.save(4, state_at(4)).result()
    for step in (1, 2, 4):
        assert torch.equal(incckpt.load(tmp_path, step=step)["weight"], state_at(step)["weight"])


@pytest.mark.parametrize("damage", [truncate, empty, foreign], ids=lambda damage: damage.__name__)
def test_an_unreadable_manifest_stops_collection(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Lesson 4 of the seed: a truncated manifest was taken for an empty one, and everything was collected."""
    save_three(tmp_path)
    with CheckpointManager(tmp_path, run="other") as other:
        other.save(1, {"x": torch.randn(1000)}).result()
    damage(objects_of(tmp_path, 2)["manifest"])
    before = object_keys(LocalBackend(str(tmp_path)))
    with caplog.at_level(logging.WARNING), CheckpointManager(tmp_path, run="other", keep_last_n=1) as other:
        other.save(2, {"x": torch.randn(1000)}).result()
    assert "nothing was collected" in caplog.text or "without collecting" in caplog.text
    assert before <= object_keys(LocalBackend(str(tmp_path)))
    assert torch.equal(incckpt.load(tmp_path, step=3)["weight"], state_at(3)["weight"])

    # Deleting that checkpoint works without reading it, and then collection goes on.
    with CheckpointManager(tmp_path) as manager:
        manager.restore(state_at(0))
        assert manager.delete(2)
        assert not manager.delete(2)
        manager.save(4, state_at(4)).result()
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [1, 3, 4]
    with CheckpointManager(tmp_path, run="other", keep_last_n=1) as other:
        other.save(3, {"x": torch.randn(1000)}).result()
    assert orphans(tmp_path) == set()


@pytest.mark.parametrize("damage", [truncate, empty, foreign], ids=lambda damage: damage.__name__)
def test_an_unreadable_ref(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    save_three(tmp_path)
    damage(objects_of(tmp_path, 3)["ref"])
    with pytest.raises(CorruptionError, match="refs/default/"):
        incckpt.load(tmp_path)
    target = state_at(0)
    with CheckpointManager(tmp_path, keep_last_n=1) as manager:
        assert manager.restore(target) == 2
        manager.save(3, state_at(3)).result()
        assert manager.delete(3)
        manager.save(5, state_at(5)).result()
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [5]
    assert orphans(tmp_path) == set()


@pytest.mark.parametrize("text", ["", "{", '{"format": 1}', '{"format":1,"kind":"manifest"}', "[]", "\0"])
def test_a_marker_that_is_none(tmp_path: Path, text: str) -> None:
    save_three(tmp_path)
    (tmp_path / "incckpt.json").write_text(text)
    for use in (lambda: incckpt.load(tmp_path), lambda: incckpt.save({}, tmp_path)):
        with pytest.raises(CorruptionError, match=r"incckpt\.json"):
            use()


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    save_three(tmp_path)
    (tmp_path / "incckpt.json").write_text('{"format": 2, "kind": "store", "id": "x"}')
    with pytest.raises(FormatError, match="format 2"):
        incckpt.load(tmp_path)


def failing_at(nth: int, number: int, only: str) -> StopAt:
    """Return system calls of which one fails with an errno."""

    def fail(name: str) -> None:
        raise OSError(number, os.strerror(number))

    return StopAt(nth, fail, only=only)


@pytest.mark.parametrize(
    ("number", "only"),
    [
        (errno.ENOSPC, "write"),
        (errno.ENOSPC, "open"),
        (errno.EIO, "fsync"),
        (errno.EROFS, "open"),
        (errno.EACCES, "link"),
    ],
)
def test_a_disk_that_fails_at_any_call(tmp_path: Path, number: int, only: str) -> None:
    with CheckpointManager(LocalBackend(str(tmp_path), calls=(counting := StopAt(0, only=only)))) as manager:
        manager.save(1, state_at(1)).result()
        before = counting.count
        manager.save(2, state_at(2)).result()
        after = counting.count
    failures = 0
    for nth in range(before + 1, after + 1, every()):
        folder = tmp_path / f"store{nth}"
        calls = failing_at(nth, number, only)
        with CheckpointManager(LocalBackend(str(folder), calls=calls)) as manager:
            manager.save(1, state_at(1)).result()
            for step in (2, 3, 4):  # the call is one of the second save's, or of the third's: names are random
                error = manager.save(step, state_at(step)).exception()
                if error is not None:
                    failures += 1
                    assert isinstance(error, BackendError)
                    assert error.errno == number
                    assert str(folder) in str(error)
                    with pytest.raises(SaveError):
                        manager.save(step + 1, state_at(step + 1))
            manager.save(5, state_at(5)).result()
        assert torch.equal(incckpt.load(folder, step=1)["weight"], state_at(1)["weight"])
        assert torch.equal(incckpt.load(folder)["weight"], state_at(5)["weight"])
    assert failures or only == "link"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(IncckptError, match="file"):
        incckpt.save({"x": 1}, tmp_path / "file" / "store")
    assert (tmp_path / "file").read_text() == "in the way"


def test_verification_can_be_left_out(tmp_path: Path) -> None:
    state: dict[str, Any] = {"noise": torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)}
    incckpt.save(state, tmp_path)
    path = max(
        (path for path in (tmp_path / "objects").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptionError, match="noise"):
        incckpt.load(tmp_path)
    assert incckpt.load(tmp_path, verify=False)["noise"][-1] == state["noise"][-1] ^ 1
