"""Trainings of Accelerate for `tests.integrations.kills`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed

from incckpt.integrations.accelerate import IncrementalState, install

KINDS = ("state", "install")

EXAMPLES = torch.utils.data.TensorDataset(torch.randn(256, 32, generator=torch.Generator().manual_seed(0)))
STEPS, EVERY = 200, 5


def train(kind: str, url: str, folder: Path, result: Path, plain: bool, begun: Callable[[int], None]) -> None:
    """Train on from the latest checkpoint, and write the weights; `kind` says by which interface."""
    accelerator = Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, use_stateful_dataloader=True),
        gradient_accumulation_steps=2,
        project_config=ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, total_limit=3),
    )
    set_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.Dropout(0.1), torch.nn.Linear(256, 1))
    adam = torch.optim.AdamW(made.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 0.99**step)
    batches = torch.utils.data.DataLoader(EXAMPLES, 16, shuffle=True, generator=torch.Generator().manual_seed(3))
    model, optimizer, loader, schedule = accelerator.prepare(made, adam, batches, schedule)
    step = 0
    state = None
    if kind == "state" and not plain:
        state = IncrementalState(accelerator, url, keep_last_n=3)
        step = state.load() or 0
    elif not plain:
        state = install(accelerator, url)
        if state.latest is not None:
            accelerator.load_state()
            step = accelerator.save_iteration * EVERY
    begun(step)
    while step < STEPS:
        for (batch,) in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).square().mean())
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            step += 1
            if step % EVERY == 0 and state is not None:
                if kind == "state":
                    state.save(step)
                else:
                    accelerator.save_state()
            if step == STEPS:
                break
    accelerator.end_training()
    if state is not None:
        state.close()
    torch.save(made.state_dict(), result)
