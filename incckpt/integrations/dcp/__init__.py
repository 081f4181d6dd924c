"""Checkpoints of sharded states: a storage for ``torch.distributed.checkpoint`` (DCP).

Every rank detects, hashes and puts its own shards; one manifest makes them a checkpoint. See ``docs/distributed.md``.
"""

from incckpt.integrations.dcp.manager import DistributedCheckpointManager
from incckpt.integrations.dcp.reader import IncrementalReader
from incckpt.integrations.dcp.writer import IncrementalWriter

__all__ = ["DistributedCheckpointManager", "IncrementalReader", "IncrementalWriter"]
