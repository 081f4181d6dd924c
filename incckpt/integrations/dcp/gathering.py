"""What the ranks tell the coordinator through DCP's results, and what it makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from incckpt.errors import IncckptError
from incckpt.run.merging import Leaf
from incckpt.run.shards import Shard

__all__ = ["Failed", "gathered"]


@dataclass(frozen=True)
class Failed:
    """What a rank tells the coordinator in place of a shard if it could not store its part."""

    error: IncckptError
    tried: Sequence[str]


def gathered(
    metadata: Metadata, results: Sequence[Sequence[WriteResult]], tried: list[str]
) -> tuple[list[Leaf], list[Shard]]:
    """Return the leaves of the state, and the shard of each rank; add to `tried` what the ranks have put.

    Parameters
    ----------
    results
        Of each rank; the first one brings its shard.

    Raises
    ------
    IncckptError
        That of a rank that has failed.
    """
    told = [parts[0].storage_data if parts else Shard.empty() for parts in results]
    for one in told:
        tried += one.tried
    for rank, one in enumerate(told):
        if isinstance(one, Failed):
            one.error.add_note(f"rank {rank} could not store its part of the checkpoint, so nothing was committed")
            raise one.error
    paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
    leaves: list[Leaf] = []
    for fqn, described in metadata.state_dict_metadata.items():
        path = tuple(paths.get(fqn, (fqn,)))
        if isinstance(described, TensorStorageMetadata):
            shape, requires_grad = tuple(described.size), described.properties.requires_grad
            leaves.append(Leaf(fqn, path, shape, len(described.chunks), requires_grad))
        else:
            leaves.append(Leaf(fqn, path))
    return leaves, told
