"""TRL's trainers with incremental checkpoints: their own saving still runs, and they resume as the plain ones do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTTrainer

from incckpt.integrations.transformers import IncrementalTrainerMixin, incremental
from tests.integrations import tiny

pytestmark = pytest.mark.slow


def sft(kind: Any, folder: Path, **changes: Any) -> Any:
    """With LoRA adapters."""
    return tiny.sft(kind, folder, **changes)


def dpo(kind: Any, folder: Path, **changes: Any) -> Any:
    """With a reference model."""
    rows = {"prompt": ["the small"] * 16, "chosen": [" cat ran"] * 16, "rejected": [" dog ran"] * 16}
    settings = tiny.trl_arguments(DPOConfig, folder, max_length=tiny.LENGTH, **changes)
    return kind(
        model=tiny.gpt2(),
        ref_model=tiny.gpt2(),
        args=settings,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tiny.tokenizer(),
    )


def grpo(kind: Any, folder: Path, **changes: Any) -> Any:
    """With completions that are generated in every step."""

    def lengths(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    limits = {"num_generations": 2, "max_completion_length": 4, "steps_per_generation": 1}
    return kind(
        model=tiny.gpt2(),
        reward_funcs=lengths,
        args=tiny.trl_arguments(GRPOConfig, folder, **limits, **changes),
        train_dataset=Dataset.from_dict({"prompt": ["the small", "the big"] * 8}),
        processing_class=tiny.tokenizer(),
    )


@pytest.mark.parametrize(("base", "make"), [(SFTTrainer, sft), (DPOTrainer, dpo), (GRPOTrainer, grpo)])
def test_resumed_by_url_in_an_empty_folder(base: Any, make: Any, tmp_path: Path) -> None:
    steps = {"max_steps": 4, "save_steps": 2}
    plain = make(base, tmp_path / "plain", **steps)
    plain.train()
    url = str(tmp_path / "store")
    kind = incremental(base, url=url)
    make(kind, tmp_path / "first", **steps, save_total_limit=2).train()
    assert (tmp_path / "first" / "README.md").exists()  # the model card, by TRL's own saving
    shutil.rmtree(tmp_path / "first")
    again = make(kind, tmp_path / "second", **steps)
    again.train(resume_from_checkpoint=f"{url}#@2")
    assert again.state.global_step == 4
    assert tiny.same(tiny.weights(again.model), tiny.weights(plain.model))


@pytest.mark.parametrize("base", [SFTTrainer, DPOTrainer, GRPOTrainer])
def test_names_do_not_collide(base: Any, tmp_path: Path) -> None:
    """An attribute of a trainer must not hide a method of the mixin, which calls methods of that name."""
    trainer = {SFTTrainer: sft, DPOTrainer: dpo, GRPOTrainer: grpo}[base](base, tmp_path)
    own = {name for name in vars(IncrementalTrainerMixin) if name.startswith("_") and not name.startswith("__")}
    overridden = {name for name in own if callable(getattr(base, name, None))}
    assert {name for name in own - overridden if hasattr(trainer, name)} == set()
