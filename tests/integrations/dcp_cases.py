"""What torch tests its storage writers and readers for, over ours; a module to run under ``torchrun``.

    torchrun --nproc-per-node 4 -m tests.integrations.dcp_cases FOLDER

After the cases in torch's `test/distributed/checkpoint`: tensors with several shards on a rank, every sharding loaded
into every other, rows into columns, replicas, groups of some ranks, and a failure in each method on each kind of rank.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load, load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save, save_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import incckpt
from incckpt.integrations.dcp import IncrementalReader, IncrementalWriter

_SHAPE = (10, 20)


def _boxes(*boxes: tuple[Sequence[int], Sequence[int], int]) -> EnumerableShardingSpec:
    return EnumerableShardingSpec(
        [ShardMetadata(list(at), list(size), placement=f"rank:{rank}/cpu") for at, size, rank in boxes]
    )


SHARDINGS: dict[str, Any] = {
    "rows": ChunkShardingSpec(0, [f"rank:{rank}/cpu" for rank in range(4)]),
    "columns": ChunkShardingSpec(1, [f"rank:{rank}/cpu" for rank in range(4)]),
    "several shards a rank": ChunkShardingSpec(0, [f"rank:{rank}/cpu" for rank in (0, 1, 1, 0, 3)]),
    "two ranks of four": ChunkShardingSpec(0, ["rank:2/cpu", "rank:1/cpu"]),
    "uneven": _boxes(([0, 0], [1, 20], 3), ([1, 0], [8, 20], 0), ([9, 0], [1, 20], 1)),
    "a grid": _boxes(([0, 0], [4, 7], 0), ([0, 7], [4, 13], 1), ([4, 0], [6, 7], 2), ([4, 7], [6, 13], 3)),
}


def sharded(sharding: str, whole: torch.Tensor | None = None) -> ShardedTensor:
    """Return a sharded tensor: zeros, or what `whole` holds."""
    found: ShardedTensor = sharded_tensor.zeros(SHARDINGS[sharding], *_SHAPE)
    for shard in found.local_shards():
        if whole is None:
            break
        at, size = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        shard.tensor.copy_(whole[at[0] : at[0] + size[0], at[1] : at[1] + size[1]])
    return found


def check_sharded(tensor: ShardedTensor, whole: torch.Tensor, what: str) -> None:
    """Check each local shard."""
    expected = {tuple(shard.metadata.shard_offsets): shard.tensor for shard in tensor.local_shards()}
    for at, found in expected.items():
        part = whole[tuple(slice(a, a + n) for a, n in zip(at, found.shape, strict=True))]
        assert torch.equal(found, part), f"{what}: the shard at {at} differs"


def reshard(folder: Path) -> None:
    """Save in each sharding, and load into each other, into a whole tensor, and without DCP."""
    for number, saved in enumerate(SHARDINGS):
        whole = torch.arange(200.0).reshape(_SHAPE) + 1000 * number
        store = str(folder / f"sharding-{number}")
        with IncrementalWriter(store, threads=1) as writer:
            save({"w": sharded(saved, whole), "step": number}, storage_writer=writer)
        for wanted in SHARDINGS:
            state: dict[str, Any] = {"w": sharded(wanted), "step": None}
            load(state, storage_reader=IncrementalReader(store, threads=1))
            check_sharded(state["w"], whole, f"{saved} into {wanted}")
            assert state["step"] == number
        plain = {"w": torch.zeros(_SHAPE)}
        load(plain, storage_reader=IncrementalReader(store, threads=1))
        assert torch.equal(plain["w"], whole), f"{saved} into a tensor"
        if dist.get_rank() == 0:
            assert torch.equal(incckpt.load(store)["w"], whole), f"{saved} without DCP"
        dist.barrier()


def replicas(folder: Path) -> None:
    """A tensor that all ranks have is stored once, whole; sharded and replicated ones load into each other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    whole = torch.arange(60.0).reshape(6, 10)
    placements = [(Replicate(), Shard(0)), (Shard(1), Replicate()), (Shard(0), Shard(1)), (Replicate(), Replicate())]
    for number, placed in enumerate(placements):
        store = str(folder / f"replicas-{number}")
        tensor = distribute_tensor(whole, mesh, placed)
        with IncrementalWriter(store, threads=1) as writer:
            save({"d": tensor, "plain": whole.clone()}, storage_writer=writer)
        for other in placements:
            state = {"d": distribute_tensor(torch.zeros(6, 10), mesh, other), "plain": torch.zeros(6, 10)}
            load(state, storage_reader=IncrementalReader(store, threads=1))
            assert isinstance(state["d"], DTensor)
            assert torch.equal(state["d"].full_tensor(), whole)
            assert torch.equal(state["plain"], whole)
    dist.barrier()


