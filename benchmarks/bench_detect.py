"""Speed of change detection and staging on the tensors of Llama 3.2 1B, against torch and the memory itself.

The shapes are those of the model's ``state_dict()``: embedding, 16 layers of 9 tensors, the last norm, and ``lm_head``
as a tensor of its own (in the released model it is the embedding; counted apart they make 147 tensors and 1.498 G
parameters). In part of the tensors every element differs from the base. Everything is timed in one run with the same
number of threads, in turn, the best of several rounds each; speeds count the bytes read and written, and the
memory's own is that of the fastest kernel that reads both copies whole.

    python benchmarks/bench_detect.py                 # a quarter of the size
    python benchmarks/bench_detect.py --scale 1       # 6 GB, and 3 GB more for torch's temporaries
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from incckpt.staging import _detect, detect

LAYERS, HIDDEN, KEY_VALUE, INTERMEDIATE, VOCABULARY = 16, 2048, 8 * 64, 8192, 128_256
THRESHOLD = 1e-4
GIB = 1 << 30


def llama_shapes() -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of Llama 3.2 1B's tensors."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        of_layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (KEY_VALUE, HIDDEN),
            "self_attn.v_proj": (KEY_VALUE, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


@dataclass
class Pair:
    """Two copies of a state as a table with one segment, and one group, per tensor."""

    current: list[Tensor]
    base: list[Tensor]

    def __post_init__(self) -> None:
        self.src = np.array([tensor.data_ptr() for tensor in self.current], np.uintp)
        self.dst = np.array([tensor.data_ptr() for tensor in self.base], np.uintp)
        self.sizes = np.array([tensor.nbytes for tensor in self.current], np.int64)
        self.group = np.arange(len(self.current))
        self.code = np.full(len(self.current), detect.DTYPE_CODES["bfloat16"])

    @property
    def nbytes(self) -> int:
        return int(self.sizes.sum())

    def read(self, threads: int) -> None:
        blocks = detect.blocks_of(self.sizes)
        _detect.read(self.src, self.dst, blocks.segment, blocks.offset, blocks.nbytes, threads)

    def exact(self, threads: int) -> npt.NDArray[np.bool_]:
        return detect.changed_exact(self.src, self.dst, self.sizes, self.group, len(self.sizes), threads=threads)

    def l2(self, threads: int, kernel: str) -> npt.NDArray[np.float64]:
        diff, base = detect.relative_l2(
            self.src, self.dst, self.sizes, self.group, self.code, len(self.sizes), threads=threads, kernel=kernel
        )
        return np.sqrt(diff / base)

    def copy(self, threads: int) -> None:
        detect.copy(self.src, self.dst, self.sizes, threads=threads)

    def torch_copy(self) -> None:
        for c, b in zip(self.current, self.base, strict=True):
            b.copy_(c)

    def torch_equal(self) -> npt.NDArray[np.bool_]:
        return np.array([not torch.equal(c, b) for c, b in zip(self.current, self.base, strict=True)])

    def torch_l2(self) -> npt.NDArray[np.float64]:
        pairs = zip(self.current, self.base, strict=True)
        return np.array([float((c.float() - b.float()).norm() / b.float().norm()) for c, b in pairs])


def states(scale: float, seed: int) -> tuple[Pair, Pair]:
    """Return a state with its equal copy, and with 30 % of its tensors changed by about 1 %."""
    generator = torch.Generator().manual_seed(seed)
    noise = (torch.randn(1 << 22, generator=generator) * 0.02).to(torch.bfloat16)
    base = []
    for shape in llama_shapes().values():
        tensor = torch.empty((max(1, round(shape[0] * scale)), *shape[1:]), dtype=torch.bfloat16)
        flat = tensor.view(-1)
        for start in range(0, len(flat), len(noise)):
            flat[start : start + len(noise)] = noise[: len(flat) - start]
        base.append(tensor)
    current = [tensor.clone() for tensor in base]
    changed = list(current)
    for index in torch.randperm(len(base), generator=generator)[: round(0.3 * len(base))].tolist():
        changed[index] = current[index] * 1.01  # a tensor more, so that the equal copy stays equal
    return Pair(current, base), Pair(changed, base)


@dataclass
class Way:
    """One row of the table: what is timed, the bytes it reads or writes, and the way that it is compared with."""

    name: str
    nbytes: int
    call: Callable[[], object]
    instead_of: str = ""
    seconds: float = float("inf")

    def time(self) -> None:
        start = time.perf_counter()
        self.call()
        self.seconds = min(self.seconds, time.perf_counter() - start)


def processor() -> str:
    """Return the processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def report(scale: float, threads: int, rounds: int, seed: int) -> None:
    """Check that all ways agree, time them, and print the table."""
    torch.set_num_threads(threads)
    equal, part = states(scale, seed)
    changed = part.torch_equal()
    plain = part.torch_l2()
    assert not equal.exact(threads).any()
    assert part.exact(threads).tolist() == changed.tolist()
    for kernel in detect.KERNELS:
        # torch adds float32 squares up in float32: of 16 M elements its norm is 0.2 % off, ours agrees with float64's
        np.testing.assert_allclose(part.l2(threads, kernel), plain, rtol=1e-2)
        assert ((part.l2(threads, kernel) > THRESHOLD) == changed).all()

    moved = [tensor for tensor, differs in zip(part.current, changed.tolist(), strict=True) if differs]
    staged = Pair(moved, [torch.ones_like(tensor) for tensor in moved])

    both = 2 * equal.nbytes
    ways = [
        Way("read both copies", both, lambda: equal.read(threads)),
        Way("exact, nothing changed", both, lambda: equal.exact(threads), "torch.equal, nothing changed"),
        Way("torch.equal, nothing changed", both, equal.torch_equal),
        Way("exact, 30 % changed", both, lambda: part.exact(threads), "torch.equal, 30 % changed"),
        Way("torch.equal, 30 % changed", both, part.torch_equal),
        *(
            Way(f"relative L2, {kernel}", both, partial(part.l2, threads, kernel), "relative L2, torch in float32")
            for kernel in detect.KERNELS
        ),
        Way("relative L2, torch in float32", both, part.torch_l2),
        Way("copy of the changed", 2 * staged.nbytes, lambda: staged.copy(threads), "Tensor.copy_ of the changed"),
        Way("Tensor.copy_ of the changed", 2 * staged.nbytes, staged.torch_copy),
    ]
    for _ in range(rounds):  # in turn, so that what else the machine does falls on all alike
        for way in ways:
            way.time()
    seconds = {way.name: way.seconds for way in ways}
    memory = both / min(seconds["read both copies"], seconds["exact, nothing changed"])

    parameters = sum(tensor.numel() for tensor in equal.base)
    print(f"{processor()}, {threads} threads; torch {torch.__version__}, numpy {np.__version__}")
    print(
        f"{len(equal.base)} tensors, {parameters / 1e9:.3f} G parameters, bfloat16, 2 x {equal.nbytes / GIB:.2f} GiB; "
        f"{int(changed.sum())} tensors changed ({staged.nbytes / equal.nbytes:.0%} of the bytes)"
    )
    print(f"{'':30}{'ms':>10}{'GB/s':>8}{'of memory':>11}{'x torch':>9}")
    for way in ways:
        speed = way.nbytes / way.seconds
        versus = f"{seconds[way.instead_of] / way.seconds:.1f}" if way.instead_of else ""
        print(f"{way.name:30}{way.seconds * 1e3:10.2f}{speed / 1e9:8.2f}{speed / memory:11.2f}{versus:>9}")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--scale", type=float, default=0.25, help="rows of each tensor, relative to the model's")
    parser.add_argument("--threads", type=int, default=detect.default_threads())
    parser.add_argument("--rounds", type=int, default=5, help="of which the fastest counts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    report(options.scale, options.threads, options.rounds, options.seed)


if __name__ == "__main__":
    main()
