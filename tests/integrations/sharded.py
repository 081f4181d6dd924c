"""Sharded models on the CPU, saved and loaded through DCP; a module to run under ``torchrun``, and parts for tests.

    torchrun --nproc-per-node 4 -m tests.integrations.sharded FOLDER save
    torchrun --nproc-per-node 2 -m tests.integrations.sharded FOLDER load 4

saves a model of each kind at `FOLDER`, with its whole state beside it; and loads those that 4 processes saved.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import incckpt
from incckpt.integrations.dcp import DistributedCheckpointManager, IncrementalReader, IncrementalWriter

KINDS = ("fsdp2", "tp", "2d", "hsdp", "ddp")
WIDTH = 24


class Net(nn.Module):
    """Two linear layers around a norm, and an embedding whose rows no number of processes divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return ``float32[batch, WIDTH]``."""
        found: torch.Tensor = self.down(torch.relu(self.norm(self.up(self.embedding(tokens)))))
        return found


def mesh(kind: str) -> DeviceMesh:
    """Return the mesh of a kind for the number of processes that there is."""
    world = dist.get_world_size()
    inner = 2 if world % 2 == 0 else 1
    if kind == "2d":
        return init_device_mesh("cpu", (world // inner, inner), mesh_dim_names=("dp", "tp"))
    if kind == "hsdp":
        return init_device_mesh("cpu", (inner, world // inner), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (world,))


def built(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model of a kind, and AdamW."""
    torch.manual_seed(seed)
    net = Net()
    model: nn.Module = net
    devices = mesh(kind)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if kind in ("tp", "2d"):
        # The norm takes the whole activations, so the halves around it are gathered again.
        plan = {"up": ColwiseParallel(output_layouts=Replicate()), "down": RowwiseParallel(input_layouts=Replicate())}
        parallelize_module(model, devices["tp"] if kind == "2d" else devices, plan)
    if kind in ("fsdp2", "hsdp", "2d"):
        on = devices["dp"] if kind == "2d" else devices
        fully_shard(net.up, mesh=on)
        fully_shard(net.down, mesh=on)
        fully_shard(model, mesh=on)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Take some steps."""
    torch.manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randint(0, 7, (12,))).square().mean().backward()
        optimizer.step()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, *, whole: bool = False) -> dict[str, Any]:
    """Return the state as DCP saves it, or the whole of it on rank 0."""
    options = StateDictOptions(full_state_dict=whole, cpu_offload=whole)
    modules, optimizers = get_state_dict(model, optimizer, options=options)
    return {"model": modules, "optimizer": optimizers}


def same(one: Any, other: Any, path: str = "") -> str:
    """Return where two states differ, or an empty string."""
    if isinstance(one, Mapping):
        if set(one) != set(other):
            return f"{path}: keys {sorted(set(one) ^ set(other))}"
        return next((found for key in one if (found := same(one[key], other[key], f"{path}.{key}"))), "")
    if isinstance(one, (list, tuple)):
        pairs = enumerate(zip(one, other, strict=True))
        return next((found for i, pair in pairs if (found := same(*pair, f"{path}.{i}"))), "")
    if isinstance(one, torch.Tensor):
        equal = one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        return "" if equal else f"{path}: {one} is not {other}"
    return "" if one == other else f"{path}: {one!r} is not {other!r}"


def save(folder: Path, kinds: Sequence[str]) -> None:
    """Save a model of each kind, and on rank 0 its whole state."""
    world = dist.get_world_size()
    for kind in kinds:
        model, optimizer = built(kind, seed=1)
        train(model, optimizer, 2)
        writer = IncrementalWriter(str(folder / f"{kind}-{world}"), step=1, threads=1)
        dcp_save(state_of(model, optimizer), storage_writer=writer)
        train(model, optimizer, 1)
        writer.step = 2
        dcp_save(state_of(model, optimizer), storage_writer=writer)
        writer.close()
        whole = state_of(model, optimizer, whole=True)
        if dist.get_rank() == 0:
            torch.save(whole, folder / f"{kind}-{world}.pt")
        dist.barrier()  # the other ranks read it next


def load(folder: Path, world: int, kinds: Sequence[str]) -> None:
    """Load what `world` processes saved, into shards and, on rank 0, whole; compare with what was saved."""
    for kind in kinds:
        expected = torch.load(folder / f"{kind}-{world}.pt")
        model, optimizer = built(kind, seed=2)
        train(model, optimizer, 1)
        state = state_of(model, optimizer)
        store = str(folder / f"{kind}-{world}")
        dcp_load(state, storage_reader=IncrementalReader(store, threads=1))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        whole = state_of(model, optimizer, whole=True)  # on rank 0
        if dist.get_rank() == 0:
            assert not (found := same(expected, whole)), f"{kind} {world}: {found}"
            assert not (found := same(expected, incckpt.load(store))), f"{kind} {world}, on one machine: {found}"
            print(f"{kind}: saved by {world}, loaded by {dist.get_world_size()}: identical", flush=True)


def _say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # at once, though it is a pipe


def endless(store: Path, timeout: timedelta) -> None:
    """Restore, and save step after step, the weights of each being its number, until killed or failed."""
    torch.manual_seed(0)
    rank = dist.get_rank()
    model = Net()
    fully_shard(model)
    with DistributedCheckpointManager(str(store), keep_last_n=3, threads=1, timeout=timeout) as manager:
        state = {"model": model.state_dict()}
        restored = manager.restore(state) or 0
        for step in range(restored + 1, 1 << 20):
            for tensor in state["model"].values():
                tensor.fill_(step)
            if rank == 0:
                _say(f"saving {step}")
            manager.save(step, state).result()
            if rank == 0:
                _say(f"saved {step}")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("action", choices=("save", "load", "train"))
    parser.add_argument("worlds", type=int, nargs="*")
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that ranks wait for each other (1800)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    timeout = timedelta(seconds=arguments.timeout)
    dist.init_process_group("gloo", timeout=timeout)
    if arguments.action == "save":
        save(arguments.folder, arguments.kinds)
    if arguments.action == "train":
        endless(arguments.folder, timeout)
    for world in arguments.worlds:
        load(arguments.folder, world, arguments.kinds)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
