"""Codec speed and size against plain zstd, on weights that a small model really learned, and on Gaussian noise.

The first run trains a byte-level transformer on the Python standard library's source text for a minute or two and
keeps snapshots in ``.bench/codec.npz``; later runs read that file. Everything is timed on one core, in processor time,
the contenders in turn on the same bytes in the same run, the best of several rounds each.

*design* is what the prototype of the design stores for the same bytes, by zstd with the fewest of matches.

    python benchmarks/bench_codec.py            # every data set
    python benchmarks/bench_codec.py training   # those whose name contains "training"
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from torch import Tensor, nn
from torch.nn import functional

from incckpt.codec import _planes
from incckpt.codec import objects as codec

Bytes: TypeAlias = npt.NDArray[np.uint8]
Snapshots: TypeAlias = dict[str, Bytes]

CACHE = Path(__file__).resolve().parent.parent / ".bench" / "codec.npz"
GAPS = (1, 10, 100)
VOCABULARY, WIDTH, HEADS, DEPTH, CONTEXT, BATCH = 256, 192, 6, 4, 128, 8
TRAINED = {
    "fp32 training": 4,
    "bf16 training": 2,
    "exp_avg training": 4,
    "exp_avg_sq training": 4,
    "fp32 fine-tune": 4,
    "bf16 fine-tune": 2,
}
ROWS, TOUCHED = 50_000, {"0.6%": 300, "3.6%": 1800, "16%": 8000}


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        batch, time_, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time_, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, time_, WIDTH))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


class LanguageModel(nn.Module):
    """A byte-level causal transformer of about two million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def batches(seed: int) -> Iterator[Tensor]:
    """Yield random windows of the standard library's source text, ``int64[BATCH, CONTEXT + 1]``."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    corpus = torch.from_numpy(np.frombuffer(text, np.uint8).copy()).long()
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(corpus) - CONTEXT - 1, (BATCH,), generator=generator)
        yield torch.stack([corpus[start : start + CONTEXT + 1] for start in starts.tolist()])


def flat(tensors: Sequence[Tensor]) -> Bytes:
    """Return the bytes of `tensors`, end to end."""
    joined = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    return joined.view(torch.uint8).numpy().copy()


def train(
    model: nn.Module, rate: float, steps: int, final: float, label: str, keep: Callable[[str, Any], None]
) -> None:
    """Train by AdamW, the rate falling by a cosine from `rate` to `final`, and keep snapshots of the last steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.999))
    for step, batch in zip(range(steps + 1), batches(len(label)), strict=False):
        for gap in (0, *GAPS):
            if step == steps - max(GAPS) + gap:
                keep(f"{label}@{gap}", optimizer)
        for group in optimizer.param_groups:
            group["lr"] = final + (rate - final) * (1 + math.cos(math.pi * step / steps)) / 2
        logits = model(batch[:, :-1])
        loss = functional.cross_entropy(logits.reshape(-1, VOCABULARY).float(), batch[:, 1:].reshape(-1))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if step % 100 == 0:
            print(f"  {label}: step {step}, loss {loss.item():.3f}", flush=True)


def make_snapshots() -> Snapshots:
    """Train, fine-tune in float32 and bfloat16, and update an embedding table sparsely; about two minutes."""
    torch.manual_seed(0)
    found: Snapshots = {}
    model = LanguageModel()

    def keep_training(name: str, optimizer: torch.optim.Optimizer) -> None:
        parameters = list(model.parameters())
        found[f"fp32 {name}"] = flat(parameters)
        found[f"bf16 {name}"] = flat([p.detach().bfloat16() for p in parameters])
        for moment in ("exp_avg", "exp_avg_sq"):
            found[f"{moment} {name}"] = flat([optimizer.state[p][moment] for p in parameters])

    def keep_weights(name: str, optimizer: torch.optim.Optimizer) -> None:
        found[name] = flat([p for group in optimizer.param_groups for p in group["params"]])

    train(model, 2e-3, 500, 5e-4, "training", keep_training)
    half = LanguageModel()
    half.load_state_dict(model.state_dict())
    train(model, 2e-5, 120, 2e-5, "fp32 fine-tune", keep_weights)
    train(half.bfloat16(), 1e-5, 120, 1e-5, "bf16 fine-tune", keep_weights)

    for share, rows in TOUCHED.items():
        table = nn.Embedding(ROWS, 32, sparse=True)
        sparse = torch.optim.SparseAdam(table.parameters(), lr=1e-3)
        for step in range(41):
            if step == 40:
                found[f"embedding {share}@0"] = flat([table.weight])
            touched = torch.randint(ROWS, (rows,))
            sparse.zero_grad()
            torch.autograd.backward(functional.mse_loss(table(touched), torch.randn(rows, 32)))
            sparse.step()  # type: ignore[no-untyped-call]
        found[f"embedding {share}@1"] = flat([table.weight])
    return found


