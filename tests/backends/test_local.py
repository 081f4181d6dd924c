"""The local backend below its interface: what survives kills and power cuts, and what each system error becomes."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import incckpt
from incckpt.backends import Backend, Leftover
from incckpt.backends.local import LocalBackend
from incckpt.backends.system import SystemCalls
from incckpt.errors import (
    BackendError,
    BackendPermissionError,
    KeyExistsError,
    KeyNotFoundError,
    OptionError,
    UnsupportedOperationError,
)
from incckpt.testing.conformance import BackendConformance
from incckpt.testing.disk import PowerCut, StopAt, UnsyncedDisk
from incckpt.testing.faults import kill_process
from tests.forks import exit_code, fork, forks

pytestmark = forks

OLD, NEW = b"old" * 1_000, b"new value" * 2_000


class NoLinks(SystemCalls):
    """A file system such as FAT."""

    def link(self, source: str, target: str) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), source)


class NoLinksNoRename(NoLinks):
    """One that has no exclusive rename either."""

    def rename_new(self, source: str, target: str) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), target)


class FuseMount(SystemCalls):
    """A mount whose driver answers what it does not know with `code` (rclone's: EIO; s3fs-fuse's: EPERM, ENOSYS)."""

    def __init__(self, code: int) -> None:
        self._code = code

    def link(self, source: str, target: str) -> None:
        raise OSError(self._code, os.strerror(self._code), source)

    def rename_new(self, source: str, target: str) -> None:
        raise OSError(self._code, os.strerror(self._code), source)

    def fsync(self, fd: int) -> None:
        code = errno.ENOSYS if self._code == errno.ENOSYS else errno.EINVAL
        raise OSError(code, os.strerror(code))


class Trickling(SystemCalls):
    """Moves at most a thousand bytes a call, as the kernel may."""

    def write(self, fd: int, data: memoryview) -> int:
        return super().write(fd, data[:1_000])

    def pread(self, fd: int, nbytes: int, offset: int) -> bytes:
        return super().pread(fd, min(nbytes, 1_000), offset)


@pytest.mark.slow
class TestWithoutLinks(BackendConformance):
    large_value = 1 << 20

    @pytest.fixture
    def backend(self, tmp_path: Path) -> Iterator[Backend]:
        with LocalBackend(tmp_path, calls=NoLinks()) as backend:
            yield backend


@pytest.mark.slow
class TestTrickling(BackendConformance):
    large_value = 1 << 20
    many_keys = 20

    @pytest.fixture
    def backend(self, tmp_path: Path) -> Iterator[Backend]:
        with LocalBackend(tmp_path, calls=Trickling()) as backend:
            yield backend


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


# -- exclusive creation -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_create_has_one_winner_among_processes(tmp_path: Path) -> None:
    """Eight processes that start together create the same twenty keys; each key has exactly one winner."""
    gate, opener = os.pipe()

    def race(me: int) -> None:
        os.close(opener)
        os.read(gate, 1)  # until the parent closes its end
        backend = LocalBackend(tmp_path / "store")
        for number in range(20):
            with contextlib.suppress(KeyExistsError):
                backend.create(f"race/{number}", bytes([me]) * 10_000)
                LocalBackend(tmp_path / "won").put(f"{number}/{me}", b"")

    racers = [fork(partial(race, me)) for me in range(8)]
    os.close(gate)
    os.close(opener)
    assert [exit_code(pid) for pid in racers] == [0] * 8
    won = [entry.key.split("/") for entry in LocalBackend(tmp_path / "won").list()]
    assert sorted(int(key) for key, _ in won) == list(range(20))
    for key, winner in won:
        assert LocalBackend(tmp_path / "store").get(f"race/{key}") == bytes([int(winner)]) * 10_000


def test_without_links_or_exclusive_rename_create_is_refused_until_asked_for(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path, calls=NoLinksNoRename())
    with pytest.raises(UnsupportedOperationError, match="two writers"):
        backend.create("k", b"1")
    assert files(tmp_path) == []
    assert not backend.probe_exclusive()
    backend.create("k", b"1")
    with pytest.raises(KeyExistsError):
        backend.create("k", b"2")
    assert backend.get("k") == b"1"
    assert files(tmp_path) == ["k"]


MOUNT_ERRORS = [errno.EPERM, errno.ENOSYS, errno.EIO, errno.ENOTSUP, errno.EINVAL, errno.EACCES]


@pytest.mark.slow
@pytest.mark.parametrize("code", MOUNT_ERRORS, ids=[errno.errorcode[code] for code in MOUNT_ERRORS])
def test_a_mount_that_lacks_links_and_syncs_takes_one_writer(
    tmp_path: Path, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    states: list[dict[str, Any]] = [{"w": torch.full((4,), float(step)), "log": list(range(step))} for step in range(3)]
    with incckpt.CheckpointManager(LocalBackend(tmp_path / "store", calls=FuseMount(code)), keep_last_n=2) as manager:
        for step, state in enumerate(states):
            manager.save(step, state).result()
    messages = [record.message for record in caplog.records]
    assert len([text for text in messages if "cannot create exclusively: only one process may write" in text]) == 1
    assert len([text for text in messages if "cannot sync a file" in text]) == 1
    assert len([text for text in messages if "cannot sync a folder" in text]) <= 1
    assert torch.equal(incckpt.load(tmp_path / "store")["w"], states[2]["w"])
    assert not [name for name in files(tmp_path) if "incckpt-tmp" in name]


def test_a_thread_that_finds_out_late_that_nothing_can_be_synced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    class FirstIsSlow(FuseMount):
        def fsync(self, fd: int) -> None:
            if stat.S_ISREG(os.fstat(fd).st_mode) and not entered.is_set():
                entered.set()
                assert go_on.wait(timeout=60)
            super().fsync(fd)

    backend = LocalBackend(tmp_path, calls=FirstIsSlow(errno.ENOSYS))
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(backend.put, "a", NEW)
        assert entered.wait(timeout=60)
        backend.put("b", NEW)
        go_on.set()
        late.result()
    assert [backend.get(key) for key in ("a", "b")] == [NEW, NEW]
    assert files(tmp_path) == ["a", "b"]
    assert len([record for record in caplog.records if "cannot sync a file" in record.message]) == 1


def test_a_full_disk_is_not_taken_for_a_mount_without_links(tmp_path: Path) -> None:
    calls = NoLinks()
    calls.link = FuseMount(errno.ENOSPC).link  # type: ignore[method-assign]
    backend = LocalBackend(tmp_path, calls=calls)
    with pytest.raises(BackendError, match="full"):
        backend.probe_exclusive()
    assert backend.exclusive
    assert files(tmp_path) == []


# -- kills and power cuts ---------------------------------------------------------------------------------------------


def _create(backend: Backend) -> None:
    backend.create("runs/default/attempts/000001", NEW)


def _replace(backend: Backend) -> None:
    backend.put("pins/default", NEW)


def _put_beside(backend: Backend) -> None:
    backend.put("pins/other", NEW)


_WRITES: dict[Callable[[Backend], None], tuple[str, bytes | None]] = {
    _create: ("runs/default/attempts/000001", None),
    _replace: ("pins/default", OLD),
    _put_beside: ("pins/other", None),
}


def _value(backend: Backend, key: str) -> bytes | None:
    try:
        return backend.get(key)
    except KeyNotFoundError:
        return None


def _system_calls(write: Callable[[Backend], None], root: Path) -> int:
    LocalBackend(root).put("pins/default", OLD)
    calls = StopAt(0)
    write(LocalBackend(root, calls=calls))
    return calls.count


@pytest.mark.slow
@pytest.mark.parametrize("keep_entries", [False, True])
@pytest.mark.parametrize("write", _WRITES)
def test_power_cut_at_every_system_call(tmp_path: Path, write: Callable[[Backend], None], keep_entries: bool) -> None:
    """The old value or the new one survives, whole; what was answered survives; nothing else is disturbed."""
    key, before = _WRITES[write]
    calls = _system_calls(write, tmp_path / "dry")
    outcomes = set()
    for nth in range(1, calls + 2):
        root = tmp_path / str(nth)
        root.mkdir()
        LocalBackend(root / "store").put("pins/default", OLD)
        disk = UnsyncedDisk(root)
        answered = True
        try:
            write(LocalBackend(root / "store", calls=StopAt(nth, inner=disk)))
        except PowerCut:
            answered = False
        disk.crash(keep_entries=keep_entries)
        after = LocalBackend(root / "store")
        value = _value(after, key)
        outcomes.add(value)
        assert value == NEW if answered else value in (before, NEW), f"cut before system call {nth} of {calls}"
        assert answered == (nth > calls)
        if key != "pins/default":
            assert after.get("pins/default") == OLD
        for leftover in after.leftovers():
            after.remove_leftover(leftover)
        assert files(root / "store") == sorted(entry.key for entry in after.list())
        after.put(key, NEW)
        assert after.get(key) == NEW
    assert outcomes == {before, NEW}


@pytest.mark.parametrize("write", [_create, _put_beside])
def test_every_fsync_is_needed(tmp_path: Path, write: Callable[[Backend], None]) -> None:
    """Leave out any one fsync of a write and a power cut after it can lose what was answered, or tear it."""

    def survives(root: Path, skip: int) -> tuple[int, bool]:
        root.mkdir()
        disk = UnsyncedDisk(root, skip_fsync=skip)
        write(LocalBackend(root / "new" / "store", calls=disk))
        disk.crash()
        return disk.fsyncs, _value(LocalBackend(root / "new" / "store"), _WRITES[write][0]) == NEW

    fsyncs, kept = survives(tmp_path / "all", 0)
    assert kept
    assert fsyncs >= 5  # new, store and pins in their parents; the file; its name
    for skip in range(1, fsyncs + 1):
        assert survives(tmp_path / str(skip), skip) == (fsyncs, False), f"fsync {skip} of {fsyncs} is not needed"


def test_a_name_never_stands_for_unsynced_bytes(tmp_path: Path) -> None:
    """With names that reach the disk early, as they may, leaving out the file's fsync tears the value."""
    LocalBackend(tmp_path / "store").put("k", OLD)
    disk = UnsyncedDisk(tmp_path, skip_fsync=2)  # the first is that of the root's own name
    calls = StopAt(0, inner=disk)
    LocalBackend(tmp_path / "store", calls=calls).put("k", NEW)
    assert [name for name in calls.names if name in ("fsync", "replace", "write")] == [
        "fsync",
        "write",
        "fsync",
        "replace",
        "fsync",
    ]
    disk.crash(keep_entries=True)
    assert LocalBackend(tmp_path / "store").get("k") == b""


