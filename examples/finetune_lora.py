"""Fine-tune what `train_gpt.py` trained: the frozen weights are part of every checkpoint, and stored once.

    python examples/finetune_lora.py checkpoints        # from their latest, in a run of its own

Every checkpoint is whole: to restore one needs neither the run it started from nor code that knows what was frozen.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from train_gpt import GPT, Batches, source_text

import incckpt


class LowRank(nn.Module):
    """A frozen linear layer plus a trained product of two thin matrices."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.narrow = nn.Linear(layer.in_features, rank, bias=False)
        self.widen = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.widen.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.widen(self.narrow(x))
        return y


def add_adapters(model: GPT, rank: int) -> list[nn.Parameter]:
    """Freeze the model, put adapters beside its attention, and return their parameters."""
    model.requires_grad_(False)
    for block in model.blocks:
        block.qkv = LowRank(block.get_submodule("qkv"), rank)  # type: ignore[arg-type]
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def main() -> None:
    """Fine-tune, from where the run left off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="where train_gpt.py left its checkpoints")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--rank", type=int, default=4)
    options = parser.parse_args()

    torch.manual_seed(2)
    weights = incckpt.load(options.store, keys="model.*")["model"]
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    model = GPT(weights["norm.weight"].numel(), depth)
    model.load_state_dict(weights)
    trained = add_adapters(model, options.rank)
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    batches = Batches(2, source_text("asyncio/*.py"))
    app: dict[str, Any] = {"model": model, "optimizer": optimizer, "batches": batches, "rng": incckpt.RngState()}

    with incckpt.CheckpointManager(options.store, run="lora") as manager:
        start = manager.restore(app) or 0
        for step in range(start + 1, options.steps + 1):
            text, target = next(batches)
            loss = functional.cross_entropy(model(text).flatten(0, 1), target.flatten())
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            if step % options.every == 0:
                manager.save(step, app, metrics={"loss": loss.item()})
        manager.wait()
        counts = [sum(parameter.numel() for parameter in group) for group in (trained, model.parameters())]
        print("{:,} of {:,} parameters are trained".format(*counts))
        print("  step    loss     state   written")
        for checkpoint in manager.checkpoints():
            loss_then, nbytes, written = checkpoint.metrics["loss"], checkpoint.nbytes / 1e6, checkpoint.written / 1e6
            print(f"{checkpoint.step:6}  {loss_then:.4f}  {nbytes:5.2f} MB  {written:5.2f} MB")


if __name__ == "__main__":
    main()
