"""A full disk: freeing space needs none, and a save that finds no space leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import incckpt
from incckpt.backends.local import LocalBackend
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

    def fill(self) -> None:
        """Take all the space that is left, as somebody else's files would."""
        number = len(list(self.root.iterdir()))
        (self.root / f"filler{number}").write_bytes(b"x" * self.free())
        assert self.free() == 0


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


def test_a_save_that_finds_no_space_keeps_none(disk: Disk) -> None:
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
