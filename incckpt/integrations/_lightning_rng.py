"""The random number generators in Lightning's checkpoints, which have none of their own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from incckpt.state.rng import RngState

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback
    except ImportError as error:
        raise ImportError('neither lightning nor pytorch_lightning: pip install "incckpt[lightning]"') from error

__all__ = ["RandomState"]

log = logging.getLogger(__name__)

_RNG = "incckpt_rng"


class RandomState(Callback):
    """A callback that saves the random number generators of every rank with each checkpoint, and restores them.

    Lightning saves none. The generators are set when a checkpoint is loaded, so that shuffling at the beginning of an
    epoch goes on as it would have; for one saved within an epoch they are set once more before the first batch.

    Examples
    --------
    >>> trainer = Trainer(callbacks=[RandomState()], plugins=[IncrementalCheckpointIO(url)])  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._within_epoch: Mapping[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the generators' states; every rank calls it."""
        states: list[Any] = [None] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(states, _generators())
        else:
            states[0] = _generators()
        progress = trainer.fit_loop.epoch_loop.batch_progress
        checkpoint[_RNG] = {"ranks": states, "within_epoch": not progress.is_last_batch}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Set the generators, if the checkpoint is of this many ranks."""
        saved = checkpoint.get(_RNG)
        if saved is None:
            log.warning("the checkpoint has no random state: it was saved without this callback")
            return
        if len(saved["ranks"]) != trainer.world_size:
            log.warning(
                "the checkpoint has the random state of %d ranks, there are %d now: it is not set",
                len(saved["ranks"]),
                trainer.world_size,
            )
            return
        state = saved["ranks"][trainer.global_rank]
        _set_generators(state)
        self._within_epoch = state if saved["within_epoch"] else None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the generators again, after what preparing the loaders has drawn."""
        state, self._within_epoch = self._within_epoch, None
        if state is not None:
            _set_generators(state)


def _generators() -> dict[str, Any]:
    """Return the generators' states in tensors: Lightning's own files refuse arrays when they are read."""
    state = RngState().state_dict()
    state["python"]["state"] = torch.from_numpy(state["python"]["state"])
    numbers = state["numpy"]["state"]
    state["numpy"]["state"] = {
        key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in numbers.items()
    }
    return state


def _set_generators(state: Mapping[str, Any]) -> None:
    numbers = {
        key: value.cpu().numpy() if isinstance(value, torch.Tensor) else value
        for key, value in state["numpy"]["state"].items()
    }
    RngState().load_state_dict({**state, "numpy": {**state["numpy"], "state": numbers}})
