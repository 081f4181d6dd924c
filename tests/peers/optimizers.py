"""Optimizers: torch's own, pytorch_optimizer's, schedule-free's, and torchao's with quantized moments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_optimizer
import schedulefree
import torch
import torchao.optim
from torch import nn

from tests.peers.protocol import App, Case

__all__ = ["named_classes", "small_model", "third_party_optimizers", "torch_optimizers"]

Make = Callable[[nn.Module], Any]


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a model with parameters of one and two dimensions."""
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def loss_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the loss on random data."""
    x, y = torch.randn(5, 6, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    loss: torch.Tensor = (model(x) - y).square().mean()
    return loss


def named_classes(module: Any, base: type) -> Iterator[type]:
    """Yield the public concrete subclasses of `base` that a module offers, by name."""
    for name in sorted(dir(module)):
        found = getattr(module, name)
        if inspect.isclass(found) and issubclass(found, base) and found is not base and not name.startswith("_"):
            yield found


def step(app: App, number: int, *, dtype: torch.dtype = torch.float32, create_graph: bool = False) -> Any:
    """Train one step, with a closure for those optimizers that want one."""
    model, optimizer = app["model"], app["optimizer"]
    x, y = torch.randn(5, 6, dtype=dtype), torch.randn(5, 4, dtype=dtype)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = (model(x) - y).square().mean()
        loss.backward(create_graph=create_graph)
        return loss

    loss = closure()
    optimizer.step(closure)
    return loss


def case(group: str, name: str, make: Make, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    """Return the case of a model with its optimizer."""

    def build() -> App:
        model = small_model(dtype)
        return {"model": model, "optimizer": make(model)}

    step_of = options.pop("step", step)
    extra = {"create_graph": True} if options.pop("create_graph", False) else {}
    return Case(group, name, build, lambda app, number: step_of(app, number, dtype=dtype, **extra), **options)


# torch.optim

TORCH_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ASGD": [{"t0": 2}],
    "Adadelta": [{"weight_decay": 0.1}],
    "Adagrad": [{"initial_accumulator_value": 0.1, "lr_decay": 0.1}, {"fused": True}],
    "Adam": [{"amsgrad": True}, {"fused": True}, {"fused": True, "amsgrad": True}, {"lr": "tensor"}],
    "AdamW": [{"amsgrad": True}, {"fused": True}, {"foreach": True, "amsgrad": True}, {"lr": "tensor"}],
    "LBFGS": [{"line_search_fn": "strong_wolfe"}, {"history_size": 2, "max_iter": 3}],
    "NAdam": [{"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "RAdam": [{"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "RMSprop": [{"momentum": 0.9}, {"centered": True}, {"centered": True, "momentum": 0.9}],
    "Rprop": [{"lr": 0.1}],
    "SGD": [{"momentum": 0.9, **more} for more in ({}, {"nesterov": True}, {"fused": True}, {"dampening": 0.1})],
}  # fmt: skip


def torch_optimizers() -> Iterator[Case]:
    """Yield every optimizer of torch, with each option that adds to its state or changes its kind."""
    for cls in named_classes(torch.optim, torch.optim.Optimizer):
        signature = inspect.signature(cls).parameters
        common: list[dict[str, Any]] = [{}]
        common += [{"foreach": True}] if "foreach" in signature else []
        common += [{"maximize": True}] if "maximize" in signature else []
        for options in common + TORCH_OPTIONS.get(cls.__name__, []):
            for dtype in (torch.float32, torch.bfloat16):
                yield from _torch_case(cls, options, dtype)
        if cls.__name__ not in ("SparseAdam", "LBFGS", "Muon"):
            yield from _arrangements(cls)


def _torch_case(cls: Any, options: dict[str, Any], dtype: torch.dtype) -> Iterator[Case]:
    name = _title(cls, options, dtype)
    if cls.__name__ == "SparseAdam":
        if dtype == torch.float32:
            yield Case("torch.optim", name, lambda: _sparse(cls, options), _sparse_step)
        return

    def make(model: nn.Module) -> Any:
        given = {key: torch.tensor(0.01) if value == "tensor" else value for key, value in options.items()}
        parameters = list(model.parameters())
        if cls.__name__ == "Muon":
            parameters = [parameter for parameter in parameters if parameter.ndim == 2]
        return cls(parameters, **given)

    yield case("torch.optim", name, make, dtype)


def _arrangements(cls: Any) -> Iterator[Case]:
    """Yield other arrangements of parameters: groups with options of their own, names, a layer frozen for a while."""

    def groups(model: Any) -> Any:
        return cls(
            [
                {"params": list(model[0].parameters()), "lr": 0.1, "tag": "first"},
                {"params": list(model[3].parameters())},
            ],
            lr=0.01,
        )

    yield case("torch.optim", f"{cls.__name__}, two groups", groups)
    yield case("torch.optim", f"{cls.__name__}, named parameters", lambda model: cls(model.named_parameters(), lr=0.01))

    def thaw(app: App, number: int, *, dtype: torch.dtype) -> Any:
        app["model"][0].requires_grad_(number >= 4)
        return step(app, number, dtype=dtype)

    yield case(
        "torch.optim",
        f"{cls.__name__}, a layer thawed later",
        lambda model: cls(model.parameters(), lr=0.01),
        step=thaw,
    )
    yield Case(
        "torch.optim", f"{cls.__name__}, float32 moments of bfloat16 parameters", lambda: _mixed(cls), _mixed_step
    )


def _mixed(cls: Any) -> App:
    model = small_model(torch.bfloat16)
    more = {"momentum": 0.9} if cls is torch.optim.SGD else {}
    return {"model": model, "optimizer": cls(model.parameters(), lr=0.01, **more)}


def _mixed_step(app: App, number: int) -> Any:
    """Train as an optimizer does that keeps float32 moments between steps, which torch's own cannot."""
    states = app["optimizer"].state.values()
    wide = [
        (state, key)
        for state in states
        for key, value in state.items()
        if getattr(value, "ndim", 0) and value.is_floating_point()
    ]
    for state, key in wide:
        state[key] = state[key].bfloat16()
    loss = step(app, number, dtype=torch.bfloat16)
    for state in states:
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.is_floating_point():
                state[key] = value.float() * 1.0001
    return loss


