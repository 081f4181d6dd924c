"""Observers, fake quantizers and models prepared for quantization-aware training, of torch.ao and torchao."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.ao.quantization as ao
import torchao.quantization
from torch import nn
from torchao.quantization import pt2e, qat

from tests.peers.optimizers import named_classes
from tests.peers.protocol import App, Case, plain_steps

__all__ = ["quantizers"]

ABSTRACT = {
    "AffineQuantizedObserverBase",
    "DerivedObserverOrFakeQuantize",
    "FakeQuantizeBase",
    "FixedQParamsFakeQuantize",
    "FixedQParamsObserver",
    "FusedMovingAvgObsFakeQuantize",
    "LearnableFakeQuantize",
    "ObserverBase",
    "UniformQuantizationObserverBase",
}


def quantizers() -> Iterator[Case]:
    """Yield all of them."""
    for group, package in (("torch.ao", ao), ("torchao", pt2e)):
        yield from _observers(group, package)
    yield from _affine()
    yield from _prepared()
    yield from _trained()


def _observers(group: str, package: Any) -> Iterator[Case]:
    made: dict[str, Callable[[], Any]] = {}
    for cls in named_classes(package, nn.Module):
        if (
            ("Observer" in cls.__name__ or "FakeQuantize" in cls.__name__)
            and cls.__name__ not in ABSTRACT
            and not inspect.isabstract(cls)
        ):
            made[cls.__name__] = cls
    axis: dict[str, Any] = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric, "ch_axis": 0}
    scale: dict[str, Any] = {"scale": 1 / 256, "zero_point": 0}
    if group == "torch.ao":
        for name in sorted(vars(ao)):
            if name.startswith("default_") and (name.endswith(("_observer", "_fake_quant")) or "observer_" in name):
                made[name] = getattr(ao, name)
    made |= {
        "FixedQParamsObserver": lambda: package.FixedQParamsObserver(**scale),
        "FixedQParamsFakeQuantize": lambda: package.FixedQParamsFakeQuantize(
            package.FixedQParamsObserver.with_args(**scale)
        ),
        "FusedMovingAvgObsFakeQuantize": lambda: package.FusedMovingAvgObsFakeQuantize(
            observer=package.MovingAverageMinMaxObserver, quant_min=0, quant_max=255
        ),
        "FakeQuantize, by channel": lambda: package.FakeQuantize(
            package.MovingAveragePerChannelMinMaxObserver, quant_min=-128, quant_max=127, **axis
        ),
        "FusedMovingAvgObsFakeQuantize, by channel": lambda: package.FusedMovingAvgObsFakeQuantize(
            observer=package.MovingAveragePerChannelMinMaxObserver, quant_min=-128, quant_max=127, **axis
        ),
        "MinMaxObserver, symmetric": lambda: package.MinMaxObserver(
            dtype=torch.qint8, qscheme=torch.per_tensor_symmetric
        ),
        "HistogramObserver, 64 bins": lambda: package.HistogramObserver(bins=64),
    }
    for name, make in made.items():
        yield _observer(group, name, make)


def _observer(group: str, name: str, make: Callable[[], Any]) -> Case:
    def step(app: App, number: int) -> Any:
        output = app["observer"](torch.randn(8, 4) * (1 + number))
        try:
            return [output, app["observer"].calculate_qparams()]
        except Exception:  # noqa: BLE001 -- some only watch
            return output

    return Case(group, name, lambda: {"observer": make()}, step)


def _affine() -> Iterator[Case]:
    q = torchao.quantization
    granularities: dict[str, Any] = {
        "tensor": q.PerTensor(),
        "axis": q.PerAxis(0),
        "group": q.PerGroup(2),
        "row": q.PerRow(),
    }
    for name, granularity in granularities.items():

        def make(granularity: Any = granularity) -> Any:
            return q.AffineQuantizedMinMaxObserver(
                q.MappingType.ASYMMETRIC,
                torch.int8,
                granularity,
                eps=1e-6,
                scale_dtype=torch.float32,
                zero_point_dtype=torch.int32,
            )

        yield _observer("torchao", f"AffineQuantizedMinMaxObserver, by {name}", make)


def _model() -> nn.Module:
    model = nn.Sequential(
        ao.QuantStub(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), ao.DeQuantStub()
    )
    return model.train()


def _with_optimizer(model: nn.Module) -> App:
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)}


def _prepared() -> Iterator[Case]:
    from torch.ao.quantization import quantize_fx

    def eager(backend: str, fuse: bool) -> Callable[[], App]:
        def build() -> App:
            model = _model()
            if fuse:
                model = ao.fuse_modules_qat(model, [["1", "2"]])
            model.qconfig = ao.get_default_qat_qconfig(backend)
            return _with_optimizer(ao.prepare_qat(model))

        return build

    for backend in ("fbgemm", "qnnpack", "x86", "onednn"):
        yield Case("torch.ao", f"prepare_qat, {backend}", eager(backend, False), plain_steps)
    yield Case("torch.ao", "prepare_qat, fused", eager("fbgemm", True), plain_steps)

    def fx() -> App:
        mapping = ao.get_default_qat_qconfig_mapping("fbgemm")
        plain = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).train()
        return _with_optimizer(quantize_fx.prepare_qat_fx(plain, mapping, (torch.randn(10, 6),)))

    yield Case("torch.ao", "prepare_qat_fx", fx, plain_steps)

    def calibrated() -> App:
        model = nn.Sequential(ao.QuantStub(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), ao.DeQuantStub()).eval()
        model.qconfig = ao.get_default_qconfig("fbgemm")
        return {"model": ao.prepare(model)}

    def watch(app: App, number: int) -> Any:
        with torch.no_grad():
            return app["model"](torch.randn(10, 6))

    yield Case("torch.ao", "prepare, calibrated", calibrated, watch)

    def converted() -> App:
        app = calibrated()
        watch(app, 0)
        return {"model": ao.convert(app["model"])}

    yield Case("torch.ao", "convert (quantized tensors)", converted, watch, limit="quantized tensors")


def _trained() -> Iterator[Case]:
    def build(config: Callable[[], Any]) -> Callable[[], App]:
        def make() -> App:
            model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
            torchao.quantization.quantize_(model, config())
            return _with_optimizer(model)

        return make

    def step(app: App, number: int) -> Any:
        output = app["model"](torch.randn(4, 64))
        app["optimizer"].zero_grad()
        output.square().mean().backward()
        app["optimizer"].step()
        return output.detach()

    weights = qat.IntxFakeQuantizeConfig(torch.int4, group_size=32)  # type: ignore[attr-defined]
    activations = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    configs: dict[str, Callable[[], Any]] = {
        "QATConfig, int4 weights": lambda: qat.QATConfig(weight_config=weights, step="prepare"),
        "QATConfig, int8 activations": lambda: qat.QATConfig(
            activation_config=activations, weight_config=weights, step="prepare"
        ),
    }
    for name, config in configs.items():
        yield Case("torchao", name, build(config), step)

    def legacy(make: Callable[[], Any]) -> Callable[[], App]:
        return lambda: _with_optimizer(make().prepare(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))))

    yield Case(
        "torchao",
        "Int8DynActInt4WeightQATQuantizer",
        legacy(lambda: qat.Int8DynActInt4WeightQATQuantizer(groupsize=32)),
        step,
    )

    def exported() -> App:
        from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
            X86InductorQuantizer,
            get_default_x86_inductor_quantization_config,
        )

        plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        program = torch.export.export(plain, (torch.randn(10, 6),)).module()
        quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=True))
        return _with_optimizer(prepare_qat_pt2e(copy.deepcopy(program), quantizer))

    yield Case("torchao", "prepare_qat_pt2e", exported, plain_steps)

    def weight_only(config: Callable[[], Any]) -> Callable[[], App]:
        def make() -> App:
            model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
            torchao.quantization.quantize_(model, config())
            return {"model": model}

        return make

    def infer(app: App, number: int) -> Any:
        with torch.no_grad():
            return app["model"](torch.randn(4, 64))

    for name in ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig"):
        config = getattr(torchao.quantization, name)
        yield Case("torchao", f"{name} (tensor subclasses)", weight_only(config), infer)
