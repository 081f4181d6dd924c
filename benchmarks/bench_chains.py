"""Deltas one deep, against the last full object, beside chains of them: bytes stored, and what a restore costs.

Real sequences of 51 states ten steps apart are coded by the codec itself: an embedding table and its moments of which
few rows are touched, LoRA adapters on a frozen base, a fine-tune in bfloat16. Ways to choose a delta's base:

- one deep: the last full object, until the stopping rule says that another is due (what incckpt does);
- k levels: the same rule at every level, the first delta against an object being the base of the next level;
- chains: the save before; a full object after every so many deltas, or never again.

    python benchmarks/bench_chains.py embedding   # half a minute
    python benchmarks/bench_chains.py             # with pre-training and fine-tuning: some five minutes
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from incckpt.codec import objects as codec
from incckpt.staging.baseline import Baseline, StageReport
from incckpt.staging.content import DeltaHistory
from incckpt.state.flatten import flatten

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench_bytes import GAP, LoRALinear, State, pretrained, train_step
from benchmarks.bench_codec import LanguageModel, batches

Bytes: TypeAlias = npt.NDArray[np.uint8]

TOUCHED = {"0.6 %": 30, "3.6 %": 180, "16 %": 800}  # of 50,000 rows, by each of the ten steps between saves


# ---- sequences -------------------------------------------------------------------------------------------------------


def embedding(rows: int) -> Iterator[State]:
    """Touch `rows` rows of a table by each step."""
    torch.manual_seed(6)
    table = nn.Embedding(50_000, 32, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=1e-3)
    while True:
        for _ in range(GAP):
            touched = torch.randint(50_000, (rows,))
            optimizer.zero_grad()
            torch.autograd.backward(functional.mse_loss(table(touched), torch.randn(rows, 32)))
            optimizer.step()  # type: ignore[no-untyped-call]
        yield {"table": table.state_dict(), "optimizer": optimizer.state_dict()}


def trained(
    model: nn.Module, rate: float, state: Callable[[torch.optim.Optimizer], State], seed: int
) -> Iterator[State]:
    """Train what is not frozen of a model."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    source = batches(seed)
    while True:
        for _ in range(GAP):
            train_step(model, optimizer, next(source))
        yield state(optimizer)


def fine_tune(base: LanguageModel) -> Iterator[State]:
    """Fine-tune the weights in bfloat16 at 1e-5."""
    model = copy.deepcopy(base).bfloat16()
    return trained(model, 1e-5, lambda optimizer: model.state_dict(), 3)


