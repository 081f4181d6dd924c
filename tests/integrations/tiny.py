"""Tiny models and data for the frameworks' trainers, made from configurations: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

VOCABULARY, LENGTH = 64, 8


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences of random tokens, the same in every process."""

    def __init__(self, count: int = 32) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens.clone()}


def gpt2(width: int = 16) -> GPT2LMHeadModel:
    """Return a small GPT-2 with dropout, so that the generators matter."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=width, n_layer=1, n_head=2)
    return GPT2LMHeadModel(config)


def with_lora(model: Any) -> Any:
    """Return a model with LoRA adapters, with dropout."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(target_modules=["c_attn"], r=2, lora_dropout=0.1, fan_in_fan_out=True))


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Return arguments for eight steps, a checkpoint every other one."""
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 8,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**given, **changes})


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Return a copy of a model's state."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two states are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