def load_snapshots() -> Snapshots:
    """Read the snapshots, making them first if there are none."""
    if not CACHE.exists():
        print(f"training for the data ({CACHE}), once", flush=True)
        CACHE.parent.mkdir(exist_ok=True)
        np.savez(CACHE, **make_snapshots())  # type: ignore[arg-type]
    with np.load(CACHE) as archive:
        return {name: archive[name] for name in archive.files}


@dataclass
class Case:
    """Bytes to code."""

    name: str
    itemsize: int
    raw: Bytes
    before: Bytes | None = None


def cases(snapshots: Snapshots) -> Iterator[Case]:
    """Yield what is measured: each snapshot alone and as a delta, noise, and a few special ones."""
    for name, itemsize in TRAINED.items():
        yield Case(f"{name}", itemsize, snapshots[f"{name}@{max(GAPS)}"])
        for gap in GAPS:
            yield Case(f"{name}, delta, gap {gap}", itemsize, snapshots[f"{name}@{gap}"], snapshots[f"{name}@0"])
    yield Case("embedding", 4, snapshots["embedding 0.6%@1"])
    for share in TOUCHED:
        name = f"embedding {share}"
        yield Case(f"{name} of rows touched, delta", 4, snapshots[f"{name}@1"], snapshots[f"{name}@0"])
    generator = np.random.default_rng(0)
    noise = generator.standard_normal(2 << 20, np.float32)
    moved = noise + np.float32(1e-3) * generator.standard_normal(2 << 20, np.float32)
    yield Case("Gaussian fp32", 4, moved.view(np.uint8))
    yield Case("Gaussian fp32, delta, steps of 1e-3", 4, moved.view(np.uint8), noise.view(np.uint8))
    half = [flat([torch.from_numpy(numbers).bfloat16()]) for numbers in (moved, noise)]
    yield Case("Gaussian bf16", 2, half[0])
    yield Case("Gaussian bf16, delta, steps of 1e-3", 2, *half)
    yield Case("Gaussian fp64", 8, generator.standard_normal(1 << 20).view(np.uint8))
    yield Case("unchanged fp32, delta", 4, noise.view(np.uint8), noise.view(np.uint8).copy())
    yield Case("zeros", 4, np.zeros(8 << 20, np.uint8))
    yield Case("random bits", 4, generator.integers(0, 256, 8 << 20, np.uint8))
    yield Case("int64 tokens", 8, generator.integers(0, 50_257, 1 << 20).view(np.uint8))


@dataclass
class Result:
    """Sizes in bytes, speeds in MB of raw bytes per second of one core."""

    nbytes: int
    zstd: dict[int, int]
    stored: int
    ways: dict[str, codec.WayBytes]
    encode: float
    decode: float
    verified: float
    zstd_encode: float
    zstd_decode: float


