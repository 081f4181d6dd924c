"""Folders of Hugging Face: what from_pretrained loads, and what the Trainer saved."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import incckpt
from incckpt.errors import CorruptionError
from incckpt.interchange import export, import_files
from incckpt.testing.compare import difference

pytest.importorskip("safetensors")


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return a model, its optimizer and its schedule after a few steps."""
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 7)).sum().backward()
        optimizer.step()
        schedule.step()
    return model, optimizer, schedule


def write_checkpoint(folder: Path, step: int, *, safe: bool = True) -> dict[str, Any]:
    """Write what the Trainer keeps of a step; return the parts."""
    from safetensors.torch import save_file

    model, optimizer, schedule = trained()
    folder.mkdir(parents=True)
    state = dict(model.state_dict())
    if safe:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, folder / "pytorch_model.bin")
    rng = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(schedule.state_dict(), folder / "scheduler.pt")
    torch.save(rng, folder / "rng_state.pth")
    log = [
        {"step": step - 1, "loss": 9.0},
        {"step": step, "loss": 2.5, "epoch": 1.0},
        {"step": step, "eval_loss": 2.25},
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
    (folder / "config.json").write_text('{"model_type": "none"}')
    torch.save(print, folder / "training_args.bin")
    return {"model": state, "optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict(), "rng_state": rng}


@pytest.mark.slow
@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_of_the_trainer_is_imported(safe: bool, tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path / "checkpoint-500", 500, safe=safe)
    (made,) = import_files(tmp_path / "checkpoint-500", tmp_path / "store")
    assert made.checkpoint.step == 500
    assert made.checkpoint.metrics == {"loss": 2.5, "epoch": 1.0, "eval_loss": 2.25}
    assert made.left_out == ("training_args.bin",)
    loaded = incckpt.load(tmp_path / "store")
    for part in ("optimizer", "scheduler", "rng_state"):
        assert difference(loaded[part], expected[part]) == ""
    assert difference({name: loaded["model"][name] for name in expected["model"]}, expected["model"]) == ""
    assert loaded["trainer_state"]["global_step"] == 500
    assert loaded["config"] == {"model_type": "none"}


def test_training_goes_on_from_an_imported_folder(tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path / "checkpoint-500", 500)
    import_files(tmp_path / "checkpoint-500", tmp_path / "store")
    model, optimizer, schedule = trained()
    with incckpt.CheckpointManager(tmp_path / "store") as manager:
        assert manager.restore({"model": model, "optimizer": optimizer, "scheduler": schedule}) == 500
    assert difference(dict(model.state_dict()), expected["model"]) == ""
    assert difference(optimizer.state_dict(), expected["optimizer"]) == ""


def test_an_output_folder_becomes_a_run(tmp_path: Path) -> None:
    for step in (1000, 500):
        write_checkpoint(tmp_path / "out" / f"checkpoint-{step}", step)
    (tmp_path / "out" / "runs").mkdir()
    made = import_files(tmp_path / "out", tmp_path / "store")
    assert [one.checkpoint.step for one in made] == [500, 1000]


def test_shards_of_torch_files_are_imported(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(2)}, folder / "pytorch_model-00002-of-00002.bin")
    places = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    import_files(folder, tmp_path / "store")
    assert difference(incckpt.load(tmp_path / "store"), {"model": {"a": torch.ones(2), "b": torch.zeros(2)}}) == ""


def test_a_damaged_document_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint-5", 5)
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text("{")
    with pytest.raises(CorruptionError, match=r"trainer_state\.json is no JSON document"):
        import_files(tmp_path / "checkpoint-5", tmp_path / "store")


def test_files_beside_the_weights_are_copied(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint-5", 5)
    (tmp_path / "checkpoint-5" / "tokenizer.json").write_text("{}")
    import_files(tmp_path / "checkpoint-5", tmp_path / "store")
    done = export(
        tmp_path / "store", tmp_path / "out", format="huggingface", root="model", beside=tmp_path / "checkpoint-5"
    )
    names = ["model.safetensors", "config.json", "tokenizer.json"]
    assert [path.name for path in done.files] == names
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(names)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of transformers are not ours
def test_from_pretrained_loads_what_was_exported(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).bfloat16()
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()  # tied
    model.save_pretrained(tmp_path / "original")
    incckpt.save({"model": model, "step": 3}, tmp_path / "store")
    for name, shard_bytes in (("whole", 10**9), ("shards", 2000)):
        export(
            tmp_path / "store",
            tmp_path / name,
            format="huggingface",
            root="model",
            shard_bytes=shard_bytes,
            beside=tmp_path / "original",
        )
        loaded, report = transformers.GPT2LMHeadModel.from_pretrained(
            tmp_path / name, dtype="auto", output_loading_info=True
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert difference(dict(loaded.state_dict()), dict(model.state_dict())) == ""
        assert loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()
