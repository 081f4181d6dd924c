"""System calls made in one go are those that Python's own would be, in the same order, with the same errors."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from incckpt.backends.local import LocalBackend
from incckpt.backends.system import NativeCalls, SystemCalls
from tests.forks import exit_code, fork, forks

pytestmark = pytest.mark.slow

BOTH = pytest.mark.parametrize("calls", [SystemCalls(), NativeCalls()], ids=["Python", "native"])

# Writes down, through the dynamic linker, what is called and how it ended; the folder's own path is left out.
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

static int interesting(const char *path) { return strstr(path, getenv("SHIM_FOLDER")) != NULL; }
static char paths[1024][256];
static void note(const char *name, const char *path, long result)
{
    const int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    const ssize_t (*real_write)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    const int (*real_close)(int) = dlsym(RTLD_NEXT, "close");
    char line[512];
    const char *end = strstr(path, "store");
    const int n = snprintf(line, sizeof line, "%s %s %ld\\n", name, end ? end : path, result);
    const int fd = real(getenv("SHIM_LOG"), O_WRONLY | O_APPEND | O_CREAT, 0600);
    real_write(fd, line, n);
    real_close(fd);
}
static int opened(const char *name, const char *path, int flags, mode_t mode)
{
    const int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, name);
    const int fd = real(path, flags, mode);
    if (fd >= 0 && fd < 1024) {
        paths[fd][0] = 0;
        if (interesting(path)) {
            snprintf(paths[fd], sizeof paths[fd], "%s", path);
            note("open", path, flags & (O_CREAT | O_EXCL) ? 1 : 0);
        }
    }
    return fd;
}
int open(const char *path, int flags, ...)
{
    va_list more;
    va_start(more, flags);
    const mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
    va_end(more);
    return opened("open", path, flags, mode);
}
int open64(const char *path, int flags, ...)
{
    va_list more;
    va_start(more, flags);
    const mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
    va_end(more);
    return opened("open64", path, flags, mode);
}
#define KNOWN(fd) ((fd) >= 0 && (fd) < 1024 && paths[fd][0])
ssize_t write(int fd, const void *data, size_t nbytes)
{
    const ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    const ssize_t result = real(fd, data, nbytes);
    if (KNOWN(fd))
        note("write", paths[fd], result);
    return result;
}
int fsync(int fd)
{
    const int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    const int result = real(fd);
    if (KNOWN(fd))
        note("fsync", paths[fd], result);
    return result;
}
int close(int fd)
{
    const int (*real)(int) = dlsym(RTLD_NEXT, "close");
    if (KNOWN(fd)) {
        note("close", paths[fd], 0);
        paths[fd][0] = 0;
    }
    return real(fd);
}
int mkdir(const char *path, mode_t mode)
{
    const int (*real)(const char *, mode_t) = dlsym(RTLD_NEXT, "mkdir");
    const int result = real(path, mode);
    note("mkdir", path, result);
    return result;
}
int rename(const char *from, const char *to)
{
    const int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    const int result = real(from, to);
    note("rename", to, result);
    return result;
}
"""
PROGRAM = """
import sys
from incckpt.backends.local import LocalBackend
from incckpt.backends.system import NativeCalls, SystemCalls
backend = LocalBackend(sys.argv[1], calls=globals()[sys.argv[2]]())
backend.put("a/first", b"")
open(sys.argv[3], "w").close()
backend.put("a/k", bytes(3_000_000))
backend.put("b/k", b"k")
backend.put_many([("c/k", b"1"), ("d/k", b"2"), ("c/l", b"3")])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the shim is for glibc's names")
def test_a_put_makes_the_same_calls_in_the_same_order(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "a C compiler is needed to build incckpt at all"
    (tmp_path / "shim.c").write_text(SHIM)
    shim = tmp_path / "shim.so"
    subprocess.run([compiler, "-w", "-shared", "-fPIC", "-o", shim, tmp_path / "shim.c", "-ldl"], check=True)
    logs = {}
    for calls in ("SystemCalls", "NativeCalls"):
        store, log = tmp_path / calls / "store", tmp_path / f"{calls}.log"
        store.parent.mkdir()
        environment = {**os.environ, "LD_PRELOAD": str(shim), "SHIM_FOLDER": str(store), "SHIM_LOG": str(log)}
        subprocess.run([sys.executable, "-c", PROGRAM, store, calls, log], env=environment, check=True, timeout=120)
        lines = [line.split() for line in log.read_text().splitlines()]
        logs[calls] = [(name, re.sub(r"\.incckpt-tmp-.*", "TEMPORARY", path), result) for name, path, result in lines]
    assert logs["NativeCalls"] == [
        ("open", "store/a/TEMPORARY", "1"),
        ("write", "store/a/TEMPORARY", "3000000"),
        ("fsync", "store/a/TEMPORARY", "0"),
        ("close", "store/a/TEMPORARY", "0"),
        ("rename", "store/a/k", "0"),
        ("open", "store/a", "0"),
        ("fsync", "store/a", "0"),
        ("close", "store/a", "0"),
        ("mkdir", "store/b", "0"),
        ("open", "store", "0"),
        ("fsync", "store", "0"),
        ("close", "store", "0"),
        ("open", "store/b/TEMPORARY", "1"),
        ("write", "store/b/TEMPORARY", "1"),
        ("fsync", "store/b/TEMPORARY", "0"),
        ("close", "store/b/TEMPORARY", "0"),
        ("rename", "store/b/k", "0"),
        ("open", "store/b", "0"),
        ("fsync", "store/b", "0"),
        ("close", "store/b", "0"),
        *(("mkdir", f"store/{folder}", "0") for folder in "cd"),
        *((name, "store", "0") for name in ("open", "fsync", "close")),  # for both
        *((name, f"store/{folder}/TEMPORARY", "1") for folder in "cdc" for name in ("open", "write")),
        *((name, f"store/{folder}/TEMPORARY", "0") for folder in "cdc" for name in ("fsync", "close")),
        *(("rename", f"store/{key}", "0") for key in ("c/k", "d/k", "c/l")),
        *((name, f"store/{folder}", "0") for folder in "cd" for name in ("open", "fsync", "close")),
    ]
    assert logs["SystemCalls"] == logs["NativeCalls"]


@BOTH
@pytest.mark.parametrize("nbytes", [0, 1, 100_000])
def test_a_new_file_has_the_bytes_and_the_mode(tmp_path: Path, calls: SystemCalls, nbytes: int) -> None:
    data = os.urandom(nbytes)
    before = os.umask(0o027)
    try:
        calls.write_new(str(tmp_path / "ä"), memoryview(data))
    finally:
        os.umask(before)
    assert (tmp_path / "ä").read_bytes() == data
    assert (tmp_path / "ä").stat().st_mode & 0o777 == 0o640


@BOTH
def test_errors_are_the_systems_and_name_the_path(tmp_path: Path, calls: SystemCalls) -> None:
    taken, file = tmp_path / "taken", tmp_path / "file"
    taken.mkdir()
    file.write_bytes(b"old")
    for path, code in [
        (file, errno.EEXIST),
        (taken, errno.EEXIST),
        (tmp_path / "none" / "k", errno.ENOENT),
        (file / "k", errno.ENOTDIR),
    ]:
        with pytest.raises(OSError, match=str(path)) as caught:
            calls.write_new(str(path), memoryview(b"new"))
        assert caught.value.errno == code
    for path, code in [(file, errno.ENOTDIR), (tmp_path / "none", errno.ENOENT)]:
        with pytest.raises(OSError, match=str(path)) as caught:
            calls.sync_folder(str(path))
        assert caught.value.errno == code
    calls.sync_folder(str(taken))
    for temporary, path, named, code in [
        (file, tmp_path / "k", file, errno.EEXIST),
        (tmp_path / "none" / "t", tmp_path / "k", tmp_path / "none" / "t", errno.ENOENT),
        (tmp_path / "t1", taken, taken, errno.EISDIR),
        (tmp_path / "t2", tmp_path / "none" / "k", tmp_path / "none" / "k", errno.ENOENT),
    ]:
        with pytest.raises(OSError, match=str(named)) as caught:
            calls.write_over([(str(temporary), str(path), memoryview(b"new"))])
        assert caught.value.errno == code
        assert str(named) in (caught.value.filename, caught.value.filename2)
        if temporary.parent == tmp_path and temporary != file:
            temporary.unlink()
    assert file.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]
    for path, code in [(file, errno.EEXIST), (taken, errno.EEXIST), (tmp_path / "none" / "k", errno.ENOENT)]:
        with pytest.raises(OSError, match=str(path)) as caught:
            calls.make_folder(str(path))
        assert caught.value.errno == code
    calls.make_folder(str(taken / "k"))
    assert (taken / "k").is_dir()
    calls.write_over([])
    calls.write_over([(str(tmp_path / "t"), str(file), memoryview(b"new"))])
    assert file.read_bytes() == b"new"
    with pytest.raises(ValueError, match="null"):
        calls.write_new(f"{tmp_path}/a\0b", memoryview(b""))
    with pytest.raises(ValueError, match="null"):
        calls.write_over([(str(tmp_path / "t"), f"{tmp_path}/a\0b", memoryview(b""))])


@BOTH
def test_a_folder_is_read(tmp_path: Path, calls: SystemCalls) -> None:
    names = {f"{'x' * (number % 200)}{number}": number % 3 == 0 for number in range(500)} | {"ä": False, ".dot": True}
    for name, is_folder in names.items():
        (tmp_path / name).mkdir() if is_folder else (tmp_path / name).touch()
    (tmp_path / "to a folder").symlink_to(".dot")
    (tmp_path / "to a file").symlink_to("ä")
    (tmp_path / "to nothing").symlink_to("nowhere")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).touch()
    found, before, after = calls.read_folder(str(tmp_path))
    links = {
        "to a folder": True,
        "to a file": False,
        "to nothing": False,
        os.fsdecode(b"\xff"): False,
    }
    assert dict(found) == names | links
    assert len(found) == len(names) + len(links)
    assert before == after == tmp_path.stat().st_mtime_ns
    assert calls.read_folder(str(tmp_path / ".dot"))[0] == []
    for path, code in [(tmp_path / "ä", errno.ENOTDIR), (tmp_path / "none", errno.ENOENT)]:
        with pytest.raises(OSError, match=str(path)) as caught:
            calls.read_folder(str(path))
        assert caught.value.errno == code


@forks
@BOTH
def test_a_disk_that_takes_a_part_only(tmp_path: Path, calls: SystemCalls) -> None:
    """The kernel writes what fits under the process's limit, and refuses the rest."""

    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(OSError, match=str(tmp_path)) as caught:
            LocalBackend(tmp_path, calls=calls).put("k", bytes(300_000))
        assert caught.value.errno == errno.EFBIG

    assert exit_code(fork(write)) == 0
    assert list(tmp_path.iterdir()) == []
