"""What goes along with an optimizer: schedules of the learning rate, gradient scalers, averages of the weights."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import ema_pytorch
import pytorch_optimizer
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

from tests.peers.optimizers import small_model
from tests.peers.protocol import App, Case, plain_steps

__all__ = ["averages", "scalers", "schedules"]

Make = Callable[[Any], Any]


class Doubling:
    """A schedule's function with state of its own, which LambdaLR saves."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:
        """Return the factor of a step."""
        self.calls += 1
        return 1.0 + 0.01 * self.calls


def _chained(optimizer: Any) -> Any:
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


def _sequential(optimizer: Any) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, 10)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


SCHEDULES: dict[str, Make] = {
    "ChainedScheduler": _chained,
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "CyclicLR, a function of its own": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, scale_fn=lambda x: 0.9**x),
    "CyclicLR, cycling momentum": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum=True),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.95**step),
    "LambdaLR, an object with state": lambda o: lr_scheduler.LambdaLR(o, Doubling()),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4, 5]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 20),
    "OneCycleLR, three phases": lambda o: lr_scheduler.OneCycleLR(
        o, 0.1, 20, three_phase=True, anneal_strategy="linear"
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10, 2.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "ReduceLROnPlateau, mode max": lambda o: lr_scheduler.ReduceLROnPlateau(o, "max", patience=0, cooldown=1),
    "SequentialLR": _sequential,
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, 3),
}


def schedules() -> Iterator[Case]:
    """Yield every schedule of torch and of pytorch_optimizer."""
    for name, make in SCHEDULES.items():
        yield _schedule("torch schedules", name, make)
    yield _schedule(
        "torch schedules",
        "StepLR, learning rate a tensor",
        lambda o: lr_scheduler.StepLR(o, 2),
        lr=lambda: torch.tensor(0.1),
    )
    third_party: dict[str, Make] = {
        "CosineAnnealingWarmupRestarts": lambda o: pytorch_optimizer.CosineAnnealingWarmupRestarts(
            o, 5, warmup_steps=2
        ),
        "REXScheduler": lambda o: pytorch_optimizer.REXScheduler(o, 20, max_lr=0.1, min_lr=0.01),
        "get_wsd_schedule": lambda o: pytorch_optimizer.get_wsd_schedule(o, 2, 3, 5),
        "get_chebyshev_schedule": lambda o: pytorch_optimizer.get_chebyshev_schedule(o, 16),
    }
    for name, make in third_party.items():  # its other schedules have no state_dict
        yield _schedule("pytorch_optimizer", name, make)


def _schedule(group: str, name: str, make: Make, lr: Callable[[], Any] = lambda: 0.05) -> Case:
    def build() -> App:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr(), momentum=0.9)
        return {"model": model, "optimizer": optimizer, "schedule": make(optimizer)}

    def step(app: App, number: int) -> Any:
        output = plain_steps(app, number)
        schedule = app["schedule"]
        if "metrics" in inspect.signature(schedule.step).parameters:
            schedule.step(output.abs().sum())
        else:
            schedule.step()
        return [output, [float(group["lr"]) for group in app["optimizer"].param_groups]]

    return Case(group, name, build, step)


def scalers() -> Iterator[Case]:
    """Yield gradient scalers, growing and backing off."""

    def build() -> App:
        model = small_model()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        return {"model": model, "optimizer": torch.optim.Adam(model.parameters(), lr=0.01), "scaler": scaler}

    def step(app: App, number: int) -> Any:
        loss = app["model"](torch.randn(10, 6)).square().mean() * (float("inf") if number == 2 else 1.0)
        app["optimizer"].zero_grad()
        app["scaler"].scale(loss).backward()
        app["scaler"].step(app["optimizer"])
        app["scaler"].update()
        return [loss, app["scaler"].get_scale()]

    yield Case("torch schedules", "GradScaler", build, step)
    yield Case("torch schedules", "GradScaler, never used before", build, step, before=0)


def averages() -> Iterator[Case]:
    """Yield averages of weights: torch's, and those of ema_pytorch, saved with the model and alone."""

    def case(
        group: str,
        name: str,
        average: Callable[[nn.Module], Any],
        update: Callable[[App], Any],
        model_saved: bool = True,
    ) -> Case:
        def build() -> App:
            model = small_model()
            return {
                ("model" if model_saved else "_model"): model,
                ("optimizer" if model_saved else "_optimizer"): torch.optim.SGD(
                    model.parameters(), lr=0.1, momentum=0.9
                ),
                "average": average(model),
            }

        def step(app: App, number: int) -> Any:
            names = {name.lstrip("_"): value for name, value in app.items()}
            seen = plain_steps(names, number)
            update(names)
            return seen if model_saved else None

        return Case(group, name, build, step)

    def updated(app: App) -> None:
        app["average"].update_parameters(app["model"])

    def stepped(app: App) -> None:
        app["average"].update()

    yield case("torch averages", "AveragedModel", swa_utils.AveragedModel, updated)
    yield case(
        "torch averages",
        "AveragedModel, exponential",
        lambda m: swa_utils.AveragedModel(m, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9)),
        updated,
    )
    yield case(
        "torch averages", "AveragedModel, buffers too", lambda m: swa_utils.AveragedModel(m, use_buffers=True), updated
    )

    def ema(cls: Any = ema_pytorch.EMA, **options: Any) -> Callable[[nn.Module], Any]:
        return lambda model: cls(model, **{"update_after_step": 1, "update_every": 2, **options})

    yield case("ema_pytorch", "EMA", ema(), stepped)
    yield case("ema_pytorch", "EMA, without the online model", ema(include_online_model=False), stepped)
    yield case("ema_pytorch", "EMA, alone", ema(), stepped, model_saved=False)
    yield case("ema_pytorch", "EMA, foreach", ema(use_foreach=True), stepped)
    yield case("ema_pytorch", "EMA, allowing different devices", ema(allow_different_devices=True), stepped)
    yield case("ema_pytorch", "EMA, switching the model", ema(update_model_with_ema_every=2), stepped)
    yield case("ema_pytorch", "KarrasEMA", lambda m: ema_pytorch.KarrasEMA(m, sigma_rel=0.05, update_every=1), stepped)
    yield case(
        "ema_pytorch",
        "PostHocEMA",
        lambda m: ema_pytorch.PostHocEMA(
            m,
            sigma_rels=(0.05, 0.28),
            update_every=1,
            checkpoint_every_num_steps="manual",
            checkpoint_folder=tempfile.gettempdir(),
        ),
        stepped,
    )
    yield case(
        "ema_pytorch",
        "EMAPytree",
        lambda m: ema_pytorch.EMAPytree(dict(m.named_parameters()), update_after_step=1, update_every=2),
        stepped,
    )
    yield Case("ema_pytorch", "EMAModuleWrapper", _wrapped, _wrapped_step)


def _wrapped() -> App:
    model = ema_pytorch.EMAModuleWrapper(small_model(), update_after_step=1, update_every=2)
    return {"model": model, "optimizer": torch.optim.SGD(model.model.parameters(), lr=0.1, momentum=0.9)}


def _wrapped_step(app: App, number: int) -> Any:
    seen = plain_steps({"model": app["model"].model, "optimizer": app["optimizer"]}, number)
    app["model"].update()
    return [seen, app["model"](torch.ones(2, 6))]
