"""Bytes stored for a checkpoint every ten steps of real training, beside other ways of writing the same checkpoints.

Small models learn the Python standard library's source text by bytes: in float32, in bfloat16 with a float32 master,
fine-tuned, with LoRA on a frozen base; and an embedding table of which few rows are touched. Every scenario is saved 51
times; the figures are of the 50 after the first.

    python benchmarks/bench_bytes.py                 # about ten minutes on two cores; rewrites RESULTS.md's section
    python benchmarks/bench_bytes.py --saves 5 LoRA  # a quick look at scenarios whose names contain "LoRA"
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
import zstandard
from torch import Tensor, nn
from torch.nn import functional

import incckpt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench_codec import VOCABULARY, LanguageModel, batches

State: TypeAlias = dict[str, Any]

RESULTS = Path(__file__).with_name("RESULTS.md")
PICTURE = Path(__file__).with_name("bytes.svg")
GAP = 10
MODERATE = 300  # steps of pre-training


def tensors_of(state: Any) -> Iterator[Tensor]:
    """Yield every tensor of a nested state."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors_of(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors_of(value)


def raw_bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class WholeTensors:
    """The scheme that this project began as, written anew: tensors that changed, each whole, by zstd at level 3."""

    def __init__(self) -> None:
        self._stored: set[bytes] = set()
        self._zstd = zstandard.ZstdCompressor(level=3)

    def save(self, state: State) -> int:
        """Return the bytes that a save writes."""
        written = 0
        for tensor in tensors_of(state):
            data = raw_bytes(tensor)
            name = hashlib.sha256(data).digest()
            if name not in self._stored:
                self._stored.add(name)
                written += len(self._zstd.compress(data))
        return written


@dataclass
class Rival:
    """Bytes of the saves after the first, by contender."""

    name: str
    raw: int = 0
    bytes: dict[str, int] = field(default_factory=dict)
    first: int = 0
    series: list[float] = field(default_factory=list)

    def ratio(self, contender: str) -> float:
        """Stored bytes over the state's raw bytes."""
        return self.bytes[contender] / self.raw


CONTENDERS = ("torch.save", "zstd-3", "whole tensors", "incckpt")


class Contest:
    """Saves one scenario's states every way there is."""

    def __init__(self, name: str, folder: str) -> None:
        self.result = Rival(name, bytes=dict.fromkeys(CONTENDERS, 0))
        self._manager = incckpt.CheckpointManager(f"{folder}/{re.sub('[^a-z0-9]+', '-', name.lower())}", keep_last_n=2)
        self._whole = WholeTensors()
        self._zstd = zstandard.ZstdCompressor(level=3)
        self._step = 0

    def save(self, state: State) -> None:
        """Save a state, every way."""
        plain = io.BytesIO()
        torch.save(state, plain)
        self._manager.save(self._step, state).result()
        self._manager.wait()
        report = self._manager.history[-1]
        sizes = {
            "torch.save": plain.tell(),
            "zstd-3": sum(len(self._zstd.compress(raw_bytes(tensor))) for tensor in tensors_of(state)),
            "whole tensors": self._whole.save(state),
            "incckpt": report.put_bytes + report.manifest_bytes,
        }
        result = self.result
        if self._step == 0:
            result.first = sizes["incckpt"]
        else:
            result.raw += report.nbytes
            result.series.append(sizes["incckpt"] / report.nbytes)
            for contender in CONTENDERS:
                result.bytes[contender] += sizes[contender]
        self._step += 1

    def close(self) -> Rival:
        """Return the result."""
        self._manager.close()
        return self.result


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> float:
    """Take one step."""
    logits = model(batch[:, :-1])
    loss = functional.cross_entropy(logits.reshape(-1, VOCABULARY).float(), batch[:, 1:].reshape(-1))
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saves: int,
    seed: int,
    states: dict[str, Callable[[], State]],
    folder: str,
    final: float | None = None,
) -> list[Rival]:
    """Train, and save every `GAP` steps what each of `states` returns; the rate falls to `final`, if that is given."""
    rate = optimizer.param_groups[0]["lr"]
    contests = {name: Contest(name, folder) for name in states}
    source = batches(seed)
    for save in range(saves):
        loss = 0.0
        if final is not None:
            for group in optimizer.param_groups:
                group["lr"] = final + (rate - final) * (1 + math.cos(math.pi * save / saves)) / 2
        for _ in range(GAP):
            loss = train_step(model, optimizer, next(source))
        for name, state in states.items():
            contests[name].save(state())
        if save % 10 == 0:
            print(f"  save {save}, loss {loss:.3f}", flush=True)
    return [contest.close() for contest in contests.values()]


