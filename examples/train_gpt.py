"""Train a small GPT on the Python standard library's own source text; stop it as you like, start it again as it was.

    python examples/train_gpt.py --store checkpoints        # or s3://bucket/gpt, gs://..., az://...

What it takes to go on bit for bit is in `Training.app`: weights, optimizer, schedule, random numbers, place in the
data.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import incckpt

CONTEXT, BATCH, VOCABULARY = 96, 16, 256


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.proj(attended.transpose(1, 2).reshape(batch, length, width)))
        y: Tensor = x + self.dropout(self.down(functional.gelu(self.up(self.norm2(x)))))
        return y


class GPT(nn.Module):
    """A byte-level language model; input and output embedding are one tensor."""

    def __init__(self, width: int = 320, depth: int = 2, heads: int = 4, dropout: float = 0.05) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.token.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.05)

    def forward(self, text: Tensor) -> Tensor:
        x = self.token(text) + self.position.weight[: text.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class Batches:
    """Shuffled windows of a text. With ``state_dict`` and ``load_state_dict`` an object can be part of a checkpoint."""

    def __init__(self, seed: int, text: bytes) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.seed, self.epoch, self.position = seed, 0, 0
        self._shuffle()

    def _shuffle(self) -> None:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.order = torch.randperm((len(self.text) - 1) // CONTEXT, generator=generator)

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self.position + BATCH > len(self.order):
            self.epoch, self.position = self.epoch + 1, 0
            self._shuffle()
        starts = self.order[self.position : self.position + BATCH] * CONTEXT
        self.position += BATCH
        windows = self.text[starts[:, None] + torch.arange(CONTEXT + 1)]
        return windows[:, :-1], windows[:, 1:]

    def state_dict(self) -> dict[str, int]:
        """Return where in the data we are."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go there."""
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._shuffle()


class Training:
    """Everything that training consists of."""

    def __init__(self, steps: int, width: int = 320, depth: int = 2, seed: int = 1) -> None:
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)  # how threads share out a sum can depend on the load, and with it the last bit
        warm_up = max(1, steps // 10)
        self.model = GPT(width, depth)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda n: min(1.0, (n + 1) / warm_up) * (0.55 + 0.45 * math.cos(math.pi * n / steps))
        )
        self.batches = Batches(seed, source_text())
        self.app: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "rng": incckpt.RngState(),  # dropout draws from it
            "batches": self.batches,
        }

    def step(self) -> float:
        """Take one step and return its loss."""
        text, target = next(self.batches)
        loss = functional.cross_entropy(self.model(text).flatten(0, 1), target.flatten())
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()


def source_text(pattern: str = "*.py") -> bytes:
    """Return those of the standard library's modules that match, in the order of their names."""
    return b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob(pattern)))


def main() -> None:
    """Train, from where the store left off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="where the checkpoints are: a folder or a URL")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="steps between two checkpoints")
    parser.add_argument("--keep", type=int, help="keep this many checkpoints (default: all)")
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--log", type=Path, help="append step, loss (bit-exact) and seconds waited to this file")
    options = parser.parse_args()

    training = Training(options.steps, options.width, options.depth)
    log = options.log.open("a", buffering=1) if options.log else None
    with incckpt.CheckpointManager(options.store, keep_last_n=options.keep) as manager:
        start = manager.restore(training.app)
        print(f"resumed from step {start}" if start is not None else "starting at step 1", flush=True)
        for step in range((start or 0) + 1, options.steps + 1):
            loss, blocked = training.step(), 0.0
            if step % options.every == 0:
                started = time.perf_counter()
                manager.save(step, training.app, metrics={"loss": loss})
                blocked = time.perf_counter() - started
                print(f"step {step:4}  loss {loss:.4f}  saving, training waited {blocked * 1e3:.1f} ms", flush=True)
            if log:
                print(step, loss.hex(), blocked, file=log)
    if log:
        log.close()


if __name__ == "__main__":
    main()
