"""Quantised weights and optimizer states, over torchao and bitsandbytes: restored, they go on bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")

import bitsandbytes
from torch import nn

import incckpt
from tests.integrations.quantized import cases
from tests.peers.protocol import Case, try_case


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.group} {case.name}") for case in cases()])
def test_what_was_restored_goes_on_as_if_nothing_had_happened(case: Case) -> None:
    row = try_case(case)
    if row.verdict == "void":
        pytest.skip(row.by_hand)
    assert row.through_incckpt == "identical", f"torch.save: {row.by_hand}"


@pytest.mark.parametrize("quantised", [True, False])
def test_a_restore_that_needs_a_loader_says_which(tmp_path: Path, quantised: bool) -> None:
    def model() -> nn.Module:
        return nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64)).to("cpu")

    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"model": model()}).result()
        target = model() if quantised else nn.Sequential(nn.Linear(64, 64))
        with pytest.raises((RuntimeError, incckpt.errors.StateMismatchError)) as caught:
            manager.restore({"model": target})
    assert "make_loadable(model)" in str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
