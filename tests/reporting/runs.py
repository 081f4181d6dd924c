"""Runs to report on: small real ones, and large histories as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import incckpt
from incckpt.reporting.components import Component
from incckpt.reporting.heatmap import HeatMapBuilder
from incckpt.reporting.history import Branch, Column, History
from incckpt.reporting.tensors import TensorTable
from incckpt.run.checkpoint import Checkpoint

__all__ = ["Training", "large_history", "train"]

_PARTS = (
    "attn.q_proj",
    "attn.k_proj",
    "attn.v_proj",
    "attn.o_proj",
    "mlp.up",
    "mlp.gate",
    "mlp.down",
    "norm1",
    "norm2",
)
_STATE = 14_500_000_000  # bytes


class Training:
    """A small network with a frozen layer, trained on noise."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
        self.model[2].requires_grad_(False)
        self.optimizer = torch.optim.Adam((p for p in self.model.parameters() if p.requires_grad), lr=1e-2)
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "seen": list(range(3000))}

    def step(self) -> float:
        """Take one step and return its loss."""
        x = torch.randn(32, 8)
        loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        return float(loss.item())


def train(store: Path, steps: range, *, run: str = "default", restore: int | None = None) -> None:
    """Train from a checkpoint, or from the beginning, and save every step."""
    training = Training()
    with incckpt.CheckpointManager(store, run=run) as manager:
        if restore is not None:
            manager.restore(training.state, step=restore)
        for step in steps:
            loss = training.step()
            manager.save(step, training.state, metrics={"loss": loss, "lr": 1e-2}).result()


def large_history(tensors: int, steps: int, *, layers: int = 50) -> History:
    """Return the history of a run whose lower layers are frozen after a while, and one of whose layers jumps."""
    random = np.random.default_rng(0)
    layer = np.arange(tensors) * layers // tensors
    number = np.arange(tensors) - np.searchsorted(layer, layer)
    names = [
        f"model.layers.{of}.{_PARTS[n % len(_PARTS)]}.{'weight' if n < len(_PARTS) else f'lora_{n // len(_PARTS)}'}"
        for of, n in zip(layer.tolist(), number.tolist(), strict=True)
    ]
    speed = 10 ** random.normal(-3.2, 0.35, tensors) * (1 + layer / layers)
    alone = np.ones(tensors, np.bool_)
    content = random.integers(1, 1 << 60, tensors)
    builder = HeatMapBuilder(steps)
    history = History("s3://bucket/experiments/7b", "sft")
    for index in range(steps):
        rate = 0.55 + 0.45 * float(np.cos(np.pi * index / steps))
        moved = ~((layer < layers // 5) & (index > steps // 3)) & (layer != 7)
        content = np.where(moved, content + 1, content)
        relative = speed * rate * 10 ** random.normal(0, 0.08, tensors)
        relative[layer == 31 % layers] *= 40 if index in (steps * 2 // 3, steps - 1) else 1
        norms = {name: (float(value), 1.0) for name, value, one in zip(names, relative, moved, strict=True) if one}
        builder.add(TensorTable(names, content, alone, alone, norms if index else {}))
        metrics = {
            "loss": 2 + 9 * float(np.exp(-index / steps * 6)) + float(random.normal(0, 0.05)),
            "grad_norm": float(10 ** random.normal(0, 0.2)),
            "lr": 3e-4 * rate,
        }
        written = int(_STATE * (0.12 * rate + 0.02 if index else 0.7))
        time, attempt = 1.79e9 + 600 * index, 1 + index * 3 // steps
        checkpoint = Checkpoint("sft", 50 * index + 50, attempt, time, metrics, _STATE, written, f"ref {index}")
        wait = 0.0 if index % 97 else 0.2
        blocked = {"wait": wait, "flatten": 0.004, "stage": 0.05 + float(random.gamma(2, 0.01))}
        history.columns.append(Column(checkpoint, written, blocked, 50 * index or None))
    history.heat_map = builder.finish()
    for attempt, start, end in ((1, steps // 3, steps * 5 // 12), (2, steps * 2 // 3, steps * 7 // 10)):
        lost = [
            Checkpoint("sft", 50 * index + 50, attempt, 1.79e9, {"loss": 2.5 + index / steps}, _STATE, 10**9, "", True)
            for index in range(start, end)
        ]
        if lost:
            history.branches.append(Branch(attempt, 50 * start, lost))
    parts = [Component(f"layers.{number}", tensors // layers, 280_000_000, 1.9e8) for number in range(24)]
    model, values = (
        Component("model", tensors, 14_000_000_000, 9.6e9, parts=parts),
        Component(None, 0, 5 * 10**8, 1.2e8),
    )
    model.dtypes["bfloat16"] = model.nbytes
    history.components = [model, values]
    return history
