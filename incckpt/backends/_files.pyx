"""Sequences of system calls, made without taking the interpreter's lock in between.

Each time a thread takes the lock back, it may put the training thread to sleep (docs/decisions/007).
:class:`incckpt.backends.system.SystemCalls` does the same in Python.
"""

from cpython.bytes cimport PyBytes_AsStringAndSize
from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport free, malloc

import os


cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE /* for sync_file_range */
    #endif
    #include <dirent.h>
    #include <errno.h>
    #include <fcntl.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/stat.h>
    #include <unistd.h>

    /* Functions that return `int` return 0 or an error number; files_is_folder returns a truth value. */

    /* Make a file's content or a folder's entries durable, as SystemCalls.fsync does. */
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


    static int files_close(int fd, int code)
    {
        return close(fd) && !code && errno != EINTR ? errno : code;
    }

    /* Write a new file; where `begin`, have the system begin to bring it to the disk. */
    static int files_fill(const char *path, const uint8_t *data, size_t nbytes, int begin, int *fd)
    {
        enum { MOST = 1 << 30 }; /* some systems refuse more than INT_MAX at once */
        int code = files_open(path, O_CREAT | O_EXCL | O_WRONLY, fd);
        if (code)
            return code;
        while (nbytes && !code) {
            const ssize_t written = write(*fd, data, nbytes < MOST ? nbytes : MOST);
            if (written >= 0) {
                data += written;
                nbytes -= (size_t)written;
            } else if (errno != EINTR) {
                code = errno;
            }
        }
    #ifdef SYNC_FILE_RANGE_WRITE
        if (begin && !code)
            sync_file_range(*fd, 0, 0, SYNC_FILE_RANGE_WRITE); /* only sooner: `fsync` tells what failed */
    #endif
        if (code) {
            close(*fd);
            *fd = -1;
        }
        return code;
    }

    static int files_write_new(const char *path, const uint8_t *data, size_t nbytes)
    {
        int fd, code = files_fill(path, data, nbytes, 0, &fd);
        return code ? code : files_close(fd, files_sync(fd));
    }

    static int files_sync_folder(const char *path)
    {
        int fd, code = files_open(path, O_RDONLY | O_DIRECTORY, &fd);
        if (code)
            return code;
        return files_close(fd, files_sync(fd));
    }

    typedef struct {
        const char *temporary, *path;
        const char *folder; /* NULL if another of the files syncs it */
        const uint8_t *data;
        size_t nbytes;
        int fd;
    } files_file;

    /* Step by step for all files together, so that the file system need not write its journal for each of them. Sets
       `failed` to the file at which a step failed, and `stage` to the step: 0 write, 1 rename, 2 the folder's sync. */
    static int files_write_over(files_file *files, size_t count, size_t *failed, int *stage)
    {
        int code = 0;
        size_t i, opened = 0;
        *stage = 0;
        for (i = 0; i < count && !code; i++) {
            code = files_fill(files[i].temporary, files[i].data, files[i].nbytes, count > 1, &files[i].fd);
            *failed = i;
            opened += !code;
        }
        for (i = 0; i < opened; i++) {
            const int before = code;
            if (!code)
                code = files_sync(files[i].fd);
            code = files_close(files[i].fd, code);
            if (code && !before)
                *failed = i;
        }
        if (!code)
            *stage = 1;
        for (i = 0; i < count && !code; i++) {
            *failed = i;
            if (rename(files[i].temporary, files[i].path))
                code = errno;
        }
        if (!code)
            *stage = 2;
        for (i = 0; i < count && !code; i++) {
            *failed = i;
            if (files[i].folder)
                code = files_sync_folder(files[i].folder);
        }
        return code;
    }

    static int files_make_folder(const char *path, const char *parent)
    {
        return mkdir(path, 0777) ? errno : files_sync_folder(parent);
    }

    typedef struct {
        char *names; /* 'd' for a folder or '-', the name, and a zero byte, for each */
        size_t nbytes, room;
        int64_t before, after; /* the folder's modification time before and after reading, in ns */
    } files_folder;

    static int64_t files_changed(int fd)
    {
        struct stat found;
        if (fstat(fd, &found))
            return -1;
    #ifdef __APPLE__
        return (int64_t)found.st_mtimespec.tv_sec * 1000000000 + found.st_mtimespec.tv_nsec;
    #else
        return (int64_t)found.st_mtim.tv_sec * 1000000000 + found.st_mtim.tv_nsec;
    #endif
    }

    static int files_is_folder(int fd, const struct dirent *entry)
    {
        struct stat found;
        if (entry->d_type != DT_UNKNOWN && entry->d_type != DT_LNK)
            return entry->d_type == DT_DIR;
        return fstatat(fd, entry->d_name, &found, 0) == 0 && S_ISDIR(found.st_mode);
    }

    /* The caller frees `names`, even after an error. */
    static int files_read_folder(const char *path, files_folder *found)
    {
        DIR *const folder = opendir(path);
        int code = folder ? 0 : errno;
        *found = (files_folder){0};
        if (folder)
            found->before = files_changed(dirfd(folder));
        while (!code) {
            const struct dirent *entry;
            size_t length;
            errno = 0;
            entry = readdir(folder);
            if (!entry) {
                code = errno;
                break;
            }
            if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
                continue;
            length = strlen(entry->d_name) + 2;
            if (found->room - found->nbytes < length) {
                const size_t room = 2 * found->room + length + 4096;
                char *const larger = realloc(found->names, room);
                if (!larger) {
                    code = ENOMEM;
                    break;
                }
                found->names = larger;
                found->room = room;
            }
            found->names[found->nbytes] = files_is_folder(dirfd(folder), entry) ? 'd' : '-';
            memcpy(found->names + found->nbytes + 1, entry->d_name, length - 1);
            found->nbytes += length;
        }
        if (folder) {
            found->after = files_changed(dirfd(folder));
            closedir(folder);
        }
        return code;
    }

    """
    int files_write_new(const char *path, const uint8_t *data, size_t nbytes) noexcept nogil
    int files_sync_folder(const char *path) noexcept nogil

    ctypedef struct files_file:
        const char *temporary
        const char *path
        const char *folder
        const uint8_t *data
        size_t nbytes

    int files_write_over(files_file *files, size_t count, size_t *failed, int *stage) noexcept nogil
    int files_make_folder(const char *path, const char *parent) noexcept nogil

    ctypedef struct files_folder:
        char *names
        size_t nbytes
        int64_t before
        int64_t after

    int files_read_folder(const char *path, files_folder *found) noexcept nogil


def write_new(path, const uint8_t[::1] data not None):
    """Create a file with `data` as its content, durably.

    Raises
    ------
    OSError
        If the file exists or a call fails. After a failed call the file may hold part of the data.
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
        If a call fails.
    """
    cdef Path name = Path(path)
    cdef int code
    with nogil:
        code = files_sync_folder(name.c_name)
    check(code, path)


def write_over(files):
    """Write files durably, over existing ones: write and sync all, rename all, sync their folders.

    Parameters
    ----------
    files
        The temporary path, path and data of each; few enough to have open at once.

    Raises
    ------
    OSError
        If a call fails; names one of the paths or their folder. Any of the files may be complete then, or only its
        temporary one be there.
    """
    cdef size_t count = <size_t> len(files), i, failed = 0
    cdef int code = 0, stage = 0
    cdef files_file *all_files = <files_file *> malloc((count + 1) * sizeof(files_file))
    cdef Path first, last, above
    cdef const uint8_t[::1] view
    held = []
    folders = {}
    if all_files == NULL:
        raise MemoryError
    try:
        for i in range(count):
            temporary, path, data = files[i]
            first, last, folder = Path(temporary), Path(path), os.path.dirname(path)
            above = folders.get(folder)
            all_files[i].folder = NULL
            if above is None:
                above = folders[folder] = Path(folder)
                all_files[i].folder = above.c_name
            view = data
            held.append((first, last, view))
            all_files[i].temporary, all_files[i].path = first.c_name, last.c_name
            all_files[i].data, all_files[i].nbytes = start(view), <size_t> view.shape[0]
        with nogil:
            code = files_write_over(all_files, count, &failed, &stage)
    finally:
        free(all_files)
    if code:
        temporary, path, _ = files[failed]
        check(code, (temporary, path, os.path.dirname(path))[stage])


def make_folder(path):
    """Make a folder and sync its parent, which makes its name durable.

    Raises
    ------
    OSError
        If a call fails; the folder may exist then.
    """
    cdef Path name = Path(path), above = Path(os.path.dirname(path))
    cdef int code
    with nogil:
        code = files_make_folder(name.c_name, above.c_name)
    check(code, path)


def read_folder(path):
    """Return a folder's entries as (name, is a folder), and its modification time before and after reading, in ns.

    Raises
    ------
    OSError
        If a call fails.
    """
    cdef Path name = Path(path)
    cdef files_folder found
    cdef int code
    with nogil:
        code = files_read_folder(name.c_name, &found)
    try:
        check(code, path)
        parts = found.names[: found.nbytes].split(b"\0") if found.nbytes else []
    finally:
        free(found.names)
    return [(os.fsdecode(part[1:]), part[:1] == b"d") for part in parts if part], found.before, found.after


cdef class Path:
    """A path, encoded for the system."""

    cdef bytes name
    cdef char *c_name

    def __cinit__(self, path):
        self.name = os.fsencode(path)
        PyBytes_AsStringAndSize(self.name, &self.c_name, NULL)  # raises on null bytes


cdef const uint8_t *start(const uint8_t[::1] data) noexcept nogil:
    return &data[0] if data.shape[0] else NULL


cdef int check(int code, path) except -1:
    """Raise the `OSError` of `code`, unless it is 0."""
    if code:
        raise OSError(code, os.strerror(code), path)
    return 0
