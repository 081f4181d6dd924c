"""Fine-tunes a small GPT-2 on sentences with LoRA, by TRL."""

from __future__ import annotations

from datasets import Dataset
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from tests.integrations.tiny import LENGTH, SENTENCES, gpt2, tokenizer


def main() -> None:
    """Train, and save the adapters."""
    parser = TrlParser([SFTConfig, ModelConfig])
    training_args, model_args = parser.parse_args_and_config()
    training_args.max_length = LENGTH

    trainer = SFTTrainer(
        model=gpt2(32),
        args=training_args,
        train_dataset=Dataset.from_dict({"text": SENTENCES * 4}),
        processing_class=tokenizer(),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main()
