"""The pages on frameworks: scripts changed as their diffs say are killed and go on exactly, and all examples run."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import runpy
import signal
import sys
import textwrap
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import incckpt

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["lightning.pytorch", "transformers.trainer", "trl.trainer.sft_trainer", "datasets", "incckpt"]
URL = "s3://bucket/exp7"


def blocks(page: str, language: str) -> list[str]:
    """Return the code of a language on a page."""
    text = (ROOT / "docs" / "frameworks" / f"{page}.md").read_text()
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(code) if indent else code for indent, code in found]


def changed(script: str, diff: str) -> str:
    """Return a script with a diff applied; a line of it that is ``…`` skips some of the script's.

    Raises
    ------
    ValueError
        If the script has not the lines of the diff.
    """
    lines = script.splitlines()
    at, skipping = 0, True
    for line in diff.splitlines():
        if line == " …":
            skipping = True
        elif line.startswith("+"):
            lines.insert(at, line[1:])
            at += 1
        else:
            found = lines.index(line[1:], at)
            assert skipping or found == at, f"the script has other lines before {line!r}"
            skipping = False
            if line.startswith("-"):
                del lines[found]
            at = found + (line[0] == " ")
    return "\n".join(lines) + "\n"


def run(script: Path, arguments: list[str], output: Path, die_at: int) -> None:
    """Be the script's process; with `die_at`, one that is killed after that many saves."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    sys.argv = [str(script), *arguments]
    save = incckpt.CheckpointManager.save
    saves = 0

    def counted(manager: Any, *given: Any, **named: Any) -> Any:
        nonlocal saves
        saves += 1
        if saves > die_at > 0:
            manager.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return save(manager, *given, **named)

    with patch.object(incckpt.CheckpointManager, "save", counted):
        runpy.run_path(str(script), run_name="__main__")


def finish(script: Path, arguments: list[str], output: Path, *, die_at: int = 0) -> None:
    """Run a script in a process of its own, to its end."""
    CONTEXT.set_forkserver_preload(PRELOADED)  # they take longer to import than the scripts to run
    process = CONTEXT.Process(target=run, args=(script, arguments, output, die_at))
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if die_at else 0), output.read_text()[-3000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights that a script left."""
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (folder / name).exists():
            from safetensors.torch import load_file

            return load_file(folder / name)
    return dict(torch.load(folder / "weights.pt"))


TRAINER = (
    "--max_steps 8 --save_steps 2 --per_device_train_batch_size 4 --use_cpu true --report_to none --learning_rate 0.01"
)
SCRIPTS = {
    "causal_lm": ("transformers", 0, f"{TRAINER} --train_file {ROOT / 'LICENSE'}", "--resume_from_checkpoint"),
    "sft": ("transformers", 1, f"{TRAINER} --bf16 false --use_peft true --lora_r 2", "--resume_from_checkpoint"),
    "autoencoder": ("lightning", 0, "", "--ckpt_path"),
    "classifier": ("accelerate", 0, "", "--resume_from_checkpoint"),
}
NEEDS = {"sft": "trl", "causal_lm": "transformers", "autoencoder": "lightning.pytorch", "classifier": "accelerate"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_that_is_changed_as_the_page_says(tmp_path: Path, name: str) -> None:
    pytest.importorskip(NEEDS[name])
    page, number, options, resume = SCRIPTS[name]
    diff = blocks(page, "diff")[number]
    added = [line for line in diff.splitlines() if line.startswith("+")]
    assert len(added) == 2
    before = ROOT / "tests" / "integrations" / "scripts" / f"{name}.py"
    url = str(tmp_path / "store")
    after = tmp_path / f"{name}.py"
    after.write_text(changed(before.read_text(), diff).replace(URL, url))

    def arguments(folder: str) -> list[str]:
        return ["--output_dir", str(tmp_path / folder), *options.split()]

    finish(before, arguments("plain"), tmp_path / "plain.log")
    finish(after, arguments("killed"), tmp_path / "killed.log", die_at=2)
    finish(after, [*arguments("again"), resume, url], tmp_path / "again.log")
    expected, found = weights(tmp_path / "plain"), weights(tmp_path / "again")
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), f"{key} is not that of the script as it was"


def test_lightnings_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning.pytorch")
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from incckpt.integrations import lightning as ours
    from tests.integrations.train_lightning import EXAMPLES, Net

    class MyModule(Net):
        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(EXAMPLES, 64)  # type: ignore[arg-type]

    def trainer(max_epochs: int, plugins: list[Any], callbacks: list[Any]) -> Any:
        callbacks = [*callbacks, ModelCheckpoint("checkpoints", monitor="loss", save_last=True)]
        return Trainer(max_epochs=1, plugins=plugins, callbacks=callbacks, accelerator="cpu", logger=False)

    monkeypatch.chdir(tmp_path)
    names = {name: getattr(ours, name) for name in ours.__all__}
    names |= {"model": MyModule(), "MyModule": MyModule, "Trainer": trainer}
    for code in blocks("lightning", "python"):
        exec(code.replace(URL, "store"), names)
    assert names["checkpoint"]["global_step"] == 4
    assert torch.equal(names["model"].net[0].weight, names["checkpoint"]["state_dict"]["net.0.weight"])


def test_accelerates_examples(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", exc_type=ImportError)
    from accelerate import Accelerator

    from incckpt.integrations.accelerate import IncrementalState

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(nn.Linear(2, 2))
    names = {"accelerator": accelerator, "IncrementalState": IncrementalState, "loss": 0.5}
    for code in blocks("accelerate", "python"):
        exec(code.replace(URL, str(tmp_path)), names)
    names["checkpoints"].close()
    assert [found.metrics for found in incckpt.list_checkpoints(tmp_path)] == [{"loss": 0.5}]


@pytest.mark.usefixtures("forked_trainings")
def test_the_examples_of_exact_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check, compiled = blocks("exact-resume", "python")
    head = """
import random, incckpt, numpy, torch
def make_model():
    for seed in random.seed, numpy.random.seed, torch.manual_seed:
        seed(0)
    return torch.nn.Linear(2, 2)
"""
    (tmp_path / "training_of_a_page.py").write_text(head + check)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    importlib.import_module("training_of_a_page").test_resuming_is_exact()
    names: dict[str, Any] = {"torch": torch, "make_model": lambda: nn.Linear(2, 2), "optimizer": None}
    exec(compiled, names)
    assert sorted(names["state"]["model"].state_dict()) == ["bias", "weight"]


def test_the_examples_of_tensor_subclasses(tmp_path: Path) -> None:
    torchao: Any = pytest.importorskip("torchao")
    pytest.importorskip("torchao.optim")
    pytest.importorskip("bitsandbytes")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    class MyTensor(torch.Tensor):
        pass

    class MyOptions:
        pass

    with incckpt.CheckpointManager(tmp_path) as manager:
        names = {
            "torch": torch,
            "torchao": torchao,
            "quantize_": quantize_,
            "Int8WeightOnlyConfig": Int8WeightOnlyConfig,
        }
        names |= {"model": nn.Sequential(nn.Linear(64, 64)), "manager": manager}
        names |= {"MyTensor": MyTensor, "MyOptions": MyOptions}
        with torch.serialization.safe_globals([]):
            for code in blocks("tensor-subclasses", "python"):
                exec(code, names)
