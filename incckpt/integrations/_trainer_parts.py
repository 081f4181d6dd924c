"""Parts of a `Trainer`'s state that are no plain modules: adapters, what is only kept until later, its retention."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from incckpt.retention import Record

__all__ = ["BEST_STEP", "AdapterWeights", "Held", "KeepAsTrainer", "adapters_of", "save_configuration"]

BEST_STEP = "best_step"
"""The metric under which a checkpoint says which step was the best so far."""


class AdapterWeights:
    """The weights of a PEFT model's adapters, by adapter, as PEFT itself saves them; without those of its base.

    Parameters
    ----------
    model
        A ``peft.PeftModel``.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the weights of each adapter."""
        from peft import get_peft_model_state_dict

        return {name: get_peft_model_state_dict(self._model, adapter_name=name) for name in self._model.peft_config}

    def load_state_dict(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Load the weights of each adapter.

        Raises
        ------
        KeyError
            If the model lacks an adapter.
        """
        from peft import set_peft_model_state_dict

        missing = sorted(set(state) - set(self._model.peft_config))
        if missing:
            raise KeyError(f"the checkpoint has adapters that the model has not: {', '.join(missing)}")
        for name, weights in state.items():
            set_peft_model_state_dict(self._model, dict(weights), adapter_name=name)

    def covers_training(self) -> bool:
        """Whether the adapters are all that is trained."""
        if any(getattr(config, "is_prompt_learning", False) for config in self._model.peft_config.values()):
            return True  # their weights are computed from the parameters, so they have memory of their own
        saved = {tensor.data_ptr() for weights in self.state_dict().values() for tensor in weights.values()}
        return all(
            parameter.data_ptr() in saved
            for parameter in self._model.parameters()
            if parameter.requires_grad and parameter.numel()
        )


def adapters_of(model: Any) -> AdapterWeights | None:
    """Return the adapters of a PEFT model, if they are all that is trained; ``None`` for any other model."""
    try:
        from peft import PeftModel
    except ImportError:
        return None
    return AdapterWeights(model) if isinstance(model, PeftModel) else None


class Held:
    """Takes a part of a checkpoint, to be used later."""

    def __init__(self) -> None:
        self.state: Any = None

    def state_dict(self) -> Any:
        """Return what was taken."""
        return self.state

    def load_state_dict(self, state: Any) -> None:
        """Take `state`."""
        self.state = state


@dataclass(frozen=True)
class KeepAsTrainer:
    """Keep what a `Trainer` keeps: the last `limit` checkpoints, the best one among them even if it is older.

    The best is what the latest checkpoint says, in its metric ``best_step``.
    """

    limit: int

    def __call__(self, history: Sequence[Record]) -> set[int]:
        ordered = sorted(history, key=lambda record: record.step)
        steps = [record.step for record in ordered]
        if not steps:
            return set()
        best = ordered[-1].metrics.get(BEST_STEP)
        protected = {steps[-1], *(step for step in steps if step == best)}
        others = [step for step in steps if step not in protected]
        room = max(self.limit - len(protected), 0)
        return protected.union(others[max(len(others) - room, 0) :])


def save_configuration(model: Any, folder: Path) -> None:
    """Write what describes a model, without its weights."""
    if adapters_of(model) is not None:
        for name, adapter in model.peft_config.items():
            described = copy.copy(adapter)
            described.inference_mode = True  # as `PeftModel.save_pretrained` does
            described.save_pretrained(str(folder if name == "default" else folder / name))
        return
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "save_pretrained"):
        config = copy.deepcopy(config)
        config.architectures = [type(model).__name__]
        config.save_pretrained(str(folder))
        if getattr(model, "generation_config", None) is not None and model.can_generate():
            model.generation_config.save_pretrained(str(folder))