def lora(base: LanguageModel) -> Iterator[State]:
    """Train adapters of rank 1; the base is frozen, and in the state."""
    model = copy.deepcopy(base).requires_grad_(False)
    for block in model.blocks:
        block.qkv = LoRALinear(block.qkv, 1)  # type: ignore[arg-type]
    return trained(model, 1e-3, lambda optimizer: {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, 5)


def contents(states: Iterator[State], saves: int) -> tuple[list[list[Bytes]], list[int]]:
    """Return the contents of the chunks of each of the next states, and the chunks' element sizes."""
    found: list[list[Bytes]] = []
    sizes: list[int] = []
    for state, _ in zip(states, range(saves), strict=False):
        _, chunks = Baseline(16 << 20, keep=False).stage(flatten(state), StageReport())
        sizes = [chunk.itemsize for chunk in chunks]
        found.append([chunk.raw for chunk in chunks if chunk.raw is not None])
    return found, sizes


# ---- schemes ---------------------------------------------------------------------------------------------------------


@dataclass
class Link:
    """A stored object of a chunk, what it is against, and what was stored against it."""

    save: int
    data: bytes
    full_nbytes: int
    base: Link | None
    history: DeltaHistory = field(default_factory=DeltaHistory)

    def chain(self) -> list[Link]:
        """Return the objects that a restore needs, the full one first."""
        return [*([] if self.base is None else self.base.chain()), self]


class Chunk:
    """The contents of one chunk over all saves, and what coding them gave."""

    def __init__(self, index: int, itemsize: int, raws: list[Bytes]) -> None:
        self.index, self.itemsize, self.raws = index, itemsize, raws
        self.digests = [codec.digest(raw) for raw in raws]
        self._coded: dict[tuple[int, int], tuple[bytes, bool, int]] = {}

    def code(self, save: int, base: Link | None) -> Link:
        """Return the object of a save: a delta, if that is worth anything."""
        key = (save, -1 if base is None else base.save)
        if key not in self._coded:
            before = None if base is None else codec.Base(self.digests[base.save].identity, self.raws[base.save])
            coded = codec.encode(self.raws[save], self.itemsize, digest=self.digests[save], base=before)
            self._coded[key] = (coded.data.tobytes(), coded.base is not None, coded.full_nbytes)
        data, delta, full_nbytes = self._coded[key]
        if base is not None and (not delta or len(data) > 0.95 * full_nbytes):
            return self.code(save, None)
        return Link(save, data, full_nbytes, base)

    def decode(self, link: Link) -> float:
        """Restore a save through its chain, in place, and return the seconds of processor time."""
        out = np.empty_like(self.raws[link.save])
        start = time.thread_time()
        base = None
        for part in link.chain():
            identity = self.digests[part.save].identity
            codec.decode(part.data, out, identity=identity, base=base, verify=part is link)
            base = codec.Base(identity, out)
        seconds = time.thread_time() - start
        if not np.array_equal(out, self.raws[link.save]):
            raise AssertionError(f"save {link.save} did not come back")
        return seconds


Scheme: TypeAlias = Callable[[Chunk, "list[Link]", int], Link]


def levels(most: int) -> Scheme:
    """Take as the base the last object of the deepest level, at most `most`, whose deltas are still worth it."""

    def store(chunk: Chunk, links: list[Link], save: int) -> Link:
        bases: list[Link] = links[-1].chain() if links else []
        bases = bases[:most]
        while bases and bases[-1].history.is_over(len(bases[-1].data), chunk.index):
            bases.pop()
        link = chunk.code(save, bases[-1] if bases else None)
        if link.base is not None:
            link.base.history.add(len(link.data))
            # What takes the place of an older object of its level begins no first cycle.
            link.history.first = link.base.history.count == 1
        else:
            link.history.first = not links
        return link

    return store


def chained(deltas: float) -> Scheme:
    """Take as the base the save before; store in full after `deltas` deltas."""

    def store(chunk: Chunk, links: list[Link], save: int) -> Link:
        return chunk.code(save, links[-1] if links and len(links[-1].chain()) <= deltas else None)

    return store


SCHEMES: dict[str, Scheme] = {
    "one deep": levels(1),
    "2 levels": levels(2),
    "3 levels": levels(3),
    "all in full": chained(0),
    **{f"chain of {deltas}": chained(deltas) for deltas in (2, 4, 8, 16)},
    "chain without end": chained(math.inf),
}


@dataclass
class Result:
    """Of one scheme: averages over the saves after the first, relative to the state's raw bytes unless said otherwise.

    Attributes
    ----------
    stored
        Bytes put by a save.
    fetched, most_fetched
        Bytes that a restore reads, over those that it would if everything were stored in full: on average, and at most.
    objects
        The most objects that one chunk needs.
    decode
        Seconds to decode the save of most objects, over those of the first save, which is full.
    """

    stored: float
    fetched: float
    most_fetched: float
    objects: int
    decode: float


def run(chunks: list[Chunk], saves: int, scheme: Scheme) -> Result:
    """Store all saves in one way; restore the costliest."""
    raw = sum(chunk.raws[0].nbytes for chunk in chunks)
    stored = np.zeros(saves)
    fetched = np.zeros(saves)
    in_full = np.zeros(saves)
    depths = np.zeros(saves, np.int64)
    objects = 0
    histories: list[list[Link]] = []
    for chunk in chunks:
        links: list[Link] = []
        for save in range(saves):
            same = save > 0 and chunk.digests[save] == chunk.digests[save - 1]
            link = links[-1] if same else scheme(chunk, links, save)
            stored[save] += 0 if same else len(link.data)
            links.append(link)
            chain = link.chain()
            fetched[save] += sum(len(part.data) for part in chain)
            in_full[save] += len(chunk.code(save, None).data)
            depths[save] += len(chain) * chunk.raws[0].nbytes
            objects = max(objects, len(chain))
        histories.append(links)
    deepest = int(depths.argmax())
    times = [
        min(sum(chunk.decode(links[save]) for chunk, links in zip(chunks, histories, strict=True)) for _ in range(3))
        for save in (0, deepest)
    ]
    factors = (fetched / in_full)[1:]
    return Result(
        float(stored[1:].mean()) / raw, float(factors.mean()), float(factors.max()), objects, times[1] / times[0]
    )


def main() -> None:
    """Run the sequences and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="?", default="", help="part of a sequence's name")
    parser.add_argument("--saves", type=int, default=51)
    options = parser.parse_args()
    sequences: dict[str, Callable[[], Iterator[State]]] = {
        f"embedding and moments, {share} of rows": lambda rows=rows: embedding(rows)  # type: ignore[misc]
        for share, rows in TOUCHED.items()
    }
    learned = {"bf16 weights, fine-tune": fine_tune, "LoRA, frozen base and moments": lora}
    wanted = [name for name in (*sequences, *learned) if options.only.lower() in name.lower()]
    base = pretrained() if any(name in learned for name in wanted) else None
    for name in wanted:
        states = sequences[name]() if base is None or name in sequences else learned[name](base)
        raws, itemsizes = contents(states, options.saves)
        chunks = [Chunk(i, itemsize, [save[i] for save in raws]) for i, itemsize in enumerate(itemsizes)]
        megabytes = sum(chunk.raws[0].nbytes for chunk in chunks) / 1e6
        print(f"\n{name}: {megabytes:.0f} MB in {len(chunks)} chunks\n")
        print("| bases | stored | fetched | at most | objects | decode |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for scheme, store in SCHEMES.items():
            found = run(chunks, options.saves, store)
            print(
                f"| {scheme} | {found.stored:.4f} | {found.fetched:.2f} | {found.most_fetched:.2f} "
                f"| {found.objects} | {found.decode:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
