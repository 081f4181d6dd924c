"""A `Trainer` with incremental checkpoints, against the plain one: the same training, however it is stopped."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

pytest.importorskip("transformers")

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import incckpt
from incckpt.errors import CheckpointNotFoundError, CorruptionError, DistributedError, OptionError
from incckpt.integrations.transformers import IncrementalTrainerMixin, incremental
from tests.integrations.tiny import Tokens, arguments, gpt2, same, weights, with_lora

pytestmark = pytest.mark.slow

TENSOR_FILES = {".safetensors", ".bin", ".pt", ".pth"}


class StopAt(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Ends training at a step, as a kill would."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            control.should_training_stop = True


def make(kind: Any, folder: Path, *, stop: int = 0, model: Any = None, changes: Any = None, **given: Any) -> Any:
    """Return a trainer of the tiny GPT-2."""
    return kind(
        model=gpt2() if model is None else model,
        args=arguments(folder, **(changes or {})),
        train_dataset=Tokens(),
        callbacks=[StopAt(stop)] if stop else [],
        **given,
    )


def plain_result(tmp_path: Path, model: Any = None, **changes: Any) -> dict[str, torch.Tensor]:
    """Return the weights after an uninterrupted training by the plain Trainer."""
    trainer = make(Trainer, tmp_path / "plain", model=model, changes=changes)
    trainer.train()
    return weights(trainer.model)


def steps(url: object, run: str | None = None) -> list[int]:
    """Return the steps that a run has checkpoints of."""
    with incckpt.CheckpointManager(str(url), run=run, read_only=True) as manager:
        return [checkpoint.step for checkpoint in manager.checkpoints()]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("stop", [4, 7])
def test_resumed_by_url_in_an_empty_folder(tmp_path: Path, lora: bool, stop: int) -> None:
    def model() -> Any:
        return with_lora(gpt2()) if lora else gpt2()

    expected = plain_result(tmp_path, model())
    url = str(tmp_path / "store")
    kind = incremental(Trainer, url=url)
    make(kind, tmp_path / "first", stop=stop, model=model()).train()
    shutil.rmtree(tmp_path / "first")
    again = make(kind, tmp_path / "second", model=model())
    again.train(resume_from_checkpoint=url)
    assert same(weights(again.model), expected)
    assert steps(url) == [2, 4, 6, 8]
    assert [entry["step"] for entry in again.state.log_history] == [*range(1, 9), 8]  # with what the first one logged


def test_folders_hold_no_tensors(tmp_path: Path) -> None:
    make(incremental(Trainer, url=tmp_path / "store"), tmp_path / "out").train()
    folders = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert [folder.name for folder in folders] == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    names = {path.name for folder in folders for path in folder.iterdir()}
    assert {"trainer_state.json", "config.json", "tensors.json"} <= names
    assert {name for name in names if Path(name).suffix in TENSOR_FILES} == {"training_args.bin"}


@pytest.mark.parametrize("by", ["true", "folder", "url", "step", "another store's url"])
def test_every_way_to_name_a_checkpoint(tmp_path: Path, by: str) -> None:
    expected = plain_result(tmp_path)
    store, out = tmp_path / "store", tmp_path / "out"
    make(incremental(Trainer, url=store), out, stop=5).train()
    elsewhere = by.startswith("another")
    url, folder = (tmp_path / "new", tmp_path / "b") if elsewhere else (store, out)
    again = make(incremental(Trainer, url=url), folder)
    named = {"true": True, "folder": get_last_checkpoint(str(out)), "step": f"{store}#@2"}.get(by, str(store))
    again.train(resume_from_checkpoint=named)
    assert same(weights(again.model), expected)
    assert steps(url) == ([6, 8] if elsewhere else [2, 4, 6, 8])


def test_killed_when_all_of_the_trainers_files_are_there(tmp_path: Path) -> None:
    class Dies(IncrementalTrainerMixin, Trainer):  # type: ignore[misc, unused-ignore]
        def _incckpt_commit(self, *given: Any) -> None:
            if self.state.global_step == 4:
                raise KeyboardInterrupt
            super()._incckpt_commit(*given)

    expected = plain_result(tmp_path)
    store, out = tmp_path / "store", tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        make(Dies, out, checkpoint_url=store).train()
    assert (out / "checkpoint-4" / "trainer_state.json").exists()
    again = make(incremental(Trainer, url=store), out)
    again.train(resume_from_checkpoint=True)
    assert same(weights(again.model), expected)


def test_limit_and_best_model_as_the_plain_trainer(tmp_path: Path) -> None:
    changes = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # so that the first one is the best, and is older than the last two
    }
    plain = make(Trainer, tmp_path / "plain", changes=changes, eval_dataset=Tokens(8))
    plain.train()
    store = tmp_path / "store"
    kind = incremental(Trainer, url=store)
    make(kind, tmp_path / "out", stop=5, changes=changes, eval_dataset=Tokens(8)).train()
    assert steps(store) == [2, 4]
    again = make(kind, tmp_path / "other", changes=changes, eval_dataset=Tokens(8))
    again.train(resume_from_checkpoint=str(store))
    assert same(weights(again.model), weights(plain.model))
    best = Path(plain.state.best_model_checkpoint).name
    assert Path(again.state.best_model_checkpoint) == tmp_path / "other" / best

    def names(folder: str) -> list[str]:
        return sorted(path.name for path in (tmp_path / folder).glob("checkpoint-*"))

    assert names("other") == names("plain")
    assert [f"checkpoint-{step}" for step in steps(store)] == names("plain")
    with incckpt.CheckpointManager(store, read_only=True, metric="eval_loss", mode="max") as manager:
        assert manager.best is not None
        assert f"checkpoint-{manager.best.step}" == best


def test_only_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = tmp_path / "store"
    kind = incremental(Trainer, url=store)
    first = make(kind, tmp_path / "out", stop=4, changes={"save_only_model": True})
    first.train()
    assert set(incckpt.load(str(store))) == {"model", "trainer"}
    again = make(kind, tmp_path / "out", stop=5)
    again._load_from_checkpoint(str(tmp_path / "out" / "checkpoint-4"))
    assert same(weights(again.model), weights(first.model))
    with caplog.at_level(logging.WARNING, "incckpt"):
        again.train(resume_from_checkpoint=True)
    assert "has no optimizer" in caplog.text


def test_a_step_saved_twice_is_replaced(tmp_path: Path) -> None:
    class SaveTwice(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer._save_checkpoint(trainer.model, trial=None)

    trainer = make(incremental(Trainer, url=tmp_path / "store"), tmp_path / "out")
    trainer.add_callback(SaveTwice())
    trainer.train()
    trainer._save_checkpoint(trainer.model, None)  # after training, too, and durable at once
    assert steps(tmp_path / "store") == [2, 4, 6, 8]
    assert incckpt.verify(str(tmp_path / "store"))


def test_an_unfinished_save_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = plain_result(tmp_path)
    store, out = tmp_path / "store", tmp_path / "out"
    kind = incremental(Trainer, url=store)
    make(kind, out, stop=4).train()
    shutil.copytree(out / "checkpoint-4", out / "checkpoint-6")
    pointer = out / "checkpoint-6" / "tensors.json"
    pointer.write_text(pointer.read_text().replace('"step": 4', '"step": 6'))
    (out / "checkpoint-6" / "trainer_state.json").write_text("{")
    again = make(kind, out)
    again.train(resume_from_checkpoint=get_last_checkpoint(str(out)))
    assert "was announced but never committed, its writer must have died; this is step 4" in caplog.text
    assert same(weights(again.model), expected)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = plain_result(tmp_path)
    store, out = tmp_path / "store", tmp_path / "out"
    kind = incremental(Trainer, url=store)
    make(kind, out, stop=2).train()
    old = {path for path in store.rglob("*") if path.is_file()}
    make(kind, out, stop=4).train(resume_from_checkpoint=True)
    new = {path for path in store.rglob("*") if path.is_file()} - old
    objects = [path for path in new if path.relative_to(store).parts[0] in ("objects", "deltas")]
    largest = max(objects, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7] + b"damaged")
    with pytest.raises(CorruptionError):
        make(kind, out).train(resume_from_checkpoint=str(store) + "#@4")
    again = make(kind, out)
    again.train(resume_from_checkpoint=True)
    assert "falling back to the one before it" in caplog.text
    assert same(weights(again.model), expected)


def test_a_plain_trainers_folder_is_gone_on_from(tmp_path: Path) -> None:
    expected = plain_result(tmp_path)
    out, store = tmp_path / "out", tmp_path / "store"
    make(Trainer, out, stop=4).train()
    again = make(incremental(Trainer, url=store), out)
    again.train(resume_from_checkpoint=True)
    assert same(weights(again.model), expected)
    assert steps(store) == [6, 8]


def test_a_fresh_start_spares_a_run_that_has_checkpoints(tmp_path: Path) -> None:
    kind = incremental(Trainer, url=tmp_path / "store")
    make(kind, tmp_path / "out", stop=4).train()
    with pytest.raises(OptionError, match=r"has checkpoints up to step 4 already.*resume_from_checkpoint=True"):
        make(kind, tmp_path / "out").train()
    assert steps(tmp_path / "store") == [2, 4]
    make(incremental(Trainer, url=f"{tmp_path / 'store'}#again"), tmp_path / "out").train()
    assert steps(tmp_path / "store", "again") == [2, 4, 6, 8]


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    kind = incremental(Trainer, url=tmp_path / "store")
    with pytest.raises(CheckpointNotFoundError, match="has no checkpoint"):
        make(kind, tmp_path / "out").train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointNotFoundError, match="has no checkpoint"):
        make(kind, tmp_path / "out").train(resume_from_checkpoint=f"file://{tmp_path}/store#other")


def test_scaler(tmp_path: Path) -> None:
    def with_scaler(stop: int, scale: float) -> Any:
        trainer = make(incremental(Trainer, url=tmp_path / "store"), tmp_path / "out", stop=stop)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return trainer

    first = with_scaler(4, 512.0)
    first.accelerator.scaler.scale(torch.ones(1))  # its state is made when it is first used
    first.train()
    again = with_scaler(5, 2.0)
    again.train(resume_from_checkpoint=True)
    assert first.accelerator.scaler.state_dict()["_growth_tracker"] == 4
    assert again.accelerator.scaler.state_dict() == {**first.accelerator.scaler.state_dict(), "_growth_tracker": 5}


@pytest.mark.parametrize("hub_strategy", ["every_save", "end"])
def test_what_is_pushed_to_the_hub_has_weights(tmp_path: Path, hub_strategy: str) -> None:
    pushed: list[set[str]] = []

    class Pushing(Trainer):  # type: ignore[misc, unused-ignore]
        def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
            """Talk to no hub."""

        def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
            """Talk to no hub."""

        def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
            pushed.append({path.name for path in Path(checkpoint_folder).iterdir()})

    changes = {"push_to_hub": True, "hub_strategy": hub_strategy, "hub_model_id": "someone/some", "hub_token": "none"}
    trainer = make(incremental(Pushing, url=tmp_path / "store"), tmp_path / "out", stop=2, changes=changes)
    trainer.train()
    assert [("model.safetensors" in names) for names in pushed] == [hub_strategy == "every_save"]
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "model.safetensors").exists()
    assert set(incckpt.load(str(tmp_path / "store"), keys=["trainer"])["trainer"]["files"]) == {
        "config.json",
        "generation_config.json",
        "trainer_state.json",
    }


def test_what_is_refused(tmp_path: Path) -> None:
    class Sharded(Trainer):  # type: ignore[misc, unused-ignore]
        enabled = "is_fsdp_enabled"

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            setattr(self, self.enabled, True)

    with pytest.raises(DistributedError, match="FSDP"):
        make(incremental(Sharded, url=tmp_path / "store"), tmp_path / "out")
    Sharded.enabled = "is_deepspeed_enabled"
    with pytest.raises(DistributedError, match="DeepSpeed"):
        make(incremental(Sharded, url=tmp_path / "store"), tmp_path / "out")
    if hasattr(TrainingArguments, "enable_jit_checkpoint"):  # transformers 4 has none
        with pytest.raises(OptionError, match="SIGTERM"):
            make(
                incremental(Trainer, url=tmp_path / "store"), tmp_path / "out", changes={"enable_jit_checkpoint": True}
            )
    with pytest.raises(OptionError, match="needs the URL of a store"):
        make(type("Forgotten", (IncrementalTrainerMixin, Trainer), {}), tmp_path / "out")
    with pytest.raises(OptionError, match="not here"):
        make(incremental(Trainer, url=f"{tmp_path}/store#run@5"), tmp_path / "out")


def test_over_s3(tmp_path: Path, s3_server: dict[str, Any]) -> None:
    fsspec.filesystem("s3", **s3_server).mkdir("trainer-bucket")
    expected = plain_result(tmp_path)
    kind = incremental(Trainer, url="s3://trainer-bucket/exp#lr1", storage_options=s3_server)
    make(kind, tmp_path / "a", stop=5).train()
    again = make(kind, tmp_path / "b")
    again.train(resume_from_checkpoint="s3://trainer-bucket/exp#lr1")
    assert same(weights(again.model), expected)


@pytest.mark.parametrize("kind", ["more is trained", "whole"])
def test_kinds_of_peft_models(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    def model() -> Any:
        adapted = with_lora(gpt2())
        if kind == "more is trained":
            adapted.base_model.model.transformer.ln_f.requires_grad_(True)
        return adapted

    changes = {"max_steps": 4}
    given: dict[str, Any] = {"changes": changes, "whole_model": kind == "whole"}
    expected = plain_result(tmp_path, model(), **changes)
    kind_of = incremental(Trainer, url=tmp_path / "store")
    make(kind_of, tmp_path / "a", stop=3, model=model(), **given).train()
    assert "model" in incckpt.load(str(tmp_path / "store"))
    assert ("more of it is trained" in caplog.text) == (kind == "more is trained")
    again = make(kind_of, tmp_path / "b", model=model(), **given)
    again.train(resume_from_checkpoint=str(tmp_path / "store"))
    assert same(weights(again.model), expected)