def _sparse(cls: Any, options: dict[str, Any]) -> App:
    model = nn.Embedding(20, 4, sparse=True)
    return {"model": model, "optimizer": cls(list(model.parameters()), **options)}


def _sparse_step(app: App, number: int) -> Any:
    loss = app["model"](torch.randint(0, 20, (6,))).square().sum()
    app["optimizer"].zero_grad()
    loss.backward()
    app["optimizer"].step()
    return loss


def _title(cls: type, options: dict[str, Any], dtype: torch.dtype) -> str:
    words = [f"{key}={value}" for key, value in options.items()]
    words += [] if dtype == torch.float32 else ["bf16"]
    return f"{cls.__name__}({', '.join(words)})" if words else cls.__name__


# pytorch_optimizer

SECOND_ORDER = {"AdaHessian", "SophiaH"}
VARIANTS = (
    {"ams_bound": True}, {"amsgrad": True}, {"momentum": 0.9}, {"foreach": True}, {"rectify": True}, {"centered": True},
    {"kahan_sum": True}, {"use_shadow": True}, {"use_gc": True}, {"grokfast": True}, {"optimize_1d": True},
    {"precondition_1d": True}, {"quantize": True}, {"compress_state_dict": True}, {"rank": 2},
    {"fused": True}, {"cautious": True},
)  # fmt: skip


