"""Trains a small model in a folder until its last step, going on from its last checkpoint; for ``make chaos``.

``ckpt-chaos run`` kills it at every file event and starts it again. ``final.pt`` then has to be that of an
uninterrupted run, and no announced step may be lost. It sees only what Python does, so the store makes its system calls
from there. A plan "drifts" for it whenever a file's name holds a nonce.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import incckpt
from incckpt.backends.local import LocalBackend
from incckpt.backends.system import SystemCalls


def main() -> None:
    """Train, save and announce every step, prune, and write the weights down."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    app = {"model": model, "optimizer": optimizer, "rng": incckpt.RngState()}
    store = LocalBackend(options.folder / "store", calls=SystemCalls())
    with incckpt.CheckpointManager(store, keep_last_n=1, threads=1) as manager:
        start = manager.restore(app) or 0
        print(f"resumed from step {start}", flush=True)
        for step in range(start + 1, options.steps + 1):
            optimizer.zero_grad()
            model(torch.randn(10, 6)).square().mean().backward()
            optimizer.step()
            manager.save(step, app).result()
            (options.folder / f"announced-{step}").write_text("saved\n")
    torch.save(model.state_dict(), options.folder / "final.pt")


if __name__ == "__main__":
    main()
