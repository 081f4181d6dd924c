"""One of two processes of a torch.distributed job; both save to one store.

Usage: python -m tests.children.rank RANK STORE RENDEZVOUS-FILE
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch.distributed as dist

import incckpt


def check_refused(write: Callable[[], object]) -> None:
    """Check that this rank may not write, and hears both ways out."""
    with pytest.raises(incckpt.errors.DistributedError, match=r"rank 0 alone.* run='rank1' or '#rank1'"):
        write()


def main() -> None:
    """Save to runs of this rank's own, and try the default run."""
    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=2)
    with incckpt.CheckpointManager(folder, run=f"rank{rank}") as manager:
        assert manager.restore({"rank": -1}) is None
        manager.save(1, {"rank": rank}).result()
    incckpt.save({"rank": rank}, f"{folder}#saved-by-{rank}")
    if rank:
        check_refused(lambda: incckpt.CheckpointManager(folder))
        check_refused(lambda: incckpt.save({}, folder))
    else:
        incckpt.save({"rank": rank}, folder)
    dist.barrier()
    with incckpt.CheckpointManager(folder, read_only=True) as reader:
        target = {"rank": -1}
        assert reader.restore(target) == 0
        assert target == {"rank": 0}
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