def groups(folder: Path) -> None:
    """Two groups of two ranks save at the same time, each a run; the coordinator of one is no rank 0."""
    mine = 0 if dist.get_rank() < 2 else 1
    both = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    store = str(folder / f"group-{mine}")
    state = {"w": torch.full((4,), float(mine)), f"only-{dist.get_rank()}": torch.full((2,), float(dist.get_rank()))}
    with IncrementalWriter(store, threads=1) as writer:
        save(state, storage_writer=writer, process_group=both[mine])
    found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    load(found, storage_reader=IncrementalReader(store, threads=1), process_group=both[mine])
    assert all(torch.equal(found[name], state[name]) for name in state)
    dist.barrier()


def _failing(kind: Any, method: str, ranks: Sequence[int]) -> Any:
    """Return a subclass whose method fails on some ranks."""

    def fail(self: Any, *arguments: Any, **named: Any) -> Any:
        if dist.get_rank() in ranks:
            raise ValueError(f"{method} fails on rank {dist.get_rank()}")
        return getattr(super(failing, self), method)(*arguments, **named)

    failing = type(f"Failing{kind.__name__}", (kind,), {method: fail})
    return failing


def _fails(act: Callable[[], Any], ranks: Sequence[int]) -> None:
    """Check that `act` fails on every rank, because of `ranks`."""
    with pytest.raises(CheckpointException) as caught:
        act()
    assert set(caught.value.failures) == set(ranks)


def failures(folder: Path) -> None:
    """Whichever method fails, and wherever: the error names the rank, nothing is committed, the next save is whole."""
    state = {"w": sharded("rows", torch.ones(_SHAPE)), "plain": torch.ones(3), "value": [1, 2]}
    cases = [
        (method, coordinator, rank)
        for coordinator, rank in ((0, 2), (1, 3))
        for method in ("set_up_storage_writer", "prepare_local_plan", "write_data")
    ] + [(method, one, one) for one in (0, 1) for method in ("prepare_global_plan", "finish")]
    for number, (method, coordinator, rank) in enumerate(cases):
        store = str(folder / f"failing-{number}")
        ranks: list[int] = [rank]
        with _failing(IncrementalWriter, method, ranks)(store, threads=1, step=1) as writer:
            _fails(lambda w=writer, c=coordinator: save_state_dict(state, w, coordinator_rank=c), [rank])  # type: ignore[misc]
            dist.barrier()
            if dist.get_rank() == 0:
                committed = [path for path in Path(store, "refs").rglob("*") if path.is_file()]
                assert not committed, f"{method} failed on {rank}, and it was committed"
            dist.barrier()
            ranks.clear()
            save_state_dict(state, writer, coordinator_rank=coordinator)
        if dist.get_rank() == 0:
            assert [checkpoint.step for checkpoint in incckpt.list_checkpoints(store)] == [1]
            assert incckpt.verify(store).ok
            assert not list(Path(store, "pins").rglob("*-*")), f"{method} failed on {rank}, and left a pin"
        dist.barrier()
    store = str(folder / "failing-0")
    loads = [(method, 0, 3) for method in ("prepare_local_plan", "read_data")]
    loads += [(method, one, one) for one in (0, 2) for method in ("set_up_storage_reader", "prepare_global_plan")]
    for method, coordinator, rank in loads:
        reader = _failing(IncrementalReader, method, [rank])(store, threads=1)
        target = {"w": sharded("columns"), "plain": torch.zeros(3), "value": None}
        _fails(lambda r=reader, c=coordinator, t=target: load_state_dict(t, r, coordinator_rank=c), [rank])  # type: ignore[misc]
    dist.barrier()


def main() -> None:
    """Run all cases."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    for case in (reshard, replicas, groups, failures):
        case(Path(sys.argv[1]))
        if dist.get_rank() == 0:
            print(f"{case.__name__}: as expected", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