def pretrained() -> LanguageModel:
    """Return a model that has learned a little."""
    torch.manual_seed(0)
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step, batch in zip(range(MODERATE), batches(1), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - 0.75 * step / MODERATE)
        train_step(model, optimizer, batch)
    return model


def full_training(base: LanguageModel, saves: int, folder: str) -> list[Rival]:
    """Go on training, in float32 and mixed precision: the end of a schedule, down to a tenth of its peak."""
    model = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.999))

    def half() -> State:
        return {name: value.bfloat16() for name, value in model.state_dict().items()}

    states: dict[str, Callable[[], State]] = {
        "fp32 + Adam, training": lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        "bf16 weights, training": half,
        "bf16 + fp32 master + Adam, training": lambda: {
            "half": half(),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        },
    }
    return train(model, optimizer, saves, 2, states, folder, final=2e-4)


def bf16_fine_tune(base: LanguageModel, saves: int, folder: str) -> list[Rival]:
    """Fine-tune in bfloat16 at 1e-5, moments in bfloat16 as torch makes them."""
    model = copy.deepcopy(base).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    states: dict[str, Callable[[], State]] = {
        "bf16 weights, fine-tune": model.state_dict,
        "bf16 + moments, fine-tune": lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
    }
    return train(model, optimizer, saves, 3, states, folder)


