"""Saves of a real training run by incckpt and by what else people use, side by side.

    python benchmarks/bench_rivals.py                # about five minutes
    python benchmarks/bench_rivals.py --width 128    # in seconds
    python benchmarks/bench_rivals.py --picture docs/rivals.svg

A byte-level GPT is trained with AdamW on the Python standard library's source text. Every contender saves the same
states in turn, each durable before the next begins, in another order every time. Then each restores its last
checkpoint into a new model and optimizer, whose tensors are compared bit for bit. In the second table all blocks but
one are frozen.

- *blocked*: milliseconds that the training loop waits for a save (median);
- *durable*: seconds until the bytes are on the disk, fsynced (median);
- *first*, *later*: bytes stored by the first save and, on average, by each later one, divided by the state's;
- *restore*: seconds to restore model and optimizer in place, files in the page cache.

Rivals that are not installed are left out: ``pip install moonclip safetensors torch_checkpointing zipnn``.
``safetensors`` stores tensors only; ``zipnn`` compresses bytes only, on one thread. ``torch_checkpointing`` stages
without pinned memory, as its documentation asks of machines without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

import incckpt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench_codec import CONTEXT, VOCABULARY, batches


class Model(nn.Module):
    """A decoder-only transformer over bytes."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.zeros(CONTEXT, width))
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, 0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        for weight in self.blocks.parameters():  # the encoder copies one block
            if weight.dim() > 1:
                nn.init.xavier_uniform_(weight)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, text: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        logits: Tensor = self.head(self.blocks(self.embed(text) + self.position, mask, is_causal=True))
        return logits


class Training:
    """A model, its optimizer, and what one step does to them.

    Parameters
    ----------
    frozen
        Whether all blocks but the last, and the embeddings, are frozen.
    """

    def __init__(self, width: int, layers: int, frozen: bool) -> None:
        torch.manual_seed(0)
        self.width, self.layers, self.frozen = width, layers, frozen
        self.model, self.optimizer = self.fresh()
        self.batches = batches(0)

    def fresh(self) -> tuple[Model, torch.optim.AdamW]:
        """Return a new model and optimizer of the same shapes."""
        model = Model(self.width, self.layers)
        if self.frozen:
            model.requires_grad_(False)
            model.blocks.layers[-1].requires_grad_(True)
            model.head.requires_grad_(True)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step(self) -> None:
        """Train on a few windows of text."""
        text = next(self.batches)[:4]
        logits = self.model(text[:, :-1])
        loss = nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), text[:, 1:].reshape(-1))
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the state by name."""
        return flat(self.model, self.optimizer)


def flat(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the tensors of a model and an optimizer by name."""
    found = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{name}": value for name, value in moments.items() if isinstance(value, Tensor)}
    return found


