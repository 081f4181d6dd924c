"""Trains a small GPT-2 from scratch on a text, byte by byte."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


@dataclass
class DataArguments:
    """What to train on."""

    train_file: str = field(metadata={"help": "A text file."})
    block_size: int = field(default=16, metadata={"help": "Bytes of a sequence."})


def main() -> None:
    """Train, and save the model."""
    parser = HfArgumentParser([DataArguments, TrainingArguments])
    data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    text = Path(data_args.train_file).read_bytes()
    size = data_args.block_size
    blocks = [list(text[start : start + size]) for start in range(0, len(text) - size + 1, size)]
    train_dataset = Dataset.from_dict({"input_ids": blocks, "labels": blocks})

    config = GPT2Config(
        vocab_size=256, n_positions=size, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        data_collator=default_data_collator,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