def third_party_optimizers() -> Iterator[Case]:
    """Yield all optimizers of pytorch_optimizer, those of schedule-free, and torchao's with quantized moments."""
    for cls in named_classes(pytorch_optimizer, torch.optim.Optimizer):
        if cls.__module__.startswith("torch."):
            continue
        parameters = inspect.signature(cls).parameters
        variants: list[dict[str, Any]] = [{}]
        variants += [
            options
            for options in VARIANTS
            if all(key in parameters and parameters[key].default != value for key, value in options.items())
        ]
        for options in variants:
            yield _pytorch_optimizer(cls, options, torch.float32)
        yield _pytorch_optimizer(cls, {}, torch.bfloat16)
    yield from _schedule_free()
    yield from _quantized()


def _pytorch_optimizer(cls: Any, options: dict[str, Any], dtype: torch.dtype) -> Case:
    how = HOW.get(cls.__name__)
    make = (lambda model: how(cls, model, options)) if how else (lambda model: cls(model.parameters(), **options))
    name = cls.__name__
    settings: dict[str, Any] = {"create_graph": name in SECOND_ORDER, "before": 5, "after": 5}
    if name in ("DeMo", "DistributedMuon"):
        settings["around"] = process_group
    if name in STEPS:
        settings["step"] = STEPS[name]
    return case("pytorch_optimizer", _title(cls, options, dtype), make, dtype, **settings)


@contextmanager
def process_group() -> Iterator[None]:
    """Make a group of this process alone."""
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _of_base(cls: Any, model: nn.Module, options: dict[str, Any]) -> Any:
    return cls(model.parameters(), base_optimizer=torch.optim.AdamW, lr=0.01, **options)


def _around(cls: Any, model: nn.Module, options: dict[str, Any]) -> Any:
    return cls(torch.optim.AdamW(model.parameters(), lr=0.01), **options)


def _of_model(cls: Any, model: nn.Module, options: dict[str, Any]) -> Any:
    return cls(model, **options)


def _by_shape(cls: Any, model: nn.Module, options: dict[str, Any]) -> Any:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    return cls([{"params": matrices, "use_muon": True}, {"params": rest, "use_muon": False}], **options)


def _gsam(cls: Any, model: nn.Module, options: dict[str, Any]) -> Any:
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(base, total_iters=20)
    rho = pytorch_optimizer.ProportionScheduler(schedule, max_lr=0.01, min_lr=0.001)
    return cls(model.parameters(), base_optimizer=base, model=model, rho_scheduler=rho, **options)


def _low_rank(cls: Any, model: nn.Module, options: dict[str, Any]) -> Any:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "rank": 2, "update_proj_gap": 3, "scale": 0.25, "projection_type": "std"},
        {"params": rest},
    ]
    return cls(groups, **options)


HOW: dict[str, Callable[[Any, nn.Module, dict[str, Any]], Any]] = {
    "AdaGO": _by_shape,
    "AdaLOMO": _of_model,
    "AdaMuon": _by_shape,
    "Alice": lambda cls, model, options: cls(model.parameters(), leading_basis=1, **{"rank": 4, **options}),
    "AdamMini": _of_model,
    "APOLLO": _low_rank,
    "BSAM": lambda cls, model, options: cls(model.parameters(), num_data=5, **options),
    "Fira": _low_rank,
    "DistributedMuon": _by_shape,
    "FriendlySAM": _of_base,
    "GaLore": _low_rank,
    "GSAM": _gsam,
    "LOMO": _of_model,
    "LookSAM": _of_base,
    "Lookahead": _around,
    "Magma": _around,
    "Muon": _by_shape,
    "MuonClip": _by_shape,
    "NorMuon": _by_shape,
    "OrthoGrad": _around,
    "PCGrad": _around,
    "Ranger21": lambda cls, model, options: cls(model.parameters(), num_iterations=20, **options),
    "SAM": _of_base,
    "SafeFP16Optimizer": _around,
    "ScheduleFreeWrapper": _around,
    "SpectralSphere": lambda cls, model, options: cls([p for p in model.parameters() if p.ndim == 2], **options),
    "TRAC": _around,
    "WSAM": lambda cls, model, options: cls(
        model, model.parameters(), base_optimizer=torch.optim.AdamW, lr=0.01, **options
    ),
}


