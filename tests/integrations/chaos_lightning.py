"""The training of ckpt-chaos' target ``lightning_trainer``, with our IO; `tests.integrations.chaos` runs it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ckpt_chaos.targets import lightning_trainer
from lightning.pytorch import Trainer

from incckpt.backends import local
from incckpt.backends.system import SystemCalls
from incckpt.integrations.lightning import IncrementalCheckpointIO

RESUME = os.environ["CKPT_CHAOS_STRATEGY"]
"""How to resume: by the URL that is ``latest`` or, as the target does, from Lightning's file ``last``."""


class Patient(IncrementalCheckpointIO):
    """The saves of the first epoch, which are not the ones to kill, are there before training goes on."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save, and wait."""
        super().save_checkpoint(checkpoint, path, storage_options)
        if checkpoint["epoch"] < lightning_trainer.ARM_EPOCH:
            self.wait()


class Incremental(Trainer):
    """Saves to a store in its folder."""

    def __init__(self, default_root_dir: str, **given: Any) -> None:
        self._checkpoints = Patient(Path(default_root_dir, "store"))
        super().__init__(default_root_dir=default_root_dir, plugins=[self._checkpoints], **given)

    def fit(self, *given: Any, ckpt_path: str | None = None) -> None:
        """Train, resuming as asked."""
        super().fit(*given, ckpt_path=self._checkpoints.latest if ckpt_path and RESUME == "latest" else ckpt_path)


if __name__ == "__main__":
    with patch.object(lightning_trainer.pl, "Trainer", Incremental), patch.object(local, "NativeCalls", SystemCalls):
        lightning_trainer.main()
