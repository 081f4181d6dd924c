"""Every error that incckpt raises on purpose.

Each class also subclasses the builtin a caller would expect to catch, and stands for one way of handling it: change the
call, change the state, look at the store, start again, or retry later.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "BackendPermissionError",
    "BackendTimeoutError",
    "BacklogFullError",
    "CheckpointNotFoundError",
    "CodecError",
    "CollectionError",
    "CorruptionError",
    "DistributedError",
    "FormatError",
    "IncckptError",
    "KernelError",
    "KeyExistsError",
    "KeyNotFoundError",
    "LineageError",
    "ManagerClosedError",
    "MemoryLimitError",
    "MissingExtraError",
    "MissingObjectError",
    "OptionError",
    "PickleRefusedError",
    "ReadOnlyError",
    "SaveError",
    "StateError",
    "StateMismatchError",
    "StoreNotFoundError",
    "StoreReplacedError",
    "SupersededError",
    "UnsupportedOperationError",
]


class IncckptError(Exception):
    """Base of every error of this library."""


class OptionError(IncckptError, ValueError):
    """An argument, option or URL is not usable; the message names it and what would be."""


class MissingExtraError(IncckptError, ImportError):
    """A URL or option needs an optional dependency that is not installed; the message names the extra."""


class StateError(IncckptError, TypeError):
    """A value in the state cannot be saved; the message names its path in the state."""


class PickleRefusedError(StateError):
    """A value could only be stored or read with pickle, and ``allow_pickle=True`` was not given."""


class StateMismatchError(IncckptError, ValueError):
    """A checkpoint does not fit the objects it is to be restored into; the message names the paths."""


class BackendError(IncckptError, OSError):
    """A backend request failed; the message names the key.

    Attributes
    ----------
    transient
        Whether the same request may succeed when repeated.
    """

    def __init__(self, *args: object, transient: bool = False) -> None:
        super().__init__(*args)
        self.transient = transient


class KeyNotFoundError(BackendError, FileNotFoundError):
    """The key does not exist."""


class KeyExistsError(BackendError, FileExistsError):
    """An exclusive create found the key taken."""


class BackendPermissionError(BackendError, PermissionError):
    """The store refused access; repeating will not help."""


class UnreachableError(BackendError, ConnectionError):
    """No connection to the server could be made: its name is unknown, or no server listens there."""


class BackendTimeoutError(BackendError, TimeoutError):
    """A request, or all its retries together, took longer than allowed."""


class UnsupportedOperationError(BackendError, NotImplementedError):
    """This backend cannot do what was asked (an HTTP store cannot be written, say)."""


class StoreNotFoundError(IncckptError, FileNotFoundError):
    """There is no store at the URL."""


class StoreReplacedError(StoreNotFoundError):
    """The store that was there is gone, and another one stands in its place."""


class CheckpointNotFoundError(IncckptError, FileNotFoundError):
    """The store has no such run, or the run no such checkpoint; the message lists what there is."""


class FormatError(IncckptError, ValueError):
    """The store, or a document in it, is of a format this version cannot read."""


class CorruptionError(IncckptError, ValueError):
    """Stored bytes are not what was written; the message names the key, and the tensors that need it."""


class LineageError(CorruptionError):
    """A run's attempts, or what its last one continues, are gone or unreadable, though checkpoints of it stand.

    `incckpt.recover` makes a new lineage of those that are whole.
    """


class CodecError(CorruptionError):
    """The bytes of an object cannot be decoded, or do not match their digests."""


class MissingObjectError(CorruptionError, FileNotFoundError):
    """A checkpoint names an object that is not in the store."""


class MemoryLimitError(IncckptError, MemoryError):
    """What a store holds would take more memory than allowed, or than there is; the message says how to allow more."""


class KernelError(IncckptError, RuntimeError):
    """A kernel that was asked for by name is not available in this build or on this processor."""


class SaveError(IncckptError, RuntimeError):
    """A background save failed; its cause is chained. Raised by the next ``save()`` or ``close()`` as well."""


class BacklogFullError(IncckptError, RuntimeError):
    """A save was skipped because ``max_pending`` saves were still being written."""


class DeadlineError(SaveError, TimeoutError):
    """A save was not made because the process has to end, and it could not be made in time; earlier ones stand."""


class SupersededError(IncckptError, RuntimeError):
    """The run was taken over by another process, or has moved on since it was restored: it was not written to."""


class ManagerClosedError(IncckptError, RuntimeError):
    """The manager was closed."""


class ReadOnlyError(IncckptError, PermissionError):
    """A read-only manager, or a store that cannot be written, was asked to write."""


class CollectionError(IncckptError, RuntimeError):
    """Collection stopped before deleting anything because it could not know what is needed."""


class DistributedError(IncckptError, NotImplementedError):
    """What was asked for does not work yet in a ``torch.distributed`` job."""
