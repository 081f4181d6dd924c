"""Running the command in this process, and stores to run it on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import incckpt
from incckpt.cli.app import run


@dataclass
class Done:
    """What a command has left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Done]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Return what runs a command line."""

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return call


def state_at(step: int) -> dict[str, Any]:
    """Return a state: a large tensor that changes a little, a frozen one, a small one, a value."""
    generator = torch.Generator().manual_seed(3)
    changing = torch.randn(400_000, generator=generator)
    changing[: 1000 * step] += step
    return {
        "model": {"frozen": torch.full((300_000,), 0.5), "changing": changing, "bias": torch.full((9,), float(step))},
        "step": step,
    }


@pytest.fixture
def store(tmp_path: Path) -> str:
    """Return a store of two runs: steps 1 to 3 of `default`, step 10 of `other`, which shares most with them."""
    url = str(tmp_path / "store")
    with incckpt.CheckpointManager(url) as manager:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
            manager.save(step, state_at(step), metrics={"loss": loss})
    incckpt.save(state_at(3), url, run="other", step=10)
    return url
