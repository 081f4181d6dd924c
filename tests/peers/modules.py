"""Modules: those of torch whose state is special, and those that load in ways of their own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from tests.peers.optimizers import small_model
from tests.peers.own_loading import MODULES, OBJECTS, OPTIMIZERS
from tests.peers.protocol import App, Case, plain_steps

__all__ = ["modules", "own_loading"]

Build = Callable[[], nn.Module]


def modules() -> Iterator[Case]:
    """Yield modules of torch, some of them in bfloat16 too, and compiled ones."""
    for name, build in TORCH.items():
        yield _module("torch modules", name, build)
    for name in ("a stack of layers", "BatchNorm", "LSTM", "MultiheadAttention", "tied weights"):
        yield _module("torch modules", f"{name}, bfloat16", TORCH[name], torch.bfloat16)

    def compiled_in_place() -> nn.Module:
        model = TORCH["BatchNorm"]()
        model.compile(backend="eager")
        return model

    yield _module("torch modules", "torch.compile", lambda: torch.compile(TORCH["BatchNorm"](), backend="eager"))
    yield _module("torch modules", "compiled in place", compiled_in_place)


def own_loading() -> Iterator[Case]:
    """Yield modules, optimizers and other objects that load in ways of their own, as people write them."""
    for module in MODULES:
        yield _module("own loading", _title(module), module, strict=True)
        yield _module("own loading", f"{_title(module)}; inside a plain one", partial(_inside, module), strict=True)
    for optimizer in OPTIMIZERS:
        yield Case("own loading", _title(optimizer), partial(_optimizing, optimizer), plain_steps, strict=True)
    for kind in OBJECTS:
        yield Case("own loading", _title(kind), partial(_alone, kind), lambda app, _: app["object"].step(), strict=True)


def _inside(cls: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), cls())


def _optimizing(cls: Any) -> App:
    model = small_model()
    return {"model": model, "optimizer": cls(model.parameters(), lr=0.05)}


def _alone(cls: Any) -> App:
    return {"object": cls()}


def _title(cls: Any) -> str:
    return str(cls.__doc__).rstrip(".")


def _module(group: str, name: str, build: Any, dtype: torch.dtype = torch.float32, *, strict: bool = False) -> Case:
    """Return the case of a module with an optimizer, if there is anything to train yet."""

    def make() -> App:
        model = build().to(dtype) if dtype != torch.float32 else build()
        if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in model.parameters()):
            return {"model": model}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return (
            {"model": model, "optimizer": torch.optim.SGD(trained, lr=0.05, momentum=0.9)}
            if trained
            else {"model": model}
        )

    def step(app: App, number: int) -> Any:
        if "optimizer" in app:
            return plain_steps(app, number, dtype)
        output = app["model"](torch.randn(10, 6))
        for parameter in app["model"].parameters():
            parameter.data.mul_(0.9)
        return output

    return Case(group, name, make, step, strict=strict)


class _Call(nn.Module):
    """A module called in a way of its own."""

    def __init__(self, inner: nn.Module, call: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.inner, x)


class _Tied(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(12, 6), nn.Linear(6, 12, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> Any:
        return self.output(x + self.embedding.weight.mean(0))


class _Views(nn.Module):
    """Buffers that are views of one another, one that is not saved, one that is None, and a transposed parameter."""

    first: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        whole = torch.randn(6, 6)
        self.weight = nn.Parameter(torch.randn(6, 6).t())
        self.register_buffer("whole", whole)
        self.register_buffer("first", whole[0])
        self.register_buffer("columns", whole[:, ::2])
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.first.add_(0.1)
        return x @ self.weight + self.first


class _Complex(nn.Module):
    conjugate: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, dtype=torch.complex64))
        self.register_buffer("conjugate", torch.randn(4, dtype=torch.complex64).conj())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(torch.complex64) @ self.weight).abs() + self.conjugate.real


class _Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.some = nn.ParameterList([torch.randn(6, 4), torch.randn(4), torch.randn(0, 3)])
        self.named = nn.ParameterDict({"scale": torch.randn(4), "a-b": torch.randn(4)})
        self.layers = nn.ModuleDict(OrderedDict(one=nn.Linear(4, 4)))

    def forward(self, x: torch.Tensor) -> Any:
        rows = self.layers["one"](x @ self.some[0] + self.some[1])
        return rows * self.named["scale"] + self.named["a-b"] + self.some[2].sum()


class _Positive(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.softplus(x)

    def right_inverse(self, y: torch.Tensor) -> torch.Tensor:
        return y + torch.log(-torch.expm1(-y))


def _parametrized() -> nn.Module:
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight.abs_().add_(0.1)
    return parametrize.register_parametrization(layer, "weight", _Positive())


def _pruned() -> nn.Module:
    layer = nn.Linear(6, 4)
    prune.l1_unstructured(layer, "weight", amount=0.3)
    prune.random_structured(layer, "weight", amount=1, dim=0)
    return layer


def _shared() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.ReLU(), layer)


def _recurrent(kind: Any, **options: Any) -> Build:
    return lambda: _Call(kind(6, 5, num_layers=2, batch_first=True, **options), lambda inner, x: inner(x[None])[0])


def _attention(**options: Any) -> Build:
    return lambda: _Call(
        nn.MultiheadAttention(6, 2, batch_first=True, **options), lambda inner, x: inner(*[x[None]] * 3)[0]
    )


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.Unflatten(0, (1, 10)), nn.TransformerEncoder(layer, 2))


def _images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), *layers, nn.Flatten())


def _channels_last() -> nn.Module:
    model: Any = _images(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4))
    return model.to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


def _loss() -> nn.Module:
    labels = torch.arange(10) % 4
    return nn.Sequential(nn.Linear(6, 4), _Call(nn.CrossEntropyLoss(torch.rand(4)), lambda inner, x: inner(x, labels)))


def _after_linear(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), *layers)


TORCH: dict[str, Build] = {
    "a stack of layers": lambda: _after_linear(nn.LayerNorm(8), nn.Dropout(0.2), nn.PReLU(), nn.Linear(8, 4)),
    "BatchNorm": lambda: _after_linear(nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)),
    "BatchNorm without a momentum": lambda: _after_linear(nn.BatchNorm1d(8, momentum=None)),
    "BatchNorm without statistics": lambda: _after_linear(nn.BatchNorm1d(8, track_running_stats=False)),
    "SyncBatchNorm, in evaluation": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(
        _after_linear(nn.BatchNorm1d(8))
    ).eval(),
    "InstanceNorm with statistics": lambda: _images(nn.InstanceNorm2d(1, affine=True, track_running_stats=True)),
    "GroupNorm, RMSNorm": lambda: _after_linear(nn.GroupNorm(2, 8), nn.RMSNorm(8)),
    "tied weights": _Tied,
    "one layer used twice": _shared,
    "LSTM": _recurrent(nn.LSTM),
    "LSTM, bidirectional, projected": _recurrent(nn.LSTM, bidirectional=True, proj_size=3),
    "GRU": _recurrent(nn.GRU),
    "RNN": _recurrent(nn.RNN, nonlinearity="relu"),
    "MultiheadAttention": _attention(),
    "MultiheadAttention, weights apart": _attention(kdim=6, vdim=6, add_bias_kv=True),
    "TransformerEncoder": _transformer,
    "Bilinear": lambda: _Call(nn.Bilinear(6, 6, 4), lambda inner, x: inner(x, x)),
    "AdaptiveLogSoftmaxWithLoss": lambda: _Call(
        nn.AdaptiveLogSoftmaxWithLoss(6, 12, [3, 6]), lambda inner, x: inner.log_prob(x)
    ),
    "CrossEntropyLoss with weights": _loss,
    "views, transposed, not persistent, None": _Views,
    "complex parameters": _Complex,
    "ParameterList, ParameterDict, ModuleDict": _Containers,
    "float64": lambda: _Call(nn.Linear(6, 4).double(), lambda inner, x: inner(x.double())),
    "channels_last": _channels_last,
    "frozen in part": lambda: nn.Sequential(nn.Linear(6, 8).requires_grad_(False), nn.Linear(8, 4)),
    "lazy, initialized in the meantime": lambda: nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d()),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 4)),
    "spectral_norm, old": lambda: spectral_norm(nn.Linear(6, 4)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(6, 4)),
    "weight_norm, old": lambda: weight_norm(nn.Linear(6, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 4)),
    "parametrized": _parametrized,
    "pruned": _pruned,
    "scripted": lambda: torch.jit.script(_after_linear(nn.BatchNorm1d(8))),
    "traced": lambda: torch.jit.trace(_after_linear(nn.Tanh()), torch.zeros(10, 6)),
    "DataParallel, without a device": lambda: nn.DataParallel(nn.Linear(6, 4)),
}
