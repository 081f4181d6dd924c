"""Prints what quantised weights and optimizer states do after a restore: ``python -m tests.integrations.quantized``.

Each is trained, saved, restored into a fresh object and trained on, by ``torch.save`` and through incckpt, and compared
bit for bit with a run that nobody interrupted.
"""

from __future__ import annotations

import fnmatch
import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.peers.protocol import App, Case, Row, try_case

__all__ = ["cases", "rows"]

WIDTH = 128
INT4 = vars(torch)["int4"]  # the stubs lack it


def model() -> nn.Sequential:
    """Return two layers, wide enough to be quantised."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def train(app: App, number: int) -> Any:
    """Train one step; return the output."""
    output = app["model"](torch.randn(4, WIDTH))
    app["optimizer"].zero_grad()
    output.square().mean().backward()
    with torch.compiler.set_stance("force_eager"):
        app["optimizer"].step()
    return output.detach()


def infer(app: App, number: int) -> Any:
    """Return the output."""
    with torch.no_grad():
        return app["model"](torch.randn(4, WIDTH))


def cases() -> Iterator[Case]:
    """Yield every class and configuration."""
    yield from _torchao_optimizers()
    yield from _torchao_trained_weights()
    yield from _torchao_weights()
    yield from _bitsandbytes()


def _trained(make_model: Callable[[], nn.Module], make_optimizer: Callable[[Any], Any]) -> Callable[[], App]:
    def build() -> App:
        made = make_model()
        return {"model": made, "optimizer": make_optimizer(made.parameters())}

    return build


def _torchao_optimizers() -> Iterator[Case]:
    import torchao.optim

    for name in sorted(torchao.optim.__all__):
        if name != "CPUOffloadOptimizer":  # needs a GPU
            cls = getattr(torchao.optim, name)
            yield Case("torchao.optim", name, _trained(model, partial(cls, lr=1e-2)), train)
    for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8"):
        cls = getattr(torchao.optim, name)
        bf16 = _trained(lambda: model().bfloat16(), partial(cls, lr=1e-2, bf16_stochastic_round=True))

        def step(app: App, number: int) -> Any:
            output = app["model"](torch.randn(4, WIDTH, dtype=torch.bfloat16))
            app["optimizer"].zero_grad()
            output.square().mean().backward()
            with torch.compiler.set_stance("force_eager"):
                app["optimizer"].step()
            return output.detach()

        yield Case("torchao.optim", f"{name}, bf16 rounded at random", bf16, step)


def _torchao_trained_weights() -> Iterator[Case]:
    import torchao.optim
    from torchao.prototype import quantized_training as prototype
    from torchao.quantization import quantize_

    configs = {
        "int8_weight_only_quantized_training": prototype.int8_weight_only_quantized_training,
        "int8_mixed_precision_training": prototype.int8_mixed_precision_training,
        "bitnet_training": prototype.bitnet_training,
    }
    for name, config in configs.items():

        def quantised(config: Any = config) -> nn.Module:
            made = model()
            quantize_(made, config())
            return made

        build = _trained(quantised, partial(torchao.optim._AdamW, lr=1e-2))
        yield Case("torchao, trained", name, build, train)


def _torchao_weights() -> Iterator[Case]:
    from torchao import quantization
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    q: Any = quantization
    configs: dict[str, Callable[[], Any]] = {
        "Int8WeightOnly": q.Int8WeightOnlyConfig,
        "Int8DynamicActivationInt8Weight": q.Int8DynamicActivationInt8WeightConfig,
        "Float8WeightOnly": q.Float8WeightOnlyConfig,
        "Float8DynamicActivationFloat8Weight": q.Float8DynamicActivationFloat8WeightConfig,
        "Int4WeightOnly": lambda: q.Int4WeightOnlyConfig(group_size=32),
        "IntxWeightOnly": lambda: q.IntxWeightOnlyConfig(weight_dtype=INT4, granularity=q.PerGroup(32)),
        "Int8DynamicActivationIntxWeight": lambda: q.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=INT4, weight_granularity=q.PerGroup(32)
        ),
    }
    for name, config in configs.items():

        def build(config: Any = config) -> App:
            made = model()
            q.quantize_(made, config())
            return {"model": made}

        yield Case("torchao, weights", name, build, infer)

    def nf4() -> App:
        made: Any = model()
        for layer in (made[0], made[2]):
            layer.weight = nn.Parameter(to_nf4(layer.weight.detach(), 64, 2), requires_grad=False)
        return {"model": made}

    yield Case("torchao, weights", "NF4Tensor", nf4, infer)


def _bitsandbytes() -> Iterator[Case]:
    import bitsandbytes as bnb

    from incckpt.integrations.bitsandbytes import make_loadable

    for name in ("Adam8bit", "AdamW8bit", "Lion8bit", "RMSprop8bit", "Adagrad8bit", "SGD8bit"):
        cls = getattr(bnb.optim, name)
        more = {"momentum": 0.9} if name == "SGD8bit" else {}
        build = _trained(model, partial(cls, lr=1e-2, min_8bit_size=1024, **more))
        yield Case("bitsandbytes", name, build, train)

    def quantised(layer: Callable[[], nn.Module]) -> Callable[[], App]:
        return lambda: {"model": make_loadable(nn.Sequential(layer(), nn.Tanh(), layer())).to("cpu")}

    yield Case(
        "bitsandbytes",
        "Linear8bitLt",
        quantised(lambda: bnb.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False)),
        infer,
    )
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            make = partial(bnb.nn.Linear4bit, WIDTH, WIDTH, quant_type=kind, compress_statistics=nested)
            layer = quantised(partial(make, compute_dtype=torch.float32))
            yield Case("bitsandbytes", f"Linear4bit, {kind}{', nested' if nested else ''}", layer, infer)


def rows(pattern: str = "*") -> Iterator[Row]:
    """Try what `pattern` names, of ``group name``."""
    for case in cases():
        if fnmatch.fnmatch(f"{case.group} {case.name}", pattern):
            yield try_case(case)


def main() -> int:
    """Print the table."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    wrong = 0
    for row in rows(*sys.argv[1:2]):
        wrong += not row.through_incckpt.startswith("identical") and row.verdict != "void"
        ours = row.through_incckpt[:160]
        print(
            f"{row.group:18} {row.name:36} torch.save: {row.by_hand[:60]:12} | incckpt: {ours} ({row.verdict})",
            flush=True,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