def test_folders_of_another_process_are_made_durable_too(tmp_path: Path) -> None:
    disk = UnsyncedDisk(tmp_path)
    for folder in ("store", "store/objects", "store/objects/ab"):  # made by someone who has not synced them yet
        disk.mkdir(str(tmp_path / folder))
    LocalBackend(tmp_path / "store", calls=disk).put("objects/ab/cd", NEW)
    disk.crash()
    assert LocalBackend(tmp_path / "store").get("objects/ab/cd") == NEW


def _cut_before_its_last_sync(root: Path, disk: UnsyncedDisk, write: Callable[[Backend], None]) -> None:
    """Write as another process would that has done all but the last fsync, that of the folder."""
    calls = StopAt(0, only="fsync", inner=disk)
    dry = root.parent / f"{root.name}-dry"
    shutil.copytree(root, dry)
    write(LocalBackend(dry, calls=calls))
    with pytest.raises(PowerCut):
        write(LocalBackend(root, calls=StopAt(calls.count, only="fsync", inner=disk)))


_LOOKS: dict[str, Callable[[Backend, str], bool]] = {
    "head": lambda backend, key: _exists(backend, key),
    "list": lambda backend, key: key in {entry.key for entry in backend.list()},
    "list of a prefix": lambda backend, key: key in {entry.key for entry in backend.list(key[:-1])},
}


