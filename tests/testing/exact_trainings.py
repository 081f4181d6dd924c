"""Trainings whose resuming is checked: a module of functions, since every process makes its own."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import incckpt
from incckpt.testing.exact_resume import Training

EXAMPLES = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))


def make_model() -> torch.nn.Module:
    random.seed(0)  # every generator that is a part of the state
    np.random.seed(0)
    torch.manual_seed(0)
    normal = torch.nn.BatchNorm1d(8)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), normal, torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))


class Sampler(torch.utils.data.Sampler[int]):
    """Shuffles each epoch, and knows how far it has come."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.epoch = 0
        self.position = 0

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        for index in order[self.position :]:
            self.position += 1
            yield index
        self.epoch += 1
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


def with_a_sampler(*, with_random_state: bool = True) -> Training:
    """Shuffling, dropout and a schedule of a lambda."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
    sampler = Sampler(len(EXAMPLES))
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule, "sampler": sampler}
    if with_random_state:
        state["rng"] = incckpt.RngState()

    def train(done: int) -> Iterator[None]:
        while True:
            indices = iter(sampler)
            while chosen := list(itertools.islice(indices, 4)):
                model(EXAMPLES[chosen]).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                yield

    return state, train


def without_random_state() -> Training:
    return with_a_sampler(with_random_state=False)


class Gradients:
    """What has been accumulated in a model's gradients."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: one.grad for name, one in self.model.named_parameters() if one.grad is not None}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, one in self.model.named_parameters():
            one.grad = state[name].clone() if name in state else None


def with_accumulation() -> Training:
    """Gradients of three batches make a step of the optimizer."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = {"model": model, "optimizer": optimizer, "gradients": Gradients(model), "rng": incckpt.RngState()}

    def train(done: int) -> Iterator[None]:
        for batch in itertools.count(done + 1):
            model(EXAMPLES[batch % 5 * 4 :][:4]).square().mean().backward()
            if batch % 3 == 0:
                optimizer.step()
                optimizer.zero_grad()
            yield

    return state, train


def with_amp_and_ema() -> Training:
    """Autocast to bfloat16 with a gradient scaler, and an average of the weights."""
    model = make_model()
    decay: Any = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)  # type: ignore[no-untyped-call]
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=decay)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
    state = {
        "model": model,
        "average": average,
        "optimizer": optimizer,
        "scaler": scaler,
        "rng": incckpt.RngState(),
    }

    def train(done: int) -> Iterator[None]:
        for step in itertools.count(done):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(EXAMPLES[step % 6 * 4 :][:4]).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            average.update_parameters(model)
            yield

    return state, train


def compiled() -> Training:
    """A compiled model, saved as the one inside, whose names are its own."""
    model = make_model()
    fast: Any = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = {"model": model, "optimizer": optimizer, "rng": incckpt.RngState()}

    def train(done: int) -> Iterator[None]:
        for step in itertools.count(done):
            fast(EXAMPLES[step % 6 * 4 :][:4]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    return state, train


def every_recipe() -> Training:
    """All of the above side by side, a step of each in turn: processes take longer to start than to train."""
    trainings = {make.__name__: make() for make in (with_a_sampler, with_accumulation, with_amp_and_ema, compiled)}
    states = {name: state for name, (state, _) in trainings.items()}
    return states, lambda done: zip(*(train(done) for _, train in trainings.values()), strict=True)


def that_ends_early() -> Training:
    return {"n": 0}, lambda done: iter([None] * (3 - done))


def that_raises() -> Training:
    raise KeyError("no such thing")


def with_a_clock() -> Training:
    """Values that no two processes have in common."""
    state: dict[str, Any] = {"w": torch.zeros(1), "clock": {"now": 0}, "number": 0}

    def train(done: int) -> Iterator[None]:
        while True:
            state["clock"]["now"] = time.time_ns()
            state["number"] = os.getpid()
            yield

    return state, train
