"""A store in a local folder, durable against a power cut.

A put writes a temporary file in the target's own folder, fsyncs it, renames it and fsyncs the folder. In that order, no
name ever refers to bytes that a power cut can take. A create uses ``link`` in place of the rename: it fails if the name
is taken, and is atomic wherever there are hard links, NFS included. Without hard links it uses a rename that refuses to
replace. With neither (FAT, most FUSE mounts of buckets and drives) it looks first and then renames, once
`LocalBackend.probe_exclusive` has detected that.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from urllib.parse import quote

from incckpt.backends.base import FULL, Backend, Entry, Leftover, ReadableBuffer, keys_in, validate_key, validate_prefix
from incckpt.backends.folders import NO_SUCH_CALL, Folders
from incckpt.backends.reserve import Reserve
from incckpt.backends.system import ADVICE, NativeCalls, SystemCalls, UnsyncedCalls
from incckpt.errors import (
    BackendError,
    BackendPermissionError,
    KeyExistsError,
    KeyNotFoundError,
    OptionError,
    UnsupportedOperationError,
)

__all__ = ["LocalBackend"]

logger = logging.getLogger(__name__)

_TEMPORARY = ".incckpt-tmp-"  # no key has a segment that begins with a dot
_TEMPORARY_NAME = re.compile(rf"(?:(.+)/)?({re.escape(_TEMPORARY)}[0-9a-f]+)")
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR})
_IN_USE = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY})
_NO_HARD_LINKS = NO_SUCH_CALL | {errno.EPERM}
_NOT_OF_THE_CALL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOENT})  # any call would have failed
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_MAY_PASS = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT}
)
_AT_ONCE = 64  # files open at once in a put of many
_LIST_PASSES = 4


class LocalBackend(Backend):
    """Keys are files below a folder, which the first put makes.

    Parameters
    ----------
    root
        The folder; made absolute at once. A missing one lists as empty.
    calls
        The system calls to use; tests pass failing ones.
    """

    remote = False

    def __init__(self, root: str | os.PathLike[str], *, calls: SystemCalls | None = None) -> None:
        self._root = os.path.abspath(os.fspath(root))
        self._calls = calls if calls is not None else NativeCalls()
        self._token = (0, "")  # of this process, for the names of temporary files
        self._numbers = itertools.count()
        self._folders = Folders(self._root, self._calls)
        self._reserve = Reserve(os.path.join(self._root, ".incckpt-reserve"))
        self._place_new: Callable[[str, str], None] = self._link
        self._probed = False
        self.url = "file://" + quote(os.fsencode(self._root))

    @property
    def place(self) -> str:
        return f"file://{os.path.realpath(self._root)}"

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        with self._open(key) as (fd, size):
            return self._read(fd, start, size if end is None else min(end, size), key)

    def get_into(self, key: str, parts: Sequence[memoryview]) -> int:
        with self._open(key) as (fd, size):
            start = 0
            for part in parts:
                self._read_into(fd, part[: size - start], start, key)
                start = min(start + len(part), size)
            return size

    def put(self, key: str, data: ReadableBuffer) -> None:
        path = self._path(key)
        try:
            self._write(path, data, self._write_over)
        except OSError as exc:
            raise self._error(exc, "put", key, path, missing_is_key=False) from exc

    def put_many(self, values: Sequence[tuple[str, ReadableBuffer]]) -> None:
        for start in range(0, len(values), _AT_ONCE):
            self._put_together(values[start : start + _AT_ONCE])

    def _put_together(self, values: Sequence[tuple[str, ReadableBuffer]]) -> None:
        files: list[tuple[str, str, memoryview]] = []
        for key, data in values:
            path = self._path(key)
            temporary = os.path.join(os.path.dirname(path), self._temporary_name())
            files.append((temporary, path, memoryview(data).cast("B")))
        try:
            self._folders.make_all(os.path.dirname(path) for _, path, _ in files)
            self._calls.write_over(files)
        except BaseException as exc:
            for temporary, _, _ in files:
                self._discard(temporary)
            if not isinstance(exc, OSError):
                raise
            if not isinstance(exc, FileNotFoundError) and exc.errno not in NO_SUCH_CALL:
                named = (
                    (key, path)
                    for (key, _), (temporary, path, _) in zip(values, files, strict=True)
                    if exc.filename in (temporary, path, os.path.dirname(path))
                )
                key, path = next(named, (values[0][0], files[0][1]))
                raise self._error(exc, "put", key, path, missing_is_key=False) from exc
            super().put_many(values)  # a folder was removed meanwhile, or cannot be synced: `put` handles both

    def create(self, key: str, data: ReadableBuffer) -> None:
        path = self._path(key)
        try:
            self._write(path, data, self._write_new)
        except BackendError:
            raise
        except FileExistsError as exc:
            raise KeyExistsError(errno.EEXIST, f"{self.url}: key {key!r} exists", path) from exc
        except OSError as exc:
            raise self._error(exc, "create", key, path, missing_is_key=False) from exc

    def probe_exclusive(self) -> bool:
        """Test what this file system has: hard links, a rename that refuses to replace, or neither.

        Mounts without hard links fail with various errors (FUSE with EPERM, ENOSYS or EIO). So any error of linking an
        empty file counts as having none, unless it has nothing to do with the link.
        """
        if not self._probed:
            try:
                self._finding_room(self._probe)
            except OSError as exc:
                raise self._error(exc, "write to", "", self._root, missing_is_key=False) from exc
            self._probed = True
        return self.exclusive

    def _probe(self) -> None:
        temporary, other = (os.path.join(self._root, self._temporary_name()) for _ in range(2))
        try:
            self._folders.make(self._root)
            self._calls.close(self._calls.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC))
            if self._works(self._calls.link, temporary, other):
                self._place_new = self._link
            elif self._works(self._calls.rename_new, temporary, other):
                self._place_new = self._rename_new
            else:
                self.exclusive = False
        finally:
            for path in (temporary, other):
                self._discard(path)

    @staticmethod
    def _works(call: Callable[[str, str], None], source: str, target: str) -> bool:
        try:
            call(source, target)
        except OSError as exc:
            if exc.errno in _NOT_OF_THE_CALL:
                raise
            return False
        return True

    def delete(self, keys: Iterable[str]) -> None:
        paths = {key: self._path(key) for key in keys}
        folders: dict[str, str] = {}
        for key, path in paths.items():
            try:
                self._calls.unlink(path)
            except OSError as exc:
                if exc.errno not in _GONE and not self._folders.is_one(path):
                    raise self._error(exc, "delete", key, path) from exc
            else:
                folders[os.path.dirname(path)] = key
        for folder, key in folders.items():
            try:
                self._folders.sync(folder)
            except OSError as exc:
                if exc.errno not in _GONE:
                    raise self._error(exc, "delete", key, folder) from exc

    def list(self, prefix: str = "") -> Iterator[Entry]:
        for folder, names in self._walk(validate_prefix(prefix)):
            found: list[Entry] = []
            above = "" if folder == self._root else f"{self._key(folder)}/"
            for key in keys_in(above, names):
                path = f"{folder}/{key[len(above) :]}"
                try:
                    about = self._calls.stat(path)
                except OSError as exc:
                    if exc.errno in _GONE:
                        continue
                    raise self._error(exc, "list", prefix, path) from exc
                if stat.S_ISREG(about.st_mode):
                    found.append(Entry(key, about.st_size, about.st_mtime))
            self._settle(folder, "list", above or "./")
            yield from found

    def head(self, key: str) -> Entry:
        path = self._path(key)
        try:
            found = self._calls.stat(path)
        except OSError as exc:
            raise self._error(exc, "head", key, path) from exc
        if not stat.S_ISREG(found.st_mode):
            raise self._missing(key, path)
        self._settle(os.path.dirname(path), "head", key)
        return Entry(key, found.st_size, found.st_mtime)

    def reserve(self) -> None:
        self._reserve.keep(self._calls)

    def freeing(self) -> AbstractContextManager[None]:
        return self._reserve.freeing(self._calls)

    def room(self) -> int | None:
        try:
            return self._calls.room(self._root)
        except OSError:  # no such folder yet, or a file system that does not say
            return None

    def leftovers(self) -> Iterator[Leftover]:
        pending = [self._root]
        while pending:
            folder = pending.pop()
            if folder != self._root and os.path.islink(folder):
                continue  # what is elsewhere is not ours to tidy up
            found = self._entries(folder)
            pending += (os.path.join(folder, name) for name, is_folder in found.items() if is_folder and name[0] != ".")
            if not found and folder != self._root:
                yield from self._leftover(folder, "/")
            for name, is_folder in found.items():
                if name.startswith(_TEMPORARY) and not is_folder:
                    yield from self._leftover(os.path.join(folder, name), "")

    def _leftover(self, path: str, mark: str) -> Iterator[Leftover]:
        name = self._key(path) + mark
        try:
            yield Leftover(name, self._calls.stat(path).st_mtime)
        except OSError as exc:
            if exc.errno not in _GONE:
                raise self._error(exc, "list", name, path) from exc

    def remove_leftover(self, leftover: Leftover) -> None:
        match = _TEMPORARY_NAME.fullmatch(leftover.name)
        remove = self._calls.unlink
        if match is not None:
            path = os.path.join(self._root, validate_prefix(match[1] or ""), match[2])
        elif leftover.name.endswith("/"):
            path = os.path.join(self._root, validate_prefix(leftover.name)[:-1])
            remove = self._calls.rmdir
        else:
            raise OptionError(f"neither a temporary file nor an empty folder of {self.url}: {leftover.name!r}")
        try:
            remove(path)
        except OSError as exc:
            if exc.errno not in _GONE | _IN_USE:
                raise self._error(exc, "remove", leftover.name, path) from exc

    # -- reading ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _open(self, key: str) -> Iterator[tuple[int, int]]:
        """Open a value for reading; yield its descriptor and size."""
        path = self._path(key)
        try:
            fd = self._calls.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO's would wait for a writer
            try:
                yield fd, self._size(fd, key, path)
            finally:
                self._calls.close(fd)
        except BackendError:
            raise
        except OSError as exc:
            raise self._error(exc, "get", key, path) from exc

    def _read_into(self, fd: int, part: memoryview, start: int, key: str) -> None:
        done = 0
        while done < len(part):  # one read may return less than was asked for
            got = self._calls.preadv(fd, part[done:], start + done)
            if not got:
                raise self._ends_early(key, start + done, start + len(part))
            done += got

    def _read(self, fd: int, start: int, stop: int, key: str) -> bytes:
        parts: list[bytes] = []
        while start < stop:  # one read may return less than was asked for (at most 2 GiB on Linux)
            part = self._calls.pread(fd, stop - start, start)
            if not part:
                raise self._ends_early(key, start, stop)
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _ends_early(self, key: str, at: int, stop: int) -> BackendError:
        message = f"{self.url}: key {key!r} ends early, at byte {at} of {stop}"
        return BackendError(errno.EIO, message, transient=True)

    def _size(self, fd: int, key: str, path: str) -> int:
        found = self._calls.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise self._missing(key, path)
        return found.st_size

    def _walk(self, prefix: str) -> Iterator[tuple[str, Sequence[str]]]:
        """Yield each folder that may hold keys with `prefix`, and the names of its matching files."""
        folder, _, begin = prefix.rpartition("/")
        pending = [(os.path.join(self._root, folder) if folder else self._root, begin)]
        seen: set[str] = set()  # where links led, which may be round in circles
        while pending:
            current, begin = pending.pop()
            if os.path.islink(current):
                place = os.path.realpath(current)
                if place in seen:
                    continue
                seen.add(place)
            names: list[str] = []
            for name, is_folder in self._entries(current).items():
                if name.startswith(begin):
                    if not is_folder:
                        names.append(name)
                    elif not name.startswith("."):
                        pending.append((os.path.join(current, name), ""))
            yield current, names

    def _entries(self, folder: str) -> dict[str, bool]:
        """Return whether each name in a folder is a folder; read again while the folder changes.

        A name that a rename replaces during the reading may appear twice or, on some file systems, not at all; the
        second reading has it.
        """
        found: dict[str, bool] = {}
        try:
            last = None
            for _ in range(_LIST_PASSES):
                names, before, after = self._calls.read_folder(folder)
                found.update(names)
                if before == after and last in (None, before):
                    break
                last = after
        except OSError as exc:
            if exc.errno not in _GONE:
                path = exc.filename if isinstance(exc.filename, str) else folder
                raise self._error(exc, "list", f"{self._key(folder)}/", path) from exc
        return found

    # -- writing ------------------------------------------------------------------------------------------------------

    def _write(self, path: str, data: ReadableBuffer, write: Callable[[str, str, memoryview], None]) -> None:
        self._finding_room(lambda: self._write_once(path, data, write))

    def _finding_room(self, work: Callable[[], None]) -> None:
        """Do `work`; if the disk is full and this thread frees space, release the reserve and try again."""
        try:
            work()
        except OSError as exc:
            if exc.errno not in FULL or not self._reserve.release(self._calls):
                raise
            work()

    def _write_once(self, path: str, data: ReadableBuffer, write: Callable[[str, str, memoryview], None]) -> None:
        """Make the folder, then call ``write(temporary, path, data)``; if it fails, remove the temporary file."""
        view = memoryview(data).cast("B")
        folder = os.path.dirname(path)
        self._folders.make(folder)
        temporary = os.path.join(folder, self._temporary_name())
        calls = self._calls
        try:
            try:
                write(temporary, path, view)
            except FileNotFoundError:  # the folder was removed meanwhile: make it again
                self._folders.forget()
                self._folders.make(folder)
                write(temporary, path, view)
            except OSError as exc:
                if exc.errno not in NO_SUCH_CALL or exc.filename not in (None, temporary):
                    raise
                if isinstance(calls, UnsyncedCalls):
                    raise
                self._discard(temporary)
                self._without_sync(exc, lambda: write(temporary, path, view))
        except BaseException:
            self._discard(temporary)
            raise

    def _without_sync(self, refused: OSError, write: Callable[[], None]) -> None:
        """Write a file without syncing, which seems to be what was `refused`; if that works, never sync again."""
        calls = self._calls
        if isinstance(calls, UnsyncedCalls):  # another thread got here first
            write()
            return
        self._calls = self._folders.calls = UnsyncedCalls(calls)
        try:
            write()
        except BaseException:
            self._calls = self._folders.calls = calls
            raise
        logger.warning(
            "%s: this file system cannot sync a file (%s); a power cut, or the loss of the mount, may undo the last "
            "writes, even committed checkpoints",
            self.url,
            refused.strerror,
        )

    def _write_over(self, temporary: str, path: str, data: memoryview) -> None:
        try:
            self._calls.write_over([(temporary, path, data)])
        except OSError as exc:
            if exc.filename != os.path.dirname(path):
                raise
            self._folders.accept_unsynced(exc)

    def _write_new(self, temporary: str, path: str, data: memoryview) -> None:
        self._calls.write_new(temporary, data)
        self._name_new(temporary, path)
        self._folders.sync(os.path.dirname(path))

    def _temporary_name(self) -> str:
        """Return a name unique across machines; a forked child has its own token."""
        if os.getpid() != self._token[0]:
            self._token = (os.getpid(), secrets.token_hex(8))
        return f"{_TEMPORARY}{self._token[1]}{next(self._numbers):08x}"

    def _discard(self, temporary: str) -> None:
        try:
            self._calls.unlink(temporary)
        except FileNotFoundError:
            pass
        except OSError as exc:
            if os.path.lexists(temporary):
                logger.warning("%s: could not remove the temporary file %s: %s", self.url, temporary, exc)

    def _name_new(self, temporary: str, path: str) -> None:
        if not self.exclusive:
            if self._exists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            self._calls.replace(temporary, path)
            return
        try:
            self._place_new(temporary, path)
        except OSError as exc:
            if self._place_new != self._link or exc.errno not in _NO_HARD_LINKS:
                raise
            self._rename_new(temporary, path)
            self._place_new = self._rename_new

    def _link(self, temporary: str, path: str) -> None:
        self._calls.link(temporary, path)
        self._discard(temporary)

    def _rename_new(self, temporary: str, path: str) -> None:
        try:
            self._calls.rename_new(temporary, path)
        except OSError as exc:
            if exc.errno not in NO_SUCH_CALL:
                raise
            raise UnsupportedOperationError(
                exc.errno,
                f"{self.url}: this file system has neither hard links nor a rename that refuses to replace, so two "
                "writers cannot be kept apart; use another file system, or one writer only",
                path,
            ) from exc

    def _settle(self, folder: str, verb: str, key: str) -> None:
        """Make what was just seen in a folder durable: the process that put it may not have done so yet.

        Where this is not permitted, this process cannot write either, and so does not rely on it.
        """
        try:
            self._folders.settle(folder)
        except OSError as exc:
            if exc.errno not in _GONE | _REFUSED:
                raise self._error(exc, verb, key, folder) from exc

    # -- paths and errors ---------------------------------------------------------------------------------------------

    def _path(self, key: str) -> str:
        return os.path.join(self._root, validate_key(key))

    def _key(self, path: str) -> str:
        return os.path.relpath(path, self._root)

    def _exists(self, path: str) -> bool:
        try:
            self._calls.stat(path)
        except OSError as exc:
            if exc.errno in _GONE:
                return False
            raise
        return True

    def _missing(self, key: str, path: str) -> KeyNotFoundError:
        return KeyNotFoundError(errno.ENOENT, f"{self.url}: no key {key!r}", path)

    def _error(self, exc: OSError, verb: str, key: str, path: str, *, missing_is_key: bool = True) -> BackendError:
        code = exc.errno if exc.errno is not None else errno.EIO
        if code in _GONE and missing_is_key:
            return self._missing(key, path)
        advice = f" ({ADVICE[code]})" if code in ADVICE else ""
        message = f"{self.url}: cannot {verb} {repr(key) if key else 'the folder'}: {os.strerror(code)}{advice}"
        if code in _REFUSED:
            return BackendPermissionError(code, message, path)
        return BackendError(code, message, path, transient=code in _MAY_PASS)