def _fused_backward(app: App, number: int, *, dtype: torch.dtype) -> Any:
    loss = loss_of(app["model"], dtype)
    app["optimizer"].fused_backward(loss, 0.01)
    return loss


def _set_closure(app: App, number: int, *, dtype: torch.dtype) -> Any:
    x, y = torch.randn(5, 6, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    app["optimizer"].set_closure(nn.functional.mse_loss, x, y)
    _, loss = app["optimizer"].step()
    return loss


def _two_objectives(app: App, number: int, *, dtype: torch.dtype) -> Any:
    app["optimizer"].zero_grad()
    losses = [loss_of(app["model"], dtype), loss_of(app["model"], dtype)]
    app["optimizer"].pc_backward(losses)
    app["optimizer"].step()
    return losses[0]


def _scaled_backward(app: App, number: int, *, dtype: torch.dtype) -> Any:
    app["optimizer"].zero_grad()
    loss = loss_of(app["model"], dtype)
    app["optimizer"].backward(loss)
    app["optimizer"].step()
    return loss


def _train_mode(app: App, number: int, *, dtype: torch.dtype) -> Any:
    app["optimizer"].train()
    return step(app, number, dtype=dtype)


def _known_loss(app: App, number: int, *, dtype: torch.dtype) -> Any:
    app["optimizer"].zero_grad()
    loss = loss_of(app["model"], dtype)
    loss.backward()
    app["optimizer"].step(loss.item)
    return loss


STEPS: dict[str, Callable[..., Any]] = {
    "AliG": _known_loss,
    "AdaLOMO": _fused_backward,
    "GSAM": _set_closure,
    "LOMO": _fused_backward,
    "PCGrad": _two_objectives,
    "SafeFP16Optimizer": _scaled_backward,
    "ScheduleFreeAdamW": _train_mode,
    "ScheduleFreeRAdam": _train_mode,
    "ScheduleFreeSGD": _train_mode,
    "ScheduleFreeWrapper": _train_mode,
}


def _schedule_free() -> Iterator[Case]:
    for name in sorted(schedulefree.__dict__):
        cls = getattr(schedulefree, name)
        if not name[0].isupper() or not inspect.isclass(cls):
            continue
        wraps = "Wrapper" in name

        def make(model: nn.Module, cls: Any = cls, wraps: bool = wraps) -> Any:
            return (
                cls(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
                if wraps
                else cls(model.parameters(), lr=0.01)
            )

        def saved_in(mode: str, closure: bool) -> Callable[..., Any]:
            def train(app: App, number: int, *, dtype: torch.dtype) -> Any:
                if not closure:
                    app["optimizer"].train()
                loss = step(app, number, dtype=dtype)
                if mode == "eval" and not closure:
                    app["optimizer"].eval()
                return loss

            return train

        for mode in ("train", "eval"):
            title = f"{name}, saved in {mode} mode"
            yield case("schedulefree", title, make, step=saved_in(mode, "Closure" in name))
        yield case("schedulefree", f"{name}(bf16)", make, torch.bfloat16, step=saved_in("eval", "Closure" in name))


def _quantized() -> Iterator[Case]:
    for name in ("Adam8bit", "AdamW8bit", "Adam4bit", "AdamW4bit", "AdamFp8", "AdamWFp8"):
        cls = getattr(torchao.optim, name)

        def build(cls: Any = cls) -> App:
            model = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 64))  # smaller ones are not quantized
            return {"model": model, "optimizer": cls(model.parameters())}

        def train(app: App, number: int) -> Any:
            loss = app["model"](torch.randn(5, 64)).square().mean()
            app["optimizer"].zero_grad()
            loss.backward()
            with torch.compiler.set_stance("force_eager"):
                app["optimizer"].step()
            return loss

        yield Case("torchao", f"optim.{name}", build, train)