def _exists(backend: Backend, key: str) -> bool:
    try:
        backend.head(key)
    except KeyNotFoundError:
        return False
    return True


@pytest.mark.parametrize("look", _LOOKS)
def test_what_is_seen_is_durable(tmp_path: Path, look: str) -> None:
    """A value that another process has not yet made durable is, once it was seen here: a save may go on with it."""
    root = tmp_path / "disk" / "store"
    root.mkdir(parents=True)
    disk = UnsyncedDisk(tmp_path / "disk")
    _cut_before_its_last_sync(root, disk, lambda backend: backend.create("objects/ab/cd", NEW))
    assert _LOOKS[look](LocalBackend(root, calls=disk), "objects/ab/cd")
    disk.crash()
    assert LocalBackend(root).get("objects/ab/cd") == NEW


@pytest.mark.parametrize("look", _LOOKS)
def test_folders_above_what_is_seen_are_durable(tmp_path: Path, look: str) -> None:
    disk = UnsyncedDisk(tmp_path)
    for folder in ("store", "store/objects", "store/objects/ab"):  # made by someone who has not synced them yet
        disk.mkdir(str(tmp_path / folder))
    LocalBackend(tmp_path / "store").put("objects/ab/cd", NEW)  # this disk has heard of none of its syncs
    disk.fsync(disk.open(str(tmp_path / "store/objects/ab/cd"), os.O_RDONLY))
    assert _LOOKS[look](LocalBackend(tmp_path / "store", calls=disk), "objects/ab/cd")
    disk.crash()
    assert LocalBackend(tmp_path / "store").get("objects/ab/cd") == NEW


