"""Trainings of Lightning for `tests.integrations.kills`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from incckpt.integrations.lightning import IncrementalCheckpointIO, RandomState

KINDS = ("epochs",)

EXAMPLES = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))


class Net(LightningModule):
    """A small network with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.Dropout(0.1), torch.nn.Linear(256, 1))

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        """Return the loss."""
        loss: torch.Tensor = self.net(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """Return an optimizer and a schedule of a lambda."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.95**epoch)]


class Begun(Callback):
    """Says at which step a training begins."""

    def __init__(self, begun: Callable[[int], None]) -> None:
        self._begun = begun

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say it."""
        self._begun(trainer.global_step)


def train(kind: str, url: str, folder: Path, result: Path, plain: bool, begun: Callable[[int], None]) -> None:
    """Train on from the latest checkpoint, and write the weights; it is saved at the end of every epoch."""
    seed_everything(1)
    examples: Any = EXAMPLES
    loader: Any = torch.utils.data.DataLoader(examples, 16, shuffle=True)
    checkpoints = IncrementalCheckpointIO(url)
    keep = ModelCheckpoint(folder, monitor="loss", save_top_k=2, save_last=True)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[keep, RandomState(), Begun(begun)],
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        max_epochs=12,
        plugins=[] if plain else [checkpoints],
    )
    net = Net()
    trainer.fit(net, loader, ckpt_path=None if plain else checkpoints.latest)
    torch.save(net.state_dict(), result)
