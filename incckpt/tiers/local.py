"""What a caller says of the local tier."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, TypeAlias

from incckpt.errors import OptionError
from incckpt.messages import shown
from incckpt.options import checked_count
from incckpt.retention import Policy
from incckpt.store.location import locate

__all__ = ["LocalTier", "Tier", "local_tier"]

Tier: TypeAlias = Literal["local", "bucket"]


@dataclass(frozen=True)
class LocalTier:
    """A local store in front of the manager's own, ``CheckpointManager("s3://…", local=LocalTier("/nvme/ckpt"))``.

    Parameters
    ----------
    path
        A folder on a local disk. It holds a store like any other, which `incckpt.load` and the command line read.
    keep_last_n
        How many of the last checkpoints to keep there. What still waits for its copy is kept besides.
    retention
        A policy in place of `keep_last_n`, see :mod:`incckpt.retention`.
    max_pending
        Checkpoints that may wait to be copied, besides the one being copied. Where a further one comes, the oldest that
        waits is not copied: the bucket gets the newest ones.

    Raises
    ------
    OptionError
        If an argument is not usable.
    """

    path: str | os.PathLike[str]
    keep_last_n: int = 2
    retention: Policy | None = None
    max_pending: int = 2

    def __post_init__(self) -> None:
        location = locate(self.path)
        if location.named or location.step is not None:
            raise OptionError(f"local={shown(str(self.path))}: the run is that of the manager; leave out the fragment")
        checked_count("LocalTier: keep_last_n", self.keep_last_n, 1)
        checked_count("LocalTier: max_pending", self.max_pending, 1)
        if self.retention is not None and not callable(self.retention):
            raise OptionError(f"LocalTier: retention must be a policy such as KeepLast(5), not {self.retention!r}")


def local_tier(local: str | os.PathLike[str] | LocalTier) -> LocalTier:
    """Return what `local=` says.

    Raises
    ------
    OptionError
        If it is no folder.
    """
    return local if isinstance(local, LocalTier) else LocalTier(local)