def test_what_is_seen_to_be_gone_or_replaced_stays_so(tmp_path: Path) -> None:
    """A collector deletes objects since a ref is gone, or is a tombstone now: that ref may not come back."""
    root = tmp_path / "disk" / "store"
    for key in ("refs/default/gone", "refs/default/replaced", "refs/default/kept"):
        LocalBackend(root).put(key, OLD)
    disk = UnsyncedDisk(tmp_path / "disk")
    with pytest.raises(PowerCut):
        LocalBackend(root, calls=StopAt(1, only="fsync", inner=disk)).delete(["refs/default/gone"])
    _cut_before_its_last_sync(root, disk, lambda backend: backend.put("refs/default/replaced", NEW + NEW))
    seen = {entry.key: entry.size for entry in LocalBackend(root, calls=disk).list("refs/")}
    assert seen == {"refs/default/replaced": 2 * len(NEW), "refs/default/kept": len(OLD)}
    disk.crash()
    assert {entry.key: entry.size for entry in LocalBackend(root).list("refs/")} == seen


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_folder_that_may_not_be_synced_can_be_looked_at(tmp_path: Path, call: str, code: int) -> None:
    """An archive on a read-only disk, say."""
    LocalBackend(tmp_path).put("d/k", OLD)
    for look in _LOOKS.values():
        assert look(LocalBackend(tmp_path, calls=StopAt(1, _raise(code), only=call)), "d/k")


def test_deletes_are_durable(tmp_path: Path) -> None:
    keys = ["a/1", "a/2", "b/1", "c"]
    backend = LocalBackend(tmp_path)
    for key in keys:
        backend.put(key, OLD)
    disk = UnsyncedDisk(tmp_path)
    LocalBackend(tmp_path, calls=disk).delete([*keys, "a/missing", "missing/1"])
    assert disk.fsyncs == 3  # one for each folder
    disk.crash()
    assert list(backend.list()) == []


@pytest.mark.slow
@pytest.mark.parametrize("write", [_create, _replace])
def test_kill_at_every_system_call(tmp_path: Path, write: Callable[[Backend], None]) -> None:
    """As above with a real SIGKILL; a killed process leaves at most one temporary file, which is found and removed."""
    key, before = _WRITES[write]
    calls = _system_calls(write, tmp_path / "dry")
    left = 0
    for nth in range(1, calls + 1):
        root = tmp_path / str(nth)
        LocalBackend(root).put("pins/default", OLD)
        assert exit_code(fork(partial(write, LocalBackend(root, calls=StopAt(nth, kill_process))))) == -signal.SIGKILL
        after = LocalBackend(root)
        assert _value(after, key) in (before, NEW)
        leftovers = list(after.leftovers())
        left += len(leftovers)
        assert len(leftovers) <= 1
        for leftover in leftovers:
            assert leftover.modified is not None
            assert abs(leftover.modified - time.time()) < 600
            after.remove_leftover(leftover)
            after.remove_leftover(leftover)
        assert files(root) == sorted(entry.key for entry in after.list())
    assert left > 2


# -- errors -----------------------------------------------------------------------------------------------------------


def _raise(code: int) -> Callable[[str], None]:
    def fail(name: str) -> None:
        raise OSError(code, f"{os.strerror(code)} in {name}")

    return fail