class Contender(Protocol):
    """A way to save and restore."""

    def save(self, step: int) -> Callable[[], object]:
        """Save; return what waits until it is durable."""

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Restore the last checkpoint in place."""

    def close(self) -> None:
        """Let go of everything."""


class Incckpt:
    """incckpt, keeping all checkpoints."""

    def __init__(self, training: Training, folder: Path) -> None:
        self.app = {"model": training.model, "optimizer": training.optimizer}
        self.folder = folder
        self.manager = incckpt.CheckpointManager(folder)

    def save(self, step: int) -> Callable[[], object]:
        return self.manager.save(step, self.app).result

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with incckpt.CheckpointManager(self.folder, read_only=True) as manager:
            manager.restore({"model": model, "optimizer": optimizer})

    def close(self) -> None:
        self.manager.close()


class Files:
    """One new file or folder for each save, synced."""

    def __init__(self, training: Training, folder: Path) -> None:
        self.training, self.folder = training, folder
        self.last = folder

    def state(self) -> dict[str, Any]:
        return {"model": self.training.model.state_dict(), "optimizer": self.training.optimizer.state_dict()}

    def save(self, step: int) -> Callable[[], object]:
        self.last = self.folder / str(step)
        return self.write()

    def write(self) -> Callable[[], object]:
        raise NotImplementedError

    def sync(self) -> None:
        for path in [self.last, *self.last.rglob("*")]:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)

    def close(self) -> None:
        pass


class TorchSave(Files):
    """torch.save and torch.load."""

    def write(self) -> Callable[[], object]:
        torch.save(self.state(), self.last)
        return self.sync

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        state = torch.load(self.last, mmap=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])


class Safetensors(Files):
    """safetensors: tensors only; the optimizer's groups are the new one's."""

    def write(self) -> Callable[[], object]:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in self.training.tensors().items()}, self.last)
        return self.sync

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        from safetensors.torch import load_file

        tensors = load_file(self.last)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = tensor
        model.load_state_dict({k.partition(".")[2]: v for k, v in tensors.items() if k.startswith("model.")})
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


class AsyncSave(Files):
    """torch.distributed.checkpoint.async_save."""

    def write(self) -> Callable[[], object]:
        model, optimizer = get_state_dict(self.training.model, self.training.optimizer)
        future: Any = async_save({"model": model, "optimizer": optimizer}, checkpoint_id=self.last, no_dist=True)
        wait: Callable[[], object] = future.result  # its writer syncs
        return wait

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        weights, moments = get_state_dict(model, optimizer)
        load({"model": weights, "optimizer": moments}, checkpoint_id=self.last, no_dist=True)


class Moonclip:
    """moonclip: per-tensor deltas and zstd."""

    def __init__(self, training: Training, folder: Path) -> None:
        from moonclip import CheckpointManager

        self.training, self.folder, self.manager = training, folder, CheckpointManager(str(folder))

    def save(self, step: int) -> Callable[[], object]:
        self.manager.save(step=step, model=self.training.model, optimizer=self.training.optimizer)
        flush: Callable[[], object] = self.manager.flush
        return flush

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        from moonclip import CheckpointManager

        CheckpointManager(str(self.folder)).resume(model=model, optimizer=optimizer)

    def close(self) -> None:
        pass


class TorchCheckpointing(Files):
    """torch_checkpointing, PyTorch's new library."""

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.checkpoint_process import CheckpointProcessConfig
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.staging import CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        staging = CheckpointStagerConfig(use_pinned_memory=False, use_async_staging=False, use_non_blocking_copy=False)
        process = CheckpointProcessConfig(subprocess_init_timeout_secs=300)  # a busy machine takes its time
        save = AsyncCheckpointSaverConfig(staging_config=staging, process_config=process)
        storage = LocalFileSystemStorageConfig(use_direct_io=False)  # ext4 refuses its unaligned last writes
        self.manager = CheckpointManager(CheckpointManager.Config(save=save, storage_config=storage))

    def write(self) -> Callable[[], object]:
        future = self.manager.save(str(self.last), self.state())

        def wait() -> None:
            future.result()
            self.sync()

        return wait

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        state = self.manager.load(str(self.last), into={"model": None, "optimizer": None})
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def close(self) -> None:
        self.manager.close()


CONTENDERS: dict[str, tuple[str, Callable[[Training, Path], Contender]]] = {
    "incckpt": ("incckpt", Incckpt),
    "torch.save": ("torch", TorchSave),
    "safetensors": ("safetensors", Safetensors),
    "DCP async_save": ("torch", AsyncSave),
    "torch_checkpointing": ("torch_checkpointing", TorchCheckpointing),
    "moonclip": ("moonclip", Moonclip),
}


@dataclass
class Figures:
    """What was measured of one contender: seconds, and bytes in its folder after each save."""

    blocked: list[float] = field(default_factory=list)
    durable: list[float] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)
    restored: float = 0.0


def stored_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(training: Training, saves: int, gap: int, folder: Path) -> Iterator[tuple[str, Figures]]:
    """Train, save with every contender, and restore; yield each with its figures."""
    made: dict[str, Contender] = {}
    for name, (package, make) in CONTENDERS.items():
        if importlib.util.find_spec(package) is None:
            print(f"left out, not installed: {name}")
            continue
        place = folder / name.replace(" ", "-")
        place.mkdir()
        made[name] = make(training, place)
    figures = {name: Figures() for name in made}
    order = random.Random(0)
    for save in range(saves):
        for _ in range(gap):
            training.step()
        for name in order.sample(sorted(made), len(made)):
            began = time.perf_counter()
            wait = made[name].save(save)
            figures[name].blocked.append(time.perf_counter() - began)
            wait()
            figures[name].durable.append(time.perf_counter() - began)
            figures[name].stored.append(stored_bytes(folder / name.replace(" ", "-")))
    for name, contender in made.items():
        times = []
        for _ in range(3):
            model, optimizer = training.fresh()
            began = time.perf_counter()
            contender.restore(model, optimizer)
            times.append(time.perf_counter() - began)
            restored = flat(model, optimizer)
            for key, tensor in training.tensors().items():
                assert torch.equal(restored[key], tensor), f"{name} restores another {key}"
        figures[name].restored = statistics.median(times)
        contender.close()
        yield name, figures[name]


