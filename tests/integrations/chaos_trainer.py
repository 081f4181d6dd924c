"""The training of ckpt-chaos' target ``hf_trainer``, made incremental; `tests.integrations.chaos` runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

from ckpt_chaos.targets import hf_trainer
from transformers import Trainer

from incckpt.backends import local
from incckpt.backends.system import SystemCalls
from incckpt.integrations.transformers import IncrementalTrainerMixin


class Incremental(IncrementalTrainerMixin, Trainer):
    """Saves to a store in its folder. Training waits for the first save, which is not the one to kill."""

    def __init__(self, args: Any, **given: Any) -> None:
        super().__init__(args=args, checkpoint_url=Path(args.output_dir, "store"), **given)

    def _incckpt_commit(self, *given: Any) -> None:
        super()._incckpt_commit(*given)
        if self.state.global_step < hf_trainer.ARM_STEP and self._incckpt_manager is not None:
            self._incckpt_manager.wait()


if __name__ == "__main__":
    with patch.object(hf_trainer, "Trainer", Incremental), patch.object(local, "NativeCalls", SystemCalls):
        hf_trainer.main()