def design(case: Case) -> int:
    """Return the bytes that the design's prototype takes for the same planes: zstd, with as few matches as it can."""
    parameters = zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST, target_length=0, min_match=7, hash_log=6, window_log=17, compression_level=1
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters)

    def coded(data: Bytes) -> int:
        counts = np.bincount(data, minlength=256)
        p = counts[counts > 0] / max(1, len(data))
        if -(p * np.log2(p)).sum() >= 7.85 or len(data) < 2:
            return 5 + len(data)
        return 5 + min(len(data), len(compressor.compress(data.data))) if len(p) > 1 else 6

    def plane(data: Bytes) -> int:
        counts = np.bincount(data, minlength=256)
        if not 0.42 < counts.max() / len(data) < 1:
            return coded(data)
        others = data != counts.argmax()
        return 6 + coded(np.packbits(others, bitorder="little")) + coded(data[others])

    def planes(raw: Bytes, before: Bytes | None) -> int:
        found = [np.empty(raw.nbytes // case.itemsize, np.uint8) for _ in range(case.itemsize)]
        _planes.split(raw, before, [one.data for one in found], _planes.BEST)
        return sum(plane(one) for one in found)

    total = codec.header_nbytes(case.raw.nbytes)
    for start in range(0, case.raw.nbytes, codec.FRAME_BYTES):
        raw = case.raw[start : start + codec.FRAME_BYTES]
        befores = [None] if case.before is None else [None, case.before[start : start + codec.FRAME_BYTES]]
        total += min(raw.nbytes, *(planes(raw, before) for before in befores))
    return total


def measure(case: Case, rounds: int) -> Result:
    """Code a case by the codec and by zstd, taking turns; the best round of each, in seconds of processor time."""
    raw, nbytes = case.raw, case.raw.nbytes
    found = codec.digest(raw)
    base = None if case.before is None else codec.Base(codec.digest(case.before).identity, case.before)
    out, back = np.empty(codec.max_nbytes(nbytes), np.uint8), np.empty_like(raw)
    pieces = [raw.data[start : start + codec.FRAME_BYTES] for start in range(0, nbytes, codec.FRAME_BYTES)]
    compressors = {level: zstandard.ZstdCompressor(level=level) for level in (1, 3)}
    decompressor = zstandard.ZstdDecompressor()
    frames = {level: [item.compress(piece) for piece in pieces] for level, item in compressors.items()}
    encoded = codec.encode(raw, case.itemsize, digest=found, base=base, out=out)
    data = encoded.data.tobytes()
    codec.decode(data, back, identity=found.identity, base=base)
    if not np.array_equal(raw, back):
        raise AssertionError(f"{case.name} did not come back")
    contenders: list[Callable[[], object]] = [
        lambda: codec.encode(raw, case.itemsize, digest=found, base=base, out=out),
        lambda: codec.decode(data, back, identity=found.identity, base=base, verify=False),
        lambda: codec.decode(data, back, identity=found.identity, base=base),
        lambda: [compressors[1].compress(piece) for piece in pieces],
        lambda: [decompressor.decompress(frame) for frame in frames[1]],
    ]
    best = [math.inf] * len(contenders)
    for _ in range(rounds):
        for i, contender in enumerate(contenders):
            start = time.thread_time()
            contender()
            best[i] = min(best[i], time.thread_time() - start)
    sizes = {level: sum(map(len, frames[level])) for level in frames}
    speeds = [nbytes / 1e6 / seconds for seconds in best]
    return Result(nbytes, sizes, len(data), encoded.ways, *speeds)


def whole_states(results: dict[str, Result]) -> Iterator[str]:
    """Yield lines about states put together from their parts: stored/raw, and speeds over those of zstd-1."""
    moments = ["exp_avg training", "exp_avg_sq training"]
    states = {
        "fp32 + Adam": ["fp32 training", *moments],
        "mixed: bf16, fp32 master, Adam": ["bf16 training", "fp32 training", *moments],
    }
    for name, parts in states.items():
        if all(part in results for part in parts):
            full = [results[part] for part in parts]
            total = sum(result.nbytes for result in full)
            yield f"whole state, {name}: zstd-3 {sum(result.zstd[3] for result in full) / total:.3f}"
            for way in ("full", *(f"delta, gap {gap}" for gap in GAPS)):
                found = full if way == "full" else [results[f"{part}, {way}"] for part in parts]
                encode, decode, zstd_encode, zstd_decode = (
                    sum(result.nbytes / getattr(result, speed) for result in found)
                    for speed in ("encode", "decode", "zstd_encode", "zstd_decode")
                )
                yield (
                    f"    {way:15} {sum(result.stored for result in found) / total:.3f}, "
                    f"encode {zstd_encode / encode:.2f} x, decode {zstd_decode / decode:.2f} x"
                )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="?", default="", help="measure the cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=9, help="of each contender, of which the best counts")
    options = parser.parse_args()
    snapshots = load_snapshots()
    print(f"kernels: {_planes.VARIANTS[_planes.BEST]}, zstd {'.'.join(map(str, zstandard.ZSTD_VERSION))}; ", end="")
    print("stored/raw, and MB of raw bytes per second of one core (times what zstd -1 does on the same bytes)")
    print(f"{'':38} {'zstd-1':>6} {'zstd-3':>6} {'design':>6} {'codec':>6}", end="")
    print(f" {'encode':>13} {'decode':>13} {'verified':>8}  ways")
    results: dict[str, Result] = {}
    for case in cases(snapshots):
        if options.only not in case.name:
            continue
        result = results[case.name] = measure(case, options.rounds)
        sizes = [size / result.nbytes for size in (result.zstd[1], result.zstd[3], design(case), result.stored)]
        speeds = [
            (result.encode, result.encode / result.zstd_encode),
            (result.decode, result.decode / result.zstd_decode),
        ]
        ways = " ".join(f"{name} {total.stored / total.raw:.3f}" for name, total in result.ways.items())
        print(
            f"{case.name:38}",
            *(f"{size:6.3f}" for size in sizes),
            *(f"{speed:6.0f} ({times:4.2f})" for speed, times in speeds),
            f"{result.verified:8.0f}  {ways}",
            flush=True,
        )
    for line in whole_states(results):
        print(line)


if __name__ == "__main__":
    main()
