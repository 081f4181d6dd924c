"""A full disk: freeing space needs none, and a save that finds no space leaves nothing behind."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import incckpt
from incckpt.backends.local import LocalBackend
from incckpt.backends.memory import MemoryBackend
from incckpt.backends.wrapper import WrapperBackend
from incckpt.errors import BackendError, SaveError
from incckpt.testing.small_disk import SmallDisk
from tests.stores import orphans

pytestmark = pytest.mark.slow

MIB = 1 << 20


class Disk:
    """A disk of 8 MiB, and a store on it."""

    def __init__(self, root: Path, calls: SmallDisk | None) -> None:
        self.root = root
        self._calls = calls

    def backend(self) -> LocalBackend:
        return LocalBackend(self.root / "store", calls=self._calls)

    def free(self) -> int:
        if self._calls is not None:
            return self._calls.free
        found = os.statvfs(self.root)
        return found.f_bavail * found.f_frsize

    def fill(self, leave: int = 0) -> Path:
        """Take the space that is left, as somebody else's files would; return the file that does."""
        filler = self.root / f"filler{len(list(self.root.iterdir()))}"
        filler.write_bytes(b"x" * (self.free() - leave))
        assert self.free() == leave
        return filler

    def stored(self) -> set[str]:
        """Return what stands in the store."""
        with self.backend() as backend:
            return {entry.key for entry in backend.list()}