_OPERATIONS: dict[str, tuple[Callable[[Backend], object], list[str]]] = {
    "put": (lambda backend: backend.put("d/k", NEW), ["stat", "open", "write", "fsync", "close", "replace"]),
    "create": (lambda backend: backend.create("d/new", NEW), ["stat", "open", "write", "fsync", "close", "link"]),
    "get": (lambda backend: backend.get("d/k"), ["open", "fstat", "pread"]),
    "head": (lambda backend: backend.head("d/k"), ["stat"]),
    "delete": (lambda backend: backend.delete(["d/k"]), ["unlink", "open", "fsync"]),
    "list": (lambda backend: list(backend.list("d/")), ["stat", "scandir"]),
}
_ERRNOS = {
    errno.ENOSPC: (BackendError, False),
    errno.EDQUOT: (BackendError, False),
    errno.EIO: (BackendError, False),
    errno.EROFS: (BackendPermissionError, False),
    errno.EACCES: (BackendPermissionError, False),
    errno.ESTALE: (BackendError, True),
    errno.EMFILE: (BackendError, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("code", _ERRNOS, ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize(("verb", "call"), [(verb, call) for verb, (_, calls) in _OPERATIONS.items() for call in calls])
def test_system_errors(tmp_path: Path, verb: str, call: str, code: int) -> None:
    """Each error at each occurrence of each system call names key and path, keeps its errno, and leaves no rubbish."""
    operation, _ = _OPERATIONS[verb]
    expected, transient = _ERRNOS[code]
    raised = 0
    for nth in range(1, 10):
        root = tmp_path / str(nth)
        LocalBackend(root).put("d/k", OLD)
        calls = StopAt(nth, _raise(code), only=call)
        error = None
        try:
            operation(LocalBackend(root, calls=calls))
        except BackendError as exc:
            error = exc
        if calls.count < nth:
            assert error is None
            break
        if error is not None:
            assert type(error) is expected
            assert error.errno == code
            assert error.transient is transient
            assert f"file://{root}" in str(error)
            assert verb in str(error)
            assert "d/" in str(error)
            assert str(error.filename).startswith(str(root)) or error.filename == str(tmp_path)
            assert isinstance(error.__cause__, OSError)
            raised += 1
        assert {leftover.name for leftover in LocalBackend(root).leftovers()} <= {"d/"}  # emptied by a delete
        if verb != "delete":
            assert LocalBackend(root).get("d/k") in (OLD, NEW)
    assert raised or call == "stat"  # a stat before a mkdir only asks whether the mkdir is needed


def test_full_disk_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="free space") as caught:
        LocalBackend(tmp_path, calls=StopAt(1, _raise(errno.ENOSPC), only="write")).put("objects/ab/cd", NEW)
    assert caught.value.errno == errno.ENOSPC
    assert files(tmp_path) == []


@pytest.mark.parametrize("exception", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_leaves_no_temporary_file(tmp_path: Path, exception: type[BaseException]) -> None:
    def interrupt(name: str) -> None:
        raise exception(name)

    with pytest.raises(exception):
        LocalBackend(tmp_path, calls=StopAt(1, interrupt, only="fsync")).create("k", NEW)
    with pytest.raises(exception):
        LocalBackend(tmp_path, calls=StopAt(2, interrupt, only="fsync")).create("k", NEW)
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_synced_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class NoFolderSync(SystemCalls):
        def fsync(self, fd: int) -> None:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            super().fsync(fd)

    backend = LocalBackend(tmp_path / "store", calls=NoFolderSync())
    backend.put("a/k", NEW)
    backend.create("b/k", NEW)
    assert backend.get("a/k") == backend.get("b/k") == NEW
    assert caplog.text.count("a power cut may undo") == 1


def test_a_value_cut_short_while_it_is_read(tmp_path: Path) -> None:
    class Shrinking(SystemCalls):
        def pread(self, fd: int, nbytes: int, offset: int) -> bytes:
            return super().pread(fd, 10, offset) if offset == 0 else b""

    LocalBackend(tmp_path).put("k", NEW)
    with pytest.raises(BackendError, match="ends early, at byte 10") as caught:
        LocalBackend(tmp_path, calls=Shrinking()).get("k")
    assert caught.value.transient


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    backend.put("a", OLD)
    for write in (backend.put, backend.create):
        with pytest.raises(BackendError, match="a/b") as caught:
            write("a/b", NEW)
        assert caught.value.errno == errno.ENOTDIR
    backend.put("d/k", OLD)
    with pytest.raises(BackendError, match="a folder is in the way"):
        backend.put("d", NEW)
    assert files(tmp_path) == ["a", "d/k"]


def test_a_loop_of_links_is_an_error_that_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(BackendError, match="loop") as caught:
        list(LocalBackend(tmp_path).list())
    assert caught.value.errno == errno.ELOOP


# -- files and folders ------------------------------------------------------------------------------------------------


def test_nothing_is_made_before_the_first_put(tmp_path: Path) -> None:
    root = tmp_path / "not" / "yet"
    backend = LocalBackend(root)
    assert list(backend.list()) == []
    assert list(backend.leftovers()) == []
    backend.delete(["k"])
    with pytest.raises(KeyNotFoundError):
        backend.get("k")
    assert os.listdir(tmp_path) == []
    backend.put("a/b/k", NEW)
    assert files(tmp_path) == ["not/yet/a/b/k"]


@pytest.mark.parametrize("removed", ["objects/ab", "objects", "."])
def test_folders_removed_meanwhile_are_made_again(tmp_path: Path, removed: str) -> None:
    """Whichever of the folders above a key it is, and whether the key's own folder was there before or not."""
    for key in ("objects/ab/again", "objects/cd/new"):
        root = tmp_path / key.replace("/", "-")
        backend = LocalBackend(root)
        backend.put("objects/ab/first", OLD)
        shutil.rmtree(root / removed)
        backend.put_many([(key, NEW)])
        backend.create("objects/ef/created", NEW)
        assert files(root) == sorted([key, "objects/ef/created"])


@pytest.mark.parametrize("removed", ["objects/ab", "objects", "."])
def test_folders_removed_meanwhile_are_made_again_together(tmp_path: Path, removed: str) -> None:
    backend = LocalBackend(tmp_path / "store")
    backend.put("objects/ab/first", OLD)
    shutil.rmtree(tmp_path / "store" / removed)
    keys = [f"objects/{folder}/new" for folder in ("ab", "cd", "ef")]
    backend.put_many([(key, NEW) for key in keys])
    assert files(tmp_path / "store") == keys


def test_a_root_that_is_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    root = tmp_path / "store"
    disk = UnsyncedDisk(tmp_path)
    backend = LocalBackend(root, calls=disk)
    backend.put("a/b/1", OLD)
    shutil.rmtree(root)
    assert list(backend.list()) == []
    backend.put("a/b/2", NEW)
    disk.crash()
    assert LocalBackend(root).get("a/b/2") == NEW


def test_the_path_is_fixed_when_the_backend_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    backend = LocalBackend("here")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    backend.put("k", NEW)
    assert files(tmp_path) == ["here/k"]


def test_the_umask_is_respected(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        LocalBackend(tmp_path / "store").put("d/put", NEW)
        LocalBackend(tmp_path / "store").create("d/created", NEW)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "store").rglob("*")}
    assert modes == {"d": 0o750, "put": 0o640, "created": 0o640}


def test_buffers_are_written_without_a_copy(tmp_path: Path) -> None:
    buffer = bytearray(NEW)
    seen: list[Any] = []

    class Watching(SystemCalls):
        def write(self, fd: int, data: memoryview) -> int:
            seen.append(data.obj)
            return super().write(fd, data)

    LocalBackend(tmp_path, calls=Watching()).put("k", memoryview(buffer)[3:])
    assert [obj is buffer for obj in seen] == [True]
    assert LocalBackend(tmp_path).get("k") == NEW[3:]


def test_a_root_behind_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    backend = LocalBackend(tmp_path / "link")
    backend.put("a/k", NEW)
    assert [entry.key for entry in backend.list()] == ["a/k"]
    assert files(tmp_path / "real") == ["a/k"]


def test_a_root_whose_parent_may_not_be_read(tmp_path: Path) -> None:
    """A home directory's parent often is only searchable; a root that is there already needs no sync up there."""

    class Searchable(SystemCalls):
        def open(self, path: str, flags: int, mode: int = 0o666) -> int:
            if path == str(tmp_path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return super().open(path, flags, mode)

    (tmp_path / "store").mkdir()
    LocalBackend(tmp_path / "store", calls=Searchable()).put("a/k", NEW)
    with pytest.raises(BackendPermissionError):
        LocalBackend(tmp_path / "new", calls=Searchable()).put("a/k", NEW)


def test_a_name_hidden_by_a_rename_during_the_listing_is_found(tmp_path: Path) -> None:
    """Some file systems show a name that is renamed over during the reading of its folder not at all."""
    backend = LocalBackend(tmp_path)
    for number in range(5):
        backend.put(f"pins/{number}", OLD)

    class Racing(SystemCalls):
        passes = 0

        def scandir(self, path: str) -> list[os.DirEntry[str]]:
            found = super().scandir(path)
            if path.endswith("pins"):
                self.passes += 1
                if self.passes == 1:
                    LocalBackend(tmp_path).put("pins/3", NEW)
                    stamp = os.stat(path).st_mtime_ns + 1
                    os.utime(path, ns=(stamp, stamp))  # however coarse the clock
                    return [entry for entry in found if entry.name != "3"]
            return found

    calls = Racing()
    entries = list(LocalBackend(tmp_path, calls=calls).list("pins/"))
    assert sorted(entry.key for entry in entries) == [f"pins/{number}" for number in range(5)]
    assert calls.passes == 2


def test_keys_that_vanish_during_a_listing_are_passed_over(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    for number in range(10):
        backend.put(f"{number % 2}/{number}", OLD)
    listing = backend.list()
    first = next(listing)
    backend.delete([f"{number % 2}/{number}" for number in range(10)])
    (tmp_path / "0").rmdir()
    # The rest of the folder was looked at together with the first; the other folder is only now.
    assert all(entry.key.startswith(first.key[:2]) for entry in listing)
    assert first.size == len(OLD)


def test_a_key_that_vanishes_while_its_folder_is_listed_is_passed_over(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    for number in range(3):
        backend.put(f"d/{number}", OLD)

    def vanish(_: str) -> None:
        backend.delete(["d/0", "d/1", "d/2"])

    assert list(LocalBackend(tmp_path, calls=StopAt(3, vanish, only="stat")).list("d/")) == []


def test_leftovers_are_ours_only(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    backend.put("a/k", OLD)
    for name in (".DS_Store", "a/.nfs0001", "a/.incckpt-tmp-0123456789abcdef", ".incckpt-tmp-0"):
        (tmp_path / name).write_bytes(b"x")
    assert [entry.key for entry in backend.list()] == ["a/k"]
    leftovers = {leftover.name: leftover for leftover in backend.leftovers()}
    assert set(leftovers) == {"a/.incckpt-tmp-0123456789abcdef", ".incckpt-tmp-0"}
    for leftover in leftovers.values():
        backend.remove_leftover(leftover)
    assert files(tmp_path) == [".DS_Store", "a/.nfs0001", "a/k"]
    for name in ("a/k", ".DS_Store", "../.incckpt-tmp-0", "/.incckpt-tmp-0", ".incckpt-tmp-0/../k", ".incckpt-tmp-\0"):
        with pytest.raises(OptionError):
            backend.remove_leftover(Leftover(name, None))


def test_a_folder_that_was_left_empty_is_a_leftover(tmp_path: Path) -> None:
    backend, other = LocalBackend(tmp_path), LocalBackend(tmp_path)
    backend.put("a/b/k", OLD)
    other.put("a/b/l", OLD)
    assert list(backend.leftovers()) == []
    backend.delete(["a/b/k", "a/b/l"])
    (found,) = backend.leftovers()
    assert found.name == "a/b/"
    assert found.modified == (tmp_path / "a/b").stat().st_mtime
    backend.put("a/b/k", OLD)
    backend.remove_leftover(found)  # in use again
    assert backend.get("a/b/k") == OLD
    backend.delete(["a/b/k"])
    backend.remove_leftover(found)
    backend.remove_leftover(found)
    (found,) = backend.leftovers()
    assert found.name == "a/"
    backend.remove_leftover(found)
    assert list(backend.leftovers()) == []
    for writer in (backend, other):  # both remember folders that are gone
        writer.put("a/b/k", NEW)
        writer.create("a/b/l", NEW)
        assert sorted(entry.key for entry in LocalBackend(tmp_path).list()) == ["a/b/k", "a/b/l"]
        writer.delete(["a/b/k", "a/b/l"])
        backend.remove_leftover(found)
    for name in ("a/../", "../", "/", "./"):
        with pytest.raises(OptionError):
            backend.remove_leftover(Leftover(name, None))


def test_a_folder_made_again_by_another_process_is_made_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "store"
    root.mkdir()
    disk = UnsyncedDisk(root)
    backend = LocalBackend(root, calls=disk)
    backend.put("a/k", OLD)
    backend.delete(["a/k"])
    (found,) = backend.leftovers()
    backend.remove_leftover(found)
    (root / "a").mkdir()  # by a process that has not come to sync its name
    passed = time.monotonic() + 3600  # a folder is not removed before
    monkeypatch.setattr(time, "monotonic", lambda: passed)
    backend.put("a/k", NEW)
    disk.crash()
    assert LocalBackend(root).get("a/k") == NEW
