"""Sequences of system calls in one go: between two of them the interpreter's lock is not handed over.

Each time that a thread takes the lock back, the training thread may be put to sleep (docs/decisions/007).
:class:`incckpt.backends.system.SystemCalls` says the same in Python.
"""

from cpython.bytes cimport PyBytes_AsStringAndSize
from libc.stdint cimport uint8_t

import os


cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <unistd.h>

    /* Make what was written to a file, or the entries of a folder, durable; as SystemCalls.fsync. */
    static int files_sync(int fd)
    {
        int failed;
    #ifdef F_FULLFSYNC
        if (fcntl(fd, F_FULLFSYNC) == 0)
            return 0;
        if (errno != ENOTSUP && errno != EINVAL && errno != ENOTTY)
            return errno;
    #endif
        do
            failed = fsync(fd);
        while (failed && errno == EINTR);
        return failed ? errno : 0;
    }

    static int files_open(const char *path, int flags, int *fd)
    {
        do
            *fd = open(path, flags | O_CLOEXEC, 0666);
        while (*fd < 0 && errno == EINTR);
        return *fd < 0 ? errno : 0;
    }

    /* Those below return 0 or an error number. */

    static int files_write_new(const char *path, const uint8_t *data, size_t nbytes)
    {
        enum { MOST = 1 << 30 }; /* some systems refuse more than INT_MAX at once */
        int fd, code = files_open(path, O_CREAT | O_EXCL | O_WRONLY, &fd);
        if (code)
            return code;
        while (nbytes && !code) {
            const ssize_t written = write(fd, data, nbytes < MOST ? nbytes : MOST);
            if (written >= 0) {
                data += written;
                nbytes -= (size_t)written;
            } else if (errno != EINTR) {
                code = errno;
            }
        }
        if (!code)
            code = files_sync(fd);
        if (close(fd) && !code && errno != EINTR)
            code = errno;
        return code;
    }

    static int files_sync_folder(const char *path)
    {
        int fd, code = files_open(path, O_RDONLY | O_DIRECTORY, &fd);
        if (code)
            return code;
        code = files_sync(fd);
        if (close(fd) && !code && errno != EINTR)
            code = errno;
        return code;
    }

    static int files_rename(const char *from, const char *to) { return rename(from, to) ? errno : 0; }
    """
    int files_write_new(const char *path, const uint8_t *data, size_t nbytes) noexcept nogil
    int files_sync_folder(const char *path) noexcept nogil
    int files_rename(const char *source, const char *target) noexcept nogil


def write_new(path, const uint8_t[::1] data not None):
    """Make a file that does not exist yet, with `data` as its content, durable.

    Raises
    ------
    OSError
        What the system says; the file may be there then, with a part of the data.
    """
    cdef Path name = Path(path)
    cdef int code
    with nogil:
        code = files_write_new(name.c_name, start(data), <size_t> data.shape[0])
    check(code, path)


def sync_folder(path):
    """Make the entries of a folder durable.

    Raises
    ------
    OSError
        What the system says.
    """
    cdef Path name = Path(path)
    cdef int code
    with nogil:
        code = files_sync_folder(name.c_name)
    check(code, path)


def write_over(temporary, path, const uint8_t[::1] data not None):
    """`write_new` of `temporary`, which is given the name `path` then, and `sync_folder` of the folder that it is in.

    Raises
    ------
    OSError
        What the system says of the one of the three that it names.
    """
    folder = os.path.dirname(path)
    cdef Path first = Path(temporary), last = Path(path), above = Path(folder)
    cdef int wrote, renamed = 0, synced = 0
    with nogil:
        wrote = files_write_new(first.c_name, start(data), <size_t> data.shape[0])
        if not wrote:
            renamed = files_rename(first.c_name, last.c_name)
            if not renamed:
                synced = files_sync_folder(above.c_name)
    check(wrote, temporary)
    check(renamed, path)
    check(synced, folder)


cdef class Path:
    """A path as the system takes it."""

    cdef bytes name
    cdef char *c_name

    def __cinit__(self, path):
        self.name = os.fsencode(path)
        PyBytes_AsStringAndSize(self.name, &self.c_name, NULL)  # which refuses null bytes


cdef const uint8_t *start(const uint8_t[::1] data) noexcept nogil:
    return &data[0] if data.shape[0] else NULL


cdef int check(int code, path) except -1:
    """Raise what `code` stands for, if it is not 0."""
    if code:
        raise OSError(code, os.strerror(code), path)
    return 0
