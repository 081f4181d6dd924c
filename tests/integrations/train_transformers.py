"""Trains with a `Trainer`, from the last checkpoint at a URL if there is one; `tests.integrations.kills` kills it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, set_seed
from trl import SFTTrainer

import incckpt
from incckpt.integrations.transformers import incremental
from tests.integrations import tiny

STEPS, EVERY = 30, 2


class Announce(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Says from which step training begins."""

    def __init__(self, announce: Callable[[int], None]) -> None:
        self._announce = announce

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._announce(state.global_step)


def gpt2(kind: Any, folder: Path) -> Any:
    """A GPT-2, all of it trained."""
    return _trainer(kind, folder, tiny.gpt2(128))


def minilm(kind: Any, folder: Path) -> Any:
    """MiniLM with the weights that a package ships, all of it trained to tell sentences apart."""
    model, data = tiny.minilm()
    return _trainer(kind, folder, model, data, learning_rate=1e-4)


def sft(kind: Any, folder: Path) -> Any:
    """A GPT-2 with LoRA adapters, trained by TRL."""
    return tiny.sft(kind, folder, **_changes())


def _trainer(kind: Any, folder: Path, model: Any, data: Any = None, **changes: Any) -> Any:
    return kind(model=model, args=tiny.arguments(folder, **_changes(), **changes), train_dataset=data or tiny.Tokens())


def _changes() -> dict[str, Any]:
    return {"max_steps": STEPS, "save_steps": EVERY, "save_total_limit": 3, "logging_strategy": "no"}


KINDS = {"gpt2": gpt2, "minilm": minilm, "sft": sft}


def train(kind: str, url: str, folder: Path, result: Path, plain: bool, announce: Callable[[int], None]) -> None:
    """Train one kind to its end, and write its weights down.

    Parameters
    ----------
    url
        Of the store; training goes on from its last checkpoint, if there is one.
    folder, result
        The trainer's folder, and the file for the final weights.
    plain
        Whether to train from the beginning, with the framework's own checkpoints.
    announce
        Called with the first step.
    """
    torch.set_num_threads(1)
    set_seed(0)
    base = SFTTrainer if kind == "sft" else Trainer
    trainer = KINDS[kind](base if plain else incremental(base, url=url), folder)
    trainer.add_callback(Announce(announce))
    with incckpt.CheckpointManager(url, read_only=True) as manager:
        begun = not plain and manager.latest is not None
    trainer.train(resume_from_checkpoint=url if begun else None)
    torch.save(trainer.model.state_dict(), result)