def zipped(tensors: dict[str, Tensor]) -> int:
    """Return the bytes of all tensors after ZipNN."""
    from zipnn import ZipNN

    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    total = 0
    for tensor in tensors.values():
        if tensor.nbytes < 1024 or tensor.dtype not in names:
            total += tensor.nbytes
            continue
        coder = ZipNN(input_format="byte", bytearray_dtype=names[tensor.dtype], threads=1)
        total += len(coder.compress(bytes(tensor.contiguous().view(torch.uint8).numpy())))
    return total


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    name: str
    blocked: float  # milliseconds
    durable: float  # seconds
    first: float  # stored bytes over the state's
    later: float
    restored: float  # seconds


STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328 } .title { font-weight: 600 } .value { font-size: 11px }
.bar { fill: #b6bec9 } .ours { fill: #2f7d5b }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .bar { fill: #57606a } .ours { fill: #4fb286 } }
"""
LEFT, BAR, GAP, LINE = 140, 190, 90, 20  # pixels


def draw(tables: dict[str, list[Row]]) -> str:
    """Return an SVG picture: for each table, how long a save blocks, and the bytes of a later save."""
    parts: list[str] = []
    y = 0
    for title, rows in tables.items():
        parts.append(f'<text class="title" x="8" y="{y + 20}">{title}</text>')
        y += 30
        columns: list[tuple[str, list[float], str]] = [
            ("training waits for a save", [row.blocked for row in rows], "{:.0f} ms"),
            ("bytes of a save after the first", [100 * row.later for row in rows], "{:.0f} %"),
        ]
        for column, (label, values, unit) in enumerate(columns):
            x = LEFT + column * (BAR + GAP)
            parts.append(f'<text class="value" x="{x}" y="{y + 12}">{label}</text>')
            for line, (row, value) in enumerate(zip(rows, values, strict=True)):
                top = y + LINE * (line + 1)
                width = max(1.0, BAR * value / max(values))
                kind = "bar ours" if row.name == "incckpt" else "bar"
                if not column:
                    parts.append(f'<text x="{LEFT - 8}" y="{top + 12}" text-anchor="end">{row.name}</text>')
                parts.append(f'<rect class="{kind}" x="{x}" y="{top + 2}" width="{width:.1f}" height="13" rx="2"/>')
                text = f'<text class="value" x="{x + width + 6:.1f}" y="{top + 12}">{unit.format(value)}</text>'
                parts.append(text)
        y += LINE * (len(rows) + 1) + 16
    size = f'viewBox="0 0 {LEFT + 2 * (BAR + GAP)} {y}" width="{LEFT + 2 * (BAR + GAP)}" height="{y}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{STYLE}</style>\n{body}\n</svg>\n'


def main() -> None:
    """Print a table for a training run, and one for a fine-tuning run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--gap", type=int, default=1, help="steps between two saves (1)")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints")
    parser.add_argument("--picture", type=Path, help="an SVG file to draw")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    tables: dict[str, list[Row]] = {}
    for frozen in (False, True):
        training = Training(options.width, options.layers, frozen)
        training.step()
        nbytes = sum(tensor.nbytes for tensor in training.tensors().values())
        what = f"{options.layers - 1} of {options.layers} blocks frozen" if frozen else "all weights trained"
        title = f"{nbytes / 1e6:.0f} MB of float32 weights and AdamW's moments, {what}"
        print(f"\n{title}; {options.saves} saves; load average {os.getloadavg()[0]:.1f}\n")
        folder = Path(tempfile.mkdtemp(prefix="rivals-", dir=options.folder))
        rows = tables[title] = []
        print("| | blocked, ms | durable, s | first | later | restore, s |\n| --- | ---: | ---: | ---: | ---: | ---: |")
        try:
            for name, found in measure(training, options.saves, options.gap, folder):
                later = (found.stored[-1] - found.stored[0]) / (options.saves - 1)
                blocked, durable = statistics.median(found.blocked[1:]), statistics.median(found.durable[1:])
                row = Row(name, blocked * 1e3, durable, found.stored[0] / nbytes, later / nbytes, found.restored)
                rows.append(row)
                print(
                    f"| {name} | {row.blocked:.0f} | {row.durable:.2f} | {row.first:.2f} | {row.later:.2f} | "
                    f"{row.restored:.2f} |"
                )
        finally:
            shutil.rmtree(folder)
        if importlib.util.find_spec("zipnn"):
            share = zipped(training.tensors()) / nbytes
            print(f"| ZipNN | | | {share:.2f} | {share:.2f} | |")
    if options.picture:
        options.picture.write_text(draw(tables))


if __name__ == "__main__":
    main()
