"""Train a sharded model (FSDP2), save it every few steps, and go on from there, with any number of processes.

    torchrun --nproc-per-node 4 examples/fsdp.py checkpoints --steps 20
    torchrun --nproc-per-node 2 examples/fsdp.py checkpoints --steps 40      # goes on from step 20, in two

Runs on the CPU, over gloo. With GPUs, choose "nccl" and move the model: the saves do not change.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from incckpt.integrations.dcp import DistributedCheckpointManager


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    with DistributedCheckpointManager(options.url, keep_last_n=3) as manager:
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        step = manager.restore(state) or 0
        if step:
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        if dist.get_rank() == 0:
            print(f"step {step}: {dist.get_world_size()} processes", flush=True)
        while step < options.steps:
            step += 1
            inputs = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
            loss = (model(inputs) - inputs).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 5 == 0:
                weights, moments = get_state_dict(model, optimizer)
                manager.save(step, {"model": weights, "optimizer": moments}, {"loss": loss.item()})
                if dist.get_rank() == 0:
                    print(f"step {step}: loss {loss.item():.4f}", flush=True)
        manager.wait()
        saved = [checkpoint.step for checkpoint in manager.checkpoints()]
        if dist.get_rank() == 0:
            print(f"step {step}: checkpoints {saved}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