@pytest.fixture(params=["modelled", "tmpfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if request.param == "modelled":
        yield Disk(tmp_path, SmallDisk(tmp_path, 8 * MIB))
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system cannot be mounted here")
    yield Disk(tmp_path, None)
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def state(step: int) -> dict[str, torch.Tensor]:
    """Return a state of 1 MB that does not compress."""
    return {"w": torch.randint(256, (MIB,), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))}


def by_the_living_manager(disk: Disk, manager: incckpt.CheckpointManager) -> None:
    assert manager.delete(1)


def by_a_new_manager(disk: Disk, manager: incckpt.CheckpointManager) -> None:
    manager.close()
    with incckpt.CheckpointManager(disk.backend()) as other:
        assert other.delete(1)


@pytest.mark.parametrize("delete", [by_the_living_manager, by_a_new_manager], ids=["living", "new"])
def test_deleting_on_a_full_disk(
    disk: Disk, delete: Callable[[Disk, incckpt.CheckpointManager], None], caplog: pytest.LogCaptureFixture
) -> None:
    with incckpt.CheckpointManager(disk.backend(), threads=1) as manager:
        manager.save(1, state(1)).result()
        manager.save(2, state(2)).result()
        disk.fill()
        delete(disk, manager)
    assert disk.free() > 0.9 * MIB
    assert orphans(disk.backend()) == set()
    assert caplog.records == []
    assert torch.equal(incckpt.load(disk.backend(), progress=False)["w"], state(2)["w"])
    disk.fill()  # what is reserved is there again
    with incckpt.CheckpointManager(disk.backend(), threads=1) as manager:
        assert manager.delete(2)
        manager.save(3, {"w": state(3)["w"][: MIB // 2]}).result()
    assert orphans(disk.backend()) == set()


def test_collecting_on_a_full_disk(disk: Disk) -> None:
    incckpt.CheckpointManager(disk.backend(), threads=1).save(1, state(1)).result()
    garbage = f"objects/ab/{'c' * 62}.{'1' * 16}"
    disk.backend().put(garbage, b"x" * MIB)
    disk.fill()
    plan = incckpt.collect(disk.backend(), dry_run=False, min_age=0)
    assert plan.objects == {garbage}
    assert disk.free() > 0.9 * MIB
    assert orphans(disk.backend()) == set()


def test_a_save_that_finds_no_space_keeps_none(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalBackend, "room", lambda backend: None)  # as where a quota counts, or others write, too
    with incckpt.CheckpointManager(disk.backend(), threads=1, chunk_bytes=MIB) as manager:
        manager.save(1, state(1)).result()
        before = disk.free()
        large = {f"w{number}": state(number)["w"] for number in range(10)}
        error = manager.save(2, large).exception()
        assert isinstance(error, BackendError)
        assert "full" in str(error)
        assert disk.free() >= before - 64 * 1024
        assert orphans(disk.backend()) == set()
        with pytest.raises(SaveError):
            manager.save(2, state(2))
        manager.save(2, state(2)).result()
    assert torch.equal(incckpt.load(disk.backend(), progress=False)["w"], state(2)["w"])


def test_a_disk_without_room_for_the_reserve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = LocalBackend(tmp_path / "store", calls=SmallDisk(tmp_path, 128 * 1024))
    with incckpt.CheckpointManager(backend, threads=1) as manager:
        manager.save(1, {"w": 1}).result()
    assert "could not set space aside" in caplog.text
    assert not (tmp_path / "store" / ".incckpt-reserve").exists()
    assert incckpt.load(tmp_path / "store", progress=False) == {"w": 1}


# -- what is known before anything is put


def test_a_save_that_cannot_fit_puts_nothing(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    with incckpt.CheckpointManager(disk.backend(), threads=1) as manager:
        manager.save(1, {"a": state(1), "b": state(2)}).result()
        filler, before = disk.fill(leave=MIB // 2), disk.stored()
        error = manager.save(2, {"a": state(1), "b": state(3)}).exception()
        assert isinstance(error, BackendError)
        assert error.errno == errno.ENOSPC
        assert "step 2 was not saved" in str(error)
        assert disk.stored() == before, "something was put"
        with pytest.raises(SaveError, match="step 2"):
            manager.save(3, {"a": state(1), "b": state(3)})
        with incckpt.CheckpointManager(disk.backend(), read_only=True) as reader:
            assert [checkpoint.step for checkpoint in reader.checkpoints()] == [1]
        # Nothing has changed since the refused save, whose content has yet to be stored.
        manager.save(3, {"a": state(1), "b": state(3)}).exception()
        with pytest.raises(SaveError, match="step 3"):
            manager.save(4, {"a": state(1), "b": state(3)})
        filler.unlink()
        manager.save(4, {"a": state(1), "b": state(3)}).result()
        assert manager.history[-1].put_objects == 1, "stored again what was there"
    assert torch.equal(incckpt.load(disk.backend(), progress=False)["b"]["w"], state(3)["w"])


def test_a_first_save_that_cannot_fit(disk: Disk) -> None:
    with incckpt.CheckpointManager(disk.backend(), threads=1, chunk_bytes=MIB) as manager:
        error = manager.save(1, {f"w{number}": state(number)["w"] for number in range(10)}).exception()
        assert isinstance(error, BackendError)
        assert "step 1 was not saved" in str(error)
        assert not {key for key in disk.stored() if key.startswith("objects/")}
        with pytest.raises(SaveError):
            manager.save(1, state(1))
        manager.save(1, state(1)).result()


def test_what_is_coded_smaller_is_not_refused(disk: Disk) -> None:
    """Ten MiB on a disk of eight: what counts is what they take there, measured before and after the first save."""
    with incckpt.CheckpointManager(disk.backend(), threads=1, chunk_bytes=MIB, delta=False) as manager:
        for step in range(1, 4):
            manager.save(step, {f"w{number}": state(number)["w"] % (1 + step) for number in range(10)}).result()
    # A new process that restores nothing does not know that everything is there already.
    disk.fill(leave=64 * 1024)
    with incckpt.CheckpointManager(disk.backend(), threads=1, chunk_bytes=MIB, delta=False) as manager:
        manager.save(4, {f"w{number}": state(number)["w"] % 4 for number in range(10)}).result()
        assert manager.history[-1].put_objects == 0


def test_a_disk_that_will_be_full_is_told_ahead(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    with incckpt.CheckpointManager(disk.backend(), threads=1) as manager:
        manager.save(1, state(1)).result()
        assert not caplog.records
        filler = disk.fill(leave=MIB + MIB // 2)
        manager.save(2, state(2)).result()
        manager.wait()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "step 2" in caplog.text
        assert "another save like it will not fit" in caplog.text
        manager.delete(1)
        manager.save(3, state(3)).result()
        manager.wait()
        assert len(caplog.records) == 1, "told again"
        filler.unlink()
        manager.save(4, state(4)).result()
        disk.fill(leave=MIB + MIB // 2)
        manager.save(5, state(5)).result()
        manager.wait()
        assert len(caplog.records) == 2, "not told that there is too little again"


def test_only_a_disk_says_how_much_room_it_has(tmp_path: Path) -> None:
    assert LocalBackend(tmp_path / "missing").room() is None
    room = LocalBackend(tmp_path).room()
    assert room is not None
    assert room > 0
    assert LocalBackend(tmp_path, calls=SmallDisk(tmp_path, 8 * MIB)).room() == 8 * MIB
    assert WrapperBackend(LocalBackend(tmp_path)).room() is not None
    assert MemoryBackend("room").room() is None
