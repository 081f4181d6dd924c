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

    /* Each returns 0 or an error number. */

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
    """
    int files_write_new(const char *path, const uint8_t *data, size_t nbytes) noexcept nogil
    int files_sync_folder(const char *path) noexcept nogil


def write_new(path, const uint8_t[::1] data not None):
    """Make a file that does not exist yet, with `data` as its content, durable.

    Raises
    ------
    OSError
        What the system says; the file may be there then, with a part of the data.
    """
    cdef bytes name = os.fsencode(path)
    cdef char *c_name
    cdef size_t nbytes = <size_t> data.shape[0]
    cdef const uint8_t *start = &data[0] if nbytes else NULL
    cdef int code
    PyBytes_AsStringAndSize(name, &c_name, NULL)  # which refuses null bytes
    with nogil:
        code = files_write_new(c_name, start, nbytes)
    if code:
        raise OSError(code, os.strerror(code), path)


def sync_folder(path):
    """Make the entries of a folder durable.

    Raises
    ------
    OSError
        What the system says.
    """
    cdef bytes name = os.fsencode(path)
    cdef char *c_name
    cdef int code
    PyBytes_AsStringAndSize(name, &c_name, NULL)  # which refuses null bytes
    with nogil:
        code = files_sync_folder(c_name)
    if code:
        raise OSError(code, os.strerror(code), path)