def fp32_fine_tune(base: LanguageModel, saves: int, folder: str) -> list[Rival]:
    """Fine-tune in float32 at 2e-5."""
    model = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    return train(model, optimizer, saves, 4, {"fp32 weights, fine-tune": model.state_dict}, folder)


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained correction of low rank."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen
        self.down = nn.Parameter(torch.randn(rank, frozen.in_features) * 0.02)
        self.up = nn.Parameter(torch.zeros(frozen.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the correction."""
        y: Tensor = self.frozen(x) + functional.linear(functional.linear(x, self.down), self.up)
        return y


def lora(base: LanguageModel, saves: int, folder: str) -> list[Rival]:
    """Train adapters of rank 1 on one projection of each block; the base is frozen, and in the state."""
    model = copy.deepcopy(base).requires_grad_(False)
    for block in model.blocks:
        block.qkv = LoRALinear(block.qkv, 1)  # type: ignore[arg-type]
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-3)
    states: dict[str, Callable[[], State]] = {
        "LoRA, frozen base and moments": lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    }
    return train(model, optimizer, saves, 5, states, folder)


def embedding(base: LanguageModel, saves: int, folder: str) -> list[Rival]:
    """Touch 0.6 % of a table's rows between saves."""
    torch.manual_seed(6)
    table = nn.Embedding(50_000, 32, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=1e-3)
    names = ("embedding table, 0.6 % of rows", "embedding table and moments, 0.6 % of rows")
    contests = [Contest(name, folder) for name in names]
    for save in range(saves + 3):
        for _ in range(GAP):
            touched = torch.randint(50_000, (30,))
            optimizer.zero_grad()
            functional.mse_loss(table(touched), torch.randn(30, 32)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()  # type: ignore[no-untyped-call]
        if save >= 3:
            contests[0].save(table.state_dict())
            contests[1].save({"table": table.state_dict(), "optimizer": optimizer.state_dict()})
    return [contest.close() for contest in contests]


SCENARIOS = {
    "training": full_training,
    "bf16 fine-tune": bf16_fine_tune,
    "fp32 fine-tune": fp32_fine_tune,
    "LoRA": lora,
    "embedding": embedding,
}


def table_of(results: list[Rival], saves: int) -> str:
    """Return the results as a Markdown table."""
    lines = [
        f"Stored over raw bytes of the state, averaged over {saves - 1} saves after the first, {GAP} steps apart, "
        "manifests and full objects included. The last columns are incckpt's first save, and its last one.",
        "",
        "| state | " + " | ".join(CONTENDERS) + " | first | last |",
        "| --- |" + " ---: |" * (len(CONTENDERS) + 2),
    ]
    for result in results:
        ratios = " | ".join(f"{result.ratio(contender):.4f}" for contender in CONTENDERS)
        first = result.first / (result.raw / (saves - 1))
        lines.append(f"| {result.name} | {ratios} | {first:.3f} | {result.series[-1]:.4f} |")
    return "\n".join(lines)


def draw(results: list[Rival]) -> str:
    """Return a bar chart of the results, as SVG."""
    left, width, bar, gap = 270, 460, 11, 12
    colours = {"torch.save": "#b8bcc4", "zstd-3": "#8fa3bf", "whole tensors": "#c99a5b", "incckpt": "#2f7d5b"}
    group = len(CONTENDERS) * bar + gap
    height = 50 + group * len(results)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 70}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="100%" height="{height}" fill="white"/>',
    ]
    for i, contender in enumerate(CONTENDERS):
        x = left + i * 115
        parts.append(f'<rect x="{x}" y="12" width="10" height="10" fill="{colours[contender]}"/>')
        parts.append(f'<text x="{x + 14}" y="21">{contender}</text>')
    for row, result in enumerate(results):
        top = 36 + row * group
        middle = top + len(CONTENDERS) * bar / 2 + 4
        parts.append(f'<text x="{left - 8}" y="{middle}" text-anchor="end">{result.name}</text>')
        for i, contender in enumerate(CONTENDERS):
            ratio = result.ratio(contender)
            long = max(1.0, min(ratio, 1.05) * width)
            y = top + i * bar
            fill = colours[contender]
            parts.append(f'<rect x="{left}" y="{y}" width="{long:.1f}" height="{bar - 1}" fill="{fill}"/>')
            parts.append(f'<text x="{left + long + 4:.1f}" y="{y + 9}" font-size="9">{ratio:.3f}</text>')
    return "\n".join([*parts, "</svg>", ""])


def replace_section(path: Path, name: str, text: str) -> None:
    """Replace a section of a Markdown file, between its marks, or add it."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    section = f"{begin}\n{text}\n{end}"
    old = path.read_text() if path.exists() else "# Results\n"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    new = pattern.sub(lambda _: section, old) if pattern.search(old) else f"{old.rstrip()}\n\n{section}\n"
    path.write_text(new)


def main() -> None:
    """Run the scenarios and print, or write, the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="?", default="", help="part of a scenario's name")
    parser.add_argument("--saves", type=int, default=51)
    arguments = parser.parse_args()
    print("pre-training", flush=True)
    base = pretrained()
    results: list[Rival] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, scenario in SCENARIOS.items():
            if arguments.only.lower() in name.lower():
                print(name, flush=True)
                results += scenario(base, arguments.saves, folder)
    table = table_of(results, arguments.saves)
    print(table)
    if not arguments.only and arguments.saves == 51:
        PICTURE.write_text(draw(results))
        command = "`python benchmarks/bench_bytes.py`"
        text = f"## Bytes\n\n{command}\n\n{table}\n\n![stored bytes relative to raw bytes](bytes.svg)"
        replace_section(RESULTS, "bytes", text)


if __name__ == "__main__":
    main()
