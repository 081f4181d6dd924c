"""Trains a small classifier with Accelerate; ``save_state`` at the end of every epoch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from torch.utils.data import DataLoader, TensorDataset


class Progress:
    """The epochs that are done, registered to be saved."""

    epoch = 0

    def state_dict(self) -> dict[str, Any]:
        """Return them."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them."""
        self.epoch = state["epoch"]


def main() -> None:
    """Train, and save the weights."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--resume_from_checkpoint")
    args = parser.parse_args()
    config = ProjectConfiguration(args.output_dir, automatic_checkpoint_naming=True, total_limit=3)
    accelerator = Accelerator(cpu=True, project_config=config)
    set_seed(0)
    data = TensorDataset(torch.randn(64, 8), torch.randint(0, 2, (64,)))
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.1), torch.nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=8, shuffle=True))
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
    while progress.epoch < 5:
        for inputs, labels in loader:
            loss = torch.nn.functional.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        progress.epoch += 1
        accelerator.save_state()
    accelerator.end_training()
    torch.save(accelerator.unwrap_model(model).state_dict(), Path(args.output_dir, "weights.pt"))


if __name__ == "__main__":
    main()
