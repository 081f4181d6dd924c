"""A worker under torchrun: URL STEPS KILL_AT. Rank 0 saves; in the first round, rank 1 is killed at a step."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
import torch.distributed as dist

import incckpt

EVERY = 5


def batch(rank: int, step: int) -> torch.Tensor:
    """Return what a rank trains on in a step."""
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1000 * rank + step))


def loss_of(model: torch.nn.Module, inputs: torch.Tensor) -> Any:
    """Return the loss of a batch."""
    return (model(inputs) - inputs.sin()).square().mean()


def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return the model and its optimizer as they begin."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def main() -> None:
    """Train."""
    url, steps, kill_at = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, optimizer = made()
    # Every rank notes the signal: one that does not is ended by it, and the others fail at the next exchange.
    with incckpt.CheckpointManager(url, read_only=rank > 0, keep_last_n=3, preemption=True) as manager:
        start = manager.restore({"model": model, "optimizer": optimizer}) or 0
        for step in range(start + 1, steps + 1):
            if rank == 1 and step == kill_at and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            loss = loss_of(model, batch(rank, step))
            optimizer.zero_grad()
            loss.backward()
            for parameter in model.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
            optimizer.step()
            stop = torch.tensor(manager.preempted)
            dist.broadcast(stop, 0)  # all leave at the same step
            if rank == 0:
                print(f"step {step} loss {loss.item()}", flush=True)
                if step % EVERY == 0 or step == steps or stop:
                    manager.save(step, {"model": model, "optimizer": optimizer})
            if stop:
                break


if __name__ == "__main__":
    main()
