"""Trains a small autoencoder with Lightning."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class LitAutoEncoder(LightningModule):
    """Makes a few numbers of many, and many of a few."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 32))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Return the loss."""
        (x,) = batch
        loss = nn.functional.mse_loss(self.decoder(self.encoder(x)), x)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    """Train, and save the weights."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--ckpt_path")
    args = parser.parse_args()
    seed_everything(0)
    data = TensorDataset(torch.randn(64, 32))
    model = LitAutoEncoder()
    trainer = Trainer(
        max_epochs=5,
        accelerator="cpu",
        logger=False,
        callbacks=[ModelCheckpoint(args.output_dir, monitor="train_loss", save_top_k=2, save_last=True)],
    )
    trainer.fit(model, DataLoader(data, batch_size=8), ckpt_path=args.ckpt_path)
    torch.save(model.state_dict(), Path(args.output_dir, "weights.pt"))


if __name__ == "__main__":
    main()
